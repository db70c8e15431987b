"""What the elements of a computed shape are: constants, and sizes of other tensors.

`Concat([-1], Shape(x)[-2:-1], [64])` is the list `[-1, Dim(x, 2), 64]`. Two shapes with equal lists are equal whatever
the inputs are, which is what a rewrite of Reshape has to prove.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.optimizers.editor import GraphEditor, attribute

if TYPE_CHECKING:
    import onnx

_DEPTH = 30


@dataclass(frozen=True, slots=True)
class Dim:
    """The size of one axis of a tensor."""

    tensor: str
    axis: int


Term = int | Dim


def shape_terms(graph: GraphEditor, name: str, depth: int = _DEPTH) -> list[Term] | None:
    """The elements of an integer tensor of rank 0 or 1; None where they are not known."""
    if depth == 0:
        return None
    value = graph.constant(name, 16)
    if value is not None:
        return [int(v) for v in value.reshape(-1)] if value.ndim < 2 and value.dtype.kind == "i" else None
    node = graph.maker(name)
    if node is None:
        return None
    if node.op_type == "Shape":
        return _sizes(graph, node)
    if node.op_type in ("Squeeze", "Unsqueeze", "Cast", "Identity"):
        return shape_terms(graph, node.input[0], depth - 1)
    if node.op_type == "Concat":
        found: list[Term] = []
        for part in node.input:
            terms = shape_terms(graph, part, depth - 1)
            if terms is None:
                return None
            found += terms
        return found
    if node.op_type == "Gather":
        terms, indices = shape_terms(graph, node.input[0], depth - 1), graph.constant(node.input[1], 16)
        if terms is None or indices is None or indices.ndim > 1:
            return None
        return [terms[int(i)] for i in indices.reshape(-1) if -len(terms) <= int(i) < len(terms)]
    return _slice(graph, node, depth) if node.op_type == "Slice" else None


def _sizes(graph: GraphEditor, node: onnx.NodeProto) -> list[Term] | None:
    shape = graph.shape(node.input[0])
    if shape is None:
        return None
    every: list[Term] = [size if isinstance(size, int) else Dim(node.input[0], axis) for axis, size in enumerate(shape)]
    start, end = attribute(node, "start", 0), attribute(node, "end")
    return every[start:end]


def _slice(graph: GraphEditor, node: onnx.NodeProto, depth: int) -> list[Term] | None:
    terms = shape_terms(graph, node.input[0], depth - 1)
    if terms is None or len(node.input) < 3:
        return None
    bounds = [graph.scalar(name) for name in node.input[1:3]]
    axis = graph.scalar(node.input[3]) if len(node.input) > 3 and node.input[3] else 0
    step = graph.scalar(node.input[4]) if len(node.input) > 4 and node.input[4] else 1
    if bounds[0] is None or bounds[1] is None or axis not in (0, -1) or step != 1:
        return None
    return terms[int(bounds[0]) : int(bounds[1])]


def axis_terms(graph: GraphEditor, name: str) -> list[Term] | None:
    """The sizes of a tensor as terms: what `Shape` of it would give."""
    shape = graph.shape(name)
    if shape is None:
        return None
    return [size if isinstance(size, int) else Dim(name, axis) for axis, size in enumerate(shape)]
