"""Are two sets of outputs the same? With a verdict that says why, and that refuses to call a vacuous test passed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from deploykit.benchmarks.columns import find_wrong_column
from deploykit.benchmarks.differences import FLOOR, Difference, Outputs, Tolerance, diff_arrays
from deploykit.benchmarks.vacuity import check_vacuity
from deploykit.specs import Array

__all__ = [
    "OutputDiff",
    "Outputs",
    "Parity",
    "Tolerance",
    "Verdict",
    "check_vacuity",
    "compare",
    "compare_lossy",
    "top1_agreement",
    "without_padding",
]


class Verdict(StrEnum):
    """Outcome of a comparison."""

    PASSED = "passed"
    FAILED = "failed"
    UNVERIFIABLE = "unverifiable"


@dataclass(frozen=True, slots=True)
class OutputDiff:
    """How one output differs, over all cases.

    Attributes:
        name: The output.
        equal: Within the tolerance, with NaN and Inf in the same places, and of the same shape and dtype.
        max_abs: Largest absolute difference.
        max_rel: Largest ratio of a difference to the root mean square of the reference.
        cosine: Smallest cosine of the flattened outputs over the cases; 1 where both are zero.
        sqnr_db: Smallest ratio of signal to error power over the cases, in dB; inf where there is no error.
        reason: Why it is not equal.
        case: Number of the case that the reason is about; None where there is none.
        index: Place in the output that the reason is about, one number an axis.
        top1: Share of rows whose largest entry is the same; None unless the output is [batch, classes].
    """

    name: str
    equal: bool
    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    reason: str = ""
    case: int | None = None
    index: tuple[int, ...] | None = None
    top1: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy; infinite ratios become None."""
        return {
            "name": self.name,
            "equal": self.equal,
            "max_abs": _finite(self.max_abs),
            "max_rel": _finite(self.max_rel),
            "cosine": _finite(self.cosine),
            "sqnr_db": _finite(self.sqnr_db),
            **({} if self.top1 is None else {"top1_agreement": self.top1}),
            **({"reason": self.reason} if self.reason else {}),
            **({"case": self.case} if self.case is not None else {}),
            **({"index": list(self.index)} if self.index is not None else {}),
        }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Parity:
    """Result of a comparison over several cases.

    Attributes:
        verdict: Passed or failed; whether passing means anything is for `check_vacuity` to say.
        outputs: One entry an output of the reference.
        cases: How many sets of inputs.
        shapes: Shapes of the outputs, one mapping a case.
        tolerance: The loosest of those used; None where values were judged by their cosine.
        reason: Why it failed.
        relaxed: Where, and why, something else than equality was asked for ("node (TopK): ties in 3 of 100 rows").
    """

    verdict: Verdict
    outputs: tuple[OutputDiff, ...]
    cases: int
    shapes: tuple[dict[str, list[int]], ...]
    tolerance: Tolerance | None
    reason: str = ""
    relaxed: tuple[str, ...] = ()

    @property
    def cosine(self) -> float:
        """Worst cosine of all outputs."""
        return min((o.cosine for o in self.outputs), default=1.0)

    @property
    def failed_case(self) -> int:
        """Number of the case that the reason is about; 0 where there is none."""
        return next((o.case for o in self.outputs if not o.equal and o.case is not None), 0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        top1 = next((o.top1 for o in self.outputs if o.top1 is not None), None)
        return {
            "verdict": str(self.verdict),
            "cases": self.cases,
            "shapes": list(self.shapes),
            "tolerance": self.tolerance.as_dict() if self.tolerance else None,
            "outputs": [o.as_dict() for o in self.outputs],
            **({} if top1 is None else {"top1_agreement": top1}),
            **({"relaxed": list(self.relaxed)} if self.relaxed else {}),
            **({"reason": self.reason} if self.reason else {}),
        }


def compare(
    expected: Sequence[Outputs],
    actual: Sequence[Outputs],
    tolerance: Tolerance | None = None,
    *,
    bounded: Collection[str] = (),
    slack: Sequence[Outputs] | None = None,
) -> Parity:
    """Compare outputs case by case.

    Args:
        expected: The reference's outputs, one mapping a case.
        actual: The candidate's, in the same order.
        tolerance: None for the default of each output's dtype.
        bounded: Outputs that the graph makes by Sigmoid or Softmax: they may differ by `FLOOR`, as long as the outputs
            for one input would still not pass as those for another.
        slack: What each value may differ by where few differ, one mapping a case; see `conditioning.slack_of`.
    """
    if bounded and check_vacuity(expected, tolerance, bounded):
        bounded = ()
    diffs = tuple(
        _diff_output(name, expected, actual, tolerance, FLOOR if name in bounded else 0.0, slack)
        for name in expected[0]
    )
    shapes = tuple({name: list(a.shape) for name, a in case.items()} for case in expected)
    dtypes = [np.asarray(a).dtype.name for a in expected[0].values()]
    loosest = max((Tolerance.for_dtype(d) for d in dtypes), key=lambda t: t.atol, default=Tolerance())
    verdict, reason = _judge(diffs)
    return Parity(verdict, diffs, len(expected), shapes, tolerance or loosest, reason)


def _judge(diffs: Sequence[OutputDiff]) -> tuple[Verdict, str]:
    bad = [d for d in diffs if not d.equal]
    return (Verdict.FAILED, f"{bad[0].name}: {bad[0].reason}") if bad else (Verdict.PASSED, "")


def _diff_output(
    name: str,
    expected: Sequence[Outputs],
    actual: Sequence[Outputs],
    tolerance: Tolerance | None,
    floor: float,
    slack: Sequence[Outputs] | None,
) -> OutputDiff:
    inf = float("inf")
    worst = OutputDiff(name, True, 0.0, 0.0, 1.0, inf)
    chosen = tolerance or Tolerance()
    for number, (want, have) in enumerate(zip(expected, actual, strict=True)):
        if name not in have:
            return OutputDiff(name, False, inf, inf, 0.0, 0.0, "is missing", number)
        x, y = np.asarray(have[name]), np.asarray(want[name])
        chosen = replace(tolerance or Tolerance.for_dtype(y.dtype.name), floor=floor)
        room = None if slack is None else slack[number].get(name)
        worst = _worse(worst, diff_arrays(x, y, chosen, room), number, y)
    if worst.equal:
        sides = [[np.asarray(case[name]) for case in cases] for cases in (actual, expected)]
        wrong = find_wrong_column(sides[0], sides[1], chosen)
        if wrong is not None:
            reason = f"case {wrong.case}, shape {list(sides[1][wrong.case].shape)}: {wrong.reason}"
            worst = replace(worst, equal=False, reason=reason, case=wrong.case, index=wrong.index)
    return replace(worst, top1=_top1(name, expected, actual))


def _worse(worst: OutputDiff, found: Difference, number: int, want: Array) -> OutputDiff:
    """Both together; the first reason stays, unless a later one is about more than a tolerance."""
    telling = found.reason and (worst.equal or np.isfinite(worst.max_abs) > np.isfinite(found.max_abs))
    return OutputDiff(
        worst.name,
        worst.equal and not found.reason,
        max(worst.max_abs, found.max_abs),
        max(worst.max_rel, found.max_rel),
        min(worst.cosine, found.cosine),
        min(worst.sqnr_db, found.sqnr_db),
        f"case {number}, shape {list(want.shape)}: {found.reason}" if telling else worst.reason,
        number if telling else worst.case,
        found.index if telling else worst.index,
    )


def without_padding(outputs: Sequence[Outputs], feeds: Sequence[Outputs]) -> list[dict[str, Array]]:
    """Drop what stands at padded positions, for lossy comparisons.

    An input `attention_mask` [batch, sequence] says which positions are real. Outputs [batch, sequence, ...] hold
    numbers at the others too, which no user reads, which follow from no data, and which quantization changes most.

    Args:
        outputs: One mapping a case.
        feeds: The inputs of the same cases.
    """
    return [_real_positions(o, f.get("attention_mask")) for o, f in zip(outputs, feeds, strict=True)]


def _real_positions(outputs: Outputs, mask: Array | None) -> dict[str, Array]:
    if mask is None or mask.ndim != 2 or not mask.any():
        return dict(outputs)
    real = mask.astype(bool)
    # The rank stays: [tokens, hidden] would look like [batch, classes].
    return {n: a[real][None] if a.ndim > 2 and a.shape[:2] == mask.shape else a for n, a in outputs.items()}


def compare_lossy(expected: Sequence[Outputs], actual: Sequence[Outputs], min_cosine: float) -> Parity:
    """Compare a quantized model with its parent: shapes, dtypes, NaN as always; values by their cosine.

    Args:
        expected: The parent's outputs, one mapping a case.
        actual: The candidate's.
        min_cosine: Smallest cosine of a flattened output that is accepted, in any case.
    """
    strict = compare(expected, actual)
    diffs = []
    for diff in strict.outputs:
        broken = diff.reason and not np.isfinite(diff.max_abs)
        low = diff.cosine < min_cosine
        reason = diff.reason if broken else f"cosine {diff.cosine:.4f} is below {min_cosine}" if low else ""
        error = 10 ** (-diff.sqnr_db / 20)
        if not reason and error > error_limit(min_cosine):  # a scale applied twice leaves the cosine as it was
            reason = f"the difference is {error:.0%} of the output's norm, though the cosine is {diff.cosine:.4f}"
        if broken and "values differ" in diff.reason:  # integer outputs: judged by the share that agrees
            reason = f"only {diff.cosine:.1%} of the values agree" if low else ""
        diffs.append(
            replace(
                diff,
                equal=not reason,
                reason=reason,
                case=diff.case if reason else None,
                index=diff.index if reason else None,
            )
        )
    verdict, reason = _judge(diffs)
    return Parity(verdict, tuple(diffs), strict.cases, strict.shapes, None, reason)


def error_limit(min_cosine: float) -> float:
    """Twice the relative error that outputs of the parent's norm and of this cosine have at least."""
    return 2 * float(np.sqrt(1 - min_cosine**2)) if 0 < min_cosine <= 1 else float("inf")


def top1_agreement(expected: Sequence[Outputs], actual: Sequence[Outputs]) -> float | None:
    """Share of rows whose largest entry is the same, for outputs [batch, classes]; None without such an output."""
    return next((share for name in expected[0] if (share := _top1(name, expected, actual)) is not None), None)


def _top1(name: str, expected: Sequence[Outputs], actual: Sequence[Outputs]) -> float | None:
    """For one output; None where it is not [batch, classes] of floating point, or shapes differ."""
    same = rows = 0
    for want, have in zip(expected, actual, strict=True):
        y, x = np.asarray(want[name]), np.asarray(have[name])
        if y.ndim != 2 or y.shape[1] < 2 or y.dtype.kind != "f" or x.shape != y.shape:
            return None
        same += int((x.argmax(1) == y.argmax(1)).sum())
        rows += len(y)
    return same / rows if rows else None
