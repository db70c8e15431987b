"""What a quantized model has to keep, and how that is judged: on real data, against its floating-point parent.

The parent runs once; what of its outputs is needed later stays on disk, so that memory does not grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.benchmarks.metrics import Scorer, decide, find_metric, reduce_outputs
from deploykit.benchmarks.parity import without_padding
from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError
from deploykit.runtimes import Device, open_session
from deploykit.specs import Array, Signature, fit_feeds

DEFAULT_DROP = "0.01"
_BATCH = 8
# A row is decided where its best class leads by this many standard deviations of the row; noise decides the others.
_LEAD = 0.5
# Fewer decided rows, or fewer of them outside of the commonest class, say nothing about a collapse.
_DECIDED_ROWS, _OTHER_ROWS = 32, 5
# Cohen's kappa below which two classifiers agree hardly more than chance makes them.
_COLLAPSED_KAPPA = 0.2


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked for; several may be asked at once.

    Attributes:
        metric: One of `metrics.METRICS` or a plugin's, on labelled data; None where there is nothing to keep.
        drop: How much of the metric may be lost: in its own units, or, with `relative`, as a share of the parent's.
        relative: See `drop`.
        min_sqnr_db: Smallest ratio of signal to error power of the output, in dB.
        min_agreement: Smallest share of rows whose class is the parent's.
        output: The output that is judged; None for the first [batch, classes], or the first.
    """

    metric: str | None = None
    drop: float = 0.01
    relative: bool = False
    min_sqnr_db: float | None = None
    min_agreement: float | None = None
    output: str | None = None

    @property
    def asked(self) -> bool:
        """Whether there is anything to reach."""
        return self.metric is not None or self.min_sqnr_db is not None or self.min_agreement is not None

    def describe(self) -> str:
        """In words, for messages and manifests."""
        parts = []
        if self.metric is not None:
            drop = f"{self.drop:.3g} of the parent's" if self.relative else f"{self.drop:g}"
            way = "down" if find_metric(self.metric).higher_is_better else "up"
            parts.append(f"{self.metric} {way} by at most {drop}")
        if self.min_sqnr_db is not None:
            parts.append(f"SQNR >= {self.min_sqnr_db:g} dB")
        if self.min_agreement is not None:
            parts.append(f"agreement >= {self.min_agreement:g}")
        return ", ".join(parts)


def read_drop(text: str | float) -> tuple[float, bool]:
    """Read `0.01` (in the metric's units) or `1%` (of the parent's value).

    Returns:
        The number, a share for percents, and whether it is relative.

    Raises:
        DataError: Neither.
    """
    plain = str(text).strip()
    relative = plain.endswith("%")
    try:
        number = float(plain.removesuffix("%")) / (100 if relative else 1)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise DataError(f"max drop {text!r}", expected="0.01, in the metric's units, or 1%, of the parent's value")
    return number, relative


@dataclass(frozen=True, slots=True)
class Score:
    """How one model did.

    Attributes:
        samples: Rows judged.
        sqnr_db: Of the judged output, over all rows; inf where there is no error.
        agreement: Share of rows with the parent's class; None where the output holds no classes.
        value: The metric; None without labels.
        reference: The parent's.
        shortfall: By how much the goal is missed, each part relative to what it allows; 0 where it is met.
        collapsed: Why the model does not decide by its inputs any more; empty where it does.
    """

    samples: int
    sqnr_db: float
    agreement: float | None
    value: float | None
    reference: float | None
    shortfall: float
    collapsed: str = ""

    @property
    def met(self) -> bool:
        """Whether the goal is reached, by a model that works."""
        return self.shortfall <= 0 and not self.collapsed

    def describe(self, goal: Goal) -> str:
        """In words, with the parent's value beside it."""
        parts = []
        if self.value is not None and goal.metric is not None:
            parts.append(f"{goal.metric} {self.value:.4f} (parent {self.reference:.4f})")
        parts.append("no error" if self.sqnr_db == math.inf else f"SQNR {self.sqnr_db:.1f} dB")
        if self.agreement is not None:
            parts.append(f"agreement {self.agreement:.4f}")
        return ", ".join([*parts, *([self.collapsed] if self.collapsed else [])])


@dataclass(slots=True)
class _Tally:
    """What is kept of one model's outputs: sums and classes; the outputs themselves only for metrics that need them."""

    signal: float = 0.0
    error: float = 0.0
    rows: int = 0
    guesses: list[Array] = field(default_factory=list)
    leads: list[Array] = field(default_factory=list)
    outputs: list[Array] = field(default_factory=list)


