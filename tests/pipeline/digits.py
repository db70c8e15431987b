"""A network really trained on scikit-learn's digits, with a layer that 8 bits destroy where a test asks for one."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F32 = np.float32
LAYERS = 5


@cache
def _trained() -> tuple[Any, Any, Any]:
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    rows, labels = load_digits(return_X_y=True)
    rows = (rows / 16).astype(F32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not converge
        net = MLPClassifier((48,) * (LAYERS - 1), max_iter=60, random_state=0).fit(rows[:1000], labels[:1000])
    return net, rows[1000:], labels[1000:]


def write(folder: Path, spoiled: int | None = None, kind: str = "weight") -> Path:
    """Write `net.onnx`, `calib.npz` and `eval.npz`.

    A spoiled layer computes what it computed: its first input is always 0 and has huge weights, so that the scale of
    every output channel is ("weight"), or it is huge and has no weight, so that the scale of the inputs is
    ("activation").
    """
    net, rows, labels = _trained()
    weights = [w.astype(F32).copy() for w in net.coefs_]
    biases = [b.astype(F32).copy() for b in net.intercepts_]
    if spoiled is not None:
        assert spoiled > 0
        weights[spoiled - 1][:, 0] = 0
        biases[spoiled - 1][0] = 0 if kind == "weight" else 3e3
        weights[spoiled][0, :] = 1e3 if kind == "weight" else 0
    nodes, stored, last = [], [], "x"
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        stored += [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(bias, f"b{i}")]
        out = "y" if i == len(weights) - 1 else f"h{i}"
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [out], name=f"layer{i}"))
        if out != "y":
            nodes.append(helper.make_node("Relu", [out], [f"r{i}"], name=f"relu{i}"))
        last = f"r{i}"
    graph = helper.make_graph(
        nodes, "digits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        stored,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "net.onnx"))
    np.savez(folder / "calib.npz", x=rows[:200])
    np.savez(folder / "eval.npz", x=rows[200:], labels=labels[200:])
    return folder / "net.onnx"
