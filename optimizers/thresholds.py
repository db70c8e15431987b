"""From what calibration has seen to the range that 8 bits are spread over.

All methods work on the same counts, so that one pass over the data serves all of them. A range always holds zero:
padding and ReLU need it exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deploykit.errors import OptimizationError
from deploykit.optimizers.histogram import Histogram
from deploykit.specs import Array

METHODS = ("minmax", "percentile", "entropy", "mse", "auto")
LEVELS = 255  # steps of uint8
_CANDIDATES = 96
_NARROWEST = 0.04  # the narrowest range that is tried, as a share of the whole
_SMOOTHED = 1e-12
_WORTH = 0.8


def choose_range(seen: Histogram, method: str, percentile: float) -> tuple[float, float]:
    """The range of one tensor.

    Args:
        seen: At least one finite value.
        method: One of `METHODS`.
        percentile: For "percentile": the share of values inside, in percent.

    Returns:
        Smallest and largest value that is not clipped; the first is at most and the second at least zero.
    """
    seen.settle()
    whole = (min(seen.low, 0.0), max(seen.high, 0.0))
    choose: dict[str, Callable[[], tuple[float, float]]] = {
        "minmax": lambda: whole,
        "percentile": lambda: percentile_range(seen, percentile),
        "entropy": lambda: entropy_range(seen),
        "mse": lambda: mse_range(seen),
        "auto": lambda: auto_range(seen),
    }
    low, high = choose[method]() if seen.counts.size else whole
    # What was sampled may end before what was seen does, never beyond it.
    return max(low, whole[0]), min(high, whole[1])


def check_method(method: str, percentile: float) -> None:
    """Refuse what no method is called.

    Raises:
        OptimizationError: The method is unknown, or the percentile is no percentage.
    """
    if method not in METHODS:
        raise OptimizationError(f"unknown calibration {method!r}", expected=" or ".join(METHODS))
    if not 50 < percentile <= 100:
        raise OptimizationError(f"percentile {percentile}", expected="more than 50, at most 100; usual is 99.99")


def percentile_range(seen: Histogram, percentile: float) -> tuple[float, float]:
    """The range without the outermost (100 - percentile) / 2 percent of the values on each side."""
    below, above, _, counts = seen.bins()
    total = np.cumsum(counts)
    cut = total[-1] * (100 - percentile) / 200
    first = int(np.searchsorted(total, cut, side="right"))
    last = int(np.searchsorted(total, total[-1] - cut, side="left"))
    return min(float(below[min(first, below.size - 1)]), 0.0), max(float(above[min(last, above.size - 1)]), 0.0)


def expected_error(seen: Histogram, lows: Array, highs: Array) -> Array:
    """Expected squared error of rounding to 255 steps and clipping, for every pair of limits.

    Inside, errors are uniform within a step (Bennett 1948); zeros have none, because zero is a step. Outside it is the
    distance to the limit.

    Args:
        seen: The values.
        lows: float64 [a], at most zero.
        highs: float64 [b], at least zero.

    Returns:
        float64 [a, b], the mean over all values.
    """
    _, _, middle, counts = seen.bins()
    moments = np.cumsum(np.stack([counts, counts * middle, counts * middle**2]), axis=1)
    moments = np.concatenate([np.zeros((3, 1)), moments], axis=1)
    under, over = np.searchsorted(middle, lows, side="left"), np.searchsorted(middle, highs, side="right")

    def clipped(part: Array, limit: Array) -> Array:
        square: Array = part[2] - 2 * limit * part[1] + limit**2 * part[0]
        return square

    zeros = counts[middle == 0].sum()
    inside = np.maximum(moments[0, over][None, :] - moments[0, under][:, None] - zeros, 0)
    step = (highs[None, :] - lows[:, None]) / LEVELS
    outside = clipped(moments[:, under], lows)[:, None] + clipped(moments[:, -1:] - moments[:, over], highs)[None, :]
    result: Array = (inside * step**2 / 12 + outside) / max(float(moments[0, -1]), 1.0)
    return result


def mse_range(seen: Histogram) -> tuple[float, float]:
    """The range with the smallest expected squared error, both limits searched."""
    lows, highs = _limits(min(seen.low, 0.0)), _limits(max(seen.high, 0.0))
    errors = expected_error(seen, lows, highs)
    best = np.unravel_index(int(np.argmin(errors)), errors.shape)
    return float(lows[best[0]]), float(highs[best[1]])


def _limits(end: float) -> Array:
    return end * np.geomspace(1, _NARROWEST, _CANDIDATES) if end else np.zeros(1)


def entropy_range(seen: Histogram) -> tuple[float, float]:
    """The range whose 255 steps lose the least information: smallest Kullback-Leibler divergence.

    Migacz, 8-bit Inference with TensorRT (GTC 2017), for ranges that are not symmetric: both limits shrink by the same
    factor. What lies outside is counted at the limit; what a step holds is spread over its bins that are not empty.
    """
    whole = (min(seen.low, 0.0), max(seen.high, 0.0))
    _, _, middle, counts = seen.bins()
    inner = middle != 0  # zero is a step of every range
    middle, counts = middle[inner], counts[inner]
    if middle.size == 0:
        return whole
    shares = np.geomspace(1, _NARROWEST, _CANDIDATES)
    lost = divergences(middle, counts, whole[0] * shares, whole[1] * shares)
    best = int(np.argmin(lost))
    return (float(whole[0] * shares[best]), float(whole[1] * shares[best])) if np.isfinite(lost[best]) else whole


def divergences(middle: Array, counts: Array, lows: Array, highs: Array) -> Array:
    """Kullback-Leibler divergence of what 255 steps make of the counts, for several ranges at once.

    Bins of one step get the same share, so that their logarithms are one, and sums over steps take cumulative counts at
    the steps' edges: the cost hangs on the number of steps, not of bins.

    Args:
        middle: float64 [n], ascending, without zero.
        counts: float64 [n], at least 1.
        lows: float64 [a].
        highs: float64 [a].

    Returns:
        float64 [a]; infinite where fewer than two bins are inside.
    """
    total = counts.sum()
    p = counts / total
    below = np.concatenate([[0.0], np.cumsum(counts)])
    own = np.concatenate([[0.0], np.cumsum(p * np.log(p + _SMOOTHED))])
    first, last = np.searchsorted(middle, lows, side="left"), np.searchsorted(middle, highs, side="right")
    few = last - first < 2
    first, last = np.where(few, 0, first), np.where(few, middle.size, last)
    # Where each step begins and ends, as positions among the bins inside.
    edges = lows[:, None] + (np.arange(LEVELS) + 0.5) * ((highs - lows) / LEVELS)[:, None]
    inner = np.clip(np.searchsorted(middle, edges.reshape(-1)).reshape(edges.shape), first[:, None], last[:, None])
    places = np.concatenate([first[:, None], inner, last[:, None]], axis=1)
    mass, size = np.diff(below[places], axis=1), np.diff(places, axis=1)
    q = mass / np.maximum(size, 1) / (below[last] - below[first])[:, None]
    shared = mass / total
    # What is clipped counts at the outermost bin inside, on either side.
    rows = np.arange(lows.size)
    outer, bins = (below[first], total - below[last]), (first, last - 1)
    divergence = own[last] - own[first]
    for clipped, place in zip(outer, bins, strict=True):
        step = np.argmax((places[:, :-1] <= place[:, None]) & (place[:, None] < places[:, 1:]), axis=1)
        shared[rows, step] += clipped / total
        more = p[place] + clipped / total
        divergence += more * np.log(more + _SMOOTHED) - p[place] * np.log(p[place] + _SMOOTHED)
    result: Array = divergence - (shared * np.log(q + _SMOOTHED)).sum(axis=1)
    return np.where(few, np.inf, result)


def auto_range(seen: Histogram) -> tuple[float, float]:
    """`mse_range` where it lowers the expected error by a fifth or more, else everything that was seen.

    Rare large values carry more of a transformer's meaning than their share of the error tells: for a small gain they
    are not clipped (on MiniLM, minmax and mse give cosines of 0.9918 and 0.9921, and with SmoothQuant 0.9961 and
    0.9959).
    """
    whole, best = (min(seen.low, 0.0), max(seen.high, 0.0)), mse_range(seen)

    def error(limits: tuple[float, float]) -> float:
        return float(expected_error(seen, np.array(limits[:1]), np.array(limits[1:]))[0, 0])

    return best if error(best) < _WORTH * error(whole) else whole
