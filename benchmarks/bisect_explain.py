"""Why a node diverges: what differs between its definition and the reference's, and what a replay of it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.benchmarks.bisect_graph import Graph, describe_attributes, value_info, value_of
from deploykit.benchmarks.bisect_match import Judge, Match, Status
from deploykit.benchmarks.bisect_probe import Probe, TensorSource, run_model
from deploykit.errors import DeploykitError
from deploykit.specs import Array

if TYPE_CHECKING:
    import onnx

# Weights above this are not compared one by one; the replay tells.
_WEIGHT_BYTES = 256 * 1024 * 1024


# Inputs of the graph are what their names say.
_NAMED = Match(Status.AGREES, by="name")


@dataclass(frozen=True, slots=True)
class Evidence:
    """A node as a model of its own, its weights inside, with the tensors around it.

    Attributes:
        model: The candidate's node.
        reference_model: The node of the reference that makes the same tensor; None where there is none.
        device: Where the candidate ran.
        inputs: What the candidate's node was given.
        candidate: What it made of it in the whole graph.
        reference: What the reference has in its place, by the candidate's names.
    """

    model: onnx.ModelProto
    reference_model: onnx.ModelProto | None
    device: str
    inputs: dict[str, Array]
    candidate: dict[str, Array]
    reference: dict[str, Array]


def node_model(probe: Probe, number: int) -> onnx.ModelProto:
    """One node as a model; its inputs are what it reads, but for constants, which stay inside."""
    from onnx import helper

    graph = probe.graph
    constants = [name for name in graph.reads[number] if name in graph.constants and name in graph.producer]
    inside = graph.upstream(constants) | {number}
    inputs = [value_of(name, array) for name, array in probe.fetch(activations(graph, number)).items()]
    made = probe.fetch([name for name in graph.nodes[number].output if name])
    outputs = [value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in made.items()]
    return graph.part(inside, inputs, outputs)


def activations(graph: Graph, number: int) -> list[str]:
    """Names of what a node reads that follows from the inputs."""
    return [name for name in graph.reads[number] if name not in graph.constants]


def partner_of(graph: Graph, node: onnx.NodeProto, matches: Mapping[str, Match]) -> int | None:
    """Number of the reference's node that makes the tensor of the same name; None where there is none."""
    for name in node.output:
        partner = matches[name].partner if name in matches and matches[name].partner else name
        if partner in graph.producer:
            return graph.producer[partner]
    return None


