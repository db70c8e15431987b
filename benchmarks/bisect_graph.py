"""ONNX graphs as the bisection sees them: who makes and who reads a tensor; cut short, exposed, and opened up."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import ModelError, first_line
from deploykit.modelfile import dtype_name, external_files, read_model
from deploykit.specs import Array

if TYPE_CHECKING:
    import onnx

# Smaller weights stay in the file.
_INLINE_BYTES = 1024
_WEIGHTS = "deploykit-weights.data"
# Nodes that hand their input's values on, in another form or another order.
MOVEMENT_OPS = frozenset(
    {
        "Identity", "Cast", "CastLike", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose", "Dropout", "Slice",
        "Concat", "Split", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "DepthToSpace", "SpaceToDepth",
    }
)  # fmt: skip


class Graph:
    """The main graph of a model, with what is asked of it again and again.

    Args:
        model: Its tensors may be external; it is not changed.
        folder: Where its external data lie.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.nodes = list(model.graph.node)
        self.weights = {t.name: t for t in model.graph.initializer}
        self.inputs = [v.name for v in model.graph.input if v.name not in self.weights]
        self.outputs = [v.name for v in model.graph.output]
        self.reads = [list(dict.fromkeys(read_names(node))) for node in self.nodes]
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.constants = self._constants()

    def _constants(self) -> set[str]:
        """Names of all tensors that follow from no input."""
        known = set(self.weights) | {t.values.name for t in self.model.graph.sparse_initializer}
        for node, reads in zip(self.nodes, self.reads, strict=True):
            if all(name in known for name in reads) and not node.op_type.startswith(("Random", "Bernoulli", "Multi")):
                known.update(name for name in node.output if name)
        return known

    def consumers(self) -> dict[str, list[int]]:
        """Numbers of the nodes that read a tensor, by its name."""
        found: dict[str, list[int]] = {}
        for number, reads in enumerate(self.reads):
            for name in reads:
                found.setdefault(name, []).append(number)
        return found

    def label(self, number: int) -> str:
        """The node's name; where it has none, its first output's."""
        node = self.nodes[number]
        return str(node.name or next((name for name in node.output if name), node.op_type))

    def upstream(self, names: Iterable[str], given: frozenset[str] = frozenset()) -> set[int]:
        """Numbers of all nodes that the tensors follow from, up to tensors that are given."""
        found: set[int] = set()
        open_names = list(names)
        while open_names:
            name = open_names.pop()
            number = None if name in given else self.producer.get(name)
            if number is not None and number not in found:
                found.add(number)
                open_names += self.reads[number]
        return found

    def weight(self, name: str) -> Array | None:
        """The values of an initializer; None where there is none of that name."""
        from onnx import numpy_helper

        tensor = self.weights.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor, str(self.folder)))

    def types(self) -> dict[str, int | None]:
        """ONNX element types of the tensors that nodes make; None for what is no tensor, absent where unknown."""
        import onnx

        # Weights may be missing: shapes are not asked for, and types do not follow from values.
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model)
        except Exception:  # noqa: BLE001 - onnx raises what it likes; a runtime infers the types as well
            inferred = self.model
        found: dict[str, int | None] = {}
        for value in [*inferred.graph.value_info, *inferred.graph.output]:
            kind = value.type.WhichOneof("value")
            if kind == "tensor_type":
                if value.type.tensor_type.elem_type:
                    found[value.name] = value.type.tensor_type.elem_type
            elif kind is not None:
                found[value.name] = None
        return {name: found[name] for name in found if name in self.producer}

    def cut(self, outputs: Sequence[onnx.ValueInfoProto], extra: Sequence[onnx.NodeProto] = ()) -> onnx.ModelProto:
        """A model of the nodes that some tensors need, with these tensors as outputs.

        Args:
            outputs: What it gives out.
            extra: Nodes to append, whose outputs may be among them.
        """
        made = {name for node in extra for name in node.output}
        wanted = [v.name for v in outputs if v.name not in made] + [n for node in extra for n in read_names(node)]
        return self.part(self.upstream(wanted), [v for v in self.model.graph.input], outputs, extra)

    def part(
        self,
        numbers: Iterable[int],
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        extra: Sequence[onnx.NodeProto] = (),
    ) -> onnx.ModelProto:
        """A model of some of the nodes, in their order, with the weights that they read."""
        made = shell(self.model)
        kept = sorted(set(numbers))
        made.graph.node.extend([*(self.nodes[i] for i in kept), *extra])
        used = {name for i in kept for name in self.reads[i]} | {n for node in extra for n in read_names(node)}
        made.graph.input.extend(v for v in inputs if v.name not in self.weights or v.name in used)
        made.graph.output.extend(outputs)
        made.graph.initializer.extend(t for t in self.model.graph.initializer if t.name in used)
        made.graph.sparse_initializer.extend(self.model.graph.sparse_initializer)
        return made


