"""8-bit quantization, dynamic and static."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import deploykit.weights
from deploykit.benchmarks.parity import Verdict, compare_lossy
from deploykit.data import Dataset
from deploykit.errors import DataError, OptimizationError
from deploykit.optimizers import DynamicConfig, StaticConfig, StepConfig, StepResult, optimize
from deploykit.runtimes import open_session

Weights = dict[str, Any]
RNG = np.random.default_rng(0)


def value(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def build(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: Weights,
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "graph", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in weights.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model, full_check=True)
    return model


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def matmuls() -> onnx.ModelProto:
    return build(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b"], ["y"], name="second", transB=1),
        ],
        [value("x", ["batch", 16])],
        [value("y", ["batch", 8])],
        {"w1": normal(16, 32, scale=0.2), "w2": normal(8, 32, scale=0.2), "b": normal(8)},
    )


def residual(opset: int = 17, ir_version: int = 8, constants: bool = False) -> onnx.ModelProto:
    """Two convolutions of which the second has a way round it, an Add and a Relu."""
    weights = {
        "w1": normal(8, 3, 3, 3, scale=0.2),
        "b1": normal(8),
        # Channels of very different sizes: one scale for all would lose the small ones.
        "w2": normal(8, 8, 3, 3, scale=0.1) * np.float32(2) ** np.arange(-6, 2, dtype=np.float32).reshape(8, 1, 1, 1),
        "b2": normal(8),
    }
    made = [helper.make_node("Constant", [], [n], value=numpy_helper.from_array(a)) for n, a in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r1"], ["a"], name="add"),
        helper.make_node("Relu", ["a"], ["y"], name="relu2"),
    ]
    return build(
        made + nodes if constants else nodes,
        [value("x", ["batch", 3, 8, 8])],
        [value("y", ["batch", 8, 8, 8])],
        {} if constants else weights,
        opset,
        ir_version,
    )


IMAGES = {"x": normal(20, 3, 8, 8)}


def opener(path: Path) -> Callable[[Any], Any]:
    return open_session(path, threads=1).run


def run(
    folder: Path, model: onnx.ModelProto, config: StepConfig, data: Any = None
) -> tuple[onnx.ModelProto, StepResult]:
    """The quantized model, which is valid, and the step's result; the source is as it was."""
    source, target = folder / "source.onnx", folder / "target.onnx"
    source.write_bytes(model.SerializeToString())
    before = {p: p.read_bytes() for p in folder.iterdir()}
    result = optimize(
        source,
        config,
        target,
        check=lambda path: None,
        open_model=opener,
        data=Dataset.from_arrays(data) if isinstance(data, dict) else data,
    )
    assert {p: p.read_bytes() for p in folder.iterdir() if p != target} == before
    made = onnx.load(target)
    onnx.checker.check_model(made, full_check=True)
    assert result.changed
    assert result.tools["onnxruntime"]
    return made, result


def refused(folder: Path, model: onnx.ModelProto, config: StepConfig, data: Any = None) -> str:
    with pytest.raises(OptimizationError) as caught:
        run(folder, model, config, data)
    assert str(caught.value).isprintable()
    return str(caught.value)


def close(folder: Path, feeds: Any, min_cosine: float = 0.99) -> None:
    want, have = opener(folder / "source.onnx")(feeds), opener(folder / "target.onnx")(feeds)
    result = compare_lossy([want], [have], min_cosine)
    assert result.verdict is Verdict.PASSED, result.reason
    assert result.cosine < 1  # it is another model


