"""Weights, and whole graphs, in 16-bit floating point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import deploykit.weights
from deploykit.errors import OptimizationError
from deploykit.optimizers import HalfConfig, optimize
from deploykit.optimizers.quantize_half import to_half
from deploykit.runtimes import open_session

RNG = np.random.default_rng(0)
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def value(name: str, shape: list[Any], kind: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def save(folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Any) -> Path:
    stored = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "source.onnx")
    return folder / "source.onnx"


def net(folder: Path, mask: float = 0.0) -> Path:
    """A convolution, a Resize, a mask, a product, a branch that reads from outside, and an inner output."""
    weights = {
        "w": normal(16, 3, 5, 5, scale=0.2), "b": normal(16), "scales": np.asarray([1, 1, 2, 2], np.float32),
        "mask": np.full((1, 16, 1, 1), mask, np.float32), "d": normal(16, 64, scale=0.3), "axes": np.asarray([2, 3]),
        "yes": np.asarray(True),
    }  # fmt: skip
    inner = helper.make_graph([helper.make_node("Neg", ["p"], ["n"])], "then", [], [value("n", None)])
    other = helper.make_graph([helper.make_node("Abs", ["p"], ["a"])], "else", [], [value("a", None)])
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[2] * 4),
        helper.make_node("Resize", ["c", "", "scales"], ["r"], name="resize"),
        helper.make_node("Add", ["r", "mask"], ["m"], name="add"),
        helper.make_node("ReduceMean", ["m", "axes"], ["g"], name="mean", keepdims=0),
        helper.make_node("MatMul", ["g", "d"], ["p"], name="product"),
        helper.make_node("If", ["yes"], ["y"], name="if", then_branch=inner, else_branch=other),
    ]
    outputs = [value("y", ["batch", 64]), value("m", ["batch", 16, None, None]), value("p", ["batch", 64])]
    return save(folder, nodes, [value("x", ["batch", 3, "h", "w"])], outputs, weights)


X = {"x": normal(2, 3, 12, 10)}


def made(source: Path, config: HalfConfig) -> tuple[Path, Any]:
    target = source.parent / f"made-{len(list(source.parent.iterdir()))}.onnx"
    result = optimize(source, config, target, check=lambda path: None)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    return target, result


def outputs(path: Path, device: str = "ort:cpu") -> Any:
    with open_session(path, device, threads=1) as session:
        return session.run(X)


def distance(one: Any, other: Any) -> float:
    return max(float(np.linalg.norm(one[n] - other[n]) / np.linalg.norm(other[n])) for n in other)


def kinds_of(path: Path) -> dict[str, int]:
    return {t.name: t.data_type for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(("precision", "kind", "most"), [("fp16", HALF, 1e-3), ("bf16", TensorProto.BFLOAT16, 8e-3)])
def test_large_weights_are_stored_in_16_bits(tmp_path: Path, precision: str, kind: int, most: float) -> None:
    source = net(tmp_path)
    target, result = made(source, HalfConfig(precision, "storage"))
    kinds = kinds_of(target)
    assert {n for n, k in kinds.items() if k == kind} == {f"w_{precision}_1", f"d_{precision}_1"}
    assert kinds["b"] == kinds["scales"] == FLOAT and result.params["stored"] == 2
    for device in ("ort:cpu", "openvino:cpu"):
        assert 0 < distance(outputs(target, device), outputs(source)) < most
    assert target.stat().st_size < 0.65 * source.stat().st_size


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    values = normal(4096) * 10.0 ** RNG.integers(-30, 30, 4096).astype(np.float32)
    tensor = to_half("t", values, "bf16")
    assert tensor is not None
    found = (np.frombuffer(tensor.raw_data, "<u2").astype(np.uint32) << 16).view(np.float32)
    assert (np.abs(found - values) <= np.abs(values) * 2.0**-8).all()
    # Ties go to the even neighbour.
    ties = np.asarray([0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    tensor = to_half("t", ties, "bf16")
    assert tensor is not None and [*np.frombuffer(tensor.raw_data, "<u2")] == [0x3F80, 0x3F82]
    assert to_half("t", np.asarray([3.4e38], np.float32), "bf16") is None
    assert to_half("t", np.asarray([np.nan], np.float32), "bf16") is None
    assert to_half("t", np.asarray([65520.0], np.float32), "fp16") is None


def test_values_beyond_float16_stay(tmp_path: Path) -> None:
    weights = {"w": normal(32, 64), "big": normal(64, 64, scale=1e5)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("MatMul", ["a", "big"], ["y"], name="two"),
    ]
    source = save(tmp_path, nodes, [value("x", [4, 32])], [value("y", [4, 64])], weights)
    target, result = made(source, HalfConfig("fp16", "storage"))
    assert kinds_of(target)["big"] == FLOAT
    assert any("big (beyond the range of fp16)" in n for n in result.notes)
    target, _ = made(source, HalfConfig("bf16", "storage"))
    assert "big" not in kinds_of(target)
    _, result = made(source, HalfConfig("fp16", "native"))
    assert result.params["stored"] == 1 and any("two (MatMul)" in n for n in result.notes)


def test_a_graph_that_computes_in_float16(tmp_path: Path) -> None:
    source = net(tmp_path)
    target, result = made(source, HalfConfig("fp16", "native"))
    model = onnx.load(target)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    assert types["c"] == types["g"] == HALF
    assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [FLOAT] * 4
    assert kinds_of(target)["scales"] == FLOAT and "w" not in kinds_of(target)
    assert any("resize (Resize)" in n for n in result.notes)
    assert 0 < distance(outputs(target), outputs(source)) < 3e-3
    assert 0 < distance(outputs(target, "openvino:cpu"), outputs(source)) < 3e-3


def test_a_mask_constant_does_not_become_infinite(tmp_path: Path) -> None:
    source = net(tmp_path, mask=-3e38)
    target, result = made(source, HalfConfig("fp16", "native"))
    assert any("add (Add)" in n for n in result.notes)
    np.testing.assert_allclose(outputs(target)["m"], outputs(source)["m"], rtol=1e-3)


def test_excluded_nodes_stay_in_float32(tmp_path: Path) -> None:
    source = net(tmp_path)
    target, _ = made(source, HalfConfig("fp16", "storage", ("Conv",)))
    assert kinds_of(target)["w"] == FLOAT
    target, result = made(source, HalfConfig("fp16", "native", ("conv",)))
    assert kinds_of(target)["w"] == FLOAT and any("conv (Conv)" in n for n in result.notes)


@pytest.mark.parametrize(
    "config",
    [
        HalfConfig("fp8", "storage"), HalfConfig("fp16", "sometimes"), HalfConfig("bf16", "native"),
        HalfConfig("fp16", "storage", ("nobody",)),
    ],
)  # fmt: skip
def test_impossible_options(tmp_path: Path, config: HalfConfig) -> None:
    with pytest.raises(OptimizationError):
        made(net(tmp_path), config)


def test_nothing_to_store(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    source = save(tmp_path, nodes, [value("x", [4, 32])], [value("y", [4, 32])], {})
    with pytest.raises(OptimizationError, match="nothing to store"):
        made(source, HalfConfig("fp16", "storage"))


def test_weights_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = net(tmp_path)
    whole = {c: made(source, HalfConfig("fp16", c))[0] for c in ("storage", "native")}
    monkeypatch.setattr(deploykit.weights, "WHOLE_LIMIT_BYTES", 0)
    monkeypatch.setattr(deploykit.weights, "LARGE_BYTES", 1 << 10)
    for compute, file in whole.items():
        light, _ = made(source, HalfConfig("fp16", compute))
        assert distance(outputs(light), outputs(file)) == 0
