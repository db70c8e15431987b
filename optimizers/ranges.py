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
