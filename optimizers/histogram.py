"""What calibration remembers of one tensor: exact extremes, and counts by value that can be added up in any order.

A bin is what floats share whose first 18 bits are equal: sign, exponent and 9 bits of the fraction, so that bins are
0.2 % of their value wide, from the smallest number to the largest. No range has to be known before the data are, an
outlier costs the others no resolution, and counts are integers: merging is addition, commutative and associative bit
for bit. Only bins that are not empty are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from deploykit.specs import Array

SHIFT = 14  # of a float32's 32 bits
CODES = 1 << (32 - SHIFT)
# Beyond this a value is a mask constant (-3.4e38), not something that a scale of 255 steps could hold.
MASK_MAGNITUDE = 1e30
# Values of one array that are counted; all of them count for the extremes. A larger array is sampled evenly.
SAMPLED = 1 << 15
# Values that are looked at together, as many as the cache holds.
_PIECE = 1 << 16
_SIGN, _ABOVE = 1 << 31, 1 << 32  # the sign's bit, and more than any pattern
_MASKED = int(np.float32(MASK_MAGNITUDE).view(np.uint32))
# Samples that wait before they are counted: counting takes as long for few as for many.
_WAITING = 1 << 18


@dataclass(frozen=True, slots=True)
class Look:
    """What one array adds to a `Histogram`.

    Attributes:
        low: Smallest finite value that is no mask constant; +inf where there is none.
        high: Largest.
        count: Values.
        nonfinite: How many of them are NaN or infinite.
        hidden: How many are mask constants.
        sample: float32 [at most 2 * SAMPLED], the values that fill bins.
    """

    low: float = float("inf")
    high: float = float("-inf")
    count: int = 0
    nonfinite: int = 0
    hidden: int = 0
    sample: Array = field(default_factory=lambda: np.zeros(0, np.float32))


@dataclass(slots=True)
class Histogram:
    """One tensor's values over any number of batches.

    Attributes:
        low: Smallest finite value that is no mask constant; +inf before there was one.
        high: Largest.
        count: Values seen.
        nonfinite: How many of them were NaN or infinite.
        hidden: How many were mask constants.
        codes: int32 [bins], ascending: which bins are not empty.
        counts: int64 [bins], of the values that were counted.
    """

    low: float = float("inf")
    high: float = float("-inf")
    count: int = 0
    nonfinite: int = 0
    hidden: int = 0
    codes: Array = field(default_factory=lambda: np.zeros(0, np.int32))
    counts: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    _waiting: list[Array] = field(default_factory=list)
    _pending: int = 0

    @property
    def seen(self) -> bool:
        """Whether there is a range at all."""
        return self.low <= self.high

    def update(self, values: Array, *, count: bool = True) -> None:
        """Add an array of floats.

        The same arrays in any order give the same bits.

        Args:
            values: Any float dtype and shape.
            count: Whether to fill bins, or only follow the extremes.
        """
        self.add(look_at(values, count=count))

    def add(self, look: Look) -> None:
        """Add what `look_at` found in an array; in any order."""
        self.low, self.high = min(self.low, look.low), max(self.high, look.high)
        self.count += look.count
        self.nonfinite += look.nonfinite
        self.hidden += look.hidden
        if look.sample.size:
            self._waiting.append(look.sample)
            self._pending += look.sample.size
            if self._pending >= _WAITING:
                self.settle()

    def settle(self) -> None:
        """Count the samples that wait; to be called before `codes` and `counts` are read."""
        if self._waiting:
            bits = np.concatenate(self._waiting).view(np.uint32)
            self._waiting.clear()
            self._pending = 0
            # As the integers that are counted: otherwise they are converted to them in a pass of its own.
            self._keep(np.bincount(np.right_shift(bits, SHIFT, dtype=np.intp), minlength=CODES))

    def merge(self, other: Histogram) -> None:
        """Add what another run saw of the same tensor."""
        other.settle()
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count += other.count
        self.nonfinite += other.nonfinite
        self.hidden += other.hidden
        dense = np.zeros(CODES, np.int64)
        dense[other.codes] = other.counts
        self._keep(dense)

    def _keep(self, dense: Array) -> None:
        """Add counts of all bins, and keep those that are not empty."""
        dense[self.codes] += self.counts
        found = np.flatnonzero(dense != 0)
        self.codes, self.counts = found.astype(np.int32), dense[found].astype(np.int64)

    def bins(self) -> tuple[Array, Array, Array, Array]:
        """Bins that are not empty, by value.

        Returns:
            Lower edges, upper edges (float64 [bins], ascending), middles, and counts (float64). The bin of zero, which
            holds denormal numbers too, has its middle at zero.
        """
        self.settle()
        codes = self.codes.astype(np.uint32)
        near = (codes << np.uint32(SHIFT)).view(np.float32).astype(np.float64)
        far = ((codes << np.uint32(SHIFT)) | np.uint32((1 << SHIFT) - 1)).view(np.float32).astype(np.float64)
        below, above = np.minimum(near, far), np.maximum(near, far)
        order = np.argsort(below, kind="stable")
        below, above = below[order], above[order]
        middle = np.where(np.abs(below + above) < np.finfo(np.float32).tiny * 4, 0.0, (below + above) / 2)
        return below, above, middle, self.counts[order].astype(np.float64)


def look_at(values: Array, *, count: bool = True) -> Look:
    """What an array adds: it reads nothing else, so that several threads may look at several arrays.

    Args:
        values: Any float dtype and shape.
        count: Whether to take a sample, or only the extremes.
    """
    if values.size == 0:
        return Look()
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    found = _scan(flat, stride_for(flat.size) if count else 0)
    if found is not None:
        low, high, sample = found
        return Look(low, high, flat.size, sample=sample)
    finite = np.isfinite(flat)
    kept = flat[finite & (np.abs(flat) < MASK_MAGNITUDE)]
    nonfinite, hidden = int(flat.size - finite.sum()), int(finite.sum()) - kept.size
    found = _scan(kept, stride_for(kept.size) if count else 0) if kept.size else None
    if found is None:
        return Look(count=flat.size, nonfinite=nonfinite, hidden=hidden)
    low, high, sample = found
    return Look(low, high, flat.size, nonfinite, hidden, sample)


def _scan(flat: Array, step: int) -> tuple[float, float, Array] | None:
    """Extremes and a sample in one walk, piece by piece, so that whatever is read twice comes from the cache.

    Bit patterns are compared instead of floats: as unsigned integers the negative numbers stand above the others, and
    NaN and infinity at the ends of both halves. The largest pattern tells whether a piece has a negative number, and
    which is the smallest; comparisons of integers need not care for NaN, and what a ReLU made takes one pass.

    Args:
        flat: float32 [n], n > 0.
        step: Every how many values one is in the sample; 0 for none.

    Returns:
        Smallest, largest, and the sample; None where a value is no number or a mask constant.
    """
    unsigned, signed = flat.view(np.uint32), flat.view(np.int32)
    low, high = _ABOVE, -1  # patterns of the smallest number >= 0 and of the largest
    deepest, nearest = -1, _ABOVE  # of the negative numbers farthest from and closest to zero
    sample = np.empty(-(-flat.size // step) if step else 0, np.float32)
    filled = 0
    for start in range(0, flat.size, _PIECE):
        part = unsigned[start : start + _PIECE]
        top = int(part.max())
        if top >= _SIGN:
            deepest = max(deepest, top)
            highest = int(signed[start : start + _PIECE].max())
            if highest < 0:
                nearest = min(nearest, int(part.min()))
            else:
                high = max(high, highest)
        else:
            high = max(high, top)
            # Below a negative number or zero there is no smaller number >= 0.
            if deepest < 0 and low > 0:
                low = min(low, int(part.min()))
        if step:
            taken = flat[start + -start % step : start + _PIECE : step]
            sample[filled : filled + taken.size] = taken
            filled += taken.size
    if max(high, deepest - _SIGN) >= _MASKED:
        return None
    ends = np.array([deepest if deepest >= 0 else low, high if high >= 0 else nearest], np.uint32).view(np.float32)
    # Zero has two patterns, and which one is left must not hang on the order.
    return float(ends[0]) + 0.0, float(ends[1]) + 0.0, sample


def stride_for(size: int) -> int:
    """Every how many values one is counted: 1, or an odd number that shares no factor with usual row lengths."""
    step = size // SAMPLED
    if step < 2:
        return 1
    step += 1 - step % 2
    while any(step % factor == 0 for factor in (3, 5, 7)):
        step += 2
    return step