def weights_of(model: onnx.ModelProto) -> Weights:
    return {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


# --- dynamic ---------------------------------------------------------------------------------------------------------


def test_dynamic(tmp_path: Path) -> None:
    made, result = run(tmp_path, matmuls(), DynamicConfig())
    assert ops(made).count("MatMulInteger") == 2
    assert not {"MatMul", "Gemm"} & set(ops(made))
    assert result.params["integer_nodes"] == 2
    assert {a.dtype.name for a in weights_of(made).values() if a.ndim == 2} == {"int8"}
    close(tmp_path, {"x": normal(50, 16)})


def test_dynamic_per_channel(tmp_path: Path) -> None:
    def scales(config: DynamicConfig) -> int:
        made, _ = run(tmp_path, matmuls(), config)
        (tmp_path / "target.onnx").unlink()
        return max(a.size for n, a in weights_of(made).items() if n.endswith("_scale"))

    assert scales(DynamicConfig(per_channel=True)) == 32
    assert scales(DynamicConfig(per_channel=False)) == 1


def test_dynamic_leaves_excluded_nodes(tmp_path: Path) -> None:
    made, result = run(tmp_path, matmuls(), DynamicConfig(exclude=("first",)))
    assert ops(made).count("MatMul") == 1
    assert result.params["integer_nodes"] == 1


def test_dynamic_needs_matrix_products(tmp_path: Path) -> None:
    text = refused(tmp_path, residual(), DynamicConfig())
    assert "nothing to quantize" in text
    assert "deploykit quantize static" in text


def test_dynamic_needs_constant_weights(tmp_path: Path) -> None:
    model = build(
        [helper.make_node("MatMul", ["x", "z"], ["y"])],
        [value("x", ["n", 4]), value("z", [4, "m"])],
        [value("y", ["n", "m"])],
        {},
    )
    assert "with constant weights (it has MatMul)" in refused(tmp_path, model, DynamicConfig())


def test_dynamic_raises_the_opset_for_scales_per_channel_only(tmp_path: Path) -> None:
    model = matmuls()
    model.opset_import[0].version = 11
    made, result = run(tmp_path, model, DynamicConfig())
    assert made.opset_import[0].version == 13
    assert "opset raised from 11 to 13" in result.notes[0]
    (tmp_path / "target.onnx").unlink()
    made, result = run(tmp_path, model, DynamicConfig(per_channel=False))
    assert made.opset_import[0].version == 11
    assert not any("opset" in n for n in result.notes)


# --- static ----------------------------------------------------------------------------------------------------------


def pairs(model: onnx.ModelProto, op: str) -> Iterator[tuple[str, Any, Any]]:
    """Tensor, scale and zero point of every QuantizeLinear or DequantizeLinear."""
    weights = weights_of(model)
    for node in model.graph.node:
        if node.op_type == op:
            yield node.input[0], weights[node.input[1]], weights[node.input[2]]


def dequantized(model: onnx.ModelProto, op: str) -> list[list[str]]:
    """For every node of one type: which of its inputs come out of a DequantizeLinear."""
    made = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    return [[i for i in n.input if i in made] for n in model.graph.node if n.op_type == op]


@pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (13, 7), (11, 6), (11, 3), (10, 3)])
@pytest.mark.parametrize("constants", [False, True])
def test_static_residual_network(tmp_path: Path, opset: int, ir_version: int, constants: bool) -> None:
    model = residual(opset, ir_version, constants) if ir_version > 3 or constants else None
    if model is None:  # before IR 4 weights are inputs as well
        model = residual(opset)
        model.ir_version = ir_version
        model.graph.input.extend(value(w.name, list(w.dims)) for w in model.graph.initializer)
        onnx.checker.check_model(model)
    made, result = run(tmp_path, model, StaticConfig(), IMAGES)

    assert made.opset_import[0].version == max(opset, 13)
    assert any("opset raised" in n for n in result.notes) == (opset < 13)
    assert any("4 Constant nodes" in n for n in result.notes) == constants
    assert [i.name for i in made.graph.input] == ["x"]
    assert result.params["quantized_nodes"] == 5
    assert result.params["float_nodes"] == 0
    assert result.params["samples"] == 20

    weights = weights_of(made)
    for _, scale, zero in pairs(made, "QuantizeLinear"):
        assert (zero.dtype, scale.size) == (np.uint8, 1)
    int8 = [w for w in weights.values() if w.ndim == 4]
    assert [w.dtype for w in int8] == [np.int8, np.int8]
    per_channel = [
        (scale, zero) for name, scale, zero in pairs(made, "DequantizeLinear")
        if name in weights and weights[name].ndim == 4
    ]  # fmt: skip
    assert [(scale.size, zero.dtype, int(np.abs(zero).max())) for scale, zero in per_channel] == [(8, np.int8, 0)] * 2
    assert [len(d) for d in dequantized(made, "Conv")] == [3, 3]
    assert [len(d) for d in dequantized(made, "Add")] == [2]
    close(tmp_path, {"x": normal(8, 3, 8, 8)})


def test_static_per_tensor(tmp_path: Path) -> None:
    made, _ = run(tmp_path, residual(), StaticConfig(per_channel=False), IMAGES)
    assert {scale.size for _, scale, _ in pairs(made, "DequantizeLinear")} == {1}


