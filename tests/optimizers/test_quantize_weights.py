"""Weight-only quantization, tables of embeddings, and SmoothQuant without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import deploykit.weights
from deploykit.errors import OptimizationError
from deploykit.optimizers import DynamicConfig, StaticConfig, WeightsConfig, optimize
from deploykit.optimizers.blocks import pack_nbits, round_blocks
from deploykit.optimizers.embeddings import round_rows
from deploykit.runtimes import open_session

RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def save(folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Any, opset: int = 17) -> Path:
    stored = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "source.onnx")
    return folder / "source.onnx"


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def text_model(folder: Path, opset: int = 17) -> Path:
    """An embedding, a normalization with outliers, a MatMul with a bias behind it, and a Gemm turned round."""
    scale = np.ones(96, np.float32)
    scale[[3, 40]] = 25.0
    weights = {
        "table": normal(500, 96) * np.geomspace(0.01, 10, 500, dtype=np.float32)[:, None],
        "scale": scale, "shift": normal(96, scale=0.1),
        "w1": normal(96, 128, scale=0.1), "b1": normal(128), "w2": normal(64, 128, scale=0.1), "b2": normal(64),
        "flat": np.asarray([-1, 128], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        helper.make_node("LayerNormalization", ["e", "scale", "shift"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "w1"], ["m"], name="first"),
        helper.make_node("Add", ["m", "b1"], ["a"], name="bias"),
        helper.make_node("Reshape", ["a", "flat"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], name="second", transB=1),
    ]
    return save(
        folder, nodes, [value("ids", ["batch", "length"], TensorProto.INT64)], [value("y", [None, 64])], weights, opset
    )


IDS = {"ids": RNG.integers(0, 500, (4, 24))}


def made(source: Path, config: Any) -> tuple[Path, Any]:
    target = source.parent / f"made-{len(list(source.parent.iterdir()))}.onnx"
    before = source.read_bytes()
    result = optimize(source, config, target, check=lambda path: None)
    assert source.read_bytes() == before
    onnx.checker.check_model(onnx.load(target))
    return target, result


def out(path: Path, device: str = "ort:cpu", feeds: Any = None) -> Any:
    with open_session(path, device, threads=1) as session:
        return next(iter(session.run(IDS if feeds is None else feeds).values()))


def sqnr(have: Any, want: Any) -> float:
    return float(10 * np.log10(np.square(want).sum() / max(np.square(have - want).sum(), 1e-30)))


# --- blocks ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    inputs=st.integers(1, 70), outputs=st.integers(1, 9), bits=st.sampled_from([4, 8]),
    size=st.sampled_from([16, 32]), symmetric=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_value_is_near_one_that_its_block_holds(
    inputs: int, outputs: int, bits: int, size: int, symmetric: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(inputs, outputs)) * 10.0 ** rng.integers(-6, 4)).astype(np.float32)
    blocks = round_blocks(weight, bits, size, symmetric=symmetric)
    assert blocks.codes.max(initial=0) < 1 << bits and (blocks.scales > 0).all()
    assert not symmetric or (blocks.zeros == 1 << bits - 1).all()
    rows = np.arange(inputs) // size
    # The search may clip by up to a quarter of the range; what is inside is rounded to the nearest.
    spread = np.abs(weight).max() * 2 * 0.26 + blocks.scales[rows]
    assert (np.abs(blocks.values() - weight) <= spread).all()
    if bits == 8:
        assert (np.abs(blocks.values() - weight) <= blocks.scales[rows] * 1.01).all()


def test_the_search_for_a_scale_lowers_the_error() -> None:
    weight = np.random.default_rng(1).standard_normal((256, 32), np.float32)
    found = round_blocks(weight, 4, 32, symmetric=False)
    plain = weight.reshape(8, 32, 32)
    low, high = np.minimum(plain.min(1), 0), np.maximum(plain.max(1), 0)
    scale = ((high - low) / 15)[:, None]
    zero = np.rint(-low / scale[:, 0])[:, None]
    widest = ((np.clip(np.rint(plain / scale) + zero, 0, 15) - zero) * scale).reshape(256, 32)
    assert sqnr(found.values(), weight) > sqnr(widest, weight) + 0.1


def test_zeros_and_constants() -> None:
    weight = np.zeros((32, 3), np.float32)
    weight[:, 1], weight[:, 2] = 2.5, -1e-3
    for symmetric in (True, False):
        np.testing.assert_allclose(round_blocks(weight, 8, 16, symmetric=symmetric).values(), weight, rtol=0.01)


def test_onnxruntime_reads_packed_blocks_as_we_do(tmp_path: Path) -> None:
    """Seventy inputs fill two blocks and a part of a third; an odd number of blocks leaves half a byte of zeros."""
    weight, x = normal(70, 5), normal(7, 70)
    for bits, symmetric in ((4, False), (4, True), (8, False), (8, True)):
        blocks = round_blocks(weight, bits, 32, symmetric=symmetric)
        codes, scales, zeros = pack_nbits(blocks)
        stored = {"q": codes, "s": scales, **({} if zeros is None else {"z": zeros})}
        node = helper.make_node(
            "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", K=70, N=5, bits=bits, block_size=32
        )
        graph = helper.make_graph(
            [node], "g", [value("x", [7, 70])], [value("y", [7, 5])],
            [numpy_helper.from_array(a, n) for n, a in stored.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
        np.testing.assert_allclose(out(tmp_path / "m.onnx", feeds={"x": x}), x @ blocks.values(), rtol=1e-4, atol=1e-4)


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["qdq", "nbits"])
@pytest.mark.parametrize(("bits", "least"), [(8, 34), (4, 12)])
def test_both_forms_compute_the_same_in_both_runtimes(tmp_path: Path, form: str, bits: int, least: float) -> None:
    source = text_model(tmp_path)
    target, result = made(source, WeightsConfig(bits, 32, form))
    model = onnx.load(target)
    kinds = [n.op_type for n in model.graph.node]
    marks = {"qdq": ("DequantizeLinear", "MatMul"), "nbits": ("MatMulNBits", "MatMulNBits")}[form]
    assert kinds.count(marks[0]) == kinds.count(marks[1]) == 2 and "Gemm" not in kinds
    assert not {"w1", "w2", "table"} & {t.name for t in model.graph.initializer}
    assert (result.params["quantized_nodes"], result.params["quantized_embeddings"]) == (2, 1)
    want = out(source)
    for device in ("ort:cpu", "openvino:cpu"):
        assert sqnr(out(target, device), want) > least
    assert target.stat().st_size < source.stat().st_size / (3 if bits == 8 else 3.5)


def test_a_bias_of_a_product_with_two_axes_does_not_undo_the_fusion(tmp_path: Path) -> None:
    """ONNX Runtime would make a Gemm of MatMul and Add, and unpack the weights in every inference."""
    weights = {"w1": normal(64, 64), "b1": normal(64), "w2": normal(64, 64), "b2": normal(64)}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], name="one"),
        helper.make_node("Add", ["m", "b1"], ["a"], name="bias"),
        helper.make_node("Gemm", ["a", "w2", "b2"], ["y"], name="two"),
    ]
    source = save(tmp_path, nodes, [value("x", ["n", 64])], [value("y", ["n", 64])], weights)
    target, _ = made(source, WeightsConfig())
    with open_session(target, "ort:cpu") as session:
        assert sorted(n.op for n in session.executed()) == ["MatMulNBits", "MatMulNBits", "Sum", "Sum"]
    x = {"x": normal(5, 64)}
    assert sqnr(out(target, feeds=x), out(source, feeds=x)) > 34


def test_onnxruntime_fuses_the_standard_form(tmp_path: Path) -> None:
    target, _ = made(text_model(tmp_path), WeightsConfig())
    with open_session(target, "ort:cpu") as session:
        executed = [n for n in session.executed() if n.op == "MatMulNBits"]
    assert len(executed) == 2 and {n.precision for n in executed} == {"int8"}


def test_excluded_nodes_and_tables_stay(tmp_path: Path) -> None:
    target, result = made(text_model(tmp_path), WeightsConfig(exclude=("second", "embed")))
    assert result.params["quantized_nodes"] == 1 and result.params["quantized_embeddings"] == 0
    assert {"w2", "table"} <= {t.name for t in onnx.load(target).graph.initializer}
    _, result = made(text_model(tmp_path), WeightsConfig(embeddings=False))
    assert result.params["quantized_embeddings"] == 0


def test_a_weight_that_no_block_divides(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="odd")]
    source = save(tmp_path, nodes, [value("x", [4, 90])], [value("y", [4, 50])], {"w": normal(90, 50)})
    with pytest.raises(OptimizationError, match="nothing to quantize"):
        made(source, WeightsConfig())
    target, _ = made(source, WeightsConfig(form="nbits"))
    x = {"x": normal(4, 90)}
    assert sqnr(out(target, feeds=x), out(source, feeds=x)) > 38
    # 96 inputs take blocks of 32 where 128 were asked for.
    source = save(tmp_path, nodes, [value("x", [4, 96])], [value("y", [4, 50])], {"w": normal(96, 50)})
    target, _ = made(source, WeightsConfig(block=128))
    [node] = [n for n in onnx.load(target).graph.node if n.op_type == "DequantizeLinear"]
    assert next(a.i for a in node.attribute if a.name == "block_size") == 32


def test_what_cannot_be_taken_is_named(tmp_path: Path) -> None:
    broken = normal(64, 64)
    broken[0, 0] = np.inf
    weights = {"w": normal(64, 64), "broken": broken, "twice": normal(64, 64)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="good"),
        helper.make_node("MatMul", ["a", "broken"], ["b"], name="infinite"),
        helper.make_node("MatMul", ["b", "twice"], ["c"], name="one"),
        helper.make_node("MatMul", ["c", "twice"], ["y"], name="two"),
    ]
    source = save(tmp_path, nodes, [value("x", [4, 64])], [value("y", [4, 64])], weights)
    target, result = made(source, WeightsConfig())
    assert {t.name for t in onnx.load(target).graph.initializer} >= {"broken", "twice"}
    [note] = [n for n in result.notes if "stay in floating point" in n]
    assert "3 products" in note and "read elsewhere" in note and result.params["quantized_nodes"] == 1


@pytest.mark.parametrize(
    "config",
    [WeightsConfig(bits=3), WeightsConfig(block=48), WeightsConfig(form="gguf"), WeightsConfig(exclude=("?",))],
)
def test_impossible_options(tmp_path: Path, config: WeightsConfig) -> None:
    with pytest.raises(OptimizationError):
        made(text_model(tmp_path), config)
    assert [p.name for p in tmp_path.iterdir()] == ["source.onnx"]


def test_weights_on_disk_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = text_model(tmp_path)
    whole, _ = made(source, WeightsConfig(4))
    monkeypatch.setattr(deploykit.weights, "WHOLE_LIMIT_BYTES", 0)
    monkeypatch.setattr(deploykit.weights, "LARGE_BYTES", 1 << 10)
    light, _ = made(source, WeightsConfig(4))
    np.testing.assert_array_equal(out(light), out(whole))


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_each_row_has_its_own_scale() -> None:
    table = normal(40, 16) * np.geomspace(1e-6, 1e6, 40, dtype=np.float32)[:, None]
    table[7] = 0
    values, scales = round_rows(table)
    assert values is not None and values.dtype == np.int8
    error = np.abs(values * scales - table).max(axis=1)
    assert (error <= np.abs(table).max(axis=1) / 127 * 0.5001).all()
    table[3, 3] = np.nan
    assert round_rows(table)[0] is None


@pytest.mark.parametrize("config", [DynamicConfig(), WeightsConfig()])
def test_small_rows_of_a_table_survive(tmp_path: Path, config: Any) -> None:
    """One scale for the whole table would round the smallest rows to nothing."""
    source = text_model(tmp_path)
    model = onnx.load(source)
    model.graph.output.append(value("e", ["batch", "length", 96]))
    onnx.save(model, source)
    target, _ = made(source, config)
    small = {"ids": np.arange(8)[None]}
    with open_session(source) as one, open_session(target) as two:
        want, have = one.run(small)["e"], two.run(small)["e"]
    assert sqnr(have, want) > 38


def test_a_table_that_others_read_stays(tmp_path: Path) -> None:
    weights = {"table": normal(300, 64), "w": normal(64, 64)}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        helper.make_node("MatMul", ["e", "w"], ["h"], name="inner"),
        helper.make_node("Transpose", ["table"], ["t"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"], name="head"),
    ]
    inputs = [value("ids", ["batch", "length"], TensorProto.INT64)]
    source = save(tmp_path, nodes, inputs, [value("y", ["batch", "length", 300])], weights)
    target, result = made(source, WeightsConfig())
    assert result.params["quantized_embeddings"] == 0
    assert "table" in {t.name for t in onnx.load(target).graph.initializer}


# --- SmoothQuant without data ----------------------------------------------------------------------------------------


def test_outliers_of_a_normalization_are_smoothed_without_data(tmp_path: Path) -> None:
    source = text_model(tmp_path)
    rough, _ = made(source, DynamicConfig(ops=("MatMul", "Gemm"), smooth="off"))
    smooth, result = made(source, DynamicConfig(ops=("MatMul", "Gemm")))
    want = out(source)
    assert sqnr(out(smooth), want) > sqnr(out(rough), want) + 3
    assert any(n.startswith("SmoothQuant: of 1 activations 1 smoothed for nothing") for n in result.notes)


def test_a_normalization_without_outliers_is_left(tmp_path: Path) -> None:
    source = text_model(tmp_path)
    model = onnx.load(source)
    [scale] = [t for t in model.graph.initializer if t.name == "scale"]
    scale.CopyFrom(numpy_helper.from_array(np.ones(96, np.float32), "scale"))
    onnx.save(model, source)
    target, _ = made(source, DynamicConfig(ops=("MatMul", "Gemm")))
    rough, _ = made(source, DynamicConfig(ops=("MatMul", "Gemm"), smooth="off"))
    assert sqnr(out(target), out(source)) > sqnr(out(rough), out(source)) - 0.5


def test_unknown_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptimizationError, match="expected auto or off"):
        made(text_model(tmp_path), DynamicConfig(smooth="0.5"))


def test_bias_correction_is_automatic_for_transformers_only() -> None:
    from deploykit.optimizers.escalation import ModelKind, settled

    transformer, net = ModelKind(4, 0, 0, True), ModelKind(1, 9, 3, False)
    assert settled(StaticConfig(), transformer).bias_correction == "fast"
    assert settled(StaticConfig(), net).bias_correction == "off"
    assert settled(StaticConfig(merge=("a",)), transformer).bias_correction == "off"
    assert settled(StaticConfig(save_calibration="a"), transformer).bias_correction == "off"
    assert settled(StaticConfig(bias_correction="full"), net).bias_correction == "full"
