"""Intervals of figures that were not measured in the same rounds: a median alone, a share, and two runs' ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from deploykit.benchmarks.statistics import bounded_exp, nearest_rank, student_975
from deploykit.specs import Array

_RESAMPLES = 10_000
_LEVEL = 0.95
# Values that a percentile of resampled rounds is read from; finer than the intervals are wide.
_GRID = 256


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the median, 95 %.

    Args:
        values: One a round.
        seed: Of the resampling.

    Returns:
        Lower and upper end; twice the value where there is one round.
    """
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    medians = np.median(array[rng.integers(0, array.size, (_RESAMPLES, array.size))], axis=1)
    low, high = np.quantile(medians, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, such as an accuracy.

    Args:
        share: 0 to 1.
        count: Of how many samples.
    """
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio_of_medians(old: Sequence[float], new: Sequence[float], seed: int) -> tuple[float, float, float]:
    """How the median over rounds changed between two runs whose rounds have nothing to do with each other.

    Rounds of either run are resampled alone (an unpaired percentile bootstrap). Of few rounds that is too narrow, so
    that the interval is never narrower than Welch's t interval of the logarithms.

    Args:
        old: One value a round, above 0.
        new: The other run's.
        seed: Of the resampling.

    Returns:
        new/old, with the ends of its 95 % interval; infinite ones where a run has one round.
    """
    a, b = (np.log(np.asarray(values, np.float64)) for values in (old, new))
    middle = float(np.median(b) - np.median(a))
    rng = np.random.default_rng(seed)
    drawn = [np.median(x[rng.integers(0, x.size, (_RESAMPLES, x.size))], axis=1) for x in (a, b)]
    low, high = np.quantile(drawn[1] - drawn[0], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    half = _welch(a, b)
    return math.exp(middle), bounded_exp(min(low, middle - half)), bounded_exp(max(high, middle + half))


def ratio_of_percentiles(old: Sequence[Array], new: Sequence[Array], q: float, seed: int) -> tuple[float, float, float]:
    """The same for a percentile of all samples: rounds are resampled whole, and their samples pooled.

    Args:
        old: Samples of each round.
        new: The other run's.
        q: Percentile, 0 to 100.
        seed: Of the resampling.

    Returns:
        new/old, with the ends of its 95 % interval.
    """
    rng = np.random.default_rng(seed)
    logs = [np.log(_resampled(rounds, q, rng)) for rounds in (old, new)]
    exact = [math.log(nearest_rank(np.concatenate(rounds), q)) for rounds in (old, new)]
    middle = exact[1] - exact[0]
    low, high = np.quantile(logs[1] - logs[0], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    half = _welch(*(np.log([nearest_rank(r, q) for r in rounds]) for rounds in (old, new)))
    return math.exp(middle), bounded_exp(min(low, middle - half)), bounded_exp(max(high, middle + half))


def _resampled(rounds: Sequence[Array], q: float, rng: np.random.Generator) -> Array:
    """Percentiles of pools of resampled rounds, read from values that occur.

    A pool's percentile lies between the least and the greatest of its rounds', so that only values there can be it.
    """
    own = [nearest_rank(r, q) for r in rounds]
    pool = np.unique(np.concatenate(rounds))
    pool = pool[(pool >= min(own)) & (pool <= max(own))]
    grid = pool[np.unique(np.linspace(0, pool.size - 1, min(_GRID, pool.size)).round().astype(np.int64))]
    # counts[r, g]: samples of round r up to the grid's value g.
    counts = np.stack([np.searchsorted(np.sort(r), grid, side="right") for r in rounds]).astype(np.float64)
    sizes = np.asarray([r.size for r in rounds], np.float64)
    often = rng.multinomial(len(rounds), [1 / len(rounds)] * len(rounds), size=_RESAMPLES).astype(np.float64)
    enough = often @ counts >= np.ceil(q / 100 * (often @ sizes))[:, None] - 1e-9
    return np.asarray(grid[enough.argmax(axis=1)], np.float64)


def _welch(a: Array, b: Array) -> float:
    """Half of Welch's 95 % t interval of the difference of two means."""
    if a.size < 2 or b.size < 2:
        return math.inf
    parts = [float(x.var(ddof=1)) / x.size for x in (a, b)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return 0.0
    freedom = error**4 / sum(p * p / (x.size - 1) for p, x in zip(parts, (a, b), strict=True))
    return student_975(max(1, int(freedom))) * error
