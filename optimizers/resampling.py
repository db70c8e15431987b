"""Resizing along one axis as a matrix.

A separable resize of a known size is a product with one matrix for the rows and one for the columns, which every
runtime computes fast and alike. The weights are those of Pillow (`Image.resize`), torchvision and
`torch.nn.functional.interpolate(..., antialias=True)`: a kernel that is stretched by the ratio of the sizes where the
picture shrinks, centered at the output pixel, and normalized over the pixels that exist. The bicubic kernel is that of
R. Keys, "Cubic convolution interpolation for digital image processing" (1981), with a = -0.5.
"""

from __future__ import annotations

import numpy as np

from deploykit.specs import Array

CUBIC_A = -0.5


def kernel(resample: str, distance: Array) -> Array:
    """Weight of a pixel by its distance, in (stretched) pixels; float64.

    Args:
        resample: "bilinear" or "bicubic".
        distance: Not negative.
    """
    if resample == "bilinear":
        return np.asarray(np.maximum(1.0 - distance, 0.0))
    a, d = CUBIC_A, distance
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))


def resize_matrix(
    size: int, target: int, resample: str, *, antialias: bool = True, start: int = 0, rows: int | None = None
) -> Array:
    """Weights that make ``target`` pixels out of ``size``, or some of them.

    Args:
        size: Pixels that there are.
        target: Pixels of the resized picture.
        resample: "bilinear" or "bicubic".
        antialias: Whether the kernel is stretched where the picture shrinks.
        start: First pixel of the resized picture that is wanted.
        rows: How many are wanted; all by default.

    Returns:
        float64 [rows, size]; each row sums to 1.
    """
    ratio = size / target
    stretch = max(ratio, 1.0) if antialias else 1.0
    centers = (start + np.arange(target if rows is None else rows) + 0.5) * ratio
    places = np.arange(size) + 0.5
    weights = kernel(resample, np.abs(places[None, :] - centers[:, None]) / stretch)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def resized(height: int, width: int, resize: tuple[int, int] | int) -> tuple[int, int]:
    """The size of a resized picture: as told, or with the shorter edge as told, and the longer one rounded down."""
    if isinstance(resize, tuple):
        return resize
    shorter = min(height, width)
    return resize * height // shorter, resize * width // shorter


def crop_start(size: int, crop: int) -> int:
    """First pixel of the middle; of an odd rest, the larger half lies behind."""
    return (size - crop) // 2
