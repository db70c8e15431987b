"""Values that are stored in fewer bytes than a model takes: images as bytes, reals in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.specs import Array

_GIVEN = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class Scaling:
    """How stored values become those that are given: `stored * scale + offset`, computed in float32.

    Attributes:
        dtype: Of what is given.
        scale: One factor, or one a channel; empty where only the type is another.
        offset: As many as factors.
        axis: The axis of the channels.
    """

    dtype: str
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    axis: int = 1

    def apply(self, values: Array) -> Array:
        """What is given for stored ``values``, which have the samples along their first axis."""
        if not self.scale:
            return values.astype(self.dtype)
        shape = [1] * values.ndim
        if len(self.scale) > 1:
            shape[self.axis] = len(self.scale)
        found = np.multiply(values, np.asarray(self.scale, np.float32).reshape(shape), dtype=np.float32)
        found += np.asarray(self.offset, np.float32).reshape(shape)
        return found.astype(self.dtype, copy=False)

    def described(self) -> str:
        """In words: "* 0.01712 - 2.118 to float32"."""
        if not self.scale:
            return f"to {self.dtype}"
        scale, offset = (", ".join(f"{v:.6g}" for v in values) for values in (self.scale, self.offset))
        return f"* ({scale}) + ({offset}) to {self.dtype}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told: dict[str, Any] = {"dtype": self.dtype}
        if self.scale:
            told |= {"scale": list(self.scale), "offset": list(self.offset), "axis": self.axis}
        return told

    @classmethod
    def from_dict(cls, told: Any, shape: Sequence[int]) -> Scaling:
        """Read what `as_dict` gave.

        Args:
            told: From a file of any origin.
            shape: Of the array that it is about.

        Raises:
            ValueError: It is nothing of that kind, or does not fit.
        """
        if not isinstance(told, Mapping) or told.get("dtype") not in _GIVEN:
            raise ValueError("has a scaling of another form")
        scale, offset = _reals(told.get("scale", [])), _reals(told.get("offset", []))
        found = cls(str(told["dtype"]), scale, offset, told.get("axis", 1))
        found.check(shape)
        return found

    def check(self, shape: Sequence[int]) -> None:
        """Refuse an array that it does not fit.

        Raises:
            ValueError: There are other numbers of channels, or of factors.
        """
        if len(self.scale) != len(self.offset):
            raise ValueError(f"has {len(self.scale)} factors and {len(self.offset)} offsets")
        if len(self.scale) > 1 and (
            type(self.axis) is not int or not 1 <= self.axis < len(shape) or shape[self.axis] != len(self.scale)
        ):
            raise ValueError(f"has shape {list(shape)} and {len(self.scale)} factors along axis {self.axis}")


def _reals(values: Any) -> tuple[float, ...]:
    fits = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not fits:
        raise ValueError("has a scaling that is no list of numbers")
    return tuple(float(v) for v in values)
