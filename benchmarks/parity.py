"""Are two sets of outputs the same? With a verdict that says why, and that refuses to call a vacuous test passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from deploykit.specs import Array

# Beyond this a value is a mask constant; squares of smaller ones do not overflow.
_MASK_MAGNITUDE = 1e30


class Verdict(StrEnum):
    """Outcome of a comparison."""

    PASSED = "passed"
    FAILED = "failed"
    UNVERIFIABLE = "unverifiable"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """When outputs count as equal; all three have to hold.

    Every element: ``|a - b| <= atol * scale + rtol * |b|``, where scale is the root mean square of the reference output
    (so that outputs of 1e-3 are not waved through by an absolute 1e-4). The whole: ``||a - b|| <= norm * ||b||``.

    Attributes:
        atol: Absolute, in units of the output's root mean square.
        rtol: Relative to each element.
        norm: Relative to the output's Euclidean norm.
    """

    atol: float = 1e-3
    rtol: float = 1e-3
    norm: float = 1e-4

    @classmethod
    def for_dtype(cls, dtype: str) -> Tolerance:
        """Tolerances for floating-point graphs of one precision, summed in another order."""
        if dtype in ("float16", "bfloat16"):
            return cls(5e-2, 5e-2, 2e-2)
        return cls()

    def as_dict(self) -> dict[str, float]:
        """JSON-ready copy."""
        return {"atol": self.atol, "rtol": self.rtol, "norm": self.norm}


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
    """

    name: str
    equal: bool
    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy; infinite ratios become None."""
        return {
            "name": self.name,
            "equal": self.equal,
            "max_abs": _finite(self.max_abs),
            "max_rel": _finite(self.max_rel),
            "cosine": _finite(self.cosine),
            "sqnr_db": _finite(self.sqnr_db),
            **({"reason": self.reason} if self.reason else {}),
        }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Parity:
    """Result of a comparison over several cases."""

    verdict: Verdict
    outputs: tuple[OutputDiff, ...]
    cases: int
    shapes: tuple[dict[str, list[int]], ...]
    tolerance: Tolerance | None  # the loosest of those used; None where values were judged by their cosine
    reason: str = ""

    @property
    def cosine(self) -> float:
        """Worst cosine of all outputs."""
        return min((o.cosine for o in self.outputs), default=1.0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return {
            "verdict": str(self.verdict),
            "cases": self.cases,
            "shapes": list(self.shapes),
            "tolerance": self.tolerance.as_dict() if self.tolerance else None,
            "outputs": [o.as_dict() for o in self.outputs],
            **({"reason": self.reason} if self.reason else {}),
        }


Outputs = Mapping[str, Array]


def compare(expected: Sequence[Outputs], actual: Sequence[Outputs], tolerance: Tolerance | None = None) -> Parity:
    """Compare outputs case by case.

    Args:
        expected: The reference's outputs, one mapping a case.
        actual: The candidate's, in the same order.
        tolerance: None for the default of each output's dtype.
    """
    diffs = tuple(_diff_output(name, expected, actual, tolerance) for name in expected[0])
    bad = [d for d in diffs if not d.equal]
    reason = f"{bad[0].name}: {bad[0].reason}" if bad else ""
    shapes = tuple({name: list(a.shape) for name, a in case.items()} for case in expected)
    dtypes = [np.asarray(a).dtype.name for a in expected[0].values()]
    loosest = max((Tolerance.for_dtype(d) for d in dtypes), key=lambda t: t.atol, default=Tolerance())
    return Parity(Verdict.FAILED if bad else Verdict.PASSED, diffs, len(expected), shapes, tolerance or loosest, reason)


def check_vacuity(expected: Sequence[Outputs], tolerance: Tolerance | None = None) -> str:
    """Why a parity test on these reference outputs would prove nothing; empty where it proves something.

    A test is vacuous where the outputs for one input would pass as the outputs for another: then a graph that ignored
    its inputs would pass as well. Ten times the tolerance is taken, for a margin. An output that is the same to the bit
    in all cases (a table of anchors) is a constant and no objection, as long as another output reacts. Of a single case
    the rows are compared.
    """
    if len(expected) == 1:
        expected = _rows(expected[0])
    reacting, dull = [], []
    for name in expected[0]:
        arrays = [np.asarray(case[name]) for case in expected]
        pairs = [(a, b) for i, a in enumerate(arrays) for b in arrays[i + 1 :]]
        if all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs):
            continue
        if any(_reacts(a, b, tolerance) for a, b in pairs):
            reacting.append(name)
        else:
            dull.append(name)
    if dull:
        return f"output {dull[0]!r} hardly changes when the inputs change"
    if not reacting:
        return "no output changes when the inputs change"
    return ""


def _rows(outputs: Outputs) -> list[dict[str, Array]]:
    """The rows of one batch as cases of their own, at most eight."""
    rows = min((len(a) if a.ndim else 1 for a in outputs.values()), default=1)
    return [{n: a[i : i + 1] if a.ndim else a for n, a in outputs.items()} for i in range(min(max(rows, 1), 8))]


def _reacts(a: Array, b: Array, tolerance: Tolerance | None) -> bool:
    """Whether two outputs for different inputs differ by far more than the tolerance; rows in common are compared."""
    if a.ndim != b.ndim:
        return True
    common = tuple(slice(0, min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))
    x, y = a[common], b[common]
    if x.size == 0:
        return False
    chosen = tolerance or Tolerance.for_dtype(x.dtype.name)
    wide = Tolerance(chosen.atol * 10, chosen.rtol * 10, chosen.norm * 10)
    return bool(_why_unequal(y, x, wide)[0])


def _diff_output(
    name: str, expected: Sequence[Outputs], actual: Sequence[Outputs], tolerance: Tolerance | None
) -> OutputDiff:
    worst = OutputDiff(name, True, 0.0, 0.0, 1.0, float("inf"))
    for number, (want, have) in enumerate(zip(expected, actual, strict=True)):
        if name not in have:
            return OutputDiff(name, False, float("inf"), float("inf"), 0.0, 0.0, "is missing")
        x, y = np.asarray(have[name]), np.asarray(want[name])
        chosen = tolerance or Tolerance.for_dtype(y.dtype.name)
        reason, max_abs, max_rel, cosine, sqnr = _why_unequal(x, y, chosen)
        # The first, unless a later one is about more than a tolerance.
        telling = reason and (worst.equal or np.isfinite(worst.max_abs) > np.isfinite(max_abs))
        worst = OutputDiff(
            name,
            worst.equal and not reason,
            max(worst.max_abs, max_abs),
            max(worst.max_rel, max_rel),
            min(worst.cosine, cosine),
            min(worst.sqnr_db, sqnr),
            f"case {number}, shape {list(y.shape)}: {reason}" if telling else worst.reason,
        )
    return worst


def _why_unequal(have: Array, want: Array, tol: Tolerance) -> tuple[str, float, float, float, float]:
    """Reason (empty if equal), largest absolute and relative difference, cosine, SQNR in dB."""
    inf = float("inf")
    if have.shape != want.shape:
        return f"shape {list(have.shape)} instead of {list(want.shape)}", inf, inf, 0.0, -inf
    if have.dtype != want.dtype and not {have.dtype.kind, want.dtype.kind} <= set("OUS"):
        return f"{have.dtype} instead of {want.dtype}", inf, inf, 0.0, -inf
    if want.size == 0:
        return "", 0.0, 0.0, 1.0, inf
    if want.dtype.kind in "OUSb" or want.dtype.kind in "iu":
        differing = int(np.count_nonzero(have != want))
        if differing == 0:
            return "", 0.0, 0.0, 1.0, inf
        share = differing / want.size
        return f"{differing} of {want.size} values differ", inf, inf, 1.0 - share, -inf
    x, y = _as_real(have), _as_real(want)
    if not np.array_equal(np.isnan(x), np.isnan(y)):
        where = np.flatnonzero(np.isnan(x) != np.isnan(y))[0]
        return f"NaN on one side only, first at flat index {where}", inf, inf, 0.0, -inf
    infinite = np.isinf(x) | np.isinf(y)
    if not np.array_equal(x[infinite], y[infinite]):
        where = np.flatnonzero(infinite)[0]
        return f"infinite on one side only, first at flat index {where}", inf, inf, 0.0, -inf
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    # Mask constants (-3.4e38) are compared one by one: in the scale, they would wave everything else through.
    mask = (np.abs(x) >= _MASK_MAGNITUDE) | (np.abs(y) >= _MASK_MAGNITUDE)
    off = mask & ~np.isclose(x, y, rtol=tol.rtol, atol=0)
    if off.any():
        where = int(np.flatnonzero(off)[0])
        return f"{x[where]:.6g} instead of {y[where]:.6g}", inf, inf, 0.0, -inf
    x, y = x[~mask], y[~mask]
    if y.size == 0:
        return "", 0.0, 0.0, 1.0, inf
    return _measure(x, y, tol)


def _as_real(array: Array) -> Array:
    wide = array.reshape(-1).astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    return wide.view(np.float64) if wide.dtype.kind == "c" else wide


def _measure(x: Array, y: Array, tol: Tolerance) -> tuple[str, float, float, float, float]:
    error = np.abs(x - y)
    signal, noise = float(np.linalg.norm(y)), float(np.linalg.norm(error))
    scale = signal / np.sqrt(y.size)
    max_abs = float(error.max())
    norms = signal * float(np.linalg.norm(x))
    cosine = float(x @ y) / norms if norms else float(signal == noise == 0.0)
    sqnr = 20 * np.log10(signal / noise) if noise and signal else (float("inf") if not noise else float("-inf"))
    max_rel = max_abs / scale if scale else (float("inf") if max_abs else 0.0)
    reason = ""
    over = error > tol.atol * scale + tol.rtol * np.abs(y)
    if over.any():
        where = int(np.argmax(np.where(over, error, -1)))
        reason = (
            f"{int(over.sum())} of {y.size} values differ, the most at flat index {where}: {x[where]:.6g} instead of "
            f"{y[where]:.6g} (cosine {cosine:.6f})"
        )
    elif noise > tol.norm * signal:
        reason = f"the difference is {noise / signal:.2e} of the output's norm, allowed are {tol.norm:.0e}"
    return reason, max_abs, max_rel, cosine, float(sqnr)


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
    return {n: a[real] if a.ndim > 2 and a.shape[:2] == mask.shape else a for n, a in outputs.items()}


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
        if not reason and error > _error_limit(min_cosine):  # a scale applied twice leaves the cosine as it was
            reason = f"the difference is {error:.0%} of the output's norm, though the cosine is {diff.cosine:.4f}"
        if broken and "values differ" in diff.reason:  # integer outputs: judged by the share that agrees
            reason = f"only {diff.cosine:.1%} of the values agree" if low else ""
        diffs.append(OutputDiff(diff.name, not reason, diff.max_abs, diff.max_rel, diff.cosine, diff.sqnr_db, reason))
    bad = [d for d in diffs if not d.equal]
    return Parity(
        Verdict.FAILED if bad else Verdict.PASSED,
        tuple(diffs),
        strict.cases,
        strict.shapes,
        None,
        f"{bad[0].name}: {bad[0].reason}" if bad else "",
    )


def _error_limit(min_cosine: float) -> float:
    """Twice the relative error that outputs of the parent's norm and of this cosine have at least."""
    return 2 * float(np.sqrt(1 - min_cosine**2)) if 0 < min_cosine <= 1 else float("inf")


def top1_agreement(expected: Sequence[Outputs], actual: Sequence[Outputs]) -> float | None:
    """Share of rows whose largest entry is the same, for outputs [batch, classes]; None without such an output."""
    for name, first in expected[0].items():
        if first.ndim == 2 and first.shape[1] > 1 and first.dtype.kind == "f":
            pairs = [
                (np.asarray(e[name]).argmax(1), np.asarray(a[name]).argmax(1))
                for e, a in zip(expected, actual, strict=True)
            ]
            rows = sum(len(e) for e, _ in pairs)
            return sum(int((e == a).sum()) for e, a in pairs) / rows if rows else None
    return None
