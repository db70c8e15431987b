"""Given which tensors agree: the first node that is to blame for the outputs that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.benchmarks.bisect_graph import MOVEMENT_OPS, Graph
from deploykit.benchmarks.bisect_match import Match, Status

# Their outputs say nothing about the values of their inputs.
_BLIND = frozenset({"Shape", "Size", "ConstantOfShape", "EyeLike"})
# Relative errors below these are rounding, summed in another order.
NOISE = {"float16": 2e-3, "bfloat16": 1e-2}
NOISE_DEFAULT = 1e-6
# A node inside the tolerance whose error is this much above the noise, out of clean inputs, is an origin.
_JUMP = 10.0
_LAYERS = 10
# Above this it is rounding, summed in another order.
_ROUNDING_DB = 80.0


@dataclass(frozen=True, slots=True)
class Suspect:
    """The node that diverges first.

    Attributes:
        number: Its place in the graph.
        exceeded: Label of the first node whose output is outside the tolerance, where that is a later one.
        alternatives: Labels of other nodes that diverge from agreeing inputs, independently of it.
        witness: The first tensor after it that has a counterpart and differs, where its own outputs have none.
    """

    number: int
    exceeded: str = ""
    alternatives: tuple[str, ...] = ()
    witness: str = ""


def find_suspect(
    graph: Graph, matches: Mapping[str, Match], failing: Sequence[str], noise: float | None
) -> Suspect | None:
    """The topologically first node that has agreeing inputs and an output that does not agree.

    Only nodes count from which a failing output is reached through tensors that do not agree. A tensor without a
    counterpart is trusted where something that follows from it agrees, and where it is too small or too plain to be
    found by its values.

    Args:
        graph: The candidate's.
        matches: What is known about its tensors.
        failing: Names of the outputs that are wrong.
        noise: Relative errors up to this are rounding; None where no earlier origin shall be looked for.
    """
    trusted = _trusted(graph, matches)

    def good(name: str) -> bool:
        match = matches.get(name)
        if name in graph.constants:
            return match is None or match.status is not Status.DIFFERS or name in trusted
        if name not in graph.producer or name in trusted:
            return True
        # Sizes, flags and fillings without a counterpart say nothing; what is computed with them does.
        unjudged = match is not None and match.status is Status.UNMATCHED and not match.telling
        return match is not None and (match.status is Status.AGREES or unjudged)

    reached = _reached(graph, failing, good)
    first = [n for n in reached if all(good(name) for name in graph.reads[n])]
    if not first:
        return None
    origin = first[0] if noise is None else _origin(graph, matches, first[0], noise)
    differing = {graph.producer[name] for name, m in matches.items() if m.status is Status.DIFFERS}
    others = tuple(graph.label(n) for n in first[1:] if n in differing)[:5]
    return Suspect(
        origin, graph.label(first[0]) if origin != first[0] else "", others, _witness(graph, matches, origin)
    )


def _witness(graph: Graph, matches: Mapping[str, Match], number: int) -> str:
    follows = set(graph.nodes[number].output)
    for node, reads in zip(graph.nodes[number:], graph.reads[number:], strict=True):
        if node is not graph.nodes[number] and not follows.intersection(reads):
            continue
        follows.update(node.output)
        for name in node.output:
            if name in matches and matches[name].status is Status.DIFFERS:
                return str(name)
    return ""


def _trusted(graph: Graph, matches: Mapping[str, Match]) -> set[str]:
    """Tensors from which something follows that agrees, although they themselves have no counterpart."""
    trusted: set[str] = set()
    for number in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[number]
        if node.op_type in _BLIND:
            continue
        for name in node.output:
            match = matches.get(name)
            if name in trusted or (match and match.status is Status.AGREES and match.telling):
                trusted.update(graph.reads[number])
                break
    return trusted


def _reached(graph: Graph, failing: Sequence[str], good: Any) -> list[int]:
    """Nodes from which a failing output is reached through tensors that are not good, in the graph's order."""
    found: set[int] = set()
    open_names = list(failing)
    while open_names:
        number = graph.producer.get(open_names.pop())
        if number is None or number in found:
            continue
        found.add(number)
        open_names += [name for name in graph.reads[number] if not good(name)]
    return sorted(found)


def _origin(graph: Graph, matches: Mapping[str, Match], first: int, noise: float) -> int:
    """Where the error came from: errors grow on their way, and the tolerance may be passed long after the fault.

    Upstream of the first node outside the tolerance, through tensors with more than noise in them, stands a node whose
    inputs are clean; of several, that with the largest error.
    """
    best, best_error = first, _JUMP * noise
    seen = {first}
    open_numbers = [first] if input_error(graph, matches, first) > noise else []
    while open_numbers:
        for name in graph.reads[open_numbers.pop()]:
            number = graph.producer.get(name)
            error = output_error(graph, matches, number) if number is not None else 0.0
            if number is None or number in seen or not noise < error < float("inf"):
                continue
            seen.add(number)
            if input_error(graph, matches, number) > noise:
                open_numbers.append(number)
            elif error > best_error:
                best, best_error = number, error
    return best


def output_error(graph: Graph, matches: Mapping[str, Match], number: int) -> float:
    """Largest relative error of a node's outputs, as far as they have counterparts."""
    return _largest(matches, graph.nodes[number].output)


def input_error(graph: Graph, matches: Mapping[str, Match], number: int) -> float:
    """Largest relative error of a node's inputs, as far as they have counterparts."""
    return _largest(matches, graph.reads[number])


def _largest(matches: Mapping[str, Match], names: Sequence[str]) -> float:
    errors = [m.diff.error for name in names if (m := matches.get(name)) and m.by]
    return max(errors, default=0.0)


def worst_layers(graph: Graph, matches: Mapping[str, Match]) -> list[dict[str, Any]]:
    """The nodes with the lowest signal-to-error ratio, their inputs' beside it: where precision is lost."""
    rows = []
    for number, node in enumerate(graph.nodes):
        found = [m for name in node.output if (m := matches.get(name)) and m.by and m.telling]
        if not found or node.op_type in MOVEMENT_OPS or node.op_type in _BLIND:
            continue
        worst = min(m.diff.sqnr_db for m in found)
        if not np.isfinite(worst) or worst > _ROUNDING_DB:
            continue
        before = graph.producer.get(node.input[0], number) if node.op_type == "DequantizeLinear" else number
        into = input_error(graph, matches, before)  # integers have no error: what counts is what was quantized
        rows.append(
            {
                "node": graph.label(number),
                "op": node.op_type,
                "sqnr_db": round(worst, 2),
                "input_sqnr_db": round(float(-20 * np.log10(into)), 2) if 0 < into < float("inf") else None,
                "cosine": min(m.diff.cosine for m in found),
            }
        )
    return sorted(rows, key=lambda row: float(row["sqnr_db"]))[:_LAYERS]
