"""Bisection: two models differ; which node is the first that does?

Both run on the same inputs without graph optimizations, with their inner tensors exposed a bounded number of bytes at a
time. Tensors are matched by name, else by value. An If is replaced by the branch that is taken, a Loop's body is run on
the iteration that diverges, so that the search goes on inside.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.benchmarks.bisect_explain import explain, gather_evidence, partner_of
from deploykit.benchmarks.bisect_finding import Finding
from deploykit.benchmarks.bisect_graph import (
    MOVEMENT_OPS,
    Graph,
    body_of,
    captured_names,
    dequantized,
    inline_branch,
    load_graph,
)
from deploykit.benchmarks.bisect_match import Judge, Match, Matcher, Status
from deploykit.benchmarks.bisect_probe import BUDGET_BYTES, Probe, TensorSource, run_model
from deploykit.benchmarks.bisect_search import NOISE, NOISE_DEFAULT, Suspect, find_suspect, worst_layers
from deploykit.benchmarks.differences import Outputs
from deploykit.runtimes import Device, open_session
from deploykit.specs import Array, Feeds

if TYPE_CHECKING:
    pass

_QUANTIZED = ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")
_LEVELS = ("basic", "extended", "all")
_MAX_DEPTH = 4
# Share of the common names that have to stand for the same operators, if names are to be relied on.
_ALIKE = 0.9
_NAMED_SHARE = 0.25
_MAX_ITERATIONS = 64


@dataclass(frozen=True, slots=True)
class _Hunt:
    """One search: both sides, and the outputs that are wrong."""

    candidate: Probe
    reference: TensorSource
    judge: Judge
    failing: tuple[str, ...]
    budget_bytes: int


def bisect_models(
    candidate: Path,
    device: Device,
    reference: Path,
    reference_device: Device,
    feeds: Feeds,
    *,
    max_error: float | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> Finding:
    """Find the first node of one ONNX graph whose output is not the other's.

    Args:
        candidate: The `.onnx` file that is wrong.
        device: Where it is wrong.
        reference: The `.onnx` file that is right.
        reference_device: Where the reference runs.
        feeds: Inputs for which their outputs differ.
        max_error: Largest accepted relative error of a tensor, for quantized candidates; None for the strict tolerance.
        budget_bytes: Inner tensors that are held at a time, of each side.

    Raises:
        InferenceError: A runtime cannot run a graph with inner tensors exposed.
    """
    started = time.monotonic()
    with _workspace() as folder:
        (folder / "a").mkdir()
        mine = load_graph(candidate, folder / "a")
        theirs = mine
        if reference != candidate:
            (folder / "b").mkdir()
            theirs = load_graph(reference, folder / "b")
        probe = Probe(mine, feeds, device, budget_bytes)
        other = Probe(theirs, feeds, reference_device, budget_bytes)
        wanted = other.fetch(theirs.outputs)
        finding = _bisect(probe, other, wanted, max_error, budget_bytes)
        if finding is None:
            finding = _blame_optimizer(
                [(candidate, device, mine), (reference, reference_device, theirs)], feeds, wanted
            )
    return replace(finding, seconds=round(time.monotonic() - started, 2))


def bisect_source(
    candidate: Path,
    device: Device,
    reference: TensorSource,
    expected: Outputs,
    feeds: Feeds,
    *,
    max_error: float | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> Finding:
    """Find the first node of an ONNX graph none of whose outputs is a tensor of the model it was exported from.

    Args:
        candidate: The `.onnx` file that is wrong.
        device: Where it is wrong.
        reference: The model's inner tensors, in their order.
        expected: The model's outputs.
        feeds: Inputs for which the outputs differ.
        max_error: Largest accepted relative error of a tensor; None for the strict tolerance.
        budget_bytes: Inner tensors that are held at a time, of each side.

    Raises:
        InferenceError: The runtime cannot run the graph with inner tensors exposed.
    """
    started = time.monotonic()
    with _workspace() as folder:
        graph = load_graph(candidate, folder)
        probe = Probe(graph, feeds, device, budget_bytes)
        finding = _bisect(probe, reference, expected, max_error, budget_bytes)
        finding = finding or _blame_optimizer([(candidate, device, graph)], feeds, expected)
    return replace(finding, seconds=round(time.monotonic() - started, 2))


@contextmanager
def _workspace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="deploykit-bisect-") as folder:
        yield Path(folder)


def _bisect(
    probe: Probe, reference: TensorSource, wanted: Outputs, max_error: float | None, budget_bytes: int
) -> Finding | None:
    """Search where an output is wrong without optimization too; None where none is."""
    notes = []
    if max_error is None and any(n.op_type in _QUANTIZED for n in probe.graph.nodes):
        notes.append("the candidate is quantized: the first node outside the strict tolerance is a quantizer's")
    judge = Judge(max_error)
    failing = _failing(probe, wanted, judge)
    if not failing and max_error is not None:
        judge = Judge()
        failing = _failing(probe, wanted, judge)
        notes.append(f"no output has an error above {max_error:.0%}; the strict tolerance was taken")
    if not failing and max_error is None:
        judge = Judge(columns=True)
        failing = _failing(probe, wanted, judge)
    if not failing:
        return None
    finding = _search(_Hunt(probe, reference, judge, failing, budget_bytes), ())
    return replace(finding, notes=(*notes, *finding.notes))


def _failing(probe: Probe, wanted: Outputs, judge: Judge) -> tuple[str, ...]:
    have = probe.fetch(probe.graph.outputs)
    return tuple(
        n for n in probe.graph.outputs if n in have and n in wanted and judge.compare(have[n], wanted[n]).reason
    )


def _search(hunt: _Hunt, path: tuple[str, ...]) -> Finding:
    graph = hunt.candidate.graph
    matcher = Matcher(hunt.candidate, hunt.reference, hunt.judge, hunt.budget_bytes)
    upstream = graph.upstream(hunt.failing)
    names = [
        name
        for name in hunt.candidate.sizes
        if graph.producer[name] in upstream and (name in hunt.reference.sizes or name not in graph.constants)
    ]

    trust = _same_names(graph, hunt.reference)

    def found_one(name: str) -> bool:
        return trust and hunt.judge.max_error is None and _surely_wrong(graph, matcher.found, name)

    whole = matcher.by_name(names, found_one, trust_names=trust, alias=dequantized(graph))
    # Quantizers keep the names, and coarse tolerances would match what is not the same.
    named = sum(m.by == "name" for m in matcher.found.values())
    if whole and (hunt.judge.max_error is None or named < _NAMED_SHARE * len(matcher.found)):
        moves = {name: graph.nodes[graph.producer[name]].op_type in MOVEMENT_OPS for name in names}
        matcher.by_value(moves)
    return _conclude(hunt, matcher.found, path)


def _same_names(graph: Graph, reference: TensorSource) -> bool:
    """Whether a tensor's name means the same in both: the same operators make the tensors of the same names.

    Exporters count their tensors; in graphs that were exported apart, "add_7" may be anything.
    """
    if not isinstance(reference, Probe):
        return False
    other = reference.graph
    shared = [n for n in graph.producer if n in other.producer and n not in graph.outputs]
    alike = sum(graph.nodes[graph.producer[n]].op_type == other.nodes[other.producer[n]].op_type for n in shared)
    return bool(shared) and alike >= _ALIKE * len(shared)


def _surely_wrong(graph: Graph, found: Mapping[str, Match], name: str) -> bool:
    """Whether a tensor differs from that of its name, although the node that makes it had the same inputs."""
    if found[name].status is not Status.DIFFERS:
        return False
    reads = [n for n in graph.reads[graph.producer[name]] if n in graph.producer and n not in graph.constants]
    return all(n in found and found[n].status is Status.AGREES for n in reads)


def _conclude(hunt: _Hunt, matches: Mapping[str, Match], path: tuple[str, ...]) -> Finding:
    graph = hunt.candidate.graph
    layers = tuple(worst_layers(graph, matches))
    suspect = find_suspect(graph, matches, hunt.failing, _noise(hunt))
    if suspect is None:
        text = "no node can be named: every tensor that leads to the wrong outputs agrees, or has no counterpart"
        return Finding(text, "unknown", len(graph.nodes), path=path, layers=layers)
    node = graph.nodes[suspect.number]
    inner = _look_inside(hunt, suspect, matches, path)
    if inner is not None:
        return replace(inner, nodes=len(graph.nodes) if not path else inner.nodes)
    inputs, outputs, causes = explain(hunt.candidate, hunt.reference, hunt.judge, suspect.number, matches)
    label = graph.label(suspect.number)
    where = f" inside {' / '.join(path)}" if path else ""
    what = next((o["reason"] for o in outputs if o.get("reason")), "")
    if not what and suspect.witness:
        what = f"{suspect.witness!r}, which follows from it, differs: {matches[suspect.witness].diff.reason}"
    what = what or "the reference has no such tensor, though it has all of the node's inputs"
    summary = f"the first node that diverges is {label!r} ({node.op_type}){where}: {what}"
    notes = []
    if suspect.exceeded:
        notes.append(f"the tolerance is passed later, at {suspect.exceeded!r}; the error comes from {label!r}")
    return Finding(
        summary,
        "node",
        len(graph.nodes),
        node=label,
        op=node.op_type,
        path=path,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        agreeing=tuple(n for n in graph.reads[suspect.number] if n not in graph.constants),
        causes=tuple(causes),
        alternatives=suspect.alternatives,
        layers=layers,
        notes=tuple(notes),
        evidence=gather_evidence(hunt.candidate, hunt.reference, suspect.number, matches),
    )


def _noise(hunt: _Hunt) -> float | None:
    """Relative errors below this are rounding; None where the candidate is quantized, which is no rounding."""
    if hunt.judge.max_error is not None:
        return None
    kinds = {hunt.candidate.dtype(name) for name in hunt.candidate.sizes}
    return max(NOISE.get(kind, NOISE_DEFAULT) for kind in kinds)


def _look_inside(hunt: _Hunt, suspect: Suspect, matches: Mapping[str, Match], path: tuple[str, ...]) -> Finding | None:
    """Go on in the branch or body of the suspect, where the reference has the like; None where it cannot be done."""
    graph, reference = hunt.candidate.graph, hunt.reference
    node = graph.nodes[suspect.number]
    if node.op_type not in ("If", "Loop") or not isinstance(reference, Probe) or len(path) >= _MAX_DEPTH:
        return None
    number = partner_of(reference.graph, node, matches)
    if number is None or reference.graph.nodes[number].op_type != node.op_type:
        return None
    inside = (*path, f"{node.op_type} {graph.label(suspect.number)}")
    if node.op_type == "If":
        return _inside_if(hunt, reference, (suspect.number, number), inside)
    return _inside_loop(hunt, reference, (suspect.number, number), inside)


def _inside_if(hunt: _Hunt, reference: Probe, numbers: tuple[int, int], path: tuple[str, ...]) -> Finding | None:
    taken = []
    for probe, number in zip((hunt.candidate, reference), numbers, strict=True):
        condition = probe.graph.nodes[number].input[0]
        value = probe.graph.weight(condition)
        if value is None:
            value = probe.fetch([condition]).get(condition)
        if value is None:
            return None
        taken.append(bool(np.asarray(value).reshape(-1)[0]))
    if taken[0] != taken[1]:
        return None
    mine = inline_branch(hunt.candidate.graph, numbers[0], taken[0])
    theirs = inline_branch(reference.graph, numbers[1], taken[1])
    budget = hunt.budget_bytes
    probe = Probe(mine, hunt.candidate.feeds, hunt.candidate.device, budget)
    other = Probe(theirs, reference.feeds, reference.device, budget)
    return _search(_Hunt(probe, other, hunt.judge, hunt.failing, budget), path)


def _inside_loop(hunt: _Hunt, reference: Probe, numbers: tuple[int, int], path: tuple[str, ...]) -> Finding | None:
    """Run both bodies on the reference's values, iteration by iteration, up to the one that diverges."""
    start = _loop_start(reference, numbers[1])
    if start is None:
        return None
    count, carried = start
    outside = [_captured(hunt.candidate, numbers[0]), _captured(reference, numbers[1])]
    budget = hunt.budget_bytes
    for iteration in range(min(count, _MAX_ITERATIONS)):
        values: list[Array] = [np.asarray(iteration, np.int64), np.asarray(True), *carried]
        made: list[tuple[Graph, dict[str, Array]]] = []
        for probe, number, more in zip((hunt.candidate, reference), numbers, outside, strict=True):
            body = next(a.g for a in probe.graph.nodes[number].attribute if a.name == "body")
            feeds = dict(zip((v.name for v in body.input), values, strict=False)) | more
            made.append((body_of(probe.graph, number, feeds), feeds))
        probe = Probe(made[0][0], made[0][1], hunt.candidate.device, budget)
        other = Probe(made[1][0], made[1][1], reference.device, budget)
        wanted = run_model(made[1][0].model, reference.graph.folder, made[1][1], reference.device)
        ordered = [wanted[name] for name in made[1][0].outputs]
        failing = _failing(probe, dict(zip(made[0][0].outputs, ordered, strict=False)), hunt.judge)
        if failing:
            finding = _search(_Hunt(probe, other, hunt.judge, failing, budget), path)
            return replace(finding, notes=(*finding.notes, f"in iteration {iteration} of the loop"))
        if not bool(ordered[0].reshape(-1)[0]):
            return None
        carried = ordered[1 : 1 + len(carried)]
    return None


