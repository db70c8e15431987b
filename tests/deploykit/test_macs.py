"""Multiply-accumulates: what torch counts for the same module, and formulas by hand where it counts none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit.costs import count_compute
from deploykit.macs import computes
from deploykit.shaping import trace_model

F32 = np.float32


def macs_of(model: onnx.ModelProto, folder: Path = Path("m.onnx"), **sizes: int) -> int:
    found = count_compute(trace_model(model, folder, sizes))
    assert found.uncounted == []
    return found.macs


def torch_modules() -> dict[str, Any]:
    from torch import nn

    class Products(nn.Module):
        def forward(self, x: Any) -> Any:
            return (x @ x.transpose(1, 2)) @ x

    return {
        "conv": (nn.Conv2d(6, 10, (3, 5), stride=2, padding=1), (2, 6, 17, 19)),
        "grouped": (nn.Conv2d(8, 16, 3, groups=4), (1, 8, 12, 12)),
        "depthwise-1d": (nn.Conv1d(7, 7, 5, groups=7, dilation=2), (3, 7, 40)),
        "conv3d": (nn.Conv3d(2, 4, 3), (1, 2, 6, 7, 8)),
        "transposed": (nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), (2, 6, 5, 7)),
        "transposed-1d": (nn.ConvTranspose1d(6, 4, 3, stride=3), (2, 6, 9)),
        "linear": (nn.Linear(13, 7), (5, 13)),
        "linear-3d": (nn.Linear(13, 7, bias=False), (5, 4, 13)),
        "products": (Products(), (3, 5, 6)),
        "net": (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 7 * 7, 10)),
            (2, 3, 16, 16),
        ),
    }


NAMES = (
    "conv", "grouped", "depthwise-1d", "conv3d", "transposed", "transposed-1d", "linear", "linear-3d", "products",
    "net",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_as_many_as_torch_counts(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    module, shape = torch_modules()[name]
    example = torch.zeros(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(example)
    path = tmp_path / "m.onnx"
    torch.onnx.export(module.eval(), (example,), str(path), dynamo=False, opset_version=17)
    assert 2 * macs_of(onnx.load(str(path)), path) == counter.get_total_flops() > 0


def test_integer_products_count_like_the_ones_that_they_replace(build: Any) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    model = build(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, {"w": np.ones((4, 3), np.int8)})
    assert macs_of(model, n=5) == 5 * 4 * 3
    conv = build(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("QLinearConv", ["q", "s", "z", "w", "s", "wz", "s", "z"], ["r"]),
            helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"]),
        ],
        {"x": [1, 2, 6, 6]}, {"y": None},
        {"s": F32(1), "z": np.uint8(0), "w": np.ones((5, 2, 3, 3), np.int8), "wz": np.int8(0)},
    )  # fmt: skip
    assert macs_of(conv) == 4 * 4 * 5 * 2 * 9


@pytest.mark.parametrize(("op", "gates", "directions"), [("LSTM", 4, 1), ("LSTM", 4, 2), ("GRU", 3, 1), ("RNN", 1, 2)])
def test_recurrences(build: Any, op: str, gates: int, directions: int) -> None:
    steps, batch, inputs, hidden = 7, 3, 5, 4
    node = helper.make_node(
        op, ["x", "w", "r"], ["y"], hidden_size=hidden, direction="bidirectional" if directions == 2 else "forward"
    )
    weights = {
        "w": np.ones((directions, gates * hidden, inputs), F32), "r": np.ones((directions, gates * hidden, hidden), F32)
    }  # fmt: skip
    model = build([node], {"x": [steps, batch, inputs]}, {"y": None}, weights)
    assert macs_of(model) == steps * batch * directions * gates * hidden * (inputs + hidden)


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)], 24),
        ("bij,bjk", [(5, 2, 3), (5, 3, 4)], 120),
        ("...ij,...jk->...ik", [(6, 5, 2, 3), (5, 3, 4)], 720),
        ("bhid, bhjd -> bhij", [(2, 3, 4, 8), (2, 3, 5, 8)], 960),
        ("ij->ji", [(2, 3)], 0),
    ],
)
def test_einsum(build: Any, equation: str, shapes: list[tuple[int, ...]], macs: int) -> None:
    names = [f"x{i}" for i in range(len(shapes))]
    node = helper.make_node("Einsum", names, ["y"], equation=equation)
    assert macs_of(build([node], dict(zip(names, shapes, strict=True)), {"y": None})) == macs


def test_attention_of_the_standard_and_of_the_runtime(build: Any) -> None:
    batch, heads, length, total, size = 2, 4, 6, 9, 8
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    kv = [batch, heads, total, size]
    standard = build([node], {"q": [batch, heads, length, size], "k": kv, "v": kv}, {"y": None}, opset=23)
    assert macs_of(standard) == 2 * batch * heads * length * total * size
    contrib = {"com.microsoft": 1}
    many = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], num_heads=heads, domain="com.microsoft")
    kv3 = [batch, total, heads * size]
    model = build([many], {"q": [batch, length, heads * size], "k": kv3, "v": kv3}, {"y": None}, domains=contrib)
    assert macs_of(model) == 2 * batch * length * total * heads * size
    fused = helper.make_node("Attention", ["x", "w", "b"], ["y"], num_heads=heads, domain="com.microsoft")
    hidden = heads * size
    weights = {"w": np.ones((hidden, 3 * hidden), F32), "b": np.ones(3 * hidden, F32)}
    model = build([fused], {"x": [batch, length, hidden]}, {"y": None}, weights, domains=contrib)
    assert macs_of(model) == batch * length * hidden * 3 * hidden + 2 * batch * length * length * hidden


def test_packed_weights_count_as_the_product_that_they_are(build: Any) -> None:
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], K=64, N=32, bits=4, block_size=32,
                            domain="com.microsoft")  # fmt: skip
    weights = {"w": np.zeros((32, 2, 16), np.uint8), "s": np.ones(64, F32)}
    model = build([node], {"x": [3, 64]}, {"y": None}, weights, domains={"com.microsoft": 1})
    assert macs_of(model) == 3 * 64 * 32


def test_what_has_no_count_is_listed_and_never_zero(build: Any) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="known"),
        helper.make_node("Secret", ["a"], ["b"], name="secret", domain="my.company"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], name="after"),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    weights = {"w": np.ones((4, 3), F32), "w2": np.ones((3, 2), F32)}
    model = build(nodes, {"x": [5, 4]}, {"z": None}, weights, domains={"my.company": 1})
    found = count_compute(trace_model(model, Path("m.onnx"), {}))
    assert found.macs == 60
    assert found.nodes == 3
    assert [u["node"] for u in found.uncounted] == ["'secret'", "'after'"]
    assert "no rule" in found.uncounted[0]["reason"] and "shape" in found.uncounted[1]["reason"]


def test_every_operator_that_may_compute_is_taken_for_one() -> None:
    assert computes("Conv", "") and computes("DFT", "") and computes("Whatever", "my.company")
    assert computes("MoE", "com.microsoft") and not computes("Gelu", "com.microsoft")
    assert not computes("Relu", "") and not computes("TreeEnsembleRegressor", "ai.onnx.ml")


def test_a_weight_for_other_channels_is_a_finding(build: Any) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="odd")]
    model = build(nodes, {"x": [1, 3, 8, 8]}, {"y": None}, {"w": np.ones((2, 5, 3, 3), F32)})
    found = count_compute(trace_model(model, Path("m.onnx"), {}))
    assert found.macs == 0 and "5 channels" in found.uncounted[0]["reason"]