class Judge:
    """Holds a parent's outputs on a dataset, and judges its descendants.

    Args:
        parent: Its file.
        signature: Its inputs and outputs.
        device: Where everything is judged.
        data: Real inputs, with `labels` for a metric.
        goal: What is asked for.
        folder: An empty one for the parent's outputs.
        limit: Rows used at most; None for all.
    """

    def __init__(
        self,
        parent: Path,
        signature: Signature,
        device: Device,
        data: Dataset,
        goal: Goal,
        folder: Path,
        *,
        limit: int | None = None,
    ) -> None:
        self.goal = goal
        self._scorer = Scorer("") if goal.metric is None else find_metric(goal.metric)
        self.data = data.fitted(signature.inputs)
        self.device = device
        self._signature = signature
        self._folder = folder
        self._limit = limit
        self._labels: list[Array] = []
        self._output = goal.output
        self._parent = self._run_parent(parent)

    def _run_parent(self, parent: Path) -> _Tally:
        tally = _Tally()
        with open_session(parent, self.device) as session:
            for number, (feeds, labels, count) in enumerate(self._batches()):
                outputs = session.run(feeds)
                self._output = self._output or _judged_output(outputs)
                if self._output not in outputs:
                    raise DataError(
                        f"the model has no output {self._output!r}", expected=f"one of {', '.join(outputs)}"
                    )
                values = self._values(outputs, feeds, count)
                np.save(self._folder / f"{number}.npy", values)
                self._count(tally, outputs[self._output][:count], values, None)
                if labels is not None:
                    self._labels.append(labels)
        if not tally.rows:
            raise DataError(f"{self.data.source} holds too few samples for one run of the model")
        self._check_data(tally)
        return tally

    def _check_data(self, tally: _Tally) -> None:
        """Refuse goals that these data or outputs cannot judge."""
        if self.goal.metric is not None and not self._labels:
            raise DataError(
                f"{self.data.source} has no {LABELS!r}, which {self.goal.metric} needs",
                hint="add them, or hold the model to its parent: --min-sqnr DB or --min-agreement SHARE",
            )
        classes = self.goal.metric is not None and not self._scorer.takes_outputs
        if (classes or self.goal.min_agreement is not None) and not tally.guesses:
            raise DataError(
                f"output {self._output!r} holds no classes",
                expected="[batch, classes]",
                hint="name another: --output-name NAME, or ask for --min-sqnr DB",
            )

    def batches(self, limit: int) -> Iterator[dict[str, Array]]:
        """Inputs of the first rows, a few at a time."""
        seen = 0
        for feeds, _, count in self._batches(4):
            if seen >= limit:
                return
            seen += count
            yield feeds

    def _batches(self, size: int = _BATCH) -> Iterator[tuple[dict[str, Array], Array | None, int]]:
        """Inputs, labels, and how many of the rows are real: a fixed batch is filled up."""
        fixed = next((s.shape[0] for s in self._signature.inputs if s.shape and isinstance(s.shape[0], int)), None)
        seen = 0
        for batch in self.data.batches(fixed or size):
            count = len(next(iter(batch.values())))
            if self._limit is not None and seen >= self._limit:
                return
            seen += count
            labels = batch.get(LABELS)
            if fixed and count < fixed:
                batch = {k: np.concatenate([v, np.repeat(v[-1:], fixed - count, 0)]) for k, v in batch.items()}
            yield fit_feeds(self._signature, {k: v for k, v in batch.items() if k != LABELS}), labels, count

    def _values(self, outputs: dict[str, Array], feeds: dict[str, Array], count: int) -> Array:
        """The judged output without filled-up and padded rows, as reals."""
        assert self._output is not None
        whole = outputs[self._output]
        if len(whole) == count or not whole.ndim:
            whole = without_padding([{self._output: whole}], [feeds])[0][self._output]
        else:
            whole = whole[:count]
        return np.asarray(whole, np.float32 if whole.dtype.kind == "f" else np.float64)

    def _count(self, tally: _Tally, output: Array, values: Array, want: Array | None) -> None:
        tally.rows += len(output) if output.ndim else 1
        if self._scorer.takes_outputs:
            tally.outputs.append(output)
        try:
            tally.guesses.append(reduce_outputs({"": output}))
        except DataError:
            tally.guesses = []
        if output.ndim == 2 and output.shape[1] > 1 and output.dtype.kind == "f":
            best = np.sort(output, 1)[:, -2:]
            tally.leads.append((best[:, 1] - best[:, 0]) > _LEAD * output.std(1))
        if want is not None:
            power = want.astype(np.float64)
            tally.signal += float(np.square(power).sum())
            tally.error += math.inf if values.shape != want.shape else float(np.square(power - values).sum())

    def judge(self, model: Path, *, precision: str = "fp32") -> Score:
        """Run a descendant on all of the data.

        Args:
            model: Its file.
            precision: See `open_session`.

        Raises:
            InferenceError: It does not run.
        """
        tally = _Tally()
        with open_session(model, self.device, precision=precision) as session:
            for number, (feeds, _, count) in enumerate(self._batches()):
                outputs = session.run(fit_feeds(session.signature, feeds))
                assert self._output is not None
                values = self._values(outputs, feeds, count)
                self._count(tally, outputs[self._output][:count], values, np.load(self._folder / f"{number}.npy"))
        return self._score(tally)

    def _score(self, tally: _Tally) -> Score:
        error = tally.error if math.isfinite(tally.error) else math.inf
        sqnr = math.inf if error == 0 else -math.inf if error == math.inf else _decibels(tally.signal, error)
        agreement = value = reference = None
        collapsed = "" if error < math.inf else "its outputs are not finite, or of another shape"
        if tally.guesses and self._parent.guesses:
            want, have = decide(self._parent.guesses), decide(tally.guesses)
            agreement = float(np.mean(want == have))
            collapsed = collapsed or _collapse(want, have, self._parent.leads)
            if self.goal.metric is not None and not self._scorer.takes_outputs:
                reference, value = self._scored(want), self._scored(have)
        if self._scorer.takes_outputs:
            reference, value = (self._scored(np.concatenate(t.outputs)) for t in (self._parent, tally))
        missed = self._shortfall(sqnr, agreement, value, reference)
        return Score(tally.rows, sqnr, agreement, value, reference, missed, collapsed)

    def _scored(self, found: Array) -> float:
        return self._scorer.score(np.concatenate(self._labels), found)

    def _shortfall(self, sqnr: float, agreement: float | None, value: float | None, reference: float | None) -> float:
        goal, parts = self.goal, [0.0]
        if value is not None and reference is not None:
            allowed = goal.drop * abs(reference) if goal.relative else goal.drop
            lost = reference - value if self._scorer.higher_is_better else value - reference
            # A drop of 0.01 is reached by 0.91 - 0.90, whatever binary fractions say.
            parts.append(max(0.0, lost - allowed - 1e-9))
        if goal.min_agreement is not None and agreement is not None:
            parts.append(max(0.0, goal.min_agreement - agreement))
        if goal.min_sqnr_db is not None:
            parts.append(min(1e3, max(0.0, goal.min_sqnr_db - sqnr)) / 20)
        return max(parts)

    @property
    def tools(self) -> dict[str, str]:
        """Distributions of plugins that took part, for the lineage."""
        return self._scorer.tools

    def record(self, score: Score) -> dict[str, Any]:
        """What the manifest keeps."""
        goal = self.goal
        told = f"certified: {goal.describe()}" if goal.asked else "not certified: no accuracy target was given"
        return {
            "summary": f"{told}; {score.describe(goal)} on {self.data.source} ({score.samples} samples)",
            "data": self.data.source,
            "device": str(self.device),
            "output": self._output,
            "samples": score.samples,
            "certified": goal.asked and score.met,
            "target": goal.describe() or None,
            "sqnr_db": _rounded(score.sqnr_db),
            "agreement": _rounded(score.agreement),
            **(
                {"metric": goal.metric, "value": _rounded(score.value), "parent": _rounded(score.reference)}
                if goal.metric
                else {}
            ),
        }


