"""What one run of a model costs: multiply-accumulates, memory, and how much of it is quantized."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploykit.graphs import domain_of, element_bits, subgraphs
from deploykit.macs import UncountedError, computes, count_macs
from deploykit.shaping import Trace, Value, Visit

if TYPE_CHECKING:
    import onnx

# Outputs that are the input's memory under another shape.
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
# Between a weight and the product that it enters.
_LAYOUT = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Transpose", "Cast"})
_INTEGER_OPS = frozenset(
    {
        "ConvInteger", "MatMulInteger", "MatMulInteger16", "QLinearConv", "QLinearMatMul", "QGemm", "QAttention",
        "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM",
    }
)  # fmt: skip
_PACKED_OPS = frozenset({"MatMulNBits", "MatMulBnb4"})
_WEIGHT_INPUTS = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), (3,)),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), (1, 2)),
    **dict.fromkeys(("MatMul", "Gemm", "Einsum", "FusedMatMul"), (0, 1)),
}
_QUANTIZED_BITS = 8


@dataclass(slots=True)
class Compute:
    """Multiply-accumulates.

    Attributes:
        macs: Sum over all counted nodes, bodies times their trip count.
        by_op: The same by operator.
        nodes: Nodes that compute.
        uncounted: Nodes that compute and have no count, with the reason.
        notes: What the number leaves open.
    """

    macs: int = 0
    by_op: Counter[str] = field(default_factory=Counter)
    nodes: int = 0
    uncounted: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return {
            "macs": self.macs,
            "by_op": dict(self.by_op.most_common()),
            "nodes": self.nodes,
            "uncounted": self.uncounted,
            "notes": self.notes,
        }


def count_compute(trace: Trace) -> Compute:
    """Count a whole model. Of an If whose condition is not known, the dearer branch counts."""
    found = Compute()
    for visit, times in runs(trace, found.notes):
        domain, op = domain_of(visit.node), visit.node.op_type
        if not computes(op, domain):
            continue
        found.nodes += 1
        try:
            macs = times * count_macs(visit.node, domain, visit.inputs, visit.outputs)
        except UncountedError as exc:
            name = f"{domain}.{op}" if domain else op
            found.uncounted.append({"node": visit.label, "op": name, "reason": str(exc)})
            continue
        found.macs += macs
        found.by_op[op] += macs
    return found


def runs(trace: Trace, notes: list[str] | None = None, times: int = 1) -> Iterator[tuple[Visit, int]]:
    """Every node that runs, with how often; bodies after their node.

    Args:
        trace: The graph.
        notes: Receives what is assumed on the way.
        times: How often the graph itself runs.
    """
    said = notes if notes is not None else []
    for visit in trace.visits:
        yield visit, times
        if visit.node.op_type == "If" and len(visit.bodies) > 1:
            costs = [_rough(body.trace) for body in visit.bodies]
            dearer = visit.bodies[costs.index(max(costs))]
            if min(costs) != max(costs):
                said.append(f"If {visit.label}: which branch runs depends on data; {dearer.key}, the dearer, counts")
            yield from runs(dearer.trace, said, times)
            continue
        for body in visit.bodies:
            if body.times is None:
                said.append(f"{visit.node.op_type} {visit.label}: how often it runs depends on data; one pass counts")
            yield from runs(body.trace, said, times * (1 if body.times is None else body.times))


def _rough(trace: Trace) -> int:
    total = 0
    for visit, times in runs(trace):
        try:
            total += times * count_macs(visit.node, domain_of(visit.node), visit.inputs, visit.outputs)
        except UncountedError:
            continue
    return total


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that activations need at once.

    Attributes:
        bytes: At the dearest node; inputs and outputs of the model included, weights left out.
        node: That node.
        unknown: Tensors whose size is not known, which are left out.
    """

    bytes: int
    node: str | None
    unknown: int


def peak_memory(trace: Trace, inputs: Mapping[str, Value]) -> Peak:
    """Estimate the peak over the nodes in the file's order; a tensor lives from its maker to its last reader.

    Reshape and the like share their input's memory; other in-place work and the kernels' own scratch memory are left
    out. Bodies add their own peak while their node runs.

    Args:
        trace: The graph.
        inputs: Its inputs, which the caller keeps alive throughout.
    """
    owner = _owners(trace)
    last: dict[str, int] = {}
    for step, visit in enumerate(trace.visits):
        for name in [*visit.node.input, *_outer_names(visit.node)]:
            last[owner.get(name, name)] = step
    for name in (*trace.outputs, *inputs):
        last[owner.get(name, name)] = len(trace.visits)
    sizes = {name: _bytes(value) for name, value in {**trace.values, **inputs}.items()}
    live = {name: sizes[name] or 0 for name in inputs}
    unknown = {name for name in inputs if sizes[name] is None}
    best, where = sum(live.values()), None
    dying: dict[int, list[str]] = {}
    for step, visit in enumerate(trace.visits):
        for name, value in zip(visit.node.output, visit.outputs, strict=True):
            if not name or value is None or value.stored or owner.get(name, name) != name:
                continue
            if sizes.get(name) is None:
                unknown.add(name)
            live[name] = sizes.get(name) or 0
            dying.setdefault(last.get(name, step), []).append(name)
        inner = max((peak_memory(b.trace, {}) for b in visit.bodies), key=lambda p: p.bytes, default=Peak(0, None, 0))
        now = sum(live.values()) + inner.bytes
        if now > best:
            best, where = now, visit.label
        for name in dying.pop(step, []):
            live.pop(name, None)
    return Peak(best, where, len(unknown))


