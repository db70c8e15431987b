"""Made-up inputs are inputs that a model can take: ids inside their tables, masks as padding makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.data import ValueRange, generate
from deploykit.exporters.onnx_file import vocabulary_ranges
from deploykit.modelfile import signature_of
from deploykit.specs import TensorSpec

VOCABULARY = 11


def ids_model(nodes: list[Any], weights: dict[str, Any] | None = None, domain: str = "") -> Any:
    table = np.zeros((VOCABULARY, 3), np.float32)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in {"table": table, **(weights or {})}.items()],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def branch(name: str) -> Any:
    node = helper.make_node("Gather", ["table", "ids"], [f"{name}_y"])
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)])


def through(*ops: Any) -> list[Any]:
    return [*ops, helper.make_node("Gather", ["table", "last"], ["y"])]


def through_one_hot(*ops: Any) -> list[Any]:
    wide = helper.make_node("Unsqueeze", ["ids", "two"], ["wide"])
    return [wide, *ops, helper.make_node("MatMul", ["hot", "table"], ["y"])]


GRAPHS = {
    "plain": [helper.make_node("Gather", ["table", "ids"], ["y"])],
    "cast": through(helper.make_node("Cast", ["ids"], ["last"], to=TensorProto.INT32)),
    "slice": through(helper.make_node("Slice", ["ids", "zero", "one"], ["last"])),
    "concat": through(helper.make_node("Concat", ["start", "ids"], ["last"], axis=1)),
    "transpose": through(
        helper.make_node("Transpose", ["ids"], ["t"]), helper.make_node("Expand", ["t", "shape"], ["last"])
    ),
    "one-hot": through_one_hot(helper.make_node("OneHot", ["wide", "depth", "off_on"], ["hot"])),
    "compared": through_one_hot(
        helper.make_node("Equal", ["classes", "wide"], ["same"]),
        helper.make_node("Cast", ["same"], ["hot"], to=TensorProto.FLOAT),
    ),
    "branch": [helper.make_node("If", ["yes"], ["y"], then_branch=branch("a"), else_branch=branch("b"))],
    "quantized table": [
        helper.make_node("DequantizeLinear", ["small", "scale"], ["wide"]),
        helper.make_node("Gather", ["wide", "ids"], ["y"]),
    ],
    "fused": [
        helper.make_node(
            "EmbedLayerNormalization", ["ids", "", "table", "table", "", "g", "g"], ["y", "i"], domain="com.microsoft"
        )
    ],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_ids_stay_inside_their_table(name: str) -> None:
    weights = {
        "zero": np.array([0]), "one": np.array([1]), "start": np.zeros((1, 1), np.int64), "shape": np.array([4, 4]),
        "yes": np.array(True), "small": np.zeros((VOCABULARY, 3), np.int8), "scale": np.float32(1),
        "g": np.zeros(3, np.float32), "two": np.array([2]), "depth": np.array([VOCABULARY]),
        "off_on": np.array([0, 1], np.float32), "classes": np.arange(VOCABULARY).reshape(1, 1, VOCABULARY),
    }  # fmt: skip
    model = ids_model(GRAPHS[name], weights, "com.microsoft" if name == "fused" else "")
    inputs = signature_of(model).inputs
    ranges = vocabulary_ranges(model, inputs)
    assert ranges == {"ids": ValueRange(0, VOCABULARY - 1)}
    made = generate(inputs, {"batch": 50, "sequence": 20}, ranges=ranges)["ids"]
    assert (made.min(), made.max()) == (0, VOCABULARY - 1)


def test_smallest_table_counts() -> None:
    nodes = [*GRAPHS["cast"], helper.make_node("Gather", ["other", "ids"], ["z"])]
    model = ids_model(nodes, {"other": np.zeros((5, 2), np.float32)})
    assert vocabulary_ranges(model, signature_of(model).inputs) == {"ids": ValueRange(0, 4)}


def test_numbers_that_index_nothing_have_no_range() -> None:
    nodes = [helper.make_node("Cast", ["ids"], ["f"], to=TensorProto.FLOAT), helper.make_node("Relu", ["f"], ["y"])]
    model = ids_model(nodes)
    assert vocabulary_ranges(model, signature_of(model).inputs) == {}


def test_a_number_to_compare_ids_with_is_no_table() -> None:
    """The id of padding is one of many."""
    equal = helper.make_node("Equal", ["ids", "pad"], ["same"])
    model = ids_model([equal, helper.make_node("Cast", ["same"], ["y"], to=TensorProto.FLOAT)], {"pad": np.array(5)})
    assert vocabulary_ranges(model, signature_of(model).inputs) == {}


@pytest.mark.parametrize("dtype", ["int64", "int32", "bool", "float32"])
def test_masks_are_padding(dtype: str) -> None:
    mask = generate([TensorSpec("attention_mask", dtype, ("b", "s"))], {"b": 40, "s": 9})["attention_mask"]
    assert mask.dtype.name == dtype
    assert set(np.unique(mask).astype(int)) == {0, 1}
    assert mask[:, 0].all()
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()
    assert generate([TensorSpec("attention_mask", dtype, ())], {})["attention_mask"].shape == ()
    given = generate([TensorSpec("mask", "int64", (3, 3))], {}, ranges={"mask": ValueRange(1, 1)})["mask"]
    assert given.all()
