"""Requests are joined only where that leaves their numbers alone, to the bit."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from onnx import helper

from deploykit.errors import DeploykitError, InferenceError
from deploykit.runtimes import parse_device
from deploykit.serving.engine import ServingEngine
from deploykit.serving.joining import is_lossy, one_scale, other_request, stacked, try_rows
from deploykit.serving.loaded import Options, Source
from deploykit.serving.requests import InferRequest
from deploykit.serving_models import serve
from deploykit.specs import Signature

DRAW = np.random.default_rng(0)
FEEDS = {"x": DRAW.standard_normal((2, 8)).astype(np.float32)}
OTHER = {"x": DRAW.standard_normal((6, 8)).astype(np.float32)}
WEIGHTS = DRAW.standard_normal((8, 8)).astype(np.float32)


def eight_bits(x):
    """As a model that is quantized dynamically: within 5 %, and by one scale for all rows."""
    scale = np.abs(x).max() / 127
    return np.round(x / scale) * scale


def tried(function, *, lossy=False, other=OTHER):
    def run(feeds):
        return {"y": function(feeds["x"])}

    return try_rows(run, FEEDS, run(FEEDS), other, lossy=lossy)


@pytest.mark.parametrize("lossy", [True, False])
def test_rows_that_see_no_others_may_be_joined(lossy):
    for function in (lambda x: x * 2, lambda x: np.argmax(x, 1), lambda x: np.full(x.shape, np.nan, np.float32)):
        found = tried(function, lossy=lossy)
        assert found.allowed(force=False) and found.remark(force=False) == ""


@pytest.mark.parametrize("lossy", [True, False])
@pytest.mark.parametrize("function", [lambda x: eight_bits(x) @ WEIGHTS, lambda x: x - 1e-6 * x.mean(0)])
def test_one_bit_that_others_change_is_enough(function, lossy):
    alone, among = function(FEEDS["x"]), function(np.concatenate([FEEDS["x"], OTHER["x"]]))[:2]
    assert np.linalg.norm(alone - among) < 0.05 * np.linalg.norm(alone)
    found = tried(function, lossy=lossy)
    assert not found.allowed(force=False) and found.allowed(force=True)
    assert found.remark(force=False) == "requests are not joined: 'y' of a row is another beside other rows"
    assert "because that was asked for, though" in found.remark(force=True)


def test_the_larger_of_two_is_not_taken_for_one_that_sees_nobody():
    # Its own scale is the scale of both; what is beside it is rounded by that.
    found = tried(eight_bits, other={"x": OTHER["x"] / 100})
    assert not found.allowed(force=False)


def test_a_number_of_rows_that_changes_them_shows_alone():
    found = tried(lambda x: x / len(x), lossy=True)
    assert "than alone" in found.reason and not found.allowed(force=False)


def test_sums_in_another_order_are_within_the_tolerance_of_the_model():
    def otherwise(error):
        return lambda x: x * np.float32(1 + error) if len(x) > 2 else x

    assert tried(otherwise(1e-6)).allowed(force=False)
    assert tried(otherwise(1e-2), lossy=True).allowed(force=False)
    assert "than alone" in tried(otherwise(1e-2)).reason
    assert "than alone" in tried(otherwise(0.1), lossy=True).reason


def test_a_device_that_never_gives_the_same_bits_is_judged_by_its_tolerance():
    draw = np.random.default_rng(0)
    assert tried(lambda x: x * (1 + 1e-7 * draw.standard_normal(x.shape)).astype(np.float32)).allowed(force=False)
    noisy = tried(lambda x: x * (1 + 1e-1 * draw.standard_normal(x.shape)).astype(np.float32))
    assert not noisy.allowed(force=False)


def test_what_cannot_run_is_not_joined_by_force_either():
    def fails(x):
        if len(x) > 2:
            raise InferenceError("the model takes two rows")
        return x

    for found in (tried(fails), tried(lambda x: x[:1]), tried(lambda x: np.float32(1)), tried(eight_bits, other=None)):
        assert not found.allowed(force=True)
        assert found.remark(force=True).startswith("requests are not joined: ")


def test_rows_of_other_values_are_made_up_or_taken_from_what_there_is(models):
    other = other_request(models.rows, {"x": np.ones((2, 4), np.float32)}, [], {}, 8)
    assert other is not None and other["x"].shape == (6, 4) and len(np.unique(other["x"])) > 20
    text = Signature(models.specs(("x", "string", ("n", 2))), models.specs(("y", "string", ("n", 2))))
    ab, same = np.array([["a", "b"]], object), np.array([["a", "a"]], object)
    golden = other_request(text, {"x": ab}, [{"x": ab}, {"x": same}], {}, 3)
    assert golden is not None and golden["x"].tolist() == [["a", "a"], ["a", "a"]]
    turned = other_request(text, {"x": ab}, [{"x": ab}], {}, 2)
    assert turned is not None and turned["x"].tolist() == [["b", "a"]]
    assert other_request(text, {"x": same}, [{"x": same}], {}, 2) is None


def test_rows_lie_where_those_of_an_arena_do():
    for dtype in (np.float32, np.int8, bool, np.float64):
        parts = [np.ones((n, 3), dtype) for n in (1, 2)]
        found = stacked(parts)
        assert found.ctypes.data % 64 == 0 and found.dtype == dtype
        np.testing.assert_array_equal(found, np.concatenate(parts))


def test_whose_numbers_are_rounded(models, tmp_path):
    cpu, openvino = parse_device("ort:cpu"), parse_device("openvino:cpu")
    plain = models.artifact(tmp_path / "net", models.scaled, 1.0)
    assert not is_lossy(plain, cpu) and not is_lossy(plain.model_path, cpu) and is_lossy(plain, openvino)
    assert is_lossy(models.dynamic(tmp_path / "dynamic.onnx"), cpu)
    assert one_scale(plain.model_path) == "" and "DynamicQuantizeLinear" in one_scale(tmp_path / "dynamic.onnx")

    def branch(name, *nodes):
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(nodes[-1].output[0], models.FLOAT, [])]
        )

    quantized = branch(
        "quantized",
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), helper.make_node("Identity", ["s"], ["b"]),
    )  # fmt: skip
    plain = branch("plain", helper.make_node("ReduceMax", ["x"], ["e"], keepdims=0))
    branches = {"then_branch": quantized, "else_branch": plain}
    inner = models.write(
        tmp_path / "inner.onnx", [helper.make_node("If", ["c"], ["y"], **branches)],
        [("x", models.FLOAT, ["n"]), ("c", 9, [])], [("y", models.FLOAT, [])],
    )  # fmt: skip
    assert "DynamicQuantizeLinear" in one_scale(inner)


def served(source, use, **options):
    async def run():
        engine = ServingEngine([Source.at(source)], Options(threads=1, max_batch=8, **options))
        await engine.start()
        try:
            return await use(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["dynamic", "rounded"])
def test_models_whose_numbers_depend_on_the_batch_are_not_batched_unless_by_force(models, tmp_path, caplog, kind):
    golden = [({"x": FEEDS["x"][:1, :4]}, {"y": FEEDS["x"][:1, :4]})]
    models.artifact(tmp_path / "net", getattr(models, kind), golden=golden)
    inputs = [DRAW.standard_normal((1, 4)).astype(np.float32) for _ in range(16)]

    async def use(engine):
        alone = [(await engine.infer(InferRequest("net", {"x": x}))).outputs["y"] for x in inputs]
        together = await asyncio.gather(*(engine.infer(InferRequest("net", {"x": x})) for x in inputs))
        same = [np.array_equal(a, b.outputs["y"]) for a, b in zip(alone, together, strict=True)]
        return engine.info("net"), all(same), max(result.batch for result in together)

    info, same, rows = served(tmp_path / "net", use)
    why = "DynamicQuantizeLinear takes one scale" if kind == "dynamic" else "another beside other rows"
    assert same and (info.max_batch, rows) == (0, 0) and why in info.batching
    assert all(part in caplog.text for part in ("requests are not joined", why, "(--force-batching joins them"))
    assert "--force" not in info.batching  # that is nothing for clients
    info, same, rows = served(tmp_path / "net", use, force_batching=True)
    assert not same and info.max_batch == 8 and rows > 1 and why in info.batching and "asked for" in info.batching


def test_force_needs_a_number_of_rows(models, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 1.0)
    with pytest.raises(DeploykitError, match="add --max-batch ROWS"):
        serve([tmp_path / "net"], force_batching=True)
