"""Columns of an output whose scale is not that of the whole: scores of 0 to 1 beside boxes of 0 to 640.

The tolerance of an output goes with its root mean square, which the largest column makes: what stands beside it could
be anything. So every column (one index of one axis, over all other axes and all cases) is held to its own norm as well,
as far as rounding lets it: where large numbers cancel, a small column is rounded as the large ones are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deploykit.benchmarks.differences import MASK_MAGNITUDE, Tolerance
from deploykit.specs import Array

# Rounding beside large columns is of the size that is seen in these, and at least this share of what is allowed.
_NOISE, _LEAST = 10.0, 0.05
# Of fewer values, chance makes a column large or small.
MIN_VALUES = 4
# Axes of more places are positions, which no model gives a scale of their own.
_MAX_COLUMNS = 4096


@dataclass(frozen=True, slots=True)
class WrongColumn:
    """A column that is further off than its own scale allows.

    Attributes:
        reason: In words.
        case: Number of the case where it is furthest off.
        index: Place of the largest difference there.
    """

    reason: str
    case: int
    index: tuple[int, ...]


def find_wrong_column(
    have: Sequence[Array], want: Sequence[Array], tol: Tolerance, *, least: int = MIN_VALUES
) -> WrongColumn | None:
    """The worst column, or None; the axis of the samples has none.

    Args:
        have: The candidate's output, one array a case, of the reference's shapes and dtypes.
        want: The reference's.
        tol: Whose `column`, `rounding` and `floor` apply.
        least: Columns of fewer values are left out.
    """
    worst: tuple[float, int, int] | None = None
    floating = [(x, y) for x, y in zip(have, want, strict=True) if y.size]
    if not floating or any(y.dtype.kind not in "fV" or y.ndim < 2 or y.ndim != want[0].ndim for _, y in floating):
        return None
    pairs = [_comparable(x, y) for x, y in floating]
    for axis, errors, norms, count in _sums(pairs):
        if count < least:
            continue
        scale = float(np.sqrt(norms.sum() / (count * len(norms))))
        large = norms >= norms.mean()
        noise = float(np.sqrt(errors[large].sum() / (count * large.sum())))
        rounding = min(max(_NOISE * noise, _LEAST * tol.rounding * scale), tol.rounding * scale)
        allowed = tol.column * np.sqrt(norms) + (rounding + tol.floor) * np.sqrt(count)
        excess = np.sqrt(errors) / np.where(allowed > 0, allowed, 1.0)
        column = int(excess.argmax())
        if excess[column] > 1 and (worst is None or excess[column] > worst[0]):
            worst = float(excess[column]), axis, column
    return None if worst is None else _described(have, want, worst[1], worst[2])


def _comparable(x: Array, y: Array) -> tuple[Array, Array]:
    """Difference and reference in float64; 0 where there is Inf, NaN or a mask constant, which are compared alone."""
    wide, other = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore"):
        kept = (np.abs(wide) < MASK_MAGNITUDE) & (np.abs(other) < MASK_MAGNITUDE)
        return np.where(kept, wide - other, 0.0), np.where(kept, other, 0.0)


def _sums(pairs: Sequence[tuple[Array, Array]]) -> Iterator[tuple[int, Array, Array, int]]:
    """For every axis of one size over all cases: squares of differences and references a column, and how many."""
    first = pairs[0][1]
    for axis in range(1, first.ndim):
        size = first.shape[axis]
        if not 2 <= size <= _MAX_COLUMNS or any(y.shape[axis] != size for _, y in pairs):
            continue
        others = tuple(a for a in range(first.ndim) if a != axis)
        errors = np.sum([np.square(d).sum(axis=others) for d, _ in pairs], axis=0)
        norms = np.sum([np.square(y).sum(axis=others) for _, y in pairs], axis=0)
        yield axis, errors, norms, sum(y.size for _, y in pairs) // size


def _described(have: Sequence[Array], want: Sequence[Array], axis: int, column: int) -> WrongColumn:
    sides = [(np.take(x, column, axis), np.take(y, column, axis)) for x, y in zip(have, want, strict=True)]
    differences = [_comparable(x, y)[0] for x, y in sides]
    case = max(range(len(sides)), key=lambda i: float(np.abs(differences[i]).max(initial=0.0)))
    place = np.unravel_index(int(np.abs(differences[case]).argmax()), differences[case].shape)
    rest = tuple(int(i) for i in place)
    x, y = (side[rest] for side in sides[case])
    index = (*rest[:axis], column, *rest[axis:])
    norm = float(np.sqrt(sum(np.square(_comparable(*side)[1]).sum() for side in sides)))
    noise = float(np.sqrt(sum(np.square(d).sum() for d in differences)))
    share = f"{noise / norm:.1e} of its own norm" if norm else "all of it"
    return WrongColumn(
        f"column {column} of axis {axis}, which is small beside the others, is off by {share}: {float(x):.6g} instead "
        f"of {float(y):.6g} at {list(index)}",
        case,
        index,
    )
