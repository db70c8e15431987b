"""Outputs that hang on a choice between equals: top-k, arg-max, non-maximum suppression, non-zero.

Where two scores tie, two right models may choose differently, and everything that is gathered by the choice differs.
So the graph is asked: do the outputs that differ follow from such a choice? Then the choice itself is judged, on the
reference's scores; and the reference's choice is put into the candidate's graph, whose outputs then have to be equal
as strictly as any. A wrong index, and a wrong number anywhere else, still fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from deploykit.benchmarks.bisect_graph import Graph, value_info, value_of
from deploykit.benchmarks.bisect_match import Judge
from deploykit.benchmarks.bisect_probe import run_model
from deploykit.benchmarks.differences import Outputs
from deploykit.modelfile import read_model
from deploykit.runtimes import Device
from deploykit.specs import Array, Feeds

if TYPE_CHECKING:
    import onnx

_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_CHOICES = ("TopK", "ArgMax", "ArgMin", "NonMaxSuppression")
_BOOLEAN = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Xor", "Cast", "Reshape", "Squeeze",
            "Unsqueeze", "Identity", "Transpose", "Flatten", "Gather", "Slice", "Concat", "Expand")  # fmt: skip
_MAX_CHOICES = 64
# Kernels may round a score once more on its way into the choice.
_ROUNDING = 4.0


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """One operator that chooses, as it ran.

    Attributes:
        op: Its ONNX name.
        inputs: Scores (for NonMaxSuppression boxes and scores; for comparisons both sides).
        outputs: What it chose.
    """

    op: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


class Choices(Protocol):
    """A reference that can tell what it chose."""

    def choices(self, feeds: Feeds) -> Sequence[Choice]:
        """All choices of one run, in order."""
        ...


class GraphChoices:
    """The choices of an ONNX graph on a device, with the runtime's optimizations, as it is deployed.

    Args:
        graph: Its folder receives the cut models.
        device: Where it runs.
    """

    def __init__(self, graph: Graph, device: Device) -> None:
        self.graph = graph
        self._device = device
        self._types = graph.types()

    def numbers(self, outputs: Sequence[str]) -> list[int]:
        """Numbers of the nodes that choose and that these outputs follow from."""
        upstream = self.graph.upstream(outputs)
        chosen = {n for n in upstream if self.graph.nodes[n].op_type in _CHOICES}
        for number in upstream:
            if self.graph.nodes[number].op_type == "NonZero":
                chosen |= self._comparisons(number)
        return sorted(chosen)

    def _comparisons(self, number: int) -> set[int]:
        """The comparisons whose outcome, through boolean operators only, decides what is not zero."""
        found: set[int] = set()
        open_names = list(self.graph.reads[number])
        while open_names:
            maker = self.graph.producer.get(open_names.pop())
            if maker is None or self.graph.nodes[maker].op_type not in _BOOLEAN:
                continue
            if self.graph.nodes[maker].op_type in _COMPARISONS:
                found.add(maker)
            else:
                open_names += self.graph.reads[maker]
        return found

    def run(self, feeds: Feeds, names: Sequence[str], fixed: Mapping[str, Array]) -> dict[str, Array]:
        """Tensors of one run in which some are given from outside."""
        free = [name for name in dict.fromkeys(names) if name not in fixed and name in self.graph.producer]
        inputs = [v for v in self.graph.model.graph.input if v.name not in fixed]
        inputs += [value_of(n, a) for n, a in fixed.items()]
        cut = self.graph.part(
            self.graph.upstream(free, frozenset(fixed)), inputs, [value_info(n, self._types.get(n)) for n in free]
        )
        made = run_model(cut, self.graph.folder, {**feeds, **fixed}, self._device, optimize=True) if free else {}
        given = {**feeds, **fixed}
        weights = {n: w for n in names if n not in made and n not in given and (w := self.graph.weight(n)) is not None}
        return made | weights | {n: np.asarray(given[n]) for n in names if n in given}

    def choice(self, number: int, values: Mapping[str, Array]) -> Choice:
        """What one node chose, from the tensors around it."""
        node = self.graph.nodes[number]
        return Choice(
            node.op_type,
            tuple(values[name] for name in scores_of(node)),
            tuple(values[name] for name in node.output if name),
        )

    def choices(self, feeds: Feeds) -> Sequence[Choice]:
        """All choices that an output follows from."""
        numbers = self.numbers(self.graph.outputs)
        values = self.run(feeds, self.around(numbers), {})
        return [self.choice(n, values) for n in numbers]

    def around(self, numbers: Sequence[int]) -> list[str]:
        """Names of what these nodes choose from, and of what they chose."""
        nodes = [self.graph.nodes[n] for n in numbers]
        return [name for node in nodes for name in (*scores_of(node), *node.output) if name]


def has_choices(path: Path) -> bool:
    """Whether a model's main graph holds a node that chooses; its weights are not read."""
    return any(node.op_type in (*_CHOICES, "NonZero") for node in read_model(path, weights=False).graph.node)


