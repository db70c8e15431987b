"""Strided convolutions over one channel, as convolutions over several."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.optimizers.prepare import infer_shapes
from deploykit.optimizers.rewrite import rewrite

RNG = np.random.default_rng(0)


def convolution(length, filter_length, stride, pads, *, rank=3, bias=True, channels=1, **attributes):
    """One convolution over samples [batch, 1, length] or [batch, 1, length, 1], and a Relu."""
    rest = [1] * (rank - 3)
    weights = {"w": RNG.normal(size=(6, channels, filter_length, *rest)).astype(np.float32)}
    if bias:
        weights["b"] = RNG.normal(size=6).astype(np.float32)
    spatial = {
        "kernel_shape": [filter_length, *rest], "strides": [stride, *rest],
        "pads": [pads[0], *[0] * (rank - 3), pads[1], *[0] * (rank - 3)],
    }  # fmt: skip
    if "auto_pad" in attributes:
        del spatial["pads"]
    nodes = [
        helper.make_node("Conv", ["x", *weights], ["c"], name="conv", **spatial | attributes),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", channels, length, *rest])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )  # fmt: skip
    return infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def run(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def rewritten(model):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    notes = rewrite(copy)
    onnx.checker.check_model(copy, full_check=True)
    return copy, notes


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(
    ("filter_length", "stride", "pads"), [(10, 5, (0, 0)), (512, 4, (254, 254)), (11, 4, (3, 1)), (7, 3, (0, 5))]
)
def test_the_same_numbers_at_every_length(filter_length, stride, pads, fixed, rank):
    for length in range(520, 526) if filter_length == 512 else range(filter_length, filter_length + 14):
        model = convolution(length if fixed else "length", filter_length, stride, pads, rank=rank)
        made, notes = rewritten(model)
        assert len(notes) == 1
        conv = next(n for n in made.graph.node if n.op_type == "Conv")
        weight = next(w for w in made.graph.initializer if w.name == conv.input[1])
        assert list(weight.dims)[1] == stride
        x = RNG.normal(size=(2, 1, length, *[1] * (rank - 3))).astype(np.float32)
        wanted, found = run(model, x), run(made, x)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        convolution("length", 10, 1, (0, 0)),
        convolution("length", 5, 4, (0, 0)),
        convolution("length", 10, 5, (0, 0), channels=2),
        convolution("length", 10, 5, (0, 0), dilations=[2]),
        convolution(64, 10, 5, (0, 0), auto_pad="SAME_UPPER"),
    ],
    ids=["no stride", "short filter", "two channels", "dilated", "automatic padding"],
)
def test_others_are_left_alone(model):
    assert rewritten(model)[1] == []
