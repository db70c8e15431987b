"""Two arrays side by side: are they equal within a tolerance, how far are they apart, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.specs import Array

Outputs = Mapping[str, Array]

# Beyond this a value is a mask constant; squares of smaller ones do not overflow.
MASK_MAGNITUDE = 1e30
_INF = float("inf")


# Kernels of Sigmoid and Softmax are exact to a few units in the last place of 1, however small the result: where a
# detector sees nothing, two right runtimes differ by 1e-7 about 0.
FLOOR = 4 * 2.0**-23
# Of an output's values, so many at most may use their slack.
SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class Tolerance:
    """When outputs count as equal; all three have to hold.

    Every element: ``|a - b| <= atol * scale + rtol * |b| + floor``, where scale is the root mean square of the
    reference output (so that outputs of 1e-3 are not waved through by an absolute 1e-4). The whole:
    ``||a - b|| <= norm * ||b|| + floor * sqrt(size)``.

    Attributes:
        atol: Absolute, in units of the output's root mean square.
        rtol: Relative to each element.
        norm: Relative to the output's Euclidean norm.
        floor: Absolute; 0 unless the graph says that the output is a probability, see `FLOOR`.
        column: Relative to the norm of one column, see `columns.find_wrong_column`.
        rounding: What a column may differ by at most beside larger ones, in units of the output's root mean square.
    """

    atol: float = 1e-3
    rtol: float = 1e-3
    norm: float = 1e-4
    floor: float = 0.0
    column: float = 1e-3
    rounding: float = 1e-5

    @classmethod
    def for_dtype(cls, dtype: str) -> Tolerance:
        """Tolerances for floating-point graphs of one precision, summed in another order."""
        if dtype in ("float16", "bfloat16"):
            return cls(5e-2, 5e-2, 2e-2, column=2e-1, rounding=1e-2)
        return cls()

    def as_dict(self) -> dict[str, float]:
        """JSON-ready copy."""
        return {"atol": self.atol, "rtol": self.rtol, "norm": self.norm, "floor": self.floor}


@dataclass(frozen=True, slots=True)
class Difference:
    """How one array differs from another.

    Attributes:
        reason: Why they are not equal; empty where they are.
        max_abs: Largest absolute difference.
        max_rel: Largest ratio of a difference to the root mean square of the reference.
        cosine: Cosine of the flattened arrays; 1 where both are zero. Share of equal values for integers.
        sqnr_db: Ratio of signal to error power in dB; inf where there is no error.
        index: Where the reason is, one number an axis; None where it is about the whole.
    """

    reason: str
    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    index: tuple[int, ...] | None = None

    @property
    def error(self) -> float:
        """Norm of the difference over the norm of the reference."""
        return float(10 ** (-self.sqnr_db / 20))


EQUAL = Difference("", 0.0, 0.0, 1.0, _INF)


def _broken(reason: str, cosine: float = 0.0, index: tuple[int, ...] | None = None) -> Difference:
    return Difference(reason, _INF, _INF, cosine, -_INF, index)


def diff_arrays(have: Array, want: Array, tol: Tolerance, slack: Array | None = None) -> Difference:
    """Compare two arrays: shape, dtype, NaN and Inf, then every value and the whole.

    Args:
        have: The candidate's.
        want: The reference's.
        tol: For floating-point values; all others have to be the same.
        slack: What each value may differ by beyond the tolerance, in the shape of ``want``; see `conditioning`.
    """
    if have.shape != want.shape:
        return _broken(f"shape {list(have.shape)} instead of {list(want.shape)}")
    if have.dtype != want.dtype and not {have.dtype.kind, want.dtype.kind} <= set("OUS"):
        return _broken(f"{have.dtype} instead of {want.dtype}")
    if want.size == 0:
        return EQUAL
    if want.dtype.kind in "OUSbiu":
        return _diff_exact(have, want)
    per_value = 2 if want.dtype.kind == "c" else 1
    x, y = as_real(have), as_real(want)

    def at(flat: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(flat // per_value, want.shape))

    broken = _diff_nonfinite(x, y, at)
    if broken is not None:
        return broken
    room = np.zeros_like(y) if slack is None else as_real(slack)
    places = np.flatnonzero(np.isfinite(y))
    x, y, room = x[places], y[places], room[places]
    # Mask constants (-3.4e38) are compared one by one: in the scale, they would wave everything else through.
    mask = (np.abs(x) >= MASK_MAGNITUDE) | (np.abs(y) >= MASK_MAGNITUDE)
    off = mask & ~np.isclose(x, y, rtol=tol.rtol, atol=0)
    if off.any():
        first = int(np.flatnonzero(off)[0])
        where = at(int(places[first]))
        return _broken(f"{x[first]:.6g} instead of {y[first]:.6g} at {list(where)}", index=where)
    x, y, places, room = x[~mask], y[~mask], places[~mask], room[~mask]
    if y.size == 0:
        return EQUAL
    return _measure(x, y, tol, room, lambda i: at(int(places[i])))


def _diff_exact(have: Array, want: Array) -> Difference:
    unequal = np.asarray(have != want)
    differing = int(np.count_nonzero(unequal))
    if differing == 0:
        return EQUAL
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(unequal)), want.shape))
    text = f"{differing} of {want.size} values differ, first at {list(where)}: {have[where]} instead of {want[where]}"
    return _broken(text, 1.0 - differing / want.size, where)


def _diff_nonfinite(x: Array, y: Array, at: Any) -> Difference | None:
    """NaN and Inf that are not in the same places on both sides; the first place and how many there are."""
    for what, mine, theirs in (("NaN", np.isnan(x), np.isnan(y)), ("infinite", np.isinf(x), np.isinf(y))):
        odd = mine != theirs
        if what == "infinite":
            odd |= mine & theirs & (x != y)
        if odd.any():
            flat = int(np.argmax(odd))
            where = at(flat)
            return _broken(
                f"{what} on one side only at {int(odd.sum())} of {y.size} places, first at {list(where)}: "
                f"{x[flat]:.6g} instead of {y[flat]:.6g}",
                index=where,
            )
    return None


def as_real(array: Array) -> Array:
    """Flat float64 values; complex numbers as pairs."""
    wide = array.reshape(-1).astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    return wide.view(np.float64) if wide.dtype.kind == "c" else wide


def _measure(x: Array, y: Array, tol: Tolerance, slack: Array, at: Any) -> Difference:
    error = np.abs(x - y)
    signal, noise = float(np.linalg.norm(y)), float(np.linalg.norm(error))
    scale = signal / np.sqrt(y.size)
    max_abs = float(error.max())
    norms = signal * float(np.linalg.norm(x))
    cosine = min(1.0, max(-1.0, float(x @ y) / norms)) if norms else float(signal == noise == 0.0)
    sqnr = 20 * np.log10(signal / noise) if noise and signal else (_INF if not noise else -_INF)
    max_rel = max_abs / scale if scale else (_INF if max_abs else 0.0)
    reason, index = "", None
    over = error > tol.atol * scale + tol.rtol * np.abs(y) + tol.floor
    if slack.any() and over.sum() <= SHARE * over.size:
        over &= error > slack
    if over.any():
        flat = int(np.argmax(np.where(over, error, -1)))
        index = at(flat)
        reason = (
            f"{int(over.sum())} of {y.size} values differ, the most at {list(index)}: {x[flat]:.6g} instead of "
            f"{y[flat]:.6g} (cosine {cosine:.6f})"
        )
    elif noise > tol.norm * signal + tol.floor * np.sqrt(y.size):
        reason = f"the difference is {noise / signal:.2e} of the output's norm, allowed are {tol.norm:.0e}"
    return Difference(reason, max_abs, max_rel, cosine, float(sqnr), index)