def explain(
    candidate: Probe, reference: TensorSource, judge: Judge, number: int, matches: Mapping[str, Match]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Describe a node's inputs and outputs, and say what about it is not as in the reference."""
    graph = candidate.graph
    node = graph.nodes[number]
    inputs = [_describe(graph, candidate, name, matches) for name in graph.reads[number]]
    outputs = [_describe(graph, candidate, name, matches) for name in node.output if name]
    if not isinstance(reference, Probe):
        return inputs, outputs, _neighbours(graph, reference, number, matches)
    other = partner_of(reference.graph, node, matches)
    if other is None:
        return inputs, outputs, ["the reference has no node that makes a tensor of that name"]
    causes = [
        *_definition(graph, number, reference.graph, other, matches),
        *_replay(candidate, reference, judge, number, other),
    ]
    return inputs, outputs, causes


def _describe(graph: Graph, probe: Probe, name: str, matches: Mapping[str, Match]) -> dict[str, Any]:
    """One tensor around the suspect, JSON-ready."""
    found: dict[str, Any] = {"name": name}
    weight = graph.weights.get(name)
    if weight is not None:
        return found | {"weight": True, "shape": list(weight.dims)}
    array = probe.fetch([name]).get(name)
    if array is not None:
        found |= {"dtype": array.dtype.name, "shape": list(array.shape)}
    if name not in graph.producer:
        return found | {"status": "input"}
    match = matches.get(name)
    if match is None or (match.status is Status.UNMATCHED and name in graph.constants):
        return found | {"status": "constant" if name in graph.constants else "not looked at"}
    found["status"] = str(match.status)
    if match.by:
        diff = match.diff
        found |= {"partner": match.partner, "by": match.by, "max_abs": _finite(diff.max_abs)}
        found |= {"sqnr_db": _finite(diff.sqnr_db), "cosine": _finite(diff.cosine)}
    if match.diff.reason:
        found["reason"] = match.diff.reason
    return found


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _neighbours(graph: Graph, reference: TensorSource, number: int, matches: Mapping[str, Match]) -> list[str]:
    """What the source computes where the graph stops agreeing."""
    found = []
    order = {name: place for place, name in enumerate(reference.sizes)}
    partners = [m.partner for name in graph.reads[number] if (m := matches.get(name)) and m.partner]
    for partner in partners:
        found.append(f"its input is made by {reference.describe(partner)} in the source")
    if partners:
        last = max(order[p] for p in partners)
        said = {reference.describe(p) for p in partners}
        after = [text for name in list(reference.sizes)[last + 1 :] if (text := reference.describe(name)) not in said]
        if after:
            found.append("the source goes on with " + ", ".join(list(dict.fromkeys(after))[:3]))
    return found


def _definition(graph: Graph, number: int, other: Graph, partner: int, matches: Mapping[str, Match]) -> list[str]:
    """Differences of operator, attributes, constants, and of which tensors are read."""
    mine, theirs = graph.nodes[number], other.nodes[partner]
    if (mine.domain or "ai.onnx", mine.op_type) != (theirs.domain or "ai.onnx", theirs.op_type):
        return [f"the operator is {mine.op_type} instead of {theirs.op_type}"]
    causes = []
    have, want = describe_attributes(mine), describe_attributes(theirs)
    for name in dict.fromkeys((*want, *have)):
        if have.get(name) != want.get(name):
            causes.append(f"attribute {name} is {_show(have.get(name))} instead of {_show(want.get(name))}")
    for place, (left, right) in enumerate(zip(mine.input, theirs.input, strict=False)):
        x, y = _constant(graph, left), _constant(other, right)
        if x is None or y is None:
            read = matches[left].partner if left in matches else left if left in graph.inputs else ""
            if read and read != right and matches.get(left, _NAMED).by == "name":
                causes.append(f"input {place} is {left!r}, in the reference it is {right!r}")
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            causes.append(f"constant {left!r} (input {place}) is {_form(x)} instead of {_form(y)}")
        elif x.tobytes() != y.tobytes():
            far = np.abs(x.astype(np.float64) - y.astype(np.float64)).max() if x.dtype.kind in "fiu" else float("nan")
            causes.append(f"constant {left!r} (input {place}) has other values: max abs {far:.3g} of {_form(x)}")
    return causes


def _show(value: Any) -> str:
    return "absent" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _form(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}" if array.size != 1 else f"{array.reshape(-1)[0]}"


def _constant(graph: Graph, name: str) -> Array | None:
    """The values of an initializer or of a Constant node, unless they are huge."""
    from onnx import helper, numpy_helper

    tensor = graph.weights.get(name)
    if tensor is not None:
        size = int(np.prod(tensor.dims, dtype=np.int64)) * 8
        return graph.weight(name) if size <= _WEIGHT_BYTES else None
    number = graph.producer.get(name)
    if number is None or graph.nodes[number].op_type != "Constant":
        return None
    attribute = graph.nodes[number].attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return np.asarray(numpy_helper.to_array(value))
    return np.asarray(value) if attribute.name.startswith(("value_float", "value_int")) else None


def _replay(candidate: Probe, reference: Probe, judge: Judge, number: int, partner: int) -> list[str]:
    """Run both nodes on the candidate's inputs: is it the node, or what came before it?"""
    mine, theirs = candidate.graph, reference.graph
    left, right = activations(mine, number), activations(theirs, partner)
    if len(left) != len(right):
        return [f"it reads {len(left)} tensors, the reference's node reads {len(right)}"]
    inputs = candidate.fetch(left)
    if len(inputs) != len(left):
        return []
    try:
        have = run_model(node_model(candidate, number), mine.folder, inputs, candidate.device)
        renamed = {r: inputs[n] for n, r in zip(left, right, strict=True)}
        want = run_model(node_model(reference, partner), theirs.folder, renamed, reference.device)
    except DeploykitError as exc:
        return [f"the node could not be replayed alone ({exc.what})"]
    for name, wanted in zip(have, want.values(), strict=False):
        reason = judge.compare(have[name], wanted).reason
        if reason:
            return [f"replayed alone on the same inputs, it still differs from the reference's node: {reason}"]
    return ["replayed alone on the same inputs, both nodes agree: the difference comes from what it was given"]


def gather_evidence(
    candidate: Probe, reference: TensorSource, number: int, matches: Mapping[str, Match]
) -> Evidence | None:
    """The suspect as a runnable model with its weights, its inputs and both outputs; None where it cannot be had."""
    graph = candidate.graph
    node = graph.nodes[number]
    partner = partner_of(reference.graph, node, matches) if isinstance(reference, Probe) else None
    names = [name for name in node.output if name]
    partners = {n: matches[n].partner or n for n in names if n in matches}
    known = {n: p for n, p in partners.items() if p in reference.sizes}
    theirs = reference.fetch(list(known.values())) if known else {}
    return Evidence(
        _self_contained(node_model(candidate, number), graph),
        _self_contained(node_model(reference, partner), reference.graph)
        if partner is not None and isinstance(reference, Probe)
        else None,
        str(candidate.device),
        candidate.fetch(activations(graph, number)),
        candidate.fetch(names),
        {n: theirs[p] for n, p in known.items()},
    )


def _self_contained(model: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """The model with its external weights read in."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    onnx.load_external_data_for_model(made, str(graph.folder))
    return made
