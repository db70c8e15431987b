"""What really ran where: the nodes of a runtime, their precision, time and traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NodePlacement:
    """Where and how one executed node ran.

    Attributes:
        name: The runtime's name for the node, after its fusions.
        op: Operator type after fusion ("QLinearConv", "FullyConnected").
        on: Execution provider or device.
        precision: Element type that the kernel computed in ("float32", "int8", "bfloat16"), "" where unknown.
        time_us: Microseconds in one run; 0 where the runtime does not say.
        moved_bytes: Size of its inputs, weights and outputs; 0 where the runtime does not say.
        weight_bytes: The part of it that is weights; 0 too where the runtime packed them away and lists them no more.
    """

    name: str
    op: str
    on: str
    precision: str
    time_us: float
    moved_bytes: int = 0
    weight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ExecutedNode:
    """One node of the graph that a runtime made of a file, and what of the file went into it.

    Attributes:
        name: The runtime's name for it, the same as in `NodePlacement`.
        op: Operator type after fusion.
        precision: Element type that its kernel computes in ("int8", "float32"), "" where unknown.
        sources: Names of the file's nodes, tensors and weights that it holds, without the runtime's suffixes.
    """

    name: str
    op: str
    precision: str
    sources: frozenset[str]


@dataclass(frozen=True, slots=True)
class Placement:
    """What really ran where."""

    asked: str
    nodes: tuple[NodePlacement, ...]

    @property
    def share_of_nodes(self) -> float:
        """Share of executed nodes on the asked provider, 0 to 1."""
        return sum(n.on == self.asked for n in self.nodes) / len(self.nodes) if self.nodes else 0.0

    @property
    def share_of_time(self) -> float:
        """Share of the nodes' time on the asked provider, 0 to 1."""
        total = sum(n.time_us for n in self.nodes)
        return sum(n.time_us for n in self.nodes if n.on == self.asked) / total if total else self.share_of_nodes

    def precisions(self) -> dict[str, int]:
        """How many nodes that compute (convolutions, matrix products, recurrences) ran in each precision."""
        return dict(Counter(n.precision for n in self.nodes if is_compute(n.op)).most_common())

    def summary(self) -> dict[str, Any]:
        """JSON-ready summary."""
        return {
            "asked": self.asked,
            "nodes": len(self.nodes),
            "share_of_nodes": round(self.share_of_nodes, 4),
            "share_of_time": round(self.share_of_time, 4),
            "compute_precisions": self.precisions(),
            "ops": dict(Counter(n.op for n in self.nodes).most_common()),
        }


_COMPUTE = (
    "conv",
    "matmul",
    "gemm",
    "fullyconnected",
    "lstm",
    "gru",
    "rnn",
    "attention",
    "mha",
    "einsum",
    "deconv",
)


# PyTorch's names for them; "linear" alone is also in ONNX Runtime's QLinearAdd.
_TORCH_COMPUTE = ("aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")


def is_compute(op: str) -> bool:
    """Whether an operator does the arithmetic that quantization is about."""
    lower = op.lower()
    if lower.startswith(_TORCH_COMPUTE):
        return True
    return any(word in lower for word in _COMPUTE) and lower not in ("convert",)


# Operators that take a part of a tensor, or only its shape; the rest of it stays where it is.
_PICKS = ("gather", "embedlayernorm", "slice", "stridedslice", "shape", "size", "aten::embedding")


def traffic_bytes(op: str, inputs: Iterable[int], outputs: Iterable[int]) -> int:
    """What an operator reads and writes, given the sizes of its tensors.

    Of an embedding's table, for example, it is the rows that are looked up.
    """
    written = sum(outputs)
    picks = op.lower().startswith(_PICKS)
    return written + sum(min(size, written) if picks else size for size in inputs)
