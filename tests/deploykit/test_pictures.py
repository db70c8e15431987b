"""Made-up pictures."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.data import generate
from deploykit.pictures import is_picture, make_pictures
from deploykit.specs import TensorSpec


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((2, 3, 32, 32), True),
        ((2, 32, 48, 3), True),
        ((1, 1, 8, 8), True),
        ((2, 8, 5, 16), False),  # keys of an attention
        ((2, 3, 4, 4), False),
        ((2, 3, 32), False),
    ],
)
def test_shapes_of_pictures(shape: tuple[int, ...], found: bool) -> None:
    assert is_picture(shape) is found


@pytest.mark.parametrize("shape", [(6, 3, 32, 40), (6, 32, 40, 3)])
def test_pictures_differ_where_noise_does_not(shape: tuple[int, ...]) -> None:
    made = make_pictures(shape, np.random.default_rng(0))
    assert made.shape == shape
    axes = (2, 3) if shape[1] == 3 else (1, 2)
    assert made.mean(axes).std(0).min() > 0.3
    assert np.random.default_rng(0).standard_normal(shape).mean(axes).std(0).max() < 0.1


def test_pictures_are_made_up_for_image_inputs() -> None:
    spec = TensorSpec("image", "float32", ("batch", 3, 16, 16))
    made = generate([spec], {"batch": 4}, seed=1)["image"]
    assert made.dtype == np.float32
    assert made.mean((2, 3)).std() > 0.3
    assert np.array_equal(made, generate([spec], {"batch": 4}, seed=1)["image"])