def scores_of(node: onnx.NodeProto) -> list[str]:
    """Names of the inputs that a choice is made by."""
    return list(node.input[:2] if node.op_type in (*_COMPARISONS, "NonMaxSuppression") else node.input[:1])


def relax(
    candidate: GraphChoices, reference: Choices, feeds: Feeds, outputs: Outputs, failing: Sequence[str]
) -> tuple[dict[str, Array], list[str]] | str:
    """The candidate's outputs as they are with the reference's choices, where its own are as good.

    Args:
        candidate: The graph whose outputs differ.
        reference: Tells its choices.
        feeds: Inputs of the case.
        outputs: What the candidate gave for it.
        failing: Names of the outputs that differ.

    Returns:
        The outputs, and what was relaxed ("node (TopK): ties in 3 of 100 rows"); or, as a string, why nothing can be
        relaxed; empty where the graph makes no choices on the way to the outputs that differ.
    """
    numbers = candidate.numbers(failing)
    if not numbers:
        return ""
    if len(numbers) > _MAX_CHOICES:
        return f"{len(numbers)} nodes choose, more than {_MAX_CHOICES}"
    graph = candidate.graph
    values = candidate.run(feeds, [*graph.outputs, *candidate.around(numbers)], {})
    moved = [n for n in failing if Judge().compare(values[n], outputs[n]).reason]
    if moved:
        return f"{moved[0]!r} changes when the choices are looked at"
    theirs = list(reference.choices(feeds))
    fixed: dict[str, Array] = {}
    said: list[str] = []
    for number in numbers:
        # What a choice is made from may follow from an earlier one.
        values = candidate.run(feeds, candidate.around([number]), fixed) if fixed else values
        mine = candidate.choice(number, values)
        node = graph.nodes[number]
        match = next((c for c in theirs if c.op == mine.op and _same_scores(mine, c)), None)
        if match is None:
            return f"the reference makes no choice from the scores of {graph.label(number)!r} ({node.op_type})"
        theirs.remove(match)
        verdict = _judge(node, mine, match)
        if verdict.startswith("!"):
            return f"{graph.label(number)!r} ({node.op_type}): {verdict[1:]}"
        if verdict:
            said.append(f"{graph.label(number)} ({node.op_type}): {verdict}")
            names = [name for name in node.output if name]
            for name, own, other in zip(names, mine.outputs, match.outputs, strict=False):
                fixed[name] = other.reshape(own.shape if own.size == other.size else other.shape).astype(own.dtype)
    if not said:
        return ""
    return candidate.run(feeds, graph.outputs, fixed), said


def _same_scores(mine: Choice, other: Choice) -> bool:
    return all(
        x.size == y.size and not Judge().compare(x.reshape(-1), y.reshape(-1)).reason
        for x, y in zip(mine.inputs, other.inputs, strict=True)
    )


def _judge(node: onnx.NodeProto, mine: Choice, other: Choice) -> str:
    """Empty where both chose the same; what is relaxed where both are right; a text with "!" where one is wrong."""
    if len(mine.outputs) != len(other.outputs) and mine.op != "TopK":
        return "!it has other outputs than the reference's"
    if mine.op == "TopK":
        return _judge_top_k(node, mine, other)
    if mine.op in ("ArgMax", "ArgMin"):
        return _judge_arg(node, mine, other)
    if mine.op == "NonMaxSuppression":
        return _judge_rows(mine.outputs[0], other.outputs[0])
    return _judge_comparison(mine, other)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _judge_top_k(node: onnx.NodeProto, mine: Choice, other: Choice) -> str:
    axis = _attribute(node, "axis", -1)
    ordered = bool(_attribute(node, "sorted", 1))
    left, right = mine.outputs[-1], other.outputs[-1]
    if left.shape != right.shape:
        return f"!it chose {list(left.shape)}, the reference {list(right.shape)}"
    return _judge_indices(mine.inputs[0], other.inputs[0].reshape(mine.inputs[0].shape), left, right, axis, ordered)