def _loop_start(probe: Probe, number: int) -> tuple[int, list[Array]] | None:
    """Number of iterations, and the values that the body is first called with; None where they cannot be had."""
    node = probe.graph.nodes[number]
    values = _values(probe, [name for name in node.input if name])
    if any(name and name not in values for name in node.input):
        return None
    count = int(values[node.input[0]].reshape(-1)[0]) if node.input[0] else _MAX_ITERATIONS
    return count, [values[name] for name in node.input[2:]]


def _captured(probe: Probe, number: int) -> dict[str, Array]:
    body = next(a.g for a in probe.graph.nodes[number].attribute if a.name == "body")
    return _values(probe, [name for name in captured_names(body) if name not in probe.graph.weights])


def _values(probe: Probe, names: Sequence[str]) -> dict[str, Array]:
    weights = {name: value for name in names if (value := probe.graph.weight(name)) is not None}
    return weights | probe.fetch([name for name in names if name not in weights])


def _blame_optimizer(sides: Sequence[tuple[Path, Device, Graph]], feeds: Feeds, wanted: Outputs) -> Finding:
    """The graphs agree as they stand: which side changes when its runtime optimizes it, and from which level on?"""
    nodes = len(sides[0][2].nodes)
    for path, device, _ in sides:
        for level in _LEVELS if device.runtime == "ort" else ("all",):
            with open_session(path, device, optimize=level) as session:
                names = {s.name for s in session.signature.inputs}
                have = session.run({k: v for k, v in feeds.items() if k in names})
            bad = [n for n in wanted if n in have and Judge().compare(have[n], wanted[n]).reason]
            if bad:
                why = Judge().compare(have[bad[0]], wanted[bad[0]]).reason
                text = (
                    f"the graphs agree node by node; {device} changes the numbers of {path.name} when it optimizes it "
                    f"(from level {level!r} on): {bad[0]}: {why}"
                )
                return Finding(text, "optimizer", nodes, notes=("the fault is the runtime's, not the graph's",))
    text = "the difference is gone when inner tensors are exposed, and it did not come back"
    return Finding(text, "unknown", nodes)
