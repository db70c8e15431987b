"""`inspect --diff`: what two models have different, weights included."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from deploykit.diffing import diff_models

F32 = np.float32


def weight_of(model: onnx.ModelProto) -> onnx.TensorProto:
    return model.graph.initializer[0]


def test_a_model_and_itself(linear: Any, save: Any, tmp_path: Path) -> None:
    path = save(linear(), tmp_path)
    found = diff_models(path, path)
    assert found["same"] == ["inputs", "outputs", "opsets", "ir_version"]
    assert (found["signature"], found["opsets"], found["ops"], found["parameters_by_dtype"]) == ([], {}, {}, {})
    assert found["macs"] == {"a": 12, "b": 12, "delta": 0}
    assert found["initializers"] == {"equal": 1, "changed": [], "only_a": [], "only_b": []}
    json.dumps(found)


def test_changed_values_have_their_largest_difference_and_sqnr(linear: Any, save: Any, tmp_path: Path) -> None:
    a, b = linear(), linear()
    values = numpy_helper.to_array(weight_of(b)).copy()
    values[0, 0] += 0.5
    weight_of(b).CopyFrom(numpy_helper.from_array(values, "w"))
    found = diff_models(save(a, tmp_path, "a.onnx"), save(b, tmp_path, "b.onnx"))["initializers"]
    power = float(np.square(np.arange(12.0)).sum())
    expected = {
        "name": "w", "a": "float32[4, 3]", "b": "float32[4, 3]", "max_abs": 0.5,
        "sqnr_db": round(10 * math.log10(power / 0.25), 2),
    }  # fmt: skip
    assert found["changed"] == [expected]


def test_operators_signature_sizes_and_weights_that_only_one_has(
    build: Any, linear: Any, save: Any, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    other = build(nodes, {"x": ["n", 4]}, {"y": ["n", 6]}, {"v": np.ones((4, 6), F32)}, opset=19, ir_version=9)
    found = diff_models(save(linear(), tmp_path, "a.onnx"), save(other, tmp_path, "b.onnx"), dims={"n": 10})
    assert found["opsets"] == {"": {"a": 18, "b": 19}}
    assert found["ops"] == {"Relu": {"a": 0, "b": 1, "delta": 1}}
    assert found["macs"] == {"a": 120, "b": 240, "delta": 120}
    assert found["parameters"]["count"] == {"a": 12, "b": 24, "delta": 12}
    assert [(s["role"], s["name"]) for s in found["signature"]] == [("output", "y")]
    weights = found["initializers"]
    assert [w["name"] for w in weights["only_a"]] == ["w"] and [w["name"] for w in weights["only_b"]] == ["v"]


def test_the_order_of_outputs_is_a_difference(build: Any, save: Any, tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["p"]), helper.make_node("Neg", ["x"], ["q"])]
    a = build(nodes, {"x": [2]}, {"p": [2], "q": [2]})
    b = build(nodes, {"x": [2]}, {"q": [2], "p": [2]})
    found = diff_models(save(a, tmp_path, "a.onnx"), save(b, tmp_path, "b.onnx"))["signature"]
    assert found == [{"role": "output", "name": "(order)", "a": ["p", "q"], "b": ["q", "p"]}]


@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_quantized_weight_is_compared_by_what_it_stands_for(
    build: Any, save: Any, tmp_path: Path, axis: int | None
) -> None:
    rng = np.random.default_rng(0)
    # A square: the axis of the scales cannot be read from their number.
    weight = (rng.standard_normal((16, 16)) * np.logspace(-2, 1, 16)).astype(F32)
    weight = weight.T.copy() if axis == 0 else weight
    over = None if axis is None else 1 - axis
    scale = np.abs(weight).max(over, keepdims=over is not None).astype(F32) / 127
    integers = np.round(weight / scale).astype(np.int8)
    a = build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [1, 16]}, {"y": [1, 16]}, {"w": weight})
    nodes = [
        helper.make_node("DequantizeLinear", ["w_quantized", "w_scale", "w_zero_point"], ["d"], axis=axis or 0),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    points = np.zeros(np.size(scale), np.int8).reshape(-1 if axis is not None else ())
    stored = {"w_quantized": integers, "w_scale": scale.reshape(points.shape), "w_zero_point": points}
    b = build(nodes, {"x": [1, 16]}, {"y": [1, 16]}, stored)
    found = diff_models(save(a, tmp_path, "a.onnx"), save(b, tmp_path, "b.onnx"))["initializers"]
    (record,) = found["changed"]
    assert record["b"] == "int8[16, 16], dequantized"
    error = weight - integers * scale
    assert record["max_abs"] == pytest.approx(float(np.abs(error).max()), rel=1e-5)
    assert record["sqnr_db"] == pytest.approx(
        10 * math.log10(float(np.square(weight, dtype=float).sum() / np.square(error, dtype=float).sum())), abs=0.02
    )
    assert found["only_a"] == []


def test_shapes_types_nan_and_external_data(build: Any, save: Any, tmp_path: Path) -> None:
    def model(weights: dict[str, Any]) -> onnx.ModelProto:
        return build([helper.make_node("Identity", ["x"], ["y"])], {"x": [1]}, {"y": [1]}, weights)

    a = model({"shape": np.ones(3, F32), "type": np.ones(3, F32), "nan": np.array([1, np.nan], F32), "same": F32(1)})
    b = model({"shape": np.ones(4, F32), "type": np.ones(3, np.float64), "nan": np.array([2, 1], F32), "same": F32(1)})
    first = save(a, tmp_path, "a.onnx")
    second = tmp_path / "b.onnx"
    onnx.save(b, str(second), save_as_external_data=True, location="b.data", size_threshold=0)
    found = diff_models(first, second)["initializers"]
    assert found["equal"] == 1
    by_name = {r["name"]: r for r in found["changed"]}
    assert set(by_name) == {"shape", "type", "nan"}
    assert by_name["shape"]["max_abs"] is None and by_name["nan"]["max_abs"] is None
    assert (by_name["type"]["b"], by_name["type"]["max_abs"]) == ("float64[3]", 0.0)
    json.dumps(found, allow_nan=False)
