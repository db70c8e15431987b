"""A graph that computes in float16, with float32 where it has to be.

Which operators take float16, and which of their inputs, is read from the standard's own schemas. Tensors between two
nodes that compute in float16 are in float16; where one of both does not, a Cast stands between them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import TYPE_CHECKING

import numpy as np

from deploykit.graphs import DEFAULT_DOMAINS, subgraphs, walk
from deploykit.optimizers.editing import attributes
from deploykit.optimizers.lazy_weights import read_weight
from deploykit.weights import LightModel, is_external

if TYPE_CHECKING:
    import onnx

# In float16 these lose what they are for: positions and counts above 2048, scores that decide, sums over many values.
_KEPT = frozenset(
    {"CumSum", "Range", "NonMaxSuppression", "TopK", "RoiAlign", "MaxRoiPool", "Resize", "Upsample", "GridSample"}
    | {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
    | {"ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "ReduceProd", "LpNormalization", "Det", "DFT", "STFT"}
    | {"DequantizeLinear", "QuantizeLinear", "Constant", "EyeLike", "ImageDecoder", "MelWeightMatrix"}
)
_HALF, _FLOAT = 10, 1  # onnx.TensorProto.DataType
_LARGEST = float(np.finfo(np.float16).max)
# Other inputs than those seen may give larger values.
_HEADROOM = 4


def compute_in_half(light: LightModel, excluded: Set[str], magnitudes: Mapping[str, float]) -> tuple[int, list[str]]:
    """Change the types of a graph, in place; inputs and outputs keep theirs.

    Args:
        light: Constants are initializers, and the types of all tensors are known.
        excluded: Names and operator types of nodes that stay in float32.
        magnitudes: The largest that was seen of each tensor; nodes that come near the end of float16 stay in float32.

    Returns:
        How many nodes compute in float16, and which compute in float32 though they have float32 tensors.
    """
    graph = light.proto.graph
    known = (*graph.input, *graph.value_info, *graph.output)
    kinds = {v.name: v.type.tensor_type.elem_type for v in known if v.type.HasField("tensor_type")}
    weights = {t.name: t for t in graph.initializer}
    kinds |= {name: t.data_type for name, t in weights.items()}
    floats, half = [], set[int]()
    for number, node in enumerate(graph.node):
        touched = [n for n in (*node.input, *node.output) if n and kinds.get(n, _FLOAT) == _FLOAT]
        if not touched:
            continue
        near = any(magnitudes.get(n, 0.0) > _LARGEST / _HEADROOM for n in (*node.input, *node.output))
        if near:
            floats.append(f"{node.name} ({node.op_type}, values beyond the range of float16)")
        elif _takes_half(light.proto, node, kinds, excluded) and _fits(light, node, weights):
            half.add(number)
        else:
            floats.append(f"{node.name} ({node.op_type})")
    if not half:
        return 0, floats
    change = _Change(light.proto, kinds, weights)
    for number, node in enumerate(graph.node):
        change.take(node, _HALF if number in half else _FLOAT)
    _write(light, change.nodes, weights, change.halves)
    return len(half), floats


class _Change:
    """The graph's nodes, one after the other, in the types that they compute in, with Casts where types meet.

    Attributes:
        nodes: Those taken so far.
        halves: Names in float16, by weight.
    """

    def __init__(self, model: onnx.ModelProto, kinds: Mapping[str, int], weights: Collection[str]) -> None:
        graph = model.graph
        self.nodes: list[onnx.NodeProto] = []
        self.halves: dict[str, str] = {}
        self._model, self._kinds, self._weights = model, kinds, weights
        # What leaves the graph, and what subgraphs read, stays in float32 under its name.
        self._given = {v.name for v in graph.output} | _captured(model)
        self._taken = {*kinds, *(name for node in graph.node for name in (*node.input, *node.output))}
        self._made: dict[str, int] = {}
        self._casts: dict[tuple[str, int], str] = {}

    def take(self, original: onnx.NodeProto, kind: int) -> None:
        """Append a node that computes in a type."""
        node = type(original)()
        node.CopyFrom(original)
        fixed = _fixed_inputs(self._model, node) if kind == _HALF else set()
        for place, name in enumerate(node.input):
            if name and self._kinds.get(name) == _FLOAT:
                node.input[place] = self._in_type(name, _FLOAT if place in fixed else kind)
        if kind == _HALF:
            _change_attributes(node)
        self.nodes.append(node)
        for place, name in enumerate(node.output):
            if not name or self._kinds.get(name) != _FLOAT:
                continue
            if kind == _HALF and name in self._given:
                node.output[place] = self._casts[name, _HALF] = self._fresh(f"{name}_fp16")
                self._cast(node.output[place], name, _FLOAT)
            else:
                self._made[name] = kind

    def _in_type(self, name: str, kind: int) -> str:
        """A tensor in a type; behind a Cast where it is made in the other."""
        if name in self._weights:
            return self.halves.setdefault(name, self._fresh(f"{name}_fp16")) if kind == _HALF else name
        if self._made.get(name, _FLOAT) == kind:
            return name
        if (name, kind) not in self._casts:
            self._casts[name, kind] = self._fresh(f"{name}_{'fp16' if kind == _HALF else 'fp32'}")
            self._cast(name, self._casts[name, kind], kind)
        return self._casts[name, kind]

    def _cast(self, source: str, made: str, kind: int) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node("Cast", [source], [made], f"{made}_cast", to=kind))

    def _fresh(self, base: str) -> str:
        while base in self._taken:
            base += "_"
        self._taken.add(base)
        return base


def _captured(model: onnx.ModelProto) -> set[str]:
    """What subgraphs read: they stay as they are, and so do the tensors that they take from outside."""
    inner = {name for located in walk(model) if located.where for name in located.node.input}
    return inner | {v.name for node in model.graph.node for _, graph in subgraphs(node) for v in graph.output}


def _takes_half(model: onnx.ModelProto, node: onnx.NodeProto, kinds: dict[str, int], excluded: Set[str]) -> bool:
    import onnx

    if node.domain not in DEFAULT_DOMAINS or node.op_type in _KEPT or {node.name, node.op_type} & excluded:
        return False
    if any(True for _ in subgraphs(node)) or any(n and n not in kinds for n in (*node.input, *node.output)):
        return False
    try:
        schema = onnx.defs.get_schema(node.op_type, _opset(model))
    except onnx.defs.SchemaError:
        return False
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for formal, names in (*_formals(schema.inputs, node.input), *_formals(schema.outputs, node.output)):
        is_float = any(kinds.get(n) == _FLOAT for n in names if n)
        types = allowed.get(formal.type_str)
        if is_float and types is not None and "tensor(float16)" not in types:
            return False
        if is_float and types is None and formal in schema.outputs:  # an output that is float32 whatever goes in
            return False
    return True


def _formals(formals: object, names: object) -> list[tuple[onnx.defs.OpSchema.FormalParameter, list[str]]]:
    """Each formal parameter with the actual ones; the last one may be variadic."""
    given, found = list(names), []  # type: ignore[call-overload]
    for place, formal in enumerate(formals):  # type: ignore[arg-type,var-annotated]
        variadic = str(formal.option).endswith("Variadic")
        found.append((formal, given[place:] if variadic else given[place : place + 1]))
    return found


def _fixed_inputs(model: onnx.ModelProto, node: onnx.NodeProto) -> set[int]:
    """Inputs that are float32 whatever the others are."""
    import onnx

    schema = onnx.defs.get_schema(node.op_type, _opset(model))
    generic = {c.type_param_str for c in schema.type_constraints}
    return {i for i, formal in enumerate(schema.inputs) if formal.type_str not in generic}


def _opset(model: onnx.ModelProto) -> int:
    return max((int(o.version) for o in model.opset_import if o.domain in DEFAULT_DOMAINS), default=1)


def _fits(light: LightModel, node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    """Whether all weights of a node are within what float16 holds."""
    from onnx import numpy_helper

    for name in node.input:
        tensor = weights.get(name)
        if tensor is None or tensor.data_type != _FLOAT:
            continue
        values = read_weight(tensor, light.folder) if is_external(tensor) else numpy_helper.to_array(tensor)
        if not (np.abs(values) <= _LARGEST).all():
            return False
    return True


def _change_attributes(node: onnx.NodeProto) -> None:
    """Let a node make float16 where an attribute says float32."""
    from onnx import numpy_helper

    given = attributes(node)
    for entry in node.attribute:
        if node.op_type == "Cast" and entry.name == "to" and given["to"] == _FLOAT:
            entry.i = _HALF
        if node.op_type == "ConstantOfShape" and entry.name == "value" and entry.t.data_type == _FLOAT:
            entry.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(entry.t).astype(np.float16)))
    if node.op_type == "ConstantOfShape" and not node.attribute:
        entry = node.attribute.add()
        entry.name, entry.type = "value", 4  # onnx.AttributeProto.TENSOR
        entry.t.CopyFrom(numpy_helper.from_array(np.zeros(1, np.float16)))


def _write(
    light: LightModel, nodes: list[onnx.NodeProto], weights: dict[str, onnx.TensorProto], halves: dict[str, str]
) -> None:
    """Put the nodes into the graph, and the weights in the types that they are read in."""
    from onnx import numpy_helper

    graph = light.proto.graph
    needed = {name for node in nodes for name in node.input} | {v.name for v in graph.output}
    needed |= _captured(light.proto)
    kept = []
    for name, tensor in weights.items():
        if name in halves:
            values = read_weight(tensor, light.folder) if is_external(tensor) else numpy_helper.to_array(tensor)
            kept.append(numpy_helper.from_array(values.astype(np.float16), halves[name]))
        if name in needed or name not in halves:
            kept.append(tensor)
    inputs = [v for v in graph.input if v.name not in weights or v.name in needed]
    for values, those in ((graph.node, nodes), (graph.initializer, kept), (graph.input, inputs)):
        del values[:]
        values.extend(those)
    del graph.value_info[:]
