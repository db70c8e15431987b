"""Shapes of every tensor of an ONNX graph when its dynamic dimensions have given sizes.

Nodes are visited one by one, in the file's order. ONNX's own inference (`onnx.shape_inference.infer_node_outputs`)
gives the outputs; small tensors whose values follow from shapes and constants are computed by ONNX's reference
evaluator, so that Shape -> Gather -> Concat -> Reshape chains have an end. Bodies of If, Loop and Scan are followed.
What depends on data stays unknown, and is said to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.contrib_shapes import CONTRIB_SHAPES
from deploykit.graphs import domain_of, opsets_of, subgraphs
from deploykit.specs import Array, terms

if TYPE_CHECKING:
    import onnx

# Values are followed in tensors up to this size: shapes, axes, pads, scales; not weights.
_SMALL = 256
_FOLDED = frozenset(
    {
        "Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "CumSum", "Div", "Equal", "Expand", "Floor",
        "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max",
        "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "Or", "Pow", "Range", "ReduceMax", "ReduceMin", "ReduceProd",
        "ReduceSum", "Reshape", "Round", "ScatterND", "Shape", "Sign", "Size", "Slice", "Split", "Sqrt", "Squeeze",
        "Sub", "Tile", "Transpose", "Unsqueeze", "Where", "Xor",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Value:
    """What is known about a tensor.

    Attributes:
        elem_type: ONNX element type; 0 where it is not known.
        shape: Sizes, None for one that is not known; None where the rank is not known.
        data: The values, where they are few and follow from shapes and constants.
        stored: Whether it is a weight or a constant of the file.
    """

    elem_type: int = 0
    shape: tuple[int | None, ...] | None = None
    data: Array | None = None
    stored: bool = False

    @property
    def size(self) -> int | None:
        """Number of elements, None where it is not known."""
        if self.shape is None or any(d is None for d in self.shape):
            return None
        return math.prod(d for d in self.shape if d is not None)

    @property
    def dims(self) -> tuple[int, ...] | None:
        """The shape where all of it is known."""
        return None if self.size is None else tuple(d for d in self.shape or () if d is not None)


UNKNOWN = Value()


@dataclass(frozen=True, slots=True)
class Body:
    """A subgraph of a node.

    Attributes:
        key: The attribute's name: "then_branch", "body".
        trace: What happens in it.
        times: How often it runs in one run of the node; None where that depends on data.
    """

    key: str
    trace: Trace
    times: int | None


@dataclass(frozen=True, slots=True)
class Visit:
    """A node with what is known about its tensors; a missing optional one is None."""

    node: onnx.NodeProto
    label: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value | None, ...]
    bodies: tuple[Body, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """One graph.

    Attributes:
        visits: Its nodes, in order.
        values: What is known about its own tensors, by name.
        outputs: Names of its outputs.
        failures: Why inference gave up at a node, by the node's label.
    """

    visits: list[Visit] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)


def trace_model(model: onnx.ModelProto, path: Path, sizes: Mapping[str, int]) -> Trace:
    """Follow the shapes through a model.

    Args:
        model: Weights may be left in their files; small ones are read from there.
        path: Where the model's file is.
        sizes: Size by symbol of the inputs; unnamed dimensions are called `<input>_dim<axis>`.
    """
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    return _Tracer(model, path, sizes).graph(model.graph, {}, "")


class _Tracer:
    """Holds what is the same in all graphs of a model."""

    def __init__(self, model: onnx.ModelProto, path: Path, sizes: Mapping[str, int]) -> None:
        self._opsets = opsets_of(model)
        self._imports = list(model.opset_import)
        self._folder = path.parent
        self._sizes = sizes

    def graph(
        self, graph: onnx.GraphProto, outer: Mapping[str, Value], where: str, inputs: Mapping[str, Value] | None = None
    ) -> Trace:
        """Visit one graph.

        Args:
            graph: The graph.
            outer: What is known outside of it.
            where: Its place, "" for the main graph.
            inputs: What its inputs are; for the main graph they are as declared.
        """
        trace = Trace(outputs=tuple(o.name for o in graph.output))
        known: dict[str, Value] = dict(outer)
        for tensor in graph.initializer:
            trace.values[tensor.name] = self._stored(tensor)
        for sparse in graph.sparse_initializer:
            trace.values[sparse.values.name] = Value(sparse.values.data_type, tuple(sparse.dims), stored=True)
        for value in graph.input:
            given = (inputs or {}).get(value.name)
            trace.values.setdefault(value.name, given or self._declared(value))
        known |= trace.values
        for node in graph.node:
            label = repr(node.name) if node.name else f"that makes {next(iter(node.output), '')!r}"
            visit = self._visit(node, f"{label} in {where}" if where else label, known, trace)
            trace.visits.append(visit)
            for name, made in zip(node.output, visit.outputs, strict=True):
                if name and made is not None:
                    trace.values[name] = known[name] = made
        return trace

    def _declared(self, value: onnx.ValueInfoProto) -> Value:
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            return Value(tensor.elem_type)
        dims: list[int | None] = []
        for axis, dim in enumerate(tensor.shape.dim):
            fixed = dim.HasField("dim_value") and dim.dim_value >= 0
            dims.append(dim.dim_value if fixed else size_of(dim.dim_param or f"{value.name}_dim{axis}", self._sizes))
        return Value(tensor.elem_type, tuple(dims))

    def _stored(self, tensor: onnx.TensorProto) -> Value:
        return Value(tensor.data_type, tuple(tensor.dims), small_values(tensor, self._folder), stored=True)

    def _visit(self, node: onnx.NodeProto, label: str, known: dict[str, Value], trace: Trace) -> Visit:
        inputs = tuple(known.get(name, UNKNOWN) if name else None for name in node.input)
        domain = domain_of(node)
        bodies: tuple[Body, ...] = ()
        try:
            if not domain and node.op_type in ("If", "Loop", "Scan"):
                bodies, made = _CONTROL[node.op_type](self, node, label, inputs, known)
            elif not domain and node.op_type == "Constant":
                made = [self._constant(node)]
            elif domain in CONTRIB_SHAPES:
                made = _contrib(node, domain, inputs)
            else:
                made = self._fold(node, inputs) or self._infer(node, domain, inputs)
        except Exception as exc:  # noqa: BLE001 - a graph that no inference understands is still inspected
            from deploykit.errors import first_line

            trace.failures[label] = first_line(exc)
            made = []
        outputs = [*made, *[UNKNOWN] * len(node.output)][: len(node.output)]
        return Visit(
            node, label, inputs, tuple(v if n else None for n, v in zip(node.output, outputs, strict=True)), bodies
        )

    def _constant(self, node: onnx.NodeProto) -> Value:
        import onnx

        for attribute in node.attribute:
            if attribute.name == "value":
                return self._stored(attribute.t)
            if attribute.name == "sparse_value":
                sparse = attribute.sparse_tensor
                return Value(sparse.values.data_type, tuple(sparse.dims), stored=True)
            raw = onnx.helper.get_attribute_value(attribute)
            if attribute.name in ("value_int", "value_ints"):
                return _known(np.asarray(raw, np.int64), onnx.TensorProto.INT64, stored=True)
            if attribute.name in ("value_float", "value_floats"):
                return _known(np.asarray(raw, np.float32), onnx.TensorProto.FLOAT, stored=True)
            if attribute.name in ("value_string", "value_strings"):
                count = () if attribute.name == "value_string" else (len(raw),)
                return Value(onnx.TensorProto.STRING, count, stored=True)
        return UNKNOWN

    def _fold(self, node: onnx.NodeProto, inputs: Sequence[Value | None]) -> list[Value] | None:
        """Values of the outputs, where they follow from values that are known and are few."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        if domain_of(node) or node.op_type not in _FOLDED:
            return None
        by_shape = node.op_type in ("Shape", "Size")
        if by_shape:
            # Only the shape of the input counts; its values need not exist.
            dims = inputs[0].dims if inputs and inputs[0] else None
            feeds = None if dims is None else [np.broadcast_to(np.float32(0), dims)]
        else:
            feeds = [v.data for v in inputs if v is not None and v.data is not None]
            if len(feeds) != sum(v is not None for v in inputs):
                feeds = None
        if feeds is None:
            return None
        if node.op_type == "ConstantOfShape" and math.prod(int(d) for d in feeds[0]) > _SMALL:
            return None
        if node.op_type in ("Expand", "Tile") and feeds[0].size * math.prod(int(d) for d in feeds[1]) > _SMALL:
            return None
        names = [n for n in node.input if n]
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info(n, 1, None) for n in dict.fromkeys(names)],
            [helper.make_tensor_value_info(n, 1, None) for n in node.output if n],
        )  # fmt: skip
        small = helper.make_model(graph, opset_imports=self._imports)
        results = ReferenceEvaluator(small).run(None, dict(zip(names, feeds, strict=True)))
        made = iter(results)
        found = []
        for name in node.output:
            array = np.asarray(next(made)) if name else np.zeros(0)
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            found.append(_known(array, kind) if array.size <= _SMALL else Value(kind, array.shape))
        return found

    def _infer(self, node: onnx.NodeProto, domain: str, inputs: Sequence[Value | None]) -> list[Value]:
        import onnx
        from onnx import numpy_helper

        schema = onnx.defs.get_schema(node.op_type, self._opsets.get(domain, 1), domain)
        types, data = {}, {}
        for name, value in zip(node.input, inputs, strict=True):
            if value is None:
                continue
            types[name] = _type_proto(value)
            if value.data is not None:
                data[name] = numpy_helper.from_array(value.data, name)
        if domain_of(node) == "" and any(v is not None and not v.elem_type for v in inputs):
            return []
        found = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=self._imports)
        return [_from_proto(found[name]) if name in found else UNKNOWN for name in node.output]

    def if_(
        self, node: onnx.NodeProto, label: str, inputs: Sequence[Value | None], known: Mapping[str, Value]
    ) -> tuple[tuple[Body, ...], list[Value]]:
        """Both branches, or the one that is taken where the condition is known."""
        condition = inputs[0].data if inputs[0] is not None else None
        taken = None if condition is None else "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
        bodies = tuple(
            Body(key, self.graph(graph, known, f"{node.op_type} {label}.{key}"), 1 if taken else None)
            for key, graph in subgraphs(node)
            if taken in (None, key)
        )
        ends = [[b.trace.values.get(name, known.get(name, UNKNOWN)) for name in b.trace.outputs] for b in bodies]
        return bodies, [_agree(list(values)) for values in zip(*ends, strict=True)]

    def loop(
        self, node: onnx.NodeProto, label: str, inputs: Sequence[Value | None], known: Mapping[str, Value]
    ) -> tuple[tuple[Body, ...], list[Value]]:
        """The body once, with carried values that keep their shape; twice where they do not."""
        import onnx

        (_, graph), *_ = subgraphs(node)
        carried = [v or UNKNOWN for v in inputs[2:]]
        head = [Value(onnx.TensorProto.INT64, ()), Value(onnx.TensorProto.BOOL, ())]
        for _attempt in range(2):
            names = [i.name for i in graph.input]
            given = dict(zip(names, [*head, *(Value(v.elem_type, v.shape) for v in carried)], strict=False))
            trace = self.graph(graph, known, f"Loop {label}.body", given)
            ends = [trace.values.get(name, known.get(name, UNKNOWN)) for name in trace.outputs]
            merged = [_agree([a, b]) for a, b in zip(carried, ends[1:], strict=False)]
            if [m.shape for m in merged] == [c.shape for c in carried]:
                break
            carried = merged
        limit = inputs[0].data if inputs and inputs[0] is not None else None
        stops = len(inputs) > 1 and inputs[1] is not None and _condition_changes(graph)
        times = None if limit is None or stops else int(limit.reshape(-1)[0])
        scans = [_stacked(v, times) for v in ends[1 + len(carried) :]]
        return (Body("body", trace, times),), [*(Value(v.elem_type, v.shape) for v in merged), *scans]

    def scan(
        self, node: onnx.NodeProto, label: str, inputs: Sequence[Value | None], known: Mapping[str, Value]
    ) -> tuple[tuple[Body, ...], list[Value]]:
        """The body once, with one slice of what it scans."""
        (_, graph), *_ = subgraphs(node)
        count = next(a.i for a in node.attribute if a.name == "num_scan_inputs")
        axes = next((list(a.ints) for a in node.attribute if a.name == "scan_input_axes"), [0] * count)
        states, scanned = list(inputs[: len(inputs) - count]), inputs[len(inputs) - count :]
        times: int | None = None
        given: list[Value] = [v or UNKNOWN for v in states]
        for axis, value in zip(axes, scanned, strict=True):
            shape = value.shape if value is not None else None
            if value is None or shape is None:
                given.append(UNKNOWN)
                continue
            times = shape[axis] if times is None else times
            position = axis % len(shape)
            given.append(Value(value.elem_type, shape[:position] + shape[position + 1 :]))
        named = dict(zip([i.name for i in graph.input], given, strict=False))
        trace = self.graph(graph, known, f"Scan {label}.body", named)
        ends = [trace.values.get(name, known.get(name, UNKNOWN)) for name in trace.outputs]
        kept = [Value(v.elem_type, v.shape) for v in ends[: len(states)]]
        return (Body("body", trace, times),), [*kept, *(_stacked(v, times) for v in ends[len(states) :])]