@pytest.mark.parametrize(("bits", "largest"), [("8", 127), ("7", 64)])
def test_weight_bits(tmp_path: Path, bits: str, largest: int) -> None:
    made, result = run(tmp_path, residual(), StaticConfig(weight_bits=bits), IMAGES)
    assert result.params["weight_bits"] == int(bits)
    assert max(int(np.abs(w.astype(int)).max()) for w in weights_of(made).values() if w.ndim == 4) == largest


@pytest.mark.parametrize(("vnni", "bits"), [(True, 8), (False, 7)])
def test_weight_bits_go_with_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool, bits: int) -> None:
    from deploykit.machine import Machine

    monkeypatch.setattr(Machine, "int8_dot", property(lambda self: vnni))
    _, result = run(tmp_path, matmuls(), DynamicConfig())
    assert result.params["weight_bits"] == bits
    assert any("no VNNI" in n for n in result.notes) is not vnni


def attention() -> onnx.ModelProto:
    """Scores plus a mask of 0 and -3.4e38, softmax, a product of two activations."""
    return build(
        [
            helper.make_node("MatMul", ["x", "wq"], ["q"], name="query"),
            helper.make_node("MatMul", ["x", "wk"], ["k"], name="key"),
            helper.make_node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
            helper.make_node("MatMul", ["q", "kt"], ["scores"], name="scores"),
            helper.make_node("Sub", ["one", "mask"], ["off"], name="off"),
            helper.make_node("Mul", ["off", "lowest"], ["bias"], name="bias"),
            helper.make_node("Add", ["scores", "bias"], ["masked"], name="apply_mask"),
            helper.make_node("Softmax", ["masked"], ["p"], name="softmax", axis=-1),
            helper.make_node("MatMul", ["p", "x"], ["mixed"], name="mix"),
            helper.make_node("MatMul", ["mixed", "wo"], ["y"], name="out"),
        ],
        [value("x", ["batch", "length", 16]), value("mask", ["batch", 1, "length"])],
        [value("y", ["batch", "length", 16])],
        {n: normal(16, 16, scale=0.3) for n in ("wq", "wk", "wo")}
        | {"one": np.float32(1), "lowest": np.float32(np.finfo(np.float32).min)},
    )


def test_attention_mask_is_never_quantized(tmp_path: Path) -> None:
    mask = np.ones((20, 1, 6), np.float32)
    mask[:, :, 4:] = 0
    data = {"x": normal(20, 6, 16), "mask": mask}
    made, result = run(tmp_path, attention(), StaticConfig(), data)
    assert dequantized(made, "Add") == [[]]
    assert not any(any(dequantized(made, kind)) for kind in ("Softmax", "Mul", "Sub", "Max"))
    assert result.params["quantized_nodes"] == 3
    assert sorted(len(d) for d in dequantized(made, "MatMul")) == [0, 0, 2, 2, 2]
    assert max(float(scale.max()) for _, scale, _ in pairs(made, "DequantizeLinear")) < 1
    close(tmp_path, data)


def test_nodes_that_stay_in_float_read_floats(tmp_path: Path) -> None:
    """The residual stream is read by a quantized product and by an Add that is not."""
    model = build(
        [
            helper.make_node("Tanh", ["x"], ["t"]),
            helper.make_node("MatMul", ["t", "w"], ["m"], name="product"),
            helper.make_node("Add", ["t", "m"], ["y"], name="residual"),
        ],
        [value("x", ["batch", 16])],
        [value("y", ["batch", 16])],
        {"w": normal(16, 16, scale=1e-3)},
    )
    feeds = {"x": normal(20, 16)}
    made, _ = run(tmp_path, model, StaticConfig(), feeds)
    assert dequantized(made, "Add") == [[]]
    assert [len(d) for d in dequantized(made, "MatMul")] == [2]
    close(tmp_path, feeds, min_cosine=0.999999)


