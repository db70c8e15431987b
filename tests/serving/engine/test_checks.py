"""What a request has to be, before it waits."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.serving.checks import check_inputs, check_outputs
from deploykit.serving.loaded import batch_symbol
from deploykit.serving.requests import InvalidRequest
from deploykit.specs import Signature, TensorSpec

SIGNATURE = Signature(
    (
        TensorSpec("ids", "int64", ("n", "t")),
        TensorSpec("mask", "int64", ("n", "t + 1")),
        TensorSpec("text", "string", (2,)),
        TensorSpec("any", "float32", None),
    ),
    (TensorSpec("y", "float32", ("n",)),),
)


def good() -> dict[str, np.ndarray]:
    return {
        "ids": np.zeros((2, 3), np.int64), "mask": np.zeros((2, 4), np.int64),
        "text": np.array(["a", "b"], object), "any": np.zeros((1, 2, 3), np.float32),
    }  # fmt: skip


def test_what_fits_passes():
    check_inputs(SIGNATURE, good())
    check_inputs(SIGNATURE, good() | {"ids": np.zeros((2, 3), ">i8"), "text": np.array(["a", "b"])})
    check_outputs(SIGNATURE, None)
    check_outputs(SIGNATURE, ("y",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": np.zeros(1)}, "no input 'other'.*ids: int64"),
        ({"ids": None}, "there is no input 'ids'"),
        ({"ids": np.zeros((2, 3), np.int32)}, r"'ids' is int32; expected ids: int64\[n, t\]"),
        ({"ids": np.zeros((2, 3, 1), np.int64)}, r"shape \[2, 3, 1\]; expected 2 dimensions"),
        ({"mask": np.zeros((3, 4), np.int64)}, "'n' of 'mask' is 3; expected 2"),
        ({"mask": np.zeros((2, 3), np.int64)}, r"expected t \+ 1 = 4"),
        ({"text": np.array(["a"], object)}, r"shape \[1\]"),
        ({"text": np.zeros(2)}, "'text' is float64"),
        ({"any": np.zeros(1)}, "'any' is float64"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(change, message):
    inputs = {name: array for name, array in (good() | change).items() if array is not None}
    with pytest.raises(InvalidRequest, match=message):
        check_inputs(SIGNATURE, inputs)


def test_unknown_outputs_are_refused():
    with pytest.raises(InvalidRequest, match="no output 'z'; expected y"):
        check_outputs(SIGNATURE, ("y", "z"))


def shapes(inputs, outputs) -> Signature:
    return Signature(
        tuple(TensorSpec(f"i{n}", "float32", s) for n, s in enumerate(inputs)),
        tuple(TensorSpec(f"o{n}", "float32", s) for n, s in enumerate(outputs)),
    )


@pytest.mark.parametrize(
    ("inputs", "outputs", "found"),
    [
        ([("n", 4)], [("n",)], "n"),
        ([("n", "t"), ("n",)], [("n", "t"), ("n", 3)], "n"),
        ([(1, 4)], [(1,)], None),
        ([("n", 4), ("m", 4)], [("n",)], None),
        ([("n", 4)], [(4,)], None),
        ([("n", 4)], [("n + 1",)], None),
        ([("n", "n")], [("n",)], None),
        ([("n", "n + t")], [("n",)], None),
        ([("n", 4), ()], [("n",)], None),
        ([("n", 4)], [()], None),
        ([None], [("n",)], None),
        ([], [("n",)], None),
    ],
)
def test_only_a_first_dimension_of_everything_is_a_batch(inputs, outputs, found):
    assert batch_symbol(shapes(inputs, outputs)) == found
