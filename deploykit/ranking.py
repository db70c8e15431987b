"""Which layers lose most by being quantized, from one pass over data.

A layer's own error is what its quantized form makes of the float model's activations, against what the float form makes
of the same. All layers are asked at once: the quantized form of each is put beside the float graph, reads the float
graph's tensors, and gives out the power of the difference and of the signal as two numbers a batch. Nothing is kept but
these sums. (Leave-one-in sensitivity, as in NNCF's accuracy control, without a run for each layer.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.errors import ModelError
from deploykit.nodes import is_quantized_op
from deploykit.runtimes.placement import is_compute
from deploykit.specs import Array, Feeds
from deploykit.weights import LightModel, open_light, write_light

if TYPE_CHECKING:
    import onnx

_PREFIX = "deploykit_rank_"
_EPSILON = 1e-30
# Powers of: the float result, all of the error, and the error where only the inputs are rounded.
_KINDS = ("signal", "error", "inputs")
# A step of this share of another's is the same outlier, handed on.
_AS_COARSE = 0.25


@dataclass(frozen=True, slots=True)
class LayerError:
    """One layer's own error.

    Attributes:
        nodes: Names of the float graph's nodes that are quantized as one; more than one where an activation is part of
            the layer before it.
        sqnr_db: Signal power over error power, over all data; inf where there is no error.
        feeders: Names of the nodes before it that have to stay in float with it, because most of its error comes from
            how its inputs are rounded, and whoever writes a tensor in integers rounds it.
    """

    nodes: tuple[str, ...]
    sqnr_db: float
    feeders: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first node's name: the one that computes."""
        return self.nodes[0]


@dataclass(frozen=True, slots=True)
class _Part:
    """Nodes of the float graph, and the nodes of the quantized graph that give the same tensor.

    `rounded` holds, by float tensor that it reads: the tensor's 8-bit copy, and the scale of that.
    """

    nodes: tuple[str, ...]
    output: str
    cone: tuple[int, ...]
    result: str
    rounded: dict[str, tuple[str, float]]


def rank_layers(
    floating: Path,
    quantized: Path,
    batches: Iterable[Feeds],
    open_model: Callable[[Path], Callable[[Feeds], dict[str, Array]]],
    folder: Path,
) -> list[LayerError]:
    """The quantized layers, the one with the largest error of its own first.

    Args:
        floating: The graph as it was before it was quantized; tensors that both have are of the same name.
        quantized: What became of it.
        batches: Real inputs.
        open_model: Opens a model file for inference.
        folder: An empty one for the graph that holds both.

    Raises:
        ModelError: The two graphs have no layer in common.
    """
    import onnx

    for name in ("float", "quantized"):
        (folder / name).mkdir()
    light, other = open_light(floating, folder / "float"), open_light(quantized, folder / "quantized")
    parts = _parts(light.proto, other.proto)
    if not parts:
        raise ModelError("no layer of the quantized model can be told from the float one's")
    both = onnx.ModelProto()
    both.CopyFrom(light.proto)
    _join(both, other, parts)
    target = folder / "both.onnx"
    write_light(LightModel(both, light.folder), target)
    run = open_model(target)
    powers = np.zeros((len(parts), len(_KINDS)))
    for feeds in batches:
        outputs = run(feeds)
        for i in range(len(parts)):
            powers[i] += [_power(outputs[f"{_PREFIX}{i}_{k}"]) if f"{_PREFIX}{i}_{k}" in outputs else 0 for k in _KINDS]
    ratios = [
        LayerError(part.nodes, _ratio_db(s, e), _feeders(part, parts, light.proto) if inputs > e / 2 > 0 else ())
        for part, (s, e, inputs) in zip(parts, powers, strict=True)
    ]
    return sorted(ratios, key=lambda layer: layer.sqnr_db)