def test_mask_added_to_a_convolution_is_never_quantized(tmp_path: Path) -> None:
    model = build(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1] * 4),
            helper.make_node("Add", ["c", "mask"], ["y"], name="apply_mask"),
        ],
        [value("x", ["batch", 3, 8, 8]), value("mask", ["batch", 1, 8, 8])],
        [value("y", ["batch", 4, 8, 8])],
        {"w": normal(4, 3, 3, 3, scale=0.2)},
    )
    mask = np.where(normal(20, 1, 8, 8) > 1, np.float32(-3e38), np.float32(0))
    made, _ = run(tmp_path, model, StaticConfig(), IMAGES | {"mask": mask})
    assert "mask" not in {name for name, _, _ in pairs(made, "QuantizeLinear")}
    assert "y" not in {name for name, _, _ in pairs(made, "QuantizeLinear")}


@pytest.mark.parametrize("exclude", ["conv2", "Add"])
def test_static_leaves_excluded_nodes(tmp_path: Path, exclude: str) -> None:
    made, result = run(tmp_path, residual(), StaticConfig(exclude=(exclude,)), IMAGES)
    assert result.params["quantized_nodes"] < 5
    rounded = {name for name, _, _ in pairs(made, "QuantizeLinear")}
    if exclude == "conv2":
        assert weights_of(made)["w2"].dtype == np.float32
        assert not {"c2", "a", "y"} & rounded
    else:
        assert not {"a", "y"} & rounded
        assert {"x", "r1", "c2"} <= rounded
    close(tmp_path, {"x": normal(8, 3, 8, 8)})


# --- calibration data ------------------------------------------------------------------------------------------------


def test_samples_are_counted_and_limited(tmp_path: Path) -> None:
    for limit, samples in ((None, 20), (11, 11), (100, 20), (1, 1)):
        _, result = run(tmp_path, residual(), StaticConfig(max_samples=limit), IMAGES)
        assert result.params["samples"] == samples
        (tmp_path / "target.onnx").unlink()


def pieces(sizes: list[int]) -> Dataset:
    """Images as a generator yields them, in pieces of its own sizes."""
    ends = np.cumsum([0, *sizes])
    whole = normal(int(ends[-1]), 3, 8, 8)

    def batches(size: int) -> Iterator[dict[str, Any]]:
        for start, end in itertools.pairwise(ends):
            for first in range(start, end, size):
                yield {"x": whole[first : min(first + size, end)]}

    return Dataset("pieces", batches)


@pytest.mark.parametrize(
    ("sizes", "limit", "used"),
    [([4, 1, 4, 3], None, 12), ([1] * 9, None, 8), ([3, 3], None, 4), ([4, 1, 4], 6, 4), ([8], 8, 8), ([5] * 3, 3, 0)],
)
def test_fixed_batches_are_filled_across_pieces(tmp_path: Path, sizes: list[int], limit: int | None, used: int) -> None:
    model = residual()
    for side in (model.graph.input, model.graph.output):
        side[0].type.tensor_type.shape.dim[0].dim_value = 4
    if not used:
        with pytest.raises(OptimizationError, match="hold no batch"):
            run(tmp_path, model, StaticConfig(max_samples=limit), pieces(sizes))
        return
    _, result = run(tmp_path, model, StaticConfig(max_samples=limit), pieces(sizes))
    assert result.params["samples"] == used


def test_pieces_that_do_not_fit_together(tmp_path: Path) -> None:
    model = residual()
    for side in (model.graph.input, model.graph.output):
        side[0].type.tensor_type.shape.dim[0].dim_value = 4
    parts = [{"x": normal(3, 3, 8, 8)}, {"x": normal(3, 3, 9, 9)}]
    with pytest.raises(DataError, match="do not fit together"):
        run(tmp_path, model, StaticConfig(), Dataset("parts", lambda size: iter(parts)))


# --- models that are not plain float32 graphs ------------------------------------------------------------------------


def parsed(
    text: str, weights: Weights, head: str = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft": 1]>'
) -> Any:
    model = onnx.parser.parse_model(head + text)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return model


CONFIGS = pytest.mark.parametrize("config", [DynamicConfig(), StaticConfig()], ids=["dynamic", "static"])
ROWS = Dataset.from_arrays({"x": normal(8, 32)})


@CONFIGS
@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_floats_stay_as_they_are(tmp_path: Path, config: StepConfig, dtype: str) -> None:
    kind = np.dtype(dtype)
    model = parsed(f"g ({dtype}[n,32] x) => ({dtype}[n,4] y) {{ y = MatMul(x, w) }}", {"w": normal(32, 4).astype(kind)})
    text = refused(tmp_path, model, config, ROWS)
    assert "nothing to quantize" in text and "float32" in text