def _judge_arg(node: onnx.NodeProto, mine: Choice, other: Choice) -> str:
    scores = mine.inputs[0]
    axis = _attribute(node, "axis", 0)
    left, right = mine.outputs[0], other.outputs[0]
    if left.size != right.size or left.size * scores.shape[axis] != scores.size:
        return f"!it chose {list(left.shape)}, the reference {list(right.shape)}"
    shape = tuple(1 if i == axis % scores.ndim else n for i, n in enumerate(scores.shape))
    return _judge_indices(
        scores, other.inputs[0].reshape(scores.shape), left.reshape(shape), right.reshape(shape), axis, True
    )


def _judge_indices(mine: Array, theirs: Array, left: Array, right: Array, axis: int, ordered: bool) -> str:
    """Indices along an axis: what each side picks has to have the same scores, as far as the scores are the same.

    A pick may differ where the reference's own scores of both picks are nearer to each other than twice the largest
    difference between the two sides' scores in that row.
    """
    rows = [np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]) for a in (mine, theirs, left, right)]
    scores_mine, scores, picks, wanted = rows[0].astype(np.float64), rows[1].astype(np.float64), rows[2], rows[3]
    differing = (picks != wanted).any(axis=1)
    if not differing.any():
        return ""
    if picks.min() < 0 or picks.max() >= scores.shape[1]:
        return "!an index is out of range"
    ranked = np.sort(picks, axis=1)
    if (ranked[:, 1:] == ranked[:, :-1]).any():
        return "!an index is chosen twice"
    with np.errstate(invalid="ignore"):
        error = np.nan_to_num(np.abs(scores_mine - scores), nan=0.0, posinf=0.0).max(axis=1, keepdims=True)
        rounding = _ROUNDING * _epsilon(theirs) * np.nan_to_num(np.abs(scores), posinf=0.0).max(axis=1, keepdims=True)
        have, want = np.take_along_axis(scores, picks, 1), np.take_along_axis(scores, wanted, 1)
        if not ordered:
            have, want = np.sort(have, axis=1), np.sort(want, axis=1)
        tied = (have == want) | (np.abs(have - want) <= 2 * error + rounding)
    if not tied.all():
        row, place = (int(i) for i in np.argwhere(~tied)[0])
        return (
            f"!row {row}, place {place}: it chose {int(picks[row, place])} with {have[row, place]:.6g} instead of "
            f"{int(wanted[row, place])} with {want[row, place]:.6g}, which is no tie"
        )
    return f"ties in {int(differing.sum())} of {len(differing)} rows"


def _epsilon(scores: Array) -> float:
    return {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1.2e-7}.get(scores.dtype.name, 0.0)


def _judge_rows(left: Array, right: Array) -> str:
    """Rows in any order: ONNX leaves it open for NonMaxSuppression."""
    mine, theirs = ({tuple(row) for row in a.reshape(-1, a.shape[-1]).tolist()} for a in (left, right))
    if mine != theirs:
        odd = sorted(mine ^ theirs)[0]
        return f"!{len(mine ^ theirs)} rows are chosen by one side only, the first is {list(odd)}"
    if left.shape != right.shape:
        return "!a row is chosen twice"
    moved = int((left != right).any(axis=-1).sum())
    return f"another order of {moved} of {len(left)} rows" if moved else ""


def _judge_comparison(mine: Choice, other: Choice) -> str:
    """A comparison may turn out differently where both sides of it are as near as they are between the models."""
    have, want = mine.outputs[0], other.outputs[0].reshape(mine.outputs[0].shape)
    flipped = have != want
    if not flipped.any():
        return ""
    a, b, x, y = (np.broadcast_to(v.astype(np.float64), have.shape) for v in (*mine.inputs, *other.inputs))
    room = np.abs(a - x) + np.abs(b - y) + _ROUNDING * _epsilon(other.inputs[0]) * np.maximum(np.abs(x), np.abs(y))
    if (np.abs(x - y) > room)[flipped].any():
        return "!it turns out differently where the two sides are not near each other"
    return f"{int(flipped.sum())} of {have.size} values at the threshold"
