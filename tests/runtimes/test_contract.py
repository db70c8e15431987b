"""What every runtime has to do, on every device that can be had.

Whoever writes a runtime for other distributions runs it with `DEPLOYKIT_CONTRACT_DEVICES=NAME:TARGET`, see
docs/extending.md; tests/test_plugins.py does so for the one in examples/plugin.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.data import Dataset
from deploykit.errors import (
    DataError,
    DeploykitError,
    DeviceError,
    InferenceError,
    MissingDependencyError,
    ModelError,
)
from deploykit.optimizers import StaticConfig, optimize
from deploykit.runtimes import Session, default_devices, open_session, parse_device, require_device

CPU_DEVICES = ("ort:cpu", "openvino:cpu")
OTHER_DEVICES = (
    "ort:cuda",
    "ort:tensorrt",
    "ort:openvino",
    "ort:directml",
    "ort:coreml",
    "ort:xnnpack",
    "openvino:gpu",
    "openvino:npu",
)
# Devices of plugins, which have to be there.
PLUGGED = tuple(name for name in os.environ.get("DEPLOYKIT_CONTRACT_DEVICES", "").split(",") if name)


def had(device: str) -> str:
    """The device; skips where it cannot be had, in the words of `require_device`."""
    try:
        require_device(device)
    except (DeviceError, MissingDependencyError) as exc:
        if device in CPU_DEVICES + PLUGGED:
            pytest.fail(f"{device} was asked for, or belongs to the development environment: {exc}")
        pytest.skip(str(exc))
    return device


@pytest.fixture(params=CPU_DEVICES + OTHER_DEVICES + PLUGGED)
def device(request: pytest.FixtureRequest) -> str:
    return had(request.param)


@pytest.fixture(params=CPU_DEVICES + PLUGGED)
def known_device(request: pytest.FixtureRequest) -> str:
    return had(request.param)


@pytest.fixture(params=CPU_DEVICES)
def cpu_device(request: pytest.FixtureRequest) -> str:
    return had(request.param)


def value(name: str, shape: Iterable[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    tensors = [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def two_by_two(tmp_path: Path) -> Path:
    """Two inputs that must not be confused, two outputs: total = left + 2 right, product = left right."""
    return save(
        tmp_path / "model.onnx",
        [
            helper.make_node("Mul", ["right", "two"], ["doubled"]),
            helper.make_node("Add", ["left", "doubled"], ["total"]),
            helper.make_node("Mul", ["left", "right"], ["product"]),
        ],
        [value("left", ["batch", 3]), value("right", ["batch", 3])],
        [value("total", ["batch", 3]), value("product", ["batch", 3])],
        {"two": np.float32([2])},
    )


def feeds(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=(batch, 3)).astype(np.float32) for n in ("left", "right")}


def one_line(exc: BaseException) -> str:
    text = str(exc)
    assert text
    assert text.isprintable(), f"not one line: {text!r}"
    return text


# --- running ---------------------------------------------------------------------------------------------------------


def test_signature_has_names_dtypes_and_shapes(two_by_two: Path, device: str) -> None:
    with open_session(two_by_two, device) as session:
        assert isinstance(session, Session)
        assert str(session.device) == device
        assert [(s.name, s.dtype) for s in session.signature.inputs] == [
            ("left", "float32"),
            ("right", "float32"),
        ]
        assert [(s.name, s.dtype) for s in session.signature.outputs] == [
            ("total", "float32"),
            ("product", "float32"),
        ]
        for spec in session.signature:
            assert spec.shape is not None
            assert isinstance(spec.shape[0], str)
            assert spec.shape[1] == 3


def test_arrays_go_by_name(two_by_two: Path, device: str) -> None:
    given = feeds()
    with open_session(two_by_two, device) as session:
        results = session.run(dict(reversed(given.items())))
    assert list(results) == ["total", "product"]
    np.testing.assert_allclose(results["total"], given["left"] + 2 * given["right"], rtol=1e-6)
    np.testing.assert_allclose(results["product"], given["left"] * given["right"], rtol=1e-6)


def test_dynamic_batch(two_by_two: Path, device: str) -> None:
    with open_session(two_by_two, device) as session:
        for batch in (1, 5, 2):
            given = feeds(batch, seed=batch)
            result = session.run(given)["total"]
            np.testing.assert_allclose(result, given["left"] + 2 * given["right"], rtol=1e-6)


def test_outputs_are_fresh_and_inputs_stay(two_by_two: Path, device: str) -> None:
    first, second = feeds(seed=1), feeds(seed=2)
    untouched = {n: a.copy() for n, a in first.items()}
    with open_session(two_by_two, device) as session:
        kept = session.run(first)
        copies = {n: a.copy() for n, a in kept.items()}
        session.run(second)
        for name, array in kept.items():
            np.testing.assert_array_equal(array, copies[name])
        kept["total"][:] = 7
        np.testing.assert_array_equal(session.run(first)["total"], copies["total"])
    for name, array in first.items():
        np.testing.assert_array_equal(array, untouched[name])
    np.testing.assert_array_equal(kept["product"], copies["product"])  # outlives the session


def test_a_concurrent_device_serves_several_threads_from_one_session(two_by_two: Path, device: str) -> None:
    if not parse_device(device).concurrent:
        pytest.skip(f"{device} promises no more than one thread at a time: requests() are for several, and tested")
    feeds = [{name: np.full((2, 3), number, np.float32) for name in ("left", "right")} for number in range(64)]
    with open_session(two_by_two, device, threads=1) as session:
        expected = [session.run(f) for f in feeds]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(session.run, feeds))
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])


def test_layout_of_the_inputs_does_not_matter(two_by_two: Path, device: str) -> None:
    given = feeds(4)
    wide = np.zeros((4, 6), np.float32)
    wide[:, ::2] = given["left"]
    frozen = given["right"].copy()
    frozen.flags.writeable = False
    with open_session(two_by_two, device) as session:
        expected = session.run(given)
        strided = session.run({"left": wide[:, ::2], "right": frozen})
        fortran = session.run({n: np.asfortranarray(a) for n, a in given.items()})
    for name, array in expected.items():
        np.testing.assert_array_equal(strided[name], array)
        np.testing.assert_array_equal(fortran[name], array)


def test_integers_booleans_and_half_floats(tmp_path: Path, device: str) -> None:
    kinds = {"ints": TensorProto.INT64, "flags": TensorProto.BOOL, "halves": TensorProto.FLOAT16}
    model = save(
        tmp_path / "model.onnx",
        [
            helper.make_node("Add", ["ints", "ints"], ["ints2"]),
            helper.make_node("Not", ["flags"], ["flags2"]),
            helper.make_node("Add", ["halves", "halves"], ["halves2"]),
        ],
        [value(n, ["batch"], k) for n, k in kinds.items()],
        [value(f"{n}2", ["batch"], k) for n, k in kinds.items()],
    )
    given: dict[str, Any] = {
        "ints": np.array([-3, 2**29, 0]),
        "flags": np.array([True, False, True]),
        "halves": np.float16([0.5, -1024, 3]),
    }
    with open_session(model, device) as session:
        assert [s.dtype for s in session.signature.inputs] == ["int64", "bool", "float16"]
        assert [s.dtype for s in session.signature.outputs] == ["int64", "bool", "float16"]
        results = session.run(given)
    assert [a.dtype for a in results.values()] == [np.int64, np.bool_, np.float16]
    np.testing.assert_array_equal(results["ints2"], given["ints"] * 2)
    np.testing.assert_array_equal(results["flags2"], ~given["flags"])
    np.testing.assert_array_equal(results["halves2"], given["halves"] * 2)


def test_leaves_a_raising_block(two_by_two: Path, device: str) -> None:
    with pytest.raises(KeyError), open_session(two_by_two, device) as session:
        raise KeyError
    with pytest.raises(InferenceError):
        session.run(feeds())


# --- wrong feeds -----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"right": None}, "'right'"),
    "extra": ({"mask": np.zeros((2, 3), np.float32)}, "'mask'"),
    "misspelt": ({"right": None, "rihgt": np.zeros((2, 3), np.float32)}, "'rihgt'"),
    "dtype": ({"left": np.zeros((2, 3))}, "float64"),
    "integers": ({"left": np.zeros((2, 3), np.int64)}, "int64"),
    "rank": ({"left": np.zeros(3, np.float32)}, "1 dimensions"),
    "size": ({"left": np.zeros((2, 4), np.float32)}, "axis 1 is 4"),
    "list": ({"left": [["a"] * 3] * 2}, "'left'"),
}


@pytest.mark.parametrize("call", ["run", "placement"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_feeds_are_data_errors(two_by_two: Path, device: str, case: str, call: str) -> None:
    change, word = WRONG[case]
    given = {n: a for n, a in (feeds() | change).items() if a is not None}
    with open_session(two_by_two, device) as session:
        with pytest.raises(DataError) as caught:
            getattr(session, call)(given)
        assert word in one_line(caught.value)
        # The session is none the worse for it.
        good = feeds()
        np.testing.assert_allclose(session.run(good)["product"], good["left"] * good["right"], rtol=1e-6)


def test_foreign_byte_order_is_no_garbage(two_by_two: Path, device: str) -> None:
    """OpenVINO swaps the bytes, ONNX Runtime would read them as they are."""
    given = feeds()
    with open_session(two_by_two, device) as session:
        try:
            result = session.run({n: a.astype(">f4") for n, a in given.items()})["product"]
        except DataError:
            return
    np.testing.assert_allclose(result, given["left"] * given["right"], rtol=1e-6)


# --- bad models ------------------------------------------------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def garbage(data: bytes) -> bytes:
    return b"\x00garbage" * 40


def nothing(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("spoil", [cut, garbage, nothing])
def test_corrupt_file(two_by_two: Path, device: str, spoil: Any) -> None:
    two_by_two.write_bytes(spoil(two_by_two.read_bytes()))
    with pytest.raises((ModelError, InferenceError)) as caught:
        open_session(two_by_two, device)
    assert str(two_by_two) in one_line(caught.value)


def test_unknown_operator(tmp_path: Path, device: str) -> None:
    graph = helper.make_graph(
        [helper.make_node("NoSuchThing", ["x"], ["y"])], "g", [value("x", [1])], [value("y", [1])]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises((ModelError, InferenceError)) as caught:
        open_session(tmp_path / "m.onnx", device)
    assert "NoSuchThing" in one_line(caught.value)


def test_missing_file_and_wrong_kind(tmp_path: Path, device: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        open_session(tmp_path / "none.onnx", device)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="is not a model"):
        open_session(tmp_path / "weights.bin", device)


def test_failure_inside_the_model(tmp_path: Path, known_device: str) -> None:
    """The feeds fit; what the model does with them does not."""
    model = save(
        tmp_path / "model.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [value("x", ["batch", 2])],
        [value("y", [2, 2])],
        {"shape": np.array([2, 2])},
    )
    with open_session(model, known_device) as session:
        assert session.run({"x": np.zeros((2, 2), np.float32)})["y"].shape == (2, 2)
        with pytest.raises(InferenceError) as caught:
            session.run({"x": np.zeros((3, 2), np.float32)})
    assert str(model) in one_line(caught.value)


# --- placement -------------------------------------------------------------------------------------------------------


def conv_model(path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(size=(8, 3, 3, 3)).astype(np.float32) / 5,
        "w2": rng.normal(size=(8, 8, 3, 3)).astype(np.float32) / 8,
    }
    return save(
        path,
        [
            helper.make_node("Conv", ["x", "w1"], ["c1"], name="first", pads=[1] * 4),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "w2"], ["y"], name="second", pads=[1] * 4),
        ],
        [value("x", ["batch", 3, 8, 8])],
        [value("y", ["batch", 8, 8, 8])],
        weights,
    )


def test_placement_says_where_every_node_ran(tmp_path: Path, device: str) -> None:
    given = {"x": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)}
    with open_session(conv_model(tmp_path / "m.onnx"), device) as session:
        before = session.run(given)["y"]
        placement = session.placement(given)
        np.testing.assert_array_equal(session.run(given)["y"], before)
    assert placement.nodes
    assert sum(n.on == placement.asked for n in placement.nodes) == len(placement.nodes)
    assert placement.share_of_nodes == 1.0
    assert placement.share_of_time == pytest.approx(1.0)
    assert sum(placement.summary()["ops"].values()) == len(placement.nodes)
    if device in CPU_DEVICES:  # elsewhere the two may become one
        assert placement.precisions() == {"float32": 2}


def test_int8_nodes_are_recognised(tmp_path: Path, cpu_device: str) -> None:
    model = conv_model(tmp_path / "m.onnx")
    given = {"x": np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)}
    with open_session(model, threads=1) as reference:
        optimize(
            model,
            StaticConfig(),
            tmp_path / "q.onnx",
            check=lambda path: None,
            open_model=lambda path: open_session(path, threads=1).run,
            data=Dataset.from_arrays(given),
        )
        expected = reference.run(given)["y"]
    with open_session(tmp_path / "q.onnx", cpu_device) as session:
        placement = session.placement(given)
        result = session.run(given)["y"]
    assert placement.precisions() == {"int8": 2}
    assert placement.share_of_nodes == 1.0
    assert np.abs(result - expected).max() < 0.05 * np.abs(expected).max()
    assert not np.array_equal(result, expected)


# --- options ---------------------------------------------------------------------------------------------------------


def runtime_threads(session: Any) -> int:
    if session.device.runtime == "ort":
        return int(session._session.get_session_options().intra_op_num_threads)
    return int(session._compiled.get_property("INFERENCE_NUM_THREADS"))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_honoured(two_by_two: Path, cpu_device: str, threads: int) -> None:
    with open_session(two_by_two, cpu_device, threads=threads) as session:
        assert threads in session.settings.values()
        assert runtime_threads(session) == threads


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": -1}, {"precision": "fp8"}])
def test_impossible_options(two_by_two: Path, device: str, options: dict[str, Any]) -> None:
    with pytest.raises(DeviceError) as caught:
        open_session(two_by_two, device, **options)
    one_line(caught.value)


def test_graph_is_left_alone_on_request(tmp_path: Path) -> None:
    given = {"x": np.ones((1, 3, 8, 8), np.float32)}
    model = conv_model(tmp_path / "m.onnx")
    with open_session(model, "ort:cpu", optimize=False) as session:
        assert session.placement(given).summary()["ops"] == {"Conv": 2, "Relu": 1}
    with pytest.raises(DeviceError, match="always optimizes"):
        open_session(model, "openvino:cpu", optimize=False)


def test_a_misspelt_setting(two_by_two: Path, known_device: str) -> None:
    with pytest.raises(DeviceError) as caught:
        open_session(two_by_two, known_device, settings={"NO_SUCH_SETTING": 1})
    assert "NO_SUCH_SETTING" in one_line(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"session.intra_op.allow_spining": "1"},
        {"execution_mode": "fast"},
        {"graph_optimization_level": "most"},
        {"intra_op_num_threads": 0},
        {"INFERENCE_NUM_THREAD": 2},
        {"FULL_DEVICE_NAME": "x"},
        {"NUM_STREAMS": 2, "PERFORMANCE_HINT": "LATENCY"},
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings_that_would_be_ignored(two_by_two: Path, cpu_device: str, settings: dict[str, Any]) -> None:
    with pytest.raises(DeviceError) as caught:
        open_session(two_by_two, cpu_device, settings=settings)
    assert next(iter(settings)) in one_line(caught.value)


# --- requests side by side, and inputs that stay on the device -------------------------------------------------------

THROUGHPUT: dict[str, dict[str, Any]] = {
    "ort:cpu": {"session.intra_op.allow_spinning": False},
    "openvino:cpu": {"NUM_STREAMS": 2},
}


@pytest.mark.parametrize("settings", ["default", "throughput", "buffers"])
def test_requests_from_threads_of_their_own(tmp_path: Path, device: str, settings: str) -> None:
    """Every request gets its own inputs' results, whatever the others do at that time."""
    chosen = {"throughput": THROUGHPUT.get(device), "buffers": {"device_buffers": True}}.get(settings)
    if settings != "default" and (chosen is None or (settings == "buffers" and not device.startswith("ort:"))):
        what = "device buffers are ONNX Runtime's" if settings == "buffers" else "no setting for throughput is known"
        pytest.skip(f"{what}: nothing to try on {device}")
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(1 + n % 3, 3, 8, 8)).astype(np.float32) for n in range(12)]
    model = conv_model(tmp_path / "m.onnx")
    with open_session(model, device, threads=1) as session:
        expected = [session.run({"x": x})["y"] for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def work(request: Any, first: int) -> None:
        start.wait(30)
        for turn in range(30):
            number = (first + turn) % len(inputs)
            if not np.allclose(request.run({"x": inputs[number]})["y"], expected[number], rtol=1e-4, atol=1e-5):
                wrong.append(number)

    with open_session(model, device, threads=1, settings=chosen) as session:
        requests = session.requests(4)
        threads = [threading.Thread(target=work, args=(r, 3 * i)) for i, r in enumerate(requests)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert not start.broken
        with pytest.raises(DataError):
            requests[1].run({"y": inputs[0]})
        with pytest.raises(DeviceError):
            session.requests(0)
    with pytest.raises(InferenceError):
        requests[0].run({"x": inputs[0]})


def test_outputs_that_are_written_again(two_by_two: Path, device: str) -> None:
    """Whoever runs so gets the same numbers as by `run`, on any thread, at any size; and keeps none of them."""
    with open_session(two_by_two, device, threads=1) as session:
        run = session.reusing()
        assert (run is not None) == session.device.concurrent
        if run is None:
            return
        wrong: list[int] = []

        def work(first: int) -> None:
            for turn in range(24):
                given = feeds(2 + (first + turn // 3) % 3, seed=first + turn)
                found = run({n: a.copy() for n, a in given.items()})
                same = [np.allclose(found["total"], given["left"] + 2 * given["right"], rtol=1e-6),
                        np.allclose(found["product"], given["left"] * given["right"], rtol=1e-6)]  # fmt: skip
                wrong.extend([turn] * (not all(same)))

        threads = [threading.Thread(target=work, args=(10 * n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        for change, word in WRONG.values():
            with pytest.raises(DataError, match=word):
                run({n: a for n, a in (feeds() | change).items() if a is not None})
    with pytest.raises(InferenceError):
        run(feeds())


def test_outputs_on_the_cpu_are_written_where_they_lie(two_by_two: Path) -> None:
    with open_session(two_by_two, "ort:cpu") as session:
        run = session.reusing()
        assert run is not None
        first, second = run(feeds(seed=1)), run(feeds(seed=2))
        assert first["total"] is second["total"]
        assert run(feeds(3))["total"] is not second["total"]


def test_outputs_whose_size_the_values_decide(tmp_path: Path) -> None:
    """There is no buffer to keep for them, also where the first inputs happened to give as many."""
    nodes = [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Neg", ["x"], ["less"])]
    outputs = [value("where", [1, "count"], TensorProto.INT64), value("less", ["n"])]
    path = save(tmp_path / "m.onnx", nodes, [value("x", ["n"])], outputs)
    with open_session(path, "ort:cpu") as session:
        run = session.reusing()
        assert run is not None
        for given in ([1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]):
            found = run({"x": np.float32(given)})
            assert found["where"].tolist() == [np.flatnonzero(given).tolist()]
            assert found["less"].tolist() == [-v for v in given]


def test_bound_inputs_run_again(two_by_two: Path, device: str) -> None:
    first, second = feeds(seed=1), feeds(4, seed=2)
    with open_session(two_by_two, device) as session:
        bound, other = session.bind(first), session.bind(second)
        for _ in range(3):
            bound.run()
        other.run()
        for given, made in ((first, bound), (second, other)):
            results = made.outputs()
            assert list(results) == ["total", "product"]
            np.testing.assert_allclose(results["total"], given["left"] + 2 * given["right"], rtol=1e-6)
            np.testing.assert_allclose(results["product"], given["left"] * given["right"], rtol=1e-6)
        kept = bound.outputs()
        kept["total"][:] = 7  # a copy: neither the next results nor the inputs are touched
        bound.run()
        np.testing.assert_allclose(bound.outputs()["total"], first["left"] + 2 * first["right"], rtol=1e-6)
        np.testing.assert_allclose(session.run(second)["product"], second["left"] * second["right"], rtol=1e-6)
        with pytest.raises(DataError):
            session.bind({"left": first["left"]})
    with pytest.raises(InferenceError):
        bound.run()


def test_bound_inputs_are_read_where_they_lie(two_by_two: Path, cpu_device: str) -> None:
    """On the CPU nothing is copied: what is written into the array is what the next run reads."""
    given = feeds()
    with open_session(two_by_two, cpu_device) as session:
        bound = session.bind(given)
        given["left"][:] = 5
        bound.run()
        np.testing.assert_allclose(bound.outputs()["product"], 5 * given["right"], rtol=1e-6)


@pytest.mark.parametrize("device", [d for d in CPU_DEVICES + OTHER_DEVICES if d.startswith("ort:")])
def test_device_buffers_give_the_same(two_by_two: Path, device: str) -> None:
    had(device)
    with (
        open_session(two_by_two, device) as plain,
        open_session(two_by_two, device, settings={"device_buffers": True}) as session,
    ):
        assert session.settings["device_buffers"] is True
        for batch, seed in ((2, 1), (2, 2), (5, 3), (2, 4)):
            given = feeds(batch, seed)
            expected, found = plain.run(given), session.run(given)
            assert list(found) == list(expected)
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array)
        kept = session.run(feeds(seed=5))
        again = session.run(feeds(seed=6))
        assert not np.array_equal(kept["total"], again["total"])
        wide = np.zeros((2, 6), np.float32)
        wide[:, ::2] = feeds()["left"]
        strided = session.run({"left": wide[:, ::2], "right": feeds()["right"]})
        np.testing.assert_array_equal(strided["total"], plain.run(feeds())["total"])
        for case, (change, word) in WRONG.items():
            bad = {n: a for n, a in (feeds() | change).items() if a is not None}
            with pytest.raises(DataError) as caught:
                session.run(bad)
            assert word in one_line(caught.value), case


# --- device names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cpu",
        "ort",
        "ort:",
        "ort:gpuu",
        "tpu:0",
        "openvino",
        "openvino:",
        ":cpu",
        "CUDA",
        "ort:cpu:0",
        "ort :cpu",
        "torch",
        "torch:",
        "torch:tpu",
        "torch:cuda:x",
    ],
)
def test_unknown_device_names(text: str) -> None:
    with pytest.raises(DeviceError) as caught:
        parse_device(text)
    assert "deploykit doctor" in one_line(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "target"),
    [
        ("ort:cpu", "ort:cpu", "CPUExecutionProvider"),
        (" ORT:CPU ", "ort:cpu", "CPUExecutionProvider"),
        ("CPUExecutionProvider", "ort:cpu", "CPUExecutionProvider"),
        ("ort:CUDAExecutionProvider", "ort:cuda", "CUDAExecutionProvider"),
        ("tensorrtexecutionprovider", "ort:tensorrt", "TensorrtExecutionProvider"),
        ("ort:NewVendorExecutionProvider", "ort:NewVendorExecutionProvider", "NewVendorExecutionProvider"),
        ("openvino:gpu.1", "openvino:gpu.1", "GPU.1"),
        ("ov:AUTO:GPU,CPU", "openvino:auto:gpu,cpu", "AUTO:GPU,CPU"),
        ("torch:cpu", "torch:cpu", "cpu"),
        ("Torch-Compile:CUDA:1", "torch-compile:cuda:1", "cuda:1"),
    ],
)
def test_device_names(text: str, name: str, target: str) -> None:
    device = parse_device(text)
    assert str(device) == name
    assert device.target == target
    assert parse_device(str(device)) == parse_device(device) == device


def test_default_devices_can_be_had() -> None:
    found = default_devices()
    assert [str(d) for d in found] == list(CPU_DEVICES)
    assert [require_device(d) for d in found] == list(found)


def test_openvino_device_that_does_not_exist(two_by_two: Path) -> None:
    for call in (lambda: require_device("openvino:npu.7"), lambda: open_session(two_by_two, "openvino:npu.7")):
        with pytest.raises(DeviceError) as caught:
            call()
        assert "NPU.7" in one_line(caught.value)


def cuda_is_built() -> bool:
    try:
        require_device("ort:cuda")
    except DeploykitError:
        return False
    return True


@pytest.mark.skipif(cuda_is_built(), reason="onnxruntime has CUDA here")
@pytest.mark.parametrize("name", ["ort:cuda", "CUDAExecutionProvider", "ort:CUDAExecutionProvider"])
def test_missing_provider_is_an_error(two_by_two: Path, name: str) -> None:
    for call in (lambda: require_device(name), lambda: open_session(two_by_two, name)):
        with pytest.raises(DeviceError) as caught:
            call()
        text = one_line(caught.value)
        assert "CUDAExecutionProvider" in text
        assert "onnxruntime-gpu" in text


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
@pytest.mark.skipif(cuda_is_built(), reason="onnxruntime has CUDA here")
def test_provider_that_does_not_start_is_an_error(two_by_two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel with CUDA on a machine without its libraries: ONNX Runtime would go on with the CPU."""
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    require_device("ort:cuda")
    with pytest.raises(DeviceError) as caught:
        open_session(two_by_two, "ort:cuda")
    one_line(caught.value)


@pytest.mark.parametrize("device", CPU_DEVICES)
def test_names_are_those_of_the_file_whatever_is_fused(tmp_path: Path, device: str) -> None:
    """OpenVINO gives the compiled input of Reshape + Relu the inner tensor's name as well."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["a"]), helper.make_node("Relu", ["a"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2, 3])],
        [helper.make_tensor("shape", TensorProto.INT64, [3], [-1, 2, 3])],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    values = np.arange(-6, 6, dtype=np.float32).reshape(2, 6)
    with open_session(path, device) as session:
        assert [s.name for s in session.signature] == ["x", "y"]
        np.testing.assert_array_equal(session.run({"x": values})["y"], np.maximum(values, 0).reshape(2, 2, 3))