_Control = Callable[
    [_Tracer, Any, str, Sequence[Value | None], Mapping[str, Value]], tuple[tuple[Body, ...], list[Value]]
]
_CONTROL: dict[str, _Control] = {"If": _Tracer.if_, "Loop": _Tracer.loop, "Scan": _Tracer.scan}


def _condition_changes(graph: onnx.GraphProto) -> bool:
    """Whether a Loop's body may end it early: its condition is more than a constant or the one that it was given."""
    name = graph.output[0].name
    if name == graph.input[1].name:
        return False
    maker = next((n for n in graph.node if name in n.output), None)
    if maker is not None and maker.op_type == "Identity":
        return bool(maker.input[0] != graph.input[1].name) and _is_computed(graph, maker.input[0])
    return _is_computed(graph, name)


def _is_computed(graph: onnx.GraphProto, name: str) -> bool:
    return any(name in n.output and n.op_type != "Constant" for n in graph.node)


def _agree(values: Sequence[Value]) -> Value:
    """What several possible values have in common."""
    first = values[0]
    if any(v.shape is None or first.shape is None or len(v.shape) != len(first.shape) for v in values):
        return Value(first.elem_type)
    dims = zip(*[v.shape or () for v in values], strict=True)
    return Value(first.elem_type, tuple(d[0] if len(set(d)) == 1 else None for d in dims))


