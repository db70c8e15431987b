"""Walking through an ONNX model: every node, wherever it stands, and every tensor that the file stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class Located:
    """A node and its place.

    Attributes:
        node: The node.
        where: "" in the main graph, else the way to it: "If 'name'.then_branch", "function domain.Name".
        opsets: Version by domain that holds there; the default domain is "".
    """

    node: onnx.NodeProto
    where: str
    opsets: Mapping[str, int]

    @property
    def domain(self) -> str:
        """The operator's domain, "" for the standard's."""
        return domain_of(self.node)

    @property
    def label(self) -> str:
        """Name, or what tells a nameless node from others: its first output."""
        name = repr(self.node.name) if self.node.name else f"that makes {next(iter(self.node.output), '')!r}"
        return f"{name} in {self.where}" if self.where else name


def domain_of(node: onnx.NodeProto) -> str:
    """The operator's domain, "" for the standard's."""
    return "" if node.domain in DEFAULT_DOMAINS else str(node.domain)


def opsets_of(model: onnx.ModelProto | onnx.FunctionProto) -> dict[str, int]:
    """Version by domain; the default domain is ""."""
    return {"" if o.domain in DEFAULT_DOMAINS else o.domain: int(o.version) for o in model.opset_import}


def walk(model: onnx.ModelProto) -> Iterator[Located]:
    """Every node of the graph, its subgraphs and the model's own functions; a function's body once."""
    yield from _nodes(model.graph.node, "", opsets_of(model))
    for function in model.functions:
        opsets = opsets_of(model) | opsets_of(function)
        yield from _nodes(function.node, f"function {function.domain}.{function.name}", opsets)


def _nodes(nodes: object, where: str, opsets: Mapping[str, int]) -> Iterator[Located]:
    for node in nodes:  # type: ignore[attr-defined]
        found = Located(node, where, opsets)
        yield found
        for key, graph in subgraphs(node):
            yield from _nodes(graph.node, f"{node.op_type} {found.label}.{key}", opsets)


def subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """The graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for number, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}[{number}]", graph


def stored_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Initializers and the tensors of Constant nodes, wherever they stand, by name."""
    graphs = [model.graph]
    for located in walk(model):
        graphs += [graph for _, graph in subgraphs(located.node)]
        if located.node.op_type == "Constant" and not located.domain:
            for attribute in located.node.attribute:
                if attribute.name == "value":
                    yield located.node.output[0], attribute.t
    for graph in graphs:
        for tensor in graph.initializer:
            yield tensor.name, tensor
        for sparse in graph.sparse_initializer:
            yield sparse.values.name, sparse.values


def element_bits(elem_type: int) -> float:
    """Bits of one element in memory; 0 for strings, whose size is their own."""
    import onnx

    kinds = onnx.TensorProto
    narrow = {getattr(kinds, n, -1): b for n, b in _NARROW_BITS.items()}
    if elem_type in narrow:
        return narrow[elem_type]
    if elem_type in (kinds.STRING, kinds.UNDEFINED):
        return 0
    try:
        return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize)
    except (KeyError, ValueError):
        return 0


_NARROW_BITS = {
    "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6,
}  # fmt: skip


def type_name(elem_type: int) -> str:
    """An element type as numpy and the ONNX standard call it: "float32", "int4"."""
    import onnx

    name = onnx.TensorProto.DataType.Name(elem_type).lower() if elem_type in _all_types() else f"type {elem_type}"
    return {"float": "float32", "double": "float64"}.get(name, name)


def _all_types() -> frozenset[int]:
    import onnx

    return frozenset(onnx.TensorProto.DataType.values())
