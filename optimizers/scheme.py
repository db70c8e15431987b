"""The 8-bit scheme in numpy, as onnxruntime's quantizer computes it: what the accuracy algorithms minimize against.

Activations are uint8 with a zero point and one scale a tensor; weights are symmetric int8 (of 8 or 7 bits) with one
scale an output channel, or one a tensor. Products are seen as `[groups, inputs, outputs]` matrices (see `products`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deploykit.specs import Array

_STEPS = 255
# Largest integer of a symmetric weight; 7 bits reach 64, as onnxruntime's "reduced range" does.
_LIMITS = {8: 127, 7: 64}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are rounded.

    Attributes:
        bits: 8 or 7.
        per_channel: One scale an output channel.
    """

    bits: int
    per_channel: bool

    @property
    def limit(self) -> int:
        """The largest integer of a weight."""
        return _LIMITS[self.bits]

    def steps(self, weight: Array) -> Array:
        """The distance of neighbouring weights, as float32 that broadcasts over `[groups, inputs, outputs]`."""
        axes = (1,) if self.per_channel else None
        largest = np.abs(weight).max(axis=axes, keepdims=True)
        steps = (largest.astype(np.float64) / self.limit).astype(np.float32)
        return np.where(steps < np.finfo(np.float32).tiny, np.float32(1), steps)

    def rounded(self, weight: Array) -> Array:
        """A weight `[groups, inputs, outputs]` as its 8-bit copy gives it."""
        steps = self.steps(weight)
        return np.clip(np.round(weight / steps), -self.limit, self.limit).astype(np.float32) * steps


def rounded_activation(values: Array, low: float, high: float) -> Array:
    """Activations as a uint8 tensor of the range ``low`` to ``high`` gives them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / _STEPS)
    if scale < np.finfo(np.float32).tiny:
        return np.zeros_like(values)
    zero = np.float32(np.round(-low / scale))
    steps = np.clip(np.round(values / scale) + zero, 0, _STEPS)
    return np.asarray((steps - zero) * scale, np.float32)


def error_power(have: Array, want: Array) -> float:
    """Energy of a difference."""
    return float(np.square(have - want, dtype=np.float32).sum(dtype=np.float64))
