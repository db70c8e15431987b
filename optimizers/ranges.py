"""Ranges of activations, by tensor: what quantizers spread their steps over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ranges:
    """Smallest and largest value that is not clipped.

    Attributes:
        low: By tensor; at most zero.
        high: By tensor; at least zero.
    """

    low: Mapping[str, float]
    high: Mapping[str, float]

    def extended(self, serves: Mapping[str, str]) -> Ranges:
        """The same with tensors that others stand in for."""
        known = {name: other for name, other in serves.items() if other in self.low}
        return Ranges(
            {**self.low, **{name: self.low[other] for name, other in known.items()}},
            {**self.high, **{name: self.high[other] for name, other in known.items()}},
        )