@CONFIGS
def test_weight_only_models_are_refused(tmp_path: Path, config: StepConfig) -> None:
    weights = {"w": RNG.integers(0, 255, (8, 1, 16)).astype(np.uint8), "s": np.abs(normal(8))}
    node = "com.microsoft.MatMulNBits<K=32,N=8,bits=4,block_size=32>(x, w, s)"
    model = parsed(f"g (float[n,32] x) => (float[n,8] y) {{ y = {node} }}", weights)
    assert "quantized already (it has MatMulNBits)" in refused(tmp_path, model, config, ROWS)


@CONFIGS
def test_quantized_branches_are_found(tmp_path: Path, config: StepConfig) -> None:
    branch = "(float[n,4] {0}) {{ {0} = DequantizeLinear(q, s) }}"
    text = f"""g (float[n,32] x, bool c) => (float[n,4] y) {{
        h = MatMul(x, w)
        q = Cast<to=3>(h)
        y = If (c) <then_branch = t () => {branch.format("a")}, else_branch = e () => {branch.format("b")}>
    }}"""
    model = parsed(text, {"w": normal(32, 4), "s": np.float32(0.1)})
    assert "quantized already" in refused(tmp_path, model, config, ROWS)


def test_products_in_branches_only(tmp_path: Path) -> None:
    """Nothing in a branch is quantized; to simplify such a model once more does not help."""
    text = """g (float[n,32] x, bool c) => (float[n,4] y) {
        y = If (c) <then_branch = t () => (float[n,4] a) { a = MatMul(x, w) },
                    else_branch = e () => (float[n,4] b) { d = Relu(x) b = MatMul(d, w) }>
    }"""
    said = refused(tmp_path, parsed(text, {"w": normal(32, 4)}), DynamicConfig())
    assert "outside the branches of If" in said
    assert "deploykit simplify" not in said


def test_attention_of_the_standard_is_not_that_of_onnxruntime(tmp_path: Path) -> None:
    text = "g (float[n,1,4,8] q) => (float[n,1,4,8] y) { y = Attention(q, k, v) }"
    weights = {"k": normal(1, 1, 4, 8), "v": normal(1, 1, 4, 8)}
    model = parsed(text, weights, '<ir_version: 11, opset_import: ["" : 23]>')
    assert "nothing to quantize" in refused(tmp_path, model, DynamicConfig())


def test_constants_are_no_activations(tmp_path: Path) -> None:
    """A shape that is put together from constants, and a weight that is only transposed, are nothing to quantize."""
    text = "g (float[n,32] x) => (float[n,4] y) { s = Concat<axis=0>(a, b) t = Transpose(w) y = MatMul(x, t) }"
    model = parsed(text, {"a": np.int64([1]), "b": np.int64([2]), "w": normal(4, 32)})
    assert "simplify it first" in refused(tmp_path, model, StaticConfig(), ROWS)
    assert "simplify it first" in refused(tmp_path, model, DynamicConfig())


@CONFIGS
def test_models_without_operators_of_the_standard(tmp_path: Path, config: StepConfig) -> None:
    head = '<ir_version: 8, opset_import: ["ai.onnx.ml" : 3]>'
    model = parsed("g (float[n,32] x) => (float[n,32] y) { y = ai.onnx.ml.Normalizer(x) }", {}, head)
    assert "nothing to quantize" in refused(tmp_path, model, config, ROWS)


@CONFIGS
@pytest.mark.parametrize("names", [["", "", "MatMul_0"], ["same", "same", "same"]])
def test_node_names_become_unique(tmp_path: Path, config: StepConfig, names: list[str]) -> None:
    text = "g (float[n,32] x) => (float[n,4] y) { a = MatMul(x, w) b = Tanh(a) y = MatMul(b, v) }"
    model = parsed(text, {"w": normal(32, 32, scale=0.2), "v": normal(32, 4, scale=0.2)})
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    made, _ = run(tmp_path, model, config, ROWS if isinstance(config, StaticConfig) else None)
    found = [n.name for n in made.graph.node]
    assert len(set(found)) == len(found)


