"""Made-up pictures: patches of colour under noise, each of another brightness and contrast.

Plain noise looks all the same to a network that averages over the picture, and nothing at all to a detector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_CHANNELS = (1, 3, 4)
_SMALLEST = 8


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of a batch of pictures, with the channels first or last."""
    if len(shape) != 4:
        return False
    first = shape[1] in _CHANNELS and min(shape[2:]) >= _SMALLEST
    return first or (shape[3] in _CHANNELS and min(shape[1:3]) >= _SMALLEST)


def make_pictures(shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[Any]:
    """Pictures of about zero mean and unit variance, float64.

    Args:
        shape: [batch, channels, height, width] or [batch, height, width, channels].
        rng: Source of randomness.
    """
    batch, *rest = shape
    last = not (shape[1] in _CHANNELS and min(shape[2:]) >= _SMALLEST) and shape[3] in _CHANNELS
    height, width, channels = (rest[0], rest[1], rest[2]) if last else (rest[1], rest[2], rest[0])
    made = np.empty((batch, channels, height, width))
    for picture in made:
        side = int(rng.integers(2, 6))
        rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
        light, contrast = rng.standard_normal((channels, 1, 1)), rng.uniform(0.3, 1.5)
        patches = rng.standard_normal((channels, side, side))[:, rows][:, :, columns]
        picture[:] = light + contrast * patches + rng.standard_normal(picture.shape) * rng.uniform(0.1, 0.5)
    return made.transpose(0, 2, 3, 1) if last else made