def _decibels(signal: float, error: float) -> float:
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


def _rounded(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None


def _judged_output(outputs: dict[str, Array]) -> str:
    """The first [batch, classes], else the first output in floating point, else the first."""
    shaped = [n for n, a in outputs.items() if a.dtype.kind == "f" and a.ndim == 2 and a.shape[1] > 1]
    floats = [n for n, a in outputs.items() if a.dtype.kind == "f"]
    return (shaped or floats or list(outputs))[0]


def _collapse(want: Array, have: Array, leads: list[Array]) -> str:
    """Why a classifier does not decide by its inputs any more, judged where its parent is sure; empty where it does.

    Cohen's kappa compares the agreement with what chance gives at these frequencies of the classes.
    """
    if want.shape != have.shape:
        return "its predictions have another shape"
    if leads and want.ndim == 1 and len(sure := np.concatenate(leads)) == len(want):
        want, have = want[sure], have[sure]
    if want.size < _DECIDED_ROWS:
        return ""
    classes, counts = np.unique(want, return_counts=True)
    if want.size - counts.max() < _OTHER_ROWS:
        return ""
    agreed = float(np.mean(want == have))
    chance = sum(float(n / want.size * np.mean(have == c)) for c, n in zip(classes, counts, strict=True))
    kappa = (agreed - chance) / (1 - chance) if chance < 1 else 1.0
    if kappa >= _COLLAPSED_KAPPA:
        return ""
    return f"it collapsed: its classes agree with the parent's hardly more than by chance (kappa {kappa:.2f})"
