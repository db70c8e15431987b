"""What a bisection found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deploykit.benchmarks.bisect_explain import Evidence


@dataclass(frozen=True, slots=True)
class Finding:
    """What a bisection found.

    Attributes:
        summary: One sentence.
        kind: "node", "optimizer" (the graphs agree, one of them does not when the runtime optimizes it) or "unknown".
        nodes: How many nodes the candidate's graph has.
        seconds: How long it took.
        node: Label of the first node that diverges.
        op: Its operator.
        path: Labels of the If and Loop nodes that it stands in, the outermost first.
        inputs: What is known about each of its inputs.
        outputs: The same for its outputs.
        agreeing: The last tensors that agree: its inputs' names.
        causes: What differs between the node and the reference's: operator, attributes, weights; and what a replay of
            both on the same inputs shows.
        alternatives: Labels of nodes that diverge independently of it.
        layers: The worst nodes by SQNR.
        notes: What else has to be known.
        evidence: The node as a model, and its tensors.
    """

    summary: str
    kind: str
    nodes: int
    seconds: float = 0.0
    node: str = ""
    op: str = ""
    path: tuple[str, ...] = ()
    inputs: tuple[dict[str, Any], ...] = ()
    outputs: tuple[dict[str, Any], ...] = ()
    agreeing: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    layers: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    evidence: Evidence | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy, without the tensors."""
        names = (
            "summary", "kind", "node", "op", "path", "nodes", "inputs", "outputs", "agreeing", "causes",
            "alternatives", "layers", "notes", "seconds",
        )  # fmt: skip
        return {n: list(v) if isinstance(v, tuple) else v for n in names if (v := getattr(self, n)) not in ((), "")}
