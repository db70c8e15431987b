"""Repair of Q/DQ graphs in the styles of the tools that make them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_static

from deploykit.errors import OptimizationError
from deploykit.optimizers import RepairConfig, optimize
from deploykit.optimizers.repair_pairs import Params
from deploykit.optimizers.repair_types import quantized

RNG = np.random.default_rng(0)
SIZE = 12


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


class Graph:
    """A graph that grows node by node; constants are given as arrays."""

    def __init__(self, opset=18):
        self.opset, self.nodes, self.weights, self.count = opset, [], [], 0

    def const(self, value, name=None):
        name = name or f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op, *inputs, domain="", **attributes):
        self.count += 1
        names = [i if isinstance(i, str) else self.const(i) for i in inputs]
        self.nodes.append(
            helper.make_node(op, names, [f"t{self.count}"], f"n{self.count}", domain=domain, **attributes)
        )
        return f"t{self.count}"

    def pair(self, x, scale, zero, axis=None, domain=""):
        extra = {} if axis is None else {"axis": axis}
        scale, zero = self.const(np.asarray(scale, np.float32)), self.const(zero)
        q = self.add("QuantizeLinear", x, scale, zero, domain=domain, **extra)
        return self.add("DequantizeLinear", q, scale, zero, domain=domain, **extra)

    def weight(self, value, axis=0, dtype=np.int8):
        """Symmetric codes, one scale a channel."""
        others = tuple(i for i in range(value.ndim) if i != axis)
        scale = np.abs(value).max(others) / 127
        params = Params(scale.astype(np.float32), np.full(scale.shape, 128 if dtype == np.uint8 else 0, dtype), axis)
        return self.add("DequantizeLinear", quantized(value, params), params.scale, params.zero, axis=axis)

    def model(self, outputs, shape, kind=TensorProto.FLOAT, imports=()):
        graph = helper.make_graph(
            self.nodes, "graph", [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs], self.weights,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in imports)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model, optimize=False, saved=None):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run(path, feed, **options):
    return session(path, **options).run(None, feed)


def kernels(path, folder):
    """Operators of the graph that ONNX Runtime really runs."""
    saved = folder / "optimized.onnx"
    session(path, optimize=True, saved=saved)
    return Counter(n.op_type for n in onnx.load(saved).graph.node)


def repair(model, tmp_path, *, exact=False, same_bits=None):
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    target.unlink(missing_ok=True)
    onnx.save(model, source)
    done = optimize(source, RepairConfig(exact), target, check=lambda _: None, same_bits=same_bits)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    return source, target, done


def same_bits(source, target, feed):
    return all(a.tobytes() == b.tobytes() for a, b in zip(run(source, feed), run(target, feed), strict=True))


def image(*shape):
    return {"x": normal(*(shape or (2, 3, SIZE, SIZE)))}


def mobile_net(bound=6.0):
    """NNCF's style: int8 where numbers have a sign, one scale a channel before depthwise convolutions, float biases."""
    g = Graph()
    x = g.pair("x", 4 / 127, np.int8(3))
    x = g.add("Conv", x, g.weight(normal(8, 3, 1, 1)), normal(8))
    x = g.add("Clip", x, np.float32(0), np.float32(bound))
    scales = np.linspace(0.3, 1, 8).astype(np.float32) * np.float32(bound / 255)
    x = g.pair(x, scales, np.zeros(8, np.uint8), axis=1)
    x = g.add("Conv", x, g.weight(normal(8, 1, 3, 3)), normal(8), group=8, pads=[1, 1, 1, 1])
    x = g.pair(g.add("Relu", x), 6 / 255, np.uint8(0))
    x = g.add("Conv", x, g.weight(normal(8, 8, 1, 1)), normal(8))
    first = g.pair(x, 0.1, np.int8(0))
    x = g.add("Conv", first, g.weight(normal(8, 8, 3, 3)), normal(8), pads=[1, 1, 1, 1])
    x = g.add("Add", g.pair(x, 0.2, np.int8(-5)), first)
    x = g.pair(x, 0.25, np.int8(0))
    x = g.add("Conv", x, g.weight(normal(4, 8, 1, 1)), normal(4))
    return g.model([g.pair(x, 0.3, np.int8(1))], ["n", 3, SIZE, SIZE])


