"""Memory by liveness, and how much of a model is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from deploykit.costs import Peak, count_quantized, peak_memory
from deploykit.shaping import trace_model

F32 = np.float32


def peak(model: onnx.ModelProto, **sizes: int) -> Peak:
    trace = trace_model(model, Path("m.onnx"), sizes)
    stored = {w.name for w in model.graph.initializer}
    return peak_memory(trace, {i.name: trace.values[i.name] for i in model.graph.input if i.name not in stored})


def quantized(model: onnx.ModelProto) -> dict[str, Any]:
    return count_quantized(trace_model(model, Path("m.onnx"), {})).as_dict()


def test_a_tensor_lives_until_its_last_reader(build: Any) -> None:
    # x 400 B all along; a 400, then b 400 beside a; c 400 needs a and b; y 400.
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("Relu", ["a"], ["b"], name="b"),
        helper.make_node("Add", ["a", "b"], ["c"], name="c"),
        helper.make_node("Relu", ["c"], ["y"], name="y"),
    ]
    assert peak(build(nodes, {"x": ["n", 10]}, {"y": None}), n=10) == Peak(4 * 400, "'c'", 0)
    chain = [nodes[0], nodes[1], helper.make_node("Relu", ["b"], ["y"], name="y")]
    assert peak(build(chain, {"x": [10, 10]}, {"y": None})).bytes == 3 * 400


def test_a_view_takes_no_memory_and_keeps_its_source_alive(build: Any) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Reshape", ["a", "to"], ["v"]),
        helper.make_node("Relu", ["v"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    model = build(nodes, {"x": [10, 10]}, {"y": None}, {"to": np.array([100])})
    assert peak(model).bytes == 3 * 400


def test_weights_are_no_activations_and_types_have_their_width(build: Any) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["y"], to=1),
    ]
    assert peak(build(nodes, {"x": [100]}, {"y": None}, {"unused": np.ones(1000, F32)})).bytes == 400 + 200 + 400


def test_a_body_adds_its_own_peak_and_unknown_sizes_are_counted(build: Any) -> None:
    def branch(name: str) -> onnx.GraphProto:
        nodes = [helper.make_node("Concat", ["x", "x", "x"], ["t" + name], axis=0),
                 helper.make_node("ReduceMax", ["t" + name], [name], keepdims=0)]  # fmt: skip
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [])])

    nodes = [
        helper.make_node("If", ["c"], ["m"], then_branch=branch("p"), else_branch=branch("q")),
        helper.make_node("NonZero", ["x"], ["y"]),
    ]
    found = peak(build(nodes, {"x": [100]}, {"y": None, "m": None}, {"c": np.array(True)}))
    assert found.bytes == 400 + 4 + 1200 + 4
    assert found.unknown == 1


def qdq(name: str, source: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [source, "s", "z"], [name + "_q"]),
        helper.make_node("DequantizeLinear", [name + "_q", "s", "z"], [name]),
    ]


CONSTANTS = {"s": F32(0.1), "z": np.uint8(0), "ws": F32(0.1), "wz": np.int8(0)}


def test_a_product_between_dequantized_tensors_is_integer(build: Any) -> None:
    nodes = [
        *qdq("xd", "x"),
        helper.make_node("DequantizeLinear", ["w8", "ws", "wz"], ["wd"]),
        helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["xd", "wt"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    weights = CONSTANTS | {"w8": np.ones((3, 4), np.int8), "w": np.ones((3, 5), F32)}
    found = quantized(build(nodes, {"x": [2, 4]}, {"y": None}, weights))
    assert found["nodes"] == {"integer": 1, "weight_only": 0, "float": 1, "share": 0.5}
    assert found["macs"] == {"integer": 24, "weight_only": 0, "float": 30, "share": 0.4444}
    assert found["weights"] == {"integer": 12, "weight_only": 0, "float": 15, "share": 0.4444}


def test_a_dequantized_weight_alone_is_weight_only(build: Any) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "ws", "wz"], ["wd"]),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    found = quantized(build(nodes, {"x": [2, 4]}, {"y": None}, CONSTANTS | {"w8": np.ones((4, 3), np.int8)}))
    assert found["nodes"] == {"integer": 0, "weight_only": 1, "float": 0, "share": 1.0}
    assert found["weights"]["weight_only"] == 12


def test_dequantized_from_32_bits_is_not_quantized(build: Any) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w32", "ws"], ["wd"]),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    found = quantized(build(nodes, {"x": [2, 4]}, {"y": None}, CONSTANTS | {"w32": np.ones((4, 3), np.int32)}))
    assert found["nodes"]["float"] == 1 and found["weights"]["share"] == 0.0


def test_a_weight_that_two_nodes_share_counts_once_and_a_model_without_products_has_no_share(build: Any) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    assert quantized(build(nodes, {"x": [2, 4]}, {"y": None}, {"w": np.ones((4, 4), F32)}))["weights"]["float"] == 16
    relu = quantized(build([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": None}))
    assert relu["nodes"]["share"] is None