@CONFIGS
@pytest.mark.parametrize("opset", [7, 9, 17])
def test_large_weights_are_quantized_like_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: StepConfig, opset: int
) -> None:
    """Left on disk and read one by one, weights give the same file."""
    weights = {
        "w": normal(600, 700, scale=0.1),
        "v": normal(8, 700, scale=0.1),
        "u": normal(700, 700, scale=0.1),
        "b": normal(8),
    }
    model = build(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("MatMul", ["h", "u"], ["i"]),
            helper.make_node("Gemm", ["i", "v", "b"], ["y"], transB=1),
        ],
        [value("x", ["n", 600])],
        [value("y", ["n", 8])],
        weights,
        opset=opset,
    )
    data = Dataset.from_arrays({"x": normal(16, 600)}) if isinstance(config, StaticConfig) else None
    (tmp_path / "whole").mkdir()
    (tmp_path / "light").mkdir()
    whole, _ = run(tmp_path / "whole", model, config, data)
    monkeypatch.setattr(deploykit.weights, "WHOLE_LIMIT_BYTES", 0)
    light, _ = run(tmp_path / "light", model, config, data)
    assert [n.op_type for n in light.graph.node] == [n.op_type for n in whole.graph.node]
    want = {t.name: numpy_helper.to_array(t) for t in whole.graph.initializer}
    have = {t.name: numpy_helper.to_array(t) for t in light.graph.initializer}
    assert have.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(have[name], array, err_msg=name)


def test_ranges_cover_the_data(tmp_path: Path) -> None:
    made, _ = run(tmp_path, residual(), StaticConfig(batch_size=3), IMAGES | {"labels": np.zeros(20)})
    [(scale, zero)] = [(s, z) for name, s, z in pairs(made, "QuantizeLinear") if name == "x"]
    low, high = (0 - int(zero)) * float(scale), (255 - int(zero)) * float(scale)
    assert low == pytest.approx(float(IMAGES["x"].min()), abs=float(scale))
    assert high == pytest.approx(float(IMAGES["x"].max()), abs=float(scale))


def test_fixed_batch(tmp_path: Path) -> None:
    model = residual()
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = 6
    _, result = run(tmp_path, model, StaticConfig(), IMAGES)
    assert result.params["samples"] == 18  # the incomplete rest is left out
    (tmp_path / "target.onnx").unlink()
    assert "no batch" in refused(tmp_path, model, StaticConfig(), {"x": IMAGES["x"][:5]})


def test_data_that_do_not_fit(tmp_path: Path) -> None:
    for data in ({"z": IMAGES["x"], "w": IMAGES["x"]}, {"x": IMAGES["x"][:, :2]}, {"x": IMAGES["x"].astype(int)}):
        with pytest.raises(DataError):
            run(tmp_path, residual(), StaticConfig(), data)
        assert not (tmp_path / "target.onnx").exists()


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    spoiled = IMAGES["x"].copy()
    spoiled[3, 1, 2, 4:6] = [np.nan, np.inf]
    _, result = run(tmp_path, residual(), StaticConfig(), {"x": spoiled})
    (said,) = (note for note in result.notes if "NaN" in note)
    assert said.startswith("2 of 3840 values of input 'x' are NaN or infinite")
    (tmp_path / "target.onnx").unlink()
    _, result = run(tmp_path, residual(), StaticConfig(), IMAGES)
    assert not any("NaN" in note for note in result.notes)


def test_data_without_a_finite_value(tmp_path: Path) -> None:
    text = refused(tmp_path, residual(), StaticConfig(), {"x": np.full((4, 3, 8, 8), np.nan, np.float32)})
    assert "no chosen node has a finite range" in text
    assert not (tmp_path / "target.onnx").exists()


def test_static_needs_data(tmp_path: Path) -> None:
    assert "--data" in refused(tmp_path, residual(), StaticConfig(), None)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [DynamicConfig(), StaticConfig()])
@pytest.mark.parametrize("first", [DynamicConfig(), StaticConfig()])
def test_quantized_models_are_refused(tmp_path: Path, first: StepConfig, second: StepConfig) -> None:
    made, _ = run(tmp_path, matmuls(), first, {"x": normal(8, 16)})
    (tmp_path / "target.onnx").unlink()
    assert "quantized already" in refused(tmp_path, made, second, {"x": normal(8, 16)})


def test_nothing_to_quantize(tmp_path: Path) -> None:
    model = build([helper.make_node("Relu", ["x"], ["y"])], [value("x", ["n"])], [value("y", ["n"])], {})
    for config in (StaticConfig(), DynamicConfig()):
        assert "nothing to quantize" in refused(tmp_path, model, config, {"x": normal(4)})
    text = refused(tmp_path, residual(), StaticConfig(exclude=("Conv",)), IMAGES)
    assert "drop --exclude" in text


