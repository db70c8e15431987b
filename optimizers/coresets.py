"""A small part of a dataset that stands for all of it, chosen by features of its samples.

k-center (Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; Sener and Savarese, Active learning
for convolutional neural networks: a core-set approach, 2018) takes the sample that is furthest from all that were
taken, again and again: no sample is further from its nearest than twice what the best choice of so many could reach. It
finds the rare ones. Herding (Welling, Herding dynamical weights to learn, 2009; here in the form of Rebuffi et al.,
iCaRL, 2017, equation 4) takes the sample that brings the mean of what was taken closest to the mean of all. It finds
the usual ones.

Features are read in blocks, so that they may be a mapped file; beside them, memory holds a number a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deploykit.errors import OptimizationError
from deploykit.specs import Array

METHODS = ("k-center", "herding", "random")
_BLOCK = 8192


@dataclass(frozen=True, slots=True)
class Spread:
    """How well chosen samples stand for all.

    Attributes:
        radius: Largest distance of a sample to the nearest that was chosen.
        mean_error: Distance of the mean of the chosen ones to the mean of all.
    """

    radius: float
    mean_error: float


def choose(
    features: Array,
    count: int,
    *,
    method: str = "k-center",
    strata: Array | None = None,
    seed: int = 0,
    seen: Callable[[int], None] | None = None,
) -> list[int]:
    """Choose samples.

    Args:
        features: `[samples, dimensions]`, reals; may be mapped.
        count: How many; all where there are fewer.
        method: One of `METHODS`.
        strata: A class a sample, `[samples]`: each is given its share of `count`, and chosen from alone.
        seed: Of the first sample of k-center, and of random choices.
        seen: Told, at times, how many were chosen.

    Returns:
        Numbers of samples, in the order in which they were chosen, stratum after stratum.

    Raises:
        OptimizationError: There is no such method, or a feature is not finite.
    """
    if method not in METHODS:
        raise OptimizationError(f"no method {method!r}", expected=", ".join(METHODS))
    if count < 1:
        raise OptimizationError(f"{count} samples", expected="1 or more")
    chosen: list[int] = []
    for number, (rows, share) in enumerate(_parts(len(features), count, strata)):
        dice = np.random.default_rng([seed, number])
        if share >= len(rows):
            picked = list(range(len(rows)))
        elif method == "random":
            picked = np.sort(dice.choice(len(rows), share, replace=False)).tolist()
        else:
            part = _Part(features, rows)
            picked = (
                k_center(part, share, int(dice.integers(len(rows)))) if method == "k-center" else herding(part, share)
            )
        chosen += [int(rows[i]) for i in picked]
        if seen is not None:
            seen(len(chosen))
    return chosen


def _parts(samples: int, count: int, strata: Array | None) -> Iterator[tuple[Array, int]]:
    """The samples of each stratum, and how many are chosen of them."""
    if strata is None:
        yield np.arange(samples), min(count, samples)
        return
    kinds, which = np.unique(strata, return_inverse=True)
    sizes = np.bincount(which, minlength=len(kinds))
    for kind, share in enumerate(allot(sizes.tolist(), min(count, samples))):
        if share:
            yield np.flatnonzero(which == kind), share


def allot(sizes: Sequence[int], count: int) -> list[int]:
    """Shares in proportion to sizes, by largest remainder (Hamilton); each gets one where there are enough.

    Args:
        sizes: Of the strata, each 1 or more.
        count: Sum of the shares; no more than the sum of sizes.
    """
    least = 1 if count >= len(sizes) else 0
    total = sum(sizes)
    exact = [count * size / total for size in sizes]
    shares = [max(least, int(value)) for value in exact]
    # Ties by order, so that the same data give the same shares.
    order = sorted(range(len(sizes)), key=lambda i: (-(exact[i] - shares[i]), i))
    while sum(shares) < count:
        shares[next(i for i in order if shares[i] < sizes[i])] += 1
        order = sorted(order, key=lambda i: (-(exact[i] - shares[i]), i))
    while sum(shares) > count:  # what each gets at least was more than its part
        shares[min((i for i in order if shares[i] > least), key=lambda i: (exact[i] - shares[i], -i))] -= 1
    return shares


class _Part:
    """Some rows of features, in blocks."""

    def __init__(self, features: Array, rows: Array) -> None:
        self._features, self._rows = features, rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Array:
        """One, as float64."""
        return np.asarray(self._features[self._rows[number]], np.float64)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """All of them, with their places among the rows."""
        for start in range(0, len(self._rows), _BLOCK):
            where = slice(start, min(start + _BLOCK, len(self._rows)))
            whole = len(self._rows) == len(self._features)
            values = np.asarray(self._features[where] if whole else self._features[self._rows[where]])
            if not np.isfinite(values).all():
                raise OptimizationError("features are not finite", hint="choose by another tensor, or without a model")
            yield where, values

    def distances(self, center: Array) -> Array:
        """Squared distances of all rows to a point."""
        found = np.empty(len(self))
        for where, values in self.blocks():
            off = values - center
            found[where] = np.einsum("ij,ij->i", off, off)
        return found


def k_center(part: _Part, count: int, first: int) -> list[int]:
    """Furthest points, each from those before it.

    Args:
        part: What is chosen from.
        count: How many, fewer than there are.
        first: The one to begin with, which the bound does not hang on.
    """
    chosen = [first]
    nearest = part.distances(part.row(first))
    nearest[first] = -1  # never again, where others lie on the very same place
    while len(chosen) < count:
        furthest = int(np.argmax(nearest))
        chosen.append(furthest)
        np.minimum(nearest, part.distances(part.row(furthest)), out=nearest, where=nearest >= 0)
        nearest[furthest] = -1
    return chosen


def herding(part: _Part, count: int) -> list[int]:
    """Points whose mean follows the mean of all.

    Args:
        part: What is chosen from.
        count: How many, fewer than there are.
    """
    mean = _mean(part)
    # Around the mean, where sums of squares keep their digits.
    halves = np.empty(len(part))
    for where, values in part.blocks():
        off = values - mean
        halves[where] = np.einsum("ij,ij->i", off, off) / 2
    total = np.zeros_like(mean)
    chosen: list[int] = []
    free = np.ones(len(part), bool)
    while len(chosen) < count:
        # |total + x|^2 is smallest where |x|^2 / 2 + <total, x> is, everything seen from the mean.
        scores = halves.copy()
        for where, values in part.blocks():
            scores[where] += (values - mean) @ total
        scores[~free] = np.inf
        best = int(np.argmin(scores))
        chosen.append(best)
        free[best] = False
        total += part.row(best) - mean
    return chosen


def spread(features: Array, chosen: Sequence[int]) -> Spread:
    """Measure a choice against all samples, whatever the strata were."""
    part = _Part(features, np.arange(len(features)))
    nearest = np.full(len(features), np.inf)
    for number in chosen:
        np.minimum(nearest, part.distances(part.row(number)), out=nearest)
    mean = _mean(_Part(features, np.asarray(chosen)))
    return Spread(float(np.sqrt(nearest.max())), float(np.linalg.norm(mean - _mean(part))))


def _mean(part: _Part) -> Array:
    total: Array | None = None
    for _, values in part.blocks():
        part_sum = values.sum(axis=0, dtype=np.float64)
        total = part_sum if total is None else total + part_sum
    assert total is not None
    return total / len(part)