def test_types_change_no_bit(tmp_path):
    source, target, done = repair(mobile_net(), tmp_path, exact=True)
    assert done.changed
    assert same_bits(source, target, image())
    kinds = {numpy_helper.to_array(w).dtype.name for w in onnx.load(target).graph.initializer}
    model = onnx.load(target)
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    zero = {w.name: w.data_type for w in model.graph.initializer}
    assert {zero[n.input[2]] for n in quantizers} == {TensorProto.UINT8}
    assert "int8" in kinds  # the weights


def test_one_scale_before_depthwise_keeps_the_codes(tmp_path):
    source, target, done = repair(mobile_net(), tmp_path)
    before, after = kernels(source, tmp_path), kernels(target, tmp_path)
    assert before["QLinearConv"] < 5 and before["QLinearConv"] + before["Conv"] + before["FusedConv"] == 5
    assert after["QLinearConv"] == 5 and after["QLinearAdd"] == 1
    assert not after["Conv"] + after["FusedConv"] + after["Clip"] + after["Relu"]
    (old,), (new,) = run(source, feed := image()), run(target, feed)
    assert np.mean(old != new) < 0.01  # a code at a tie may turn
    assert np.abs(old - new).max() <= 0.3 * 1.01
    assert any("the codes kept" in note for note in done.notes)


def test_per_channel_activations_with_a_bound_of_their_own_stay(tmp_path):
    model = mobile_net()
    clip = next(n for n in model.graph.node if n.op_type == "Clip")
    high = next(w for w in model.graph.initializer if w.name == clip.input[2])
    high.CopyFrom(numpy_helper.from_array(np.float32(2), high.name))  # inside the ranges: no factor passes it
    source, target, _ = repair(model, tmp_path)
    scales = {w.name: w.dims for w in onnx.load(target).graph.initializer}
    assert [8] in [list(scales[n.input[1]]) for n in onnx.load(target).graph.node if n.op_type == "QuantizeLinear"]
    (old,), (new,) = run(source, feed := image()), run(target, feed)
    assert np.mean(old != new) < 0.01


class Reader:
    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


def residual_net():
    g = Graph()
    x = g.add("Relu", g.add("Conv", "x", normal(8, 3, 3, 3), normal(8), pads=[1, 1, 1, 1]))
    for _ in range(2):
        y = g.add("Relu", g.add("Conv", x, normal(8, 8, 3, 3) / 5, normal(8), pads=[1, 1, 1, 1]))
        y = g.add("Conv", y, normal(8, 8, 3, 3) / 5, normal(8), pads=[1, 1, 1, 1])
        x = g.add("Relu", g.add("Add", y, x))
    x = g.add("Flatten", g.add("GlobalAveragePool", x))
    return g.model([g.add("Gemm", x, normal(8, 4), normal(4))], [2, 3, SIZE, SIZE])


OPTIONS = {
    "defaults": {},
    "float weights": {"per_channel": True, "extra_options": {"AddQDQPairToWeight": True}},
    "contrib": {"extra_options": {"UseQDQContribOps": True}},
    "symmetric": {"extra_options": {"ActivationSymmetric": True, "DedicatedQDQPair": True}},
    "uint8 weights": {
        "weight_type": QuantType.QUInt8, "activation_type": QuantType.QUInt8,
        "extra_options": {"WeightSymmetric": True},
    },
}  # fmt: skip


@pytest.fixture
def theirs(tmp_path):
    """A residual net as onnxruntime quantizes it."""

    def make(style):
        floats, made = tmp_path / "float.onnx", tmp_path / "theirs.onnx"
        onnx.save(residual_net(), floats)
        quantize_static(str(floats), str(made), Reader([image() for _ in range(4)]), **OPTIONS[style])
        return onnx.load(made)

    return make