def shell(model: onnx.ModelProto) -> onnx.ModelProto:
    """An empty model of the same opsets and IR version."""
    import onnx

    made = onnx.ModelProto()
    made.ir_version = model.ir_version
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.graph.name = "part"
    return made


def read_names(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the tensors that a node reads, those that its subgraphs take from outside included."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        yield from captured_names(graph)


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node: branches, bodies."""
    found: list[onnx.GraphProto] = []
    for attribute in node.attribute:
        found += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return found


def captured_names(graph: onnx.GraphProto) -> list[str]:
    """Names that a subgraph takes from outside."""
    inside = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    inside |= {name for node in graph.node for name in node.output}
    names = [name for node in graph.node for name in read_names(node)] + [v.name for v in graph.output]
    return [name for name in dict.fromkeys(names) if name not in inside]


def load_graph(path: Path, folder: Path) -> Graph:
    """Read a model for bisection; its weights go to (or are copied to) ``folder``, where cut models will stand.

    Cut models then hold no weights themselves: each is written in no time, whatever the size of the model.
    """
    import onnx
    from onnx import inliner

    model = read_model(path, weights=False)
    for location in sorted(external_files(model)):
        target = folder / location
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.parent / location, target)
    if model.functions:
        try:
            model = inliner.inline_local_functions(model)
        except Exception as exc:
            raise ModelError(f"the functions of {path} cannot be put into its graph ({first_line(exc)})") from exc
    onnx.save(
        model,
        str(folder / "whole.onnx"),
        save_as_external_data=True,
        location=_WEIGHTS,
        size_threshold=_INLINE_BYTES,
        convert_attribute=False,
    )
    # Saving moves the values out of the message, and leaves the references.
    return Graph(model, folder)


def value_of(name: str, array: Array) -> onnx.ValueInfoProto:
    """A tensor of an array's type and shape; OpenVINO wants to know the rank of what it is given."""
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def value_info(name: str, elem_type: int | None) -> onnx.ValueInfoProto:
    """A tensor of any shape; without a type where it is unknown, which ONNX Runtime fills in."""
    import onnx

    made = onnx.ValueInfoProto()
    made.name = name
    if elem_type is not None:
        made.type.tensor_type.elem_type = elem_type
    return made


def bytes_of(elem_type: int | None) -> int:
    """Bytes of one element; 8 where the type is not known."""
    try:
        return max(1, np.dtype(dtype_name(elem_type)).itemsize) if elem_type else 8
    except (TypeError, ModelError):
        return 8


def describe_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes that are plain values."""
    from onnx import AttributeProto, helper

    plain = (
        AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.FLOATS, AttributeProto.STRING,
        AttributeProto.STRINGS,
    )  # fmt: skip
    found = {}
    for attribute in node.attribute:
        if attribute.type in plain:
            value = helper.get_attribute_value(attribute)
            found[attribute.name] = _text(value) if not isinstance(value, list) else [_text(v) for v in value]
    return found


def _text(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def dequantized(graph: Graph) -> dict[str, str]:
    """The float tensor that a Q/DQ pair stands in for, by the name of what the pair makes."""
    found = {}
    for node in graph.nodes:
        maker = graph.producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if maker is not None and graph.nodes[maker].op_type == "QuantizeLinear":
            found[node.output[0]] = graph.nodes[maker].input[0]
    return found


def inline_branch(graph: Graph, number: int, taken: bool) -> Graph:
    """The graph with one If replaced by the branch that is taken."""
    import onnx

    node = graph.nodes[number]
    branch = next(a.g for a in node.attribute if a.name == ("then_branch" if taken else "else_branch"))
    made = onnx.ModelProto()
    made.CopyFrom(graph.model)
    ends = [
        onnx.helper.make_node("Identity", [inner.name], [outer], name=f"{graph.label(number)}/{outer}")
        for inner, outer in zip(branch.output, node.output, strict=False)
        if outer
    ]
    nodes = [*graph.nodes[:number], *branch.node, *ends, *graph.nodes[number + 1 :]]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(branch.initializer)
    made.graph.value_info.extend(branch.value_info)
    return Graph(made, graph.folder)


def body_of(graph: Graph, number: int, feeds: dict[str, Array]) -> Graph:
    """The body of a Loop as a model of its own; what it takes from outside becomes an input.

    Args:
        graph: The graph that holds the Loop.
        number: The Loop's.
        feeds: One iteration's inputs, by the body's names; they give the inputs' types.
    """
    body = next(a.g for a in graph.nodes[number].attribute if a.name == "body")
    made = shell(graph.model)
    made.graph.node.extend(body.node)
    made.graph.initializer.extend(body.initializer)
    made.graph.value_info.extend(body.value_info)
    made.graph.initializer.extend(graph.weights[name] for name in captured_names(body) if name in graph.weights)
    made.graph.input.extend(value_of(n, a) for n, a in feeds.items())
    made.graph.output.extend(body.output)
    return Graph(made, graph.folder)