def _feeders(part: _Part, parts: list[_Part], model: onnx.ModelProto) -> tuple[str, ...]:
    """Nodes whose results the part's inputs are, further back where a node hands on a tensor of as coarse a scale."""
    makers = {p.output: p for p in parts}
    computes = {n.name for n in model.graph.node if is_compute(n.op_type)}
    found: dict[str, None] = {}
    waiting = [(name, scale) for name, (_, scale) in part.rounded.items()]
    while waiting:
        name, coarse = waiting.pop()
        maker = makers.get(name)
        if maker is None or maker.nodes[0] in found:
            continue
        found |= dict.fromkeys(maker.nodes)
        if not computes.intersection(maker.nodes):
            waiting += [(n, coarse) for n, (_, scale) in maker.rounded.items() if scale > _AS_COARSE * coarse]
    return tuple(name for name in found if name not in part.nodes)


def _power(value: Array) -> float:
    found = float(np.asarray(value).reshape(-1)[0])
    return found if math.isfinite(found) else math.inf


def _ratio_db(signal: float, error: float) -> float:
    if not math.isfinite(error):
        return -math.inf
    return math.inf if error <= 0 else 10 * math.log10(max(signal, _EPSILON) / error)


# --- which nodes belong together -------------------------------------------------------------------------------------


def _parts(floating: onnx.ModelProto, quantized: onnx.ModelProto) -> list[_Part]:
    """Layers whose quantized form can be cut out of the quantized graph, between tensors that both graphs have."""
    weights = {t.name for t in floating.graph.initializer}
    known = {v.name for v in floating.graph.input} | {o for n in floating.graph.node for o in n.output if o}
    known -= weights
    makers = {o: i for i, n in enumerate(quantized.graph.node) for o in n.output if o}
    pairs = _pairs(quantized)
    parts = []
    for names, output in _groups(floating, frozenset(makers)):
        cone = _cone(quantized, makers, output, known)
        rounded = output in pairs or quantized.graph.node[makers[output]].op_type == "DequantizeLinear"
        if not _is_quantized(quantized, cone, rounded):
            continue
        result = output
        if output in pairs:  # what the next layer reads
            result = pairs[output][1]
            cone |= {*pairs[output][0]}
        inner = tuple(sorted(cone))
        parts.append(_Part(names, output, inner, result, _rounded(quantized, inner, known - {output})))
    return parts


def _groups(floating: onnx.ModelProto, present: frozenset[str]) -> list[tuple[tuple[str, ...], str]]:
    """Nodes, each with those before it whose tensors the quantized graph has no more (a Relu that a range replaced)."""
    waiting: dict[str, tuple[str, ...]] = {}
    found = []
    for node in floating.graph.node:
        names = (*(n for i in node.input for n in waiting.get(i, ())), node.name)
        if node.output and node.output[0] in present:
            found.append((names, node.output[0]))
        else:
            waiting |= dict.fromkeys(node.output, names)
    return found


def _cone(model: onnx.ModelProto, makers: Mapping[str, int], output: str, known: set[str]) -> set[int]:
    """Numbers of the nodes that make a tensor out of tensors that the float graph has too."""
    found: set[int] = set()
    waiting = [output]
    while waiting:
        name = waiting.pop()
        if (name in known and name != output) or name not in makers or makers[name] in found:
            continue
        found.add(makers[name])
        waiting += model.graph.node[makers[name]].input
    return found


def _pairs(model: onnx.ModelProto) -> dict[str, tuple[tuple[int, int], str]]:
    """For every tensor that is quantized: the numbers of the pair's nodes, and what comes out behind it."""
    behind = {n.input[0]: i for i, n in enumerate(model.graph.node) if n.op_type == "DequantizeLinear"}
    return {
        n.input[0]: ((i, behind[n.output[0]]), model.graph.node[behind[n.output[0]]].output[0])
        for i, n in enumerate(model.graph.node)
        if n.op_type == "QuantizeLinear" and n.output[0] in behind
    }