def _owners(trace: Trace) -> dict[str, str]:
    """The tensor whose memory another one shares."""
    owner: dict[str, str] = {}
    for visit in trace.visits:
        if visit.node.op_type in _VIEWS and not domain_of(visit.node) and visit.node.input:
            source = visit.node.input[0]
            owner[visit.node.output[0]] = owner.get(source, source)
    return owner


def _outer_names(node: onnx.NodeProto) -> Iterator[str]:
    for _, graph in subgraphs(node):
        for inner in graph.node:
            yield from inner.input
            yield from _outer_names(inner)
        yield from (o.name for o in graph.output)


def _bytes(value: Value) -> int | None:
    if value.stored:
        return 0
    bits = element_bits(value.elem_type)
    return None if value.size is None or not bits else int(-(-value.size * bits // 8))


# --- quantization ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Quantized:
    """How much of the nodes that compute, of their MACs and of their weights is in 8 bits or less.

    A node is integer where its operator is, or where its data and its weight both come out of DequantizeLinear, so that
    a runtime can fuse it to an integer kernel. With a dequantized weight alone it is weight-only: stored in few bits,
    computed in floating point.
    """

    nodes: Counter[str] = field(default_factory=Counter)
    macs: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy: for each kind of share, counts and parts of the whole (None where there is nothing)."""
        return {
            what: {
                "integer": counts["integer"],
                "weight_only": counts["weight_only"],
                "float": counts["float"],
                "share": _share(counts),
            }
            for what, counts in (("nodes", self.nodes), ("macs", self.macs), ("weights", self.weights))
        }


def _share(counts: Counter[str]) -> float | None:
    total = sum(counts.values())
    return None if not total else round((total - counts["float"]) / total, 4)


def count_quantized(trace: Trace) -> Quantized:
    """Classify every node that computes. A weight that several nodes use counts once."""
    found = Quantized()
    makers = {name: visit for visit, _ in runs(trace) for name in visit.node.output if name}
    seen: set[str] = set()
    for visit, times in runs(trace):
        node, domain = visit.node, domain_of(visit.node)
        if not computes(node.op_type, domain):
            continue
        kind = _kind(visit, makers)
        found.nodes[kind] += 1
        with contextlib.suppress(UncountedError):
            found.macs[kind] += times * count_macs(node, domain, visit.inputs, visit.outputs)
        for name, elements, few_bits in _weights(visit, makers):
            if name not in seen:
                seen.add(name)
                # Integers in a float node are weight-only; floats in any node are floats.
                found.weights[("integer" if kind == "integer" else "weight_only") if few_bits else "float"] += elements
    return found


def _kind(visit: Visit, makers: Mapping[str, Visit]) -> str:
    node = visit.node
    if node.op_type in _INTEGER_OPS:
        return "integer"
    if node.op_type in _PACKED_OPS:
        return "weight_only"
    data, *others = [_origin(name, makers) for name in node.input[:2]]
    weight = others[0] if others else None
    if weight is None or not _dequantizes(weight):
        return "float"
    return "integer" if data is not None and _dequantizes(data) else "weight_only"


def _origin(name: str, makers: Mapping[str, Visit]) -> Visit | None:
    """The node that made a tensor, seen through what only changes its layout."""
    visit = makers.get(name)
    while visit is not None and visit.node.op_type in _LAYOUT and visit.node.input:
        visit = makers.get(visit.node.input[0])
    return visit


def _dequantizes(visit: Visit) -> bool:
    kind = visit.inputs[0].elem_type if visit.inputs and visit.inputs[0] is not None else 0
    return visit.node.op_type == "DequantizeLinear" and 0 < element_bits(kind) <= _QUANTIZED_BITS


def _weights(visit: Visit, makers: Mapping[str, Visit]) -> Iterator[tuple[str, int, bool]]:
    """Stored tensors that enter a product: name, elements, and whether they have 8 bits or less."""
    node = visit.node
    if node.op_type in _PACKED_OPS:
        sizes = {a.name: a.i for a in node.attribute}
        yield node.input[1], int(sizes.get("K", 0) * sizes.get("N", 0)), True
        return
    for index in _WEIGHT_INPUTS.get(node.op_type, (1,)):
        if index >= len(node.input) or not node.input[index]:
            continue
        name, value = node.input[index], visit.inputs[index]
        while name in makers and (value is None or not value.stored):
            maker = makers[name]
            if maker.node.op_type not in (*_LAYOUT, "DequantizeLinear") or not maker.node.input:
                break
            name, value = maker.node.input[0], maker.inputs[0]
        if value is not None and value.stored and value.size and value.shape:
            yield name, value.size, 0 < element_bits(value.elem_type) <= _QUANTIZED_BITS
