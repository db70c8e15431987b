"""Is a comparison worth anything? Where outputs hardly react to inputs, equal outputs prove nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from deploykit.benchmarks.differences import FLOOR, Outputs, Tolerance, diff_arrays
from deploykit.specs import Array


def check_vacuity(
    expected: Sequence[Outputs], tolerance: Tolerance | None = None, bounded: Collection[str] = ()
) -> str:
    """Why a parity test on these reference outputs would prove nothing; empty where it proves something.

    A test is vacuous where the outputs for one input would pass as the outputs for another: then a graph that ignored
    its inputs would pass as well. Ten times the tolerance is taken, for a margin. An output that is the same to the bit
    in all cases (a table of anchors), or in all rows that the cases have in common (positions, for every row of the
    batch), is a constant and no objection, as long as another output reacts. Of a single case the rows are compared.

    Args:
        expected: Outputs, one mapping a case.
        tolerance: None for the default of each output's dtype.
        bounded: Outputs that are probabilities, which are allowed `FLOOR`.
    """
    if len(expected) == 1:
        expected = _rows(expected[0])
    reacting, dull = [], []
    for name in expected[0]:
        arrays = [np.asarray(case[name]) for case in expected]
        pairs = [(a, b) for i, a in enumerate(arrays) for b in arrays[i + 1 :]]
        if all(_is_same(a, b) for a, b in pairs):
            continue
        floor = FLOOR if name in bounded else 0.0
        if any(_reacts(a, b, tolerance, floor) for a, b in pairs):
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


def _common(a: Array, b: Array) -> tuple[Array, Array]:
    """What two arrays of one rank both have places for."""
    common = tuple(slice(0, min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))
    return a[common], b[common]


def _is_same(a: Array, b: Array) -> bool:
    """Whether two outputs are one constant, to the bit; nothing in common proves nothing."""
    if a.ndim != b.ndim or a.dtype != b.dtype:
        return False
    x, y = _common(a, b)
    return (x.size > 0 or a.size == b.size == 0) and x.tobytes() == y.tobytes()


def _reacts(a: Array, b: Array, tolerance: Tolerance | None, floor: float) -> bool:
    """Whether two outputs for different inputs differ by far more than the tolerance; rows in common are compared."""
    if a.ndim != b.ndim:
        return True
    x, y = _common(a, b)
    if x.size == 0:
        return False
    chosen = tolerance or Tolerance.for_dtype(x.dtype.name)
    wide = Tolerance(chosen.atol * 10, chosen.rtol * 10, chosen.norm * 10, floor * 10)
    return bool(diff_arrays(y, x, wide).reason)