@pytest.mark.parametrize(
    "config", [StaticConfig(calibration="median"), StaticConfig(weight_bits="4"), DynamicConfig(weight_bits="16")]
)
def test_impossible_options(tmp_path: Path, config: StepConfig) -> None:
    assert "expected" in refused(tmp_path, matmuls(), config, {"x": normal(4, 16)})


# --- manners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DynamicConfig(), StaticConfig()])
def test_root_logger_is_left_alone(tmp_path: Path, config: StepConfig, caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = list(root.handlers), list(root.filters)
    run(tmp_path, matmuls(), config, {"x": normal(8, 16)})
    assert (list(root.handlers), list(root.filters)) == before
    assert caplog.messages == []
    logging.warning("of others")
    assert caplog.messages == ["of others"]


def test_no_handler_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, `logging.warning` would."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    run(tmp_path, matmuls(), DynamicConfig())
    assert logging.getLogger().handlers == []


def calibrated(tmp_path: Path, rows: slice, name: str, **config: Any) -> StepResult:
    """Quantize the residual net with part of its data."""
    data = normal_rows[rows]
    path, out = tmp_path / f"{name}.npz", tmp_path / f"{name}-made"
    out.mkdir()
    np.savez(path, x=data)
    model = tmp_path / "model.onnx"
    onnx.save(SHARDED, model)
    return optimize(
        model, StaticConfig(batch_size=4, **config), out / "model.onnx",
        check=lambda _: None, open_model=lambda p: open_session(p).run, data=Dataset.open(path),
    )  # fmt: skip


SHARDED = residual()
normal_rows = np.random.default_rng(5).normal(size=(24, 3, 8, 8)).astype(np.float32)


def made_scales(tmp_path: Path, name: str) -> dict[str, Any]:
    model = onnx.load(tmp_path / f"{name}-made" / "model.onnx")
    return {w.name: numpy_helper.to_array(w).tolist() for w in model.graph.initializer if w.name.endswith("_scale")}


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse", "auto"])
def test_shards_give_the_scales_of_one_run(tmp_path: Path, method: str) -> None:
    calibrated(tmp_path, slice(0, 24), "whole", calibration=method)
    state = str(tmp_path / "first.calibration")
    calibrated(tmp_path, slice(0, 8), "first", calibration=method, save_calibration=state)
    result = calibrated(tmp_path, slice(8, 24), "rest", calibration=method, merge=(state,))
    assert made_scales(tmp_path, "rest") == made_scales(tmp_path, "whole")
    assert made_scales(tmp_path, "first") != made_scales(tmp_path, "whole")
    assert result.params["samples"] == 24 and result.params["merged"] == [state]


def test_calibrations_of_another_model_are_refused(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    calibrated(tmp_path, slice(0, 8), "first", save_calibration=state)
    path, out = tmp_path / "d.npz", tmp_path / "other.onnx"
    np.savez(path, x=normal(8, 16))
    onnx.save(matmuls(), tmp_path / "matmuls.onnx")
    with pytest.raises(DataError, match="another graph"):
        optimize(
            tmp_path / "matmuls.onnx", StaticConfig(merge=(state,)), out,
            check=lambda _: None, open_model=lambda p: open_session(p).run, data=Dataset.open(path),
        )  # fmt: skip
    assert not out.exists()


def test_calibrations_do_not_go_with_activations_that_their_data_change(tmp_path: Path) -> None:
    with pytest.raises(OptimizationError, match="smooth"):
        calibrated(tmp_path, slice(0, 8), "first", save_calibration=str(tmp_path / "state"), smooth=0.5)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("config", [DynamicConfig(), StaticConfig()])
def test_both_kinds_rewrite_the_graph_before(tmp_path: Path, config: StepConfig) -> None:
    mask = np.ones((20, 1, 6), np.float32)
    mask[:, :, 4:] = 0
    made, result = run(tmp_path, attention(), config, {"x": normal(20, 6, 16), "mask": mask})
    assert any("kept out of the denormal numbers" in note for note in result.notes), result.notes
    soft = next(n for n in made.graph.node if n.op_type == "Softmax")
    assert next(n.op_type for n in made.graph.node if soft.input[0] in n.output) == "Max"