def _rounded(model: onnx.ModelProto, cone: tuple[int, ...], known: set[str]) -> dict[str, tuple[str, float]]:
    from onnx import numpy_helper

    nodes = [model.graph.node[i] for i in cone]
    copies = {n.input[0]: n.output[0] for n in nodes if n.op_type == "DequantizeLinear"}
    scales = {t.name: t for t in model.graph.initializer}
    return {
        n.input[0]: (copies[n.output[0]], float(numpy_helper.to_array(scales[n.input[1]]).max()))
        for n in nodes
        if n.op_type == "QuantizeLinear" and n.input[0] in known and n.output[0] in copies and n.input[1] in scales
    }


def _is_quantized(model: onnx.ModelProto, cone: set[int], rounded: bool) -> bool:
    """Whether a part would be another one in float: not where it only reads what its neighbours quantized."""
    stored = {t.name for t in model.graph.initializer}
    quantized = [n for i in cone if is_quantized_op((n := model.graph.node[i]).op_type)]
    activations = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
    if any(n.op_type not in activations or n.input[0] in stored for n in quantized):
        return True  # its weights are integers, or its kernel is
    return bool(quantized) and rounded


# --- both graphs in one ----------------------------------------------------------------------------------------------


def _join(both: onnx.ModelProto, other: LightModel, parts: list[_Part]) -> None:
    """Put the quantized layers beside the float graph, in place, and give out the powers of signal and error."""
    import onnx
    from onnx import TensorProto, helper

    source = other.proto
    stored = {t.name: t for t in source.graph.initializer}
    added: dict[str, onnx.TensorProto] = {}
    _take_opsets(both, source)
    del both.graph.output[:]
    for number, part in enumerate(parts):
        own = {o for i in part.cone for o in source.graph.node[i].output if o}
        mark = f"{_PREFIX}{number}_"
        for i in part.cone:
            node = onnx.NodeProto()
            node.CopyFrom(source.graph.node[i])
            node.name = mark + node.name
            for place, name in enumerate(node.input):
                if name in own:
                    node.input[place] = mark + name
                elif name in stored:
                    added.setdefault(name, stored[name])
                    node.input[place] = _PREFIX + name
            for place, name in enumerate(node.output):
                node.output[place] = mark + name if name else ""
            both.graph.node.append(node)
        values = {"error": mark + part.result}
        if part.rounded:
            values["inputs"] = _with_rounded_inputs(both, part, mark)
        for kind, value in values.items():
            difference = f"{mark}{kind}_difference"
            both.graph.node.append(helper.make_node("Sub", [part.output, value], [difference], name=difference))
            values[kind] = difference
        for kind, tensor in (("signal", part.output), *values.items()):
            both.graph.node.append(
                helper.make_node("ReduceSumSquare", [tensor], [mark + kind], name=mark + kind, keepdims=0)
            )
            both.graph.output.append(helper.make_tensor_value_info(mark + kind, TensorProto.FLOAT, []))
    for name, tensor in added.items():
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = _PREFIX + name
        for entry in copy.external_data:
            if entry.key == "location":  # relative to the other model's folder
                entry.value = str((other.folder / entry.value).resolve())
        both.graph.initializer.append(copy)


def _with_rounded_inputs(both: onnx.ModelProto, part: _Part, mark: str) -> str:
    """Append the float nodes of a part once more, reading 8-bit copies of its inputs; the name of what they give."""
    import onnx

    copies = {name: mark + copy for name, (copy, _) in part.rounded.items()}
    for node in [n for n in both.graph.node if n.name in part.nodes]:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.name = f"{mark}inputs_{node.name}"
        for place, name in enumerate(made.input):
            made.input[place] = copies.get(name, name)
        for place, name in enumerate(made.output):
            if name:
                copies[name] = made.output[place] = f"{mark}inputs_{name}"
        both.graph.node.append(made)
    return copies[part.output]


def _take_opsets(both: onnx.ModelProto, source: onnx.ModelProto) -> None:
    """The quantized graph's operators may be of other domains, and its opset may have been raised."""
    versions = {o.domain: o for o in both.opset_import}
    for entry in source.opset_import:
        if entry.domain not in versions:
            both.opset_import.append(entry)
        else:
            versions[entry.domain].version = max(versions[entry.domain].version, entry.version)
    both.ir_version = max(both.ir_version, source.ir_version)
