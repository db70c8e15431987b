"""Nodes of a model wherever they are, and what they say about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.modelfile import read_model

if TYPE_CHECKING:
    import onnx

_QUANTIZED_OPS = ("QuantizeLinear", "DequantizeLinear", "ConvInteger", "QGemm", "QMoE", "GatherBlockQuantized")
_QUANTIZED_PREFIXES = (
    "QLinear",
    "QAttention",
    "QOrdered",
    "QEmbed",
    "MatMulInteger",
    "MatMulNBits",
    "MatMulBnb4",
    "MatMulFpQ4",
    "DynamicQuantize",
)
_RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node: of the main graph, of its subgraphs, and of the model's functions."""

    def walk(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            yield node
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    yield from walk(graph.node)

    yield from walk(model.graph.node)
    for function in model.functions:
        yield from walk(function.node)


def random_ops(model: onnx.ModelProto) -> list[str]:
    """Operators of a model that draw random numbers; Dropout where it has a switch for training."""
    return sorted(
        {
            n.op_type
            for n in all_nodes(model)
            if n.op_type in _RANDOM_OPS or (n.op_type == "Dropout" and len(n.input) > 2 and n.input[2])
        }
    )


def is_quantized_op(op: str) -> bool:
    """Whether an operator works on quantized values, or makes them."""
    return op in _QUANTIZED_OPS or op.startswith(_QUANTIZED_PREFIXES)


def quantized_ops(model: onnx.ModelProto) -> list[str]:
    """Operators of a model that work on quantized values, or make them."""
    return sorted({n.op_type for n in all_nodes(model) if is_quantized_op(n.op_type)})


_MOVES = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Cast", "Slice", "Split", "Concat")
_BOUNDED = ("Sigmoid", "Softmax")


def bounded_outputs(path: Path) -> frozenset[str]:
    """Outputs of an ONNX file that hold nothing but results of Sigmoid or Softmax; none of another format."""
    if path.suffix != ".onnx":
        return frozenset()
    model = read_model(path, weights=False)
    makers = {name: node for node in model.graph.node for name in node.output}

    def is_bounded(name: str) -> bool:
        node = makers.get(name)
        if node is None:
            return False
        if node.op_type in _BOUNDED:
            return True
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        return node.op_type in _MOVES and all(is_bounded(source) for source in sources)

    return frozenset(value.name for value in model.graph.output if is_bounded(value.name))