@pytest.mark.parametrize("style", OPTIONS)
def test_files_of_onnxruntime(theirs, style, tmp_path):
    source, target, done = repair(theirs(style), tmp_path, exact=True)
    assert done.changed
    feed = image()
    assert same_bits(source, target, feed)
    source, target, _ = repair(theirs(style), tmp_path)
    after = kernels(target, tmp_path)
    assert after["QLinearConv"] == 5 and after["QLinearAdd"] == 2 and after["QGemm"] == 1
    (old,), (new,) = run(source, feed), run(target, feed)
    assert np.dot(old.ravel(), new.ravel()) >= 0.999 * np.linalg.norm(old) * np.linalg.norm(new)
    weights = {w.name: w.data_type for w in onnx.load(target).graph.initializer}
    model = onnx.load(target)
    stored = [weights.get(n.input[0]) for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert TensorProto.UINT8 not in stored
    assert not any(n.domain == "com.microsoft" for n in model.graph.node)


def test_defaults_of_onnxruntime_were_in_float(theirs, tmp_path):
    source, _, _ = repair(theirs("defaults"), tmp_path)
    before = kernels(source, tmp_path)
    assert before["Conv"] + before["FusedConv"] >= 2


def test_symmetric_ranges_get_all_their_codes(theirs, tmp_path):
    source, target, done = repair(theirs("symmetric"), tmp_path)
    assert kernels(source, tmp_path)["Relu"] and not kernels(target, tmp_path)["Relu"]
    assert any("given all their codes" in note for note in done.notes)
    feed, floats = image(), tmp_path / "float.onnx"
    (right,), (old,), (new,) = run(floats, feed), run(source, feed), run(target, feed)
    assert np.linalg.norm(new - right) < np.linalg.norm(old - right) * 1.1


def test_shared_zero_points_of_weights_and_activations(tmp_path):
    g = Graph()
    scale, zero = g.const(np.float32(0.05), "scale"), g.const(np.int8(0), "zero")
    x = g.add("DequantizeLinear", g.add("QuantizeLinear", "x", scale, zero), scale, zero)
    w = g.add("DequantizeLinear", np.arange(-6, 6, dtype=np.int8).reshape(4, 3, 1, 1), scale, zero)
    x = g.add("Conv", x, w)
    x = g.add("DequantizeLinear", g.add("QuantizeLinear", x, scale, zero), scale, zero)
    source, target, _ = repair(g.model([x], [2, 3, SIZE, SIZE]), tmp_path)
    assert same_bits(source, target, image())
    assert kernels(target, tmp_path)["QLinearConv"] == 1


def test_constant_nodes_missing_zero_points_and_lists_of_one(tmp_path):
    g = Graph(13)
    scale = g.add("Constant", value=numpy_helper.from_array(np.array([0.05], np.float32)))
    zero = g.add("Constant", value=numpy_helper.from_array(np.array([-3], np.int8)))
    x = g.add("DequantizeLinear", g.add("QuantizeLinear", "x", scale, zero), scale, zero)
    # Without a zero point QuantizeLinear makes uint8, and DequantizeLinear takes what it is given.
    x = g.add("Relu", x)
    x = g.add("DequantizeLinear", g.add("QuantizeLinear", x, np.float32(0.02)), np.float32(0.02))
    w = g.add("DequantizeLinear", np.arange(-6, 6, dtype=np.int8).reshape(4, 3, 1, 1), np.float32(0.1))
    y = g.pair(g.add("Conv", x, w), np.array([0.1], np.float32), np.array([0], np.int8))
    z = g.pair(g.add("Conv", x, w), np.array([0.2], np.float32), np.array([4], np.int8))
    x = g.pair(g.add("Add", y, z), np.array([0.3], np.float32), np.array([4], np.int8))
    source, target, done = repair(g.model([x], [2, 3, SIZE, SIZE]), tmp_path, exact=True)
    assert same_bits(source, target, image())
    assert any("to scalars" in note for note in done.notes)
    assert not kernels(source, tmp_path)["QLinearAdd"]
    assert kernels(target, tmp_path)["QLinearAdd"] == 1


def test_weights_behind_a_transpose_and_kept_in_float(tmp_path):
    """torch.ao: [outputs, inputs] in float, quantized and turned in every run."""
    g = Graph()
    weight = normal(6, 4)
    scale = (np.abs(weight).max(1) / 127).astype(np.float32)
    w = g.add("Transpose", g.pair(g.const(weight), scale, np.zeros(6, np.int8), axis=0), perm=[1, 0])
    x = g.add("MatMul", g.pair("x", 0.03, np.int8(2)), w)
    source, target, _ = repair(g.model([x], [2, 5, 4]), tmp_path, exact=True)
    assert same_bits(source, target, {"x": normal(2, 5, 4)})
    assert kernels(target, tmp_path)["MatMulIntegerToFloat"] == 1
    assert not any(n.op_type == "Transpose" for n in onnx.load(target).graph.node)


def test_weights_are_rounded_as_runtimes_do(tmp_path):
    values = np.concatenate([np.arange(-300, 300) / 2, [-1e30, 1e30, -0.0]]).astype(np.float32).reshape(1, -1)
    for zero in (np.int8(0), np.int8(-7), np.uint8(128)):
        g = Graph()
        g.add("QuantizeLinear", "x", np.float32(0.5), zero)
        g.add("Cast", "t1", to=TensorProto.FLOAT)
        path = tmp_path / "q.onnx"
        onnx.save(g.model(["t2"], [1, values.size]), path)
        expected = run(path, {"x": values})[0]
        params = Params(np.float32(0.5).reshape(()), np.asarray(zero), 0)
        np.testing.assert_array_equal(quantized(values, params), expected)


def encoder():
    """NNCF's transformers: rows of a quantized table, Gemm with float bias, products of activations, SmoothQuant."""
    g = Graph()
    x = g.add("Gather", g.weight(normal(20, 8), axis=0), "x")
    x = g.add("LayerNormalization", x, normal(8), normal(8), axis=-1)
    x = g.add("Mul", x, np.abs(normal(1, 1, 8)) + 0.5)
    x = g.add("Reshape", g.pair(x, 0.05, np.int8(4)), np.array([-1, 8]))
    parts = [
        g.add("Reshape", g.add("Gemm", x, g.weight(normal(8, 8) / 4, axis=1), normal(8)), np.array([2, -1, 8]))
        for _ in range(3)
    ]
    q, k, v = (g.pair(part, 0.03, np.int8(0)) for part in parts)
    scores = g.add("Softmax", g.add("MatMul", q, g.add("Transpose", k, perm=[0, 2, 1])), axis=-1)
    x = g.add("MatMul", g.pair(scores, 1 / 255, np.uint8(0)), v)
    x = g.add("MatMul", g.pair(x, 0.03, np.int8(1)), g.weight(normal(8, 8), axis=1))
    return g.model([x], [2, 5], TensorProto.INT64)


def test_transformers(tmp_path):
    feed = {"x": RNG.integers(0, 20, (2, 5))}
    source, target, _ = repair(encoder(), tmp_path, exact=True)
    assert same_bits(source, target, feed)
    made = onnx.load(target)
    zeros = {w.name: w.data_type for w in made.graph.initializer}
    kinds = Counter(zeros[n.input[2]] for n in made.graph.node if n.op_type == "QuantizeLinear")
    assert kinds == {TensorProto.UINT8: 3, TensorProto.INT8: 3}  # products of activations keep theirs in OpenVINO
    tables = [n for n in onnx.load(target).graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("c")]
    assert all(n.op_type != "Gather" for n in tables)
    before = kernels(source, tmp_path)
    source, target, _ = repair(encoder(), tmp_path)
    after = kernels(target, tmp_path)
    assert before["Gemm"] == 3 and not before["QGemm"]
    assert after["QGemm"] == 3 and not after["Gemm"] and after["MatMulIntegerToFloat"] == 1
    assert after["QuantizeLinear"] == 2 and not after["Mul"] - 1  # the rows' factors are left
    (old,), (new,) = run(source, feed), run(target, feed)
    assert np.dot(old.ravel(), new.ravel()) >= 0.999 * np.linalg.norm(old) * np.linalg.norm(new)


def test_a_sum_with_one_float_side_is_quantized(tmp_path):
    g = Graph()
    x = g.pair("x", 0.03, np.uint8(128))
    y = g.pair(g.add("Relu", g.add("Conv", x, g.weight(normal(8, 3, 1, 1)))), 0.05, np.uint8(0))
    z = g.add("Conv", y, g.weight(normal(8, 8, 1, 1)), normal(8))
    x = g.pair(g.add("Relu", g.add("Add", z, y)), 0.1, np.uint8(0))
    source, target, done = repair(g.model([x], [2, 3, SIZE, SIZE]), tmp_path)
    assert kernels(source, tmp_path)["QLinearConv"] == 1
    after = kernels(target, tmp_path)
    assert after["QLinearConv"] == 2 and after["QLinearAdd"] == 1
    (old,), (new,) = run(source, feed := {"x": 3 * normal(2, 3, SIZE, SIZE)}), run(target, feed)
    assert old.max() == pytest.approx(25.5)  # saturated somewhere: the new range may not move that
    assert np.abs(old - new).max() <= 2 * 0.1 * 1.01
    assert any("before a sum quantized" in note for note in done.notes)


def test_a_float_reader_beside_the_quantizer(tmp_path):
    g = Graph()
    x = g.add("Conv", g.pair("x", 0.03, np.int8(0)), g.weight(normal(8, 3, 1, 1)))
    y = g.add("GlobalAveragePool", x)  # as in squeeze and excite
    x = g.add("Conv", g.pair(x, 0.05, np.int8(0)), g.weight(normal(8, 8, 1, 1)))
    x = g.pair(x, 0.2, np.int8(0))
    source, target, _ = repair(g.model([x, y], [2, 3, SIZE, SIZE]), tmp_path)
    # An output of the model stays what it is: the pool reads the tensor as the quantizer made it.
    assert kernels(source, tmp_path)["QLinearConv"] == 1
    assert kernels(target, tmp_path)["QLinearConv"] == 2
    old, new = run(source, feed := image()), run(target, feed)
    np.testing.assert_array_equal(old[0], new[0])
    assert np.abs(old[1] - new[1]).max() <= 0.05


def test_a_product_behind_a_flatten(tmp_path):
    """NNCF's style: ONNX Runtime carries a pair over a Reshape, and not over a Flatten."""
    g = Graph()
    x = g.pair(g.add("GlobalAveragePool", g.pair("x", 0.03, np.int8(3))), 0.01, np.int8(-2))
    x = g.add("Gemm", g.add("Flatten", x), g.weight(normal(10, 3)), normal(10), transB=1)
    source, target, done = repair(g.model([x], [2, 3, SIZE, SIZE]), tmp_path, exact=True)
    assert any("1 pairs before a Flatten or Pad repeated behind it" in note for note in done.notes)
    assert same_bits(source, target, image())
    source, target, _ = repair(g.model([x], [2, 3, SIZE, SIZE]), tmp_path)
    assert kernels(source, tmp_path)["QGemm"] == 0
    assert kernels(target, tmp_path)["QGemm"] == 1
    assert not optimize(target, RepairConfig(), tmp_path / "again.onnx", check=lambda _: None).changed


@pytest.mark.parametrize(("value", "count"), [(None, 1), (0.0, 1), (0.5, 0)])
def test_a_convolution_behind_a_pad(tmp_path, value, count):
    g = Graph()
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    x = g.add("Pad", g.pair("x", 0.03, np.int8(3)), pads, *([] if value is None else [np.float32(value)]))
    x = g.add("Transpose", x, perm=[0, 1, 3, 2])
    x = g.pair(g.add("Conv", x, g.weight(normal(8, 3, 3, 3)), normal(8)), 0.2, np.uint8(128))
    source, target, done = repair(g.model([x], [2, 3, SIZE, SIZE]), tmp_path, exact=True)
    assert any("Flatten or Pad" in note for note in done.notes) == bool(count)
    assert same_bits(source, target, image())
    assert kernels(source, tmp_path)["QLinearConv"] == 0
    assert kernels(target, tmp_path)["QLinearConv"] == count


def test_codes_that_others_look_at_stay(tmp_path):
    g = Graph()
    q = g.add("QuantizeLinear", "x", np.float32(0.1), np.int8(1))
    x = g.add("DequantizeLinear", q, np.float32(0.1), np.int8(1))
    codes = g.add("Cast", q, to=TensorProto.FLOAT)
    moved = g.add("Reshape", g.add("QuantizeLinear", x, np.float32(0.1), np.int8(2)), np.array([-1]))
    y = g.add("DequantizeLinear", moved, np.float32(0.1), np.int8(2))
    source, target, _ = repair(g.model([x, codes, y], [2, 3, SIZE, SIZE]), tmp_path)
    assert same_bits(source, target, image())
    zeros = {w.name: w.data_type for w in onnx.load(target).graph.initializer}
    found = [zeros[n.input[2]] for n in onnx.load(target).graph.node if n.op_type == "QuantizeLinear"]
    assert sorted(found) == [TensorProto.UINT8, TensorProto.INT8]  # behind the Reshape nobody looks


def test_joined_codes_turn_together(tmp_path):
    g = Graph()
    zero = np.int8(-3)
    a = g.add("QuantizeLinear", "x", np.float32(0.1), zero)
    b = g.add("QuantizeLinear", g.add("Neg", "x"), np.float32(0.1), zero)
    joined = g.add("MaxPool", g.add("Concat", a, b, axis=1), kernel_shape=[2, 2])
    y = g.add("DequantizeLinear", joined, np.float32(0.1), zero)
    source, target, done = repair(g.model([y], [2, 3, SIZE, SIZE]), tmp_path, exact=True)
    assert done.params["bit_exact"] == {"2 activations from int8 to uint8": 2}
    assert same_bits(source, target, image())


def test_newer_forms(tmp_path):
    """Opset 21: the type as an attribute; scales of blocks, which stay."""
    g = Graph(21)
    q = g.add("QuantizeLinear", "x", np.float32(0.1), output_dtype=TensorProto.INT8)
    x = g.add("DequantizeLinear", q, np.float32(0.1))
    w = g.add(
        "DequantizeLinear",
        RNG.integers(-9, 9, (8, 4)).astype(np.int8),
        np.abs(normal(2, 4)) + 0.1,
        axis=0,
        block_size=4,
    )
    x = g.add("MatMul", x, w)
    source, target, done = repair(g.model([x], [2, 5, 8]), tmp_path, exact=True)
    assert done.params["bit_exact"] == {"1 activations from int8 to uint8": 1}
    assert same_bits(source, target, {"x": normal(2, 5, 8)})
    assert any(a.name == "block_size" for n in onnx.load(target).graph.node for a in n.attribute)


def test_masks_are_told_and_left(tmp_path):
    g = Graph()
    x = g.add("MatMul", g.pair("x", 0.03, np.int8(0)), g.weight(normal(8, 8), axis=1))
    x = g.add("Softmax", g.pair(g.add("Add", x, np.float32(-1)), 1.3e36, np.int8(127)))
    x = g.add("LayerNormalization", x, normal(8), normal(8))
    source, target, done = repair(g.model([x], [2, 5, 8]), tmp_path)
    assert any("attention mask" in note for note in done.notes)
    assert same_bits(source, target, {"x": normal(2, 5, 8)})


def test_weights_about_another_middle_are_told(tmp_path):
    g = Graph()
    w = g.add("DequantizeLinear", RNG.integers(0, 255, (4, 3, 1, 1)).astype(np.uint8), np.float32(0.1), np.uint8(99))
    x = g.pair(g.add("Conv", g.pair("x", 0.03, np.int8(0)), w), 0.1, np.int8(0))
    source, target, done = repair(g.model([x], [2, 3, SIZE, SIZE]), tmp_path)
    assert any("zero point is not 128" in note for note in done.notes)
    assert same_bits(source, target, image())


def test_a_repaired_model_needs_no_repair(tmp_path):
    for model in (mobile_net(), encoder()):
        _, target, done = repair(model, tmp_path)
        assert done.changed
        once = onnx.load(target)
        _, target, done = repair(once, tmp_path)
        assert not done.changed
        assert done.notes == ("nothing needs repair; the graph is as it was",)
        assert onnx.load(target) == once


def test_what_is_not_quantized_is_refused(tmp_path):
    with pytest.raises(OptimizationError, match=r"not quantized.*deploykit quantize static"):
        repair(residual_net(), tmp_path)


def test_what_has_no_pairs_is_refused(tmp_path):
    g = Graph()
    q = g.add("Cast", "x", to=TensorProto.UINT8)
    g.add("Cast", g.add("MatMulInteger", q, np.zeros((4, 4), np.int8)), to=TensorProto.FLOAT)
    with pytest.raises(OptimizationError, match=r"no Q/DQ pairs.*MatMulInteger"):
        repair(g.model([f"t{g.count}"], [2, 4]), tmp_path)


def test_other_bits_fail_the_step(tmp_path):
    with pytest.raises(OptimizationError, match="changed the result"):
        repair(mobile_net(), tmp_path, same_bits=lambda _: "output 'y' has other bits")


def test_large_weights_stay_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("deploykit.weights.WHOLE_LIMIT_BYTES", 0)
    monkeypatch.setattr("deploykit.weights.LARGE_BYTES", 1024)
    g = Graph()
    w = g.add(
        "DequantizeLinear", RNG.integers(1, 255, (64, 64)).astype(np.uint8), np.full(64, 0.01, np.float32),
        np.full(64, 128, np.uint8), axis=1,
    )  # fmt: skip
    table = g.add("DequantizeLinear", RNG.integers(-9, 9, (64, 32)).astype(np.int8), np.float32(0.1), np.int8(0))
    x = g.add("MatMul", g.pair("x", 0.03, np.int8(2)), w)
    y = g.add("Neg", g.add("Gather", table, g.add("Cast", x, to=TensorProto.INT64)))
    source, target, done = repair(g.model([x, y], [5, 64]), tmp_path, exact=True)
    assert len(done.params["bit_exact"]) == 3
    assert (tmp_path / "target.onnx.data").stat().st_size == 64 * 32
    old, new = run(source, feed := {"x": np.zeros((5, 64), np.float32)}), run(target, feed)
    assert [a.tobytes() for a in old] == [a.tobytes() for a in new]
    assert same_bits(source, target, {"x": np.full((5, 64), 0.01, np.float32)})
