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
# Samples that wait before they are counted: counting takes as long for few as for many.
_WAITING = 1 << 18


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
        if values.size == 0:
            return
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        self.count += flat.size
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high) and max(-low, high) < MASK_MAGNITUDE):
            finite = np.isfinite(flat)
            self.nonfinite += int(flat.size - finite.sum())
            kept = flat[finite & (np.abs(flat) < MASK_MAGNITUDE)]
            self.hidden += int(finite.sum()) - kept.size
            if kept.size == 0:
                return
            flat, low, high = kept, float(kept.min()), float(kept.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not count:
            return
        self._waiting.append(flat[:: stride_for(flat.size)].copy())
        if sum(part.size for part in self._waiting) >= _WAITING:
            self.settle()

    def settle(self) -> None:
        """Count the samples that wait; to be called before `codes` and `counts` are read."""
        if self._waiting:
            bits = np.concatenate(self._waiting).view(np.uint32)
            self._waiting.clear()
            self._keep(np.bincount(bits >> SHIFT, minlength=CODES))

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


def stride_for(size: int) -> int:
    """Every how many values one is counted: 1, or an odd number that shares no factor with usual row lengths."""
    step = size // SAMPLED
    if step < 2:
        return 1
    step += 1 - step % 2
    while any(step % factor == 0 for factor in (3, 5, 7)):
        step += 2
    return step
