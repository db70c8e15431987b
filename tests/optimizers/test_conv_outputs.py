"""Quantizers behind convolutions that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.data import Dataset
from deploykit.optimizers import StaticConfig, optimize
from deploykit.optimizers.conv_outputs import bare_outputs, quantize_outputs
from deploykit.optimizers.ranges import Ranges
from deploykit.optimizers.repair_pairs import PairEditor
from deploykit.proof import layers_of, runs_in_integers
from deploykit.runtimes import open_session

RNG = np.random.default_rng(0)
F32 = np.float32


def normalized(folder: Path) -> Path:
    """Convolution, Relu, normalization: NNCF leaves the second and the third in float."""
    values = {
        "w0": RNG.normal(0, 0.3, (8, 3, 3, 3)), "w1": RNG.normal(0, 0.2, (8, 8, 3, 3)), "one": np.ones(8),
        "half": np.full(8, 0.5), "b": RNG.normal(size=8),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b"], ["c0"], name="first"),
        helper.make_node("Relu", ["c0"], ["r0"], name="relu"),
        helper.make_node("BatchNormalization", ["r0", "one", "b", "half", "one"], ["n0"], name="norm"),
        helper.make_node("Conv", ["n0", "w1", "b"], ["c1"], name="second"),
        helper.make_node("Sigmoid", ["c1"], ["y"], name="sigmoid"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 8, 8])],
        [numpy_helper.from_array(v.astype(F32), k) for k, v in values.items()],
    )  # fmt: skip
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def run(path: Path) -> Any:
    return open_session(path, threads=1).run


def test_both_convolutions_run_in_integers(tmp_path: Path) -> None:
    data = {"x": RNG.normal(size=(32, 3, 12, 12)).astype(F32)}
    source, target, raw = normalized(tmp_path), tmp_path / "q.onnx", tmp_path / "nncf.onnx"
    result = optimize(
        source, StaticConfig(engine="nncf"), target, check=lambda p: None, open_model=run,
        data=Dataset.from_arrays(data), keep_float=tmp_path / "float.onnx",
    )  # fmt: skip
    assert result.params["outputs_quantized"] == 2
    assert any("2 convolutions given a quantizer behind them" in note for note in result.notes)
    assert bare_outputs(PairEditor(onnx.load(raw), tmp_path)) == ["r0", "c1"]
    assert bare_outputs(PairEditor(onnx.load(target), tmp_path)) == []
    for device in ("ort:cpu", "openvino:cpu"):
        with open_session(target, device) as session:
            executed = session.executed()
        assert all(runs_in_integers(layer, executed) for layer in layers_of(onnx.load(target)))
    want, have = run(source)(data)["y"], run(target)(data)["y"]
    assert 10 * np.log10(np.square(want).sum() / np.square(want - have).sum()) > 25
    onnx.checker.check_model(onnx.load(target), full_check=True)


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(0.0, 4.0, 0), (-1.0, 3.0, 64), (-2.0, 0.0, 255), (0.0, 0.0, None), (0.0, np.inf, None)]
)
def test_ranges_become_codes(tmp_path: Path, low: float, high: float, zero: int | None) -> None:
    graph = PairEditor(onnx.load(normalized(tmp_path)), tmp_path)
    count = quantize_outputs(graph, ["r0"], Ranges({"r0": low}, {"r0": high}))
    graph.finish()
    found = [n for n in graph.model.graph.node if n.op_type == "QuantizeLinear"]
    assert (count, len(found)) == ((0, 0) if zero is None else (1, 1))
    if zero is not None:
        params = graph.params(found[0])
        assert params is not None and params.zero.dtype == np.uint8 and int(params.zero) == zero
        assert float(params.lowest()) == pytest.approx(low, abs=float(params.scale))
        norm = next(n for n in graph.model.graph.node if n.name == "norm")
        assert norm.input[0] == "r0_dequantized"


def test_no_range_leaves_it(tmp_path: Path) -> None:
    graph = PairEditor(onnx.load(normalized(tmp_path)), tmp_path)
    assert quantize_outputs(graph, ["r0"], Ranges({}, {})) == 0