def _stacked(value: Value, times: int | None) -> Value:
    return Value(value.elem_type, None if value.shape is None else (times, *value.shape))


def _known(array: Array, kind: int, *, stored: bool = False) -> Value:
    return Value(kind, tuple(array.shape), array if array.size <= _SMALL else None, stored)


def _contrib(node: onnx.NodeProto, domain: str, inputs: Sequence[Value | None]) -> list[Value]:
    import onnx

    rule = CONTRIB_SHAPES[domain].get(node.op_type)
    if rule is None:
        return []
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    shapes = [None if v is None else v.dims for v in inputs]
    found = rule(shapes, attributes)
    first = next((v.elem_type for v in inputs if v is not None), 0)
    return [Value(first, shape) for shape in found]


def _type_proto(value: Value) -> onnx.TypeProto:
    from onnx import helper

    made: onnx.TypeProto = helper.make_tensor_type_proto(value.elem_type, value.shape)
    return made


def _from_proto(kind: onnx.TypeProto) -> Value:
    if kind.WhichOneof("value") != "tensor_type":
        return UNKNOWN
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return Value(tensor.elem_type)
    return Value(
        tensor.elem_type,
        tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in tensor.shape.dim),
    )


def size_of(symbol: str, sizes: Mapping[str, int]) -> int | None:
    """Size of a dimension's name; exporters write sums too ("past_sequence + sequence"). None where it is not given."""
    if symbol in sizes:
        return sizes[symbol]
    parts = [part if isinstance(part, int) else sizes.get(part) for part in terms(symbol)]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def small_values(tensor: onnx.TensorProto, folder: Path) -> Array | None:
    """A stored tensor's values where they are few, read from the model's folder if need be; None otherwise."""
    import onnx

    if math.prod(tensor.dims) > _SMALL or tensor.data_type == onnx.TensorProto.STRING:
        return None
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor, str(folder)))
    except (ValueError, TypeError, OSError, onnx.checker.ValidationError):
        return None
