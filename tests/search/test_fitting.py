"""Data that do not fit are an error before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.errors import DataError
from deploykit.goals import Goal
from deploykit.search.fitting import check_batch, check_fit, check_labels
from deploykit.specs import Signature, TensorSpec

X, Y = TensorSpec("x", "float32", ("n", 2)), TensorSpec("y", "float32", ("n", 2))
ROWS = np.zeros((4, 2), np.float32)


def written(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "d.npz", **arrays)
    return str(folder / "d.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": ROWS[:, :1]}, r"d\.npz: 'x' has shape \(1, 1\)"),
        ({"x": ROWS.astype("int64") + 2**40}, "'x' is int64, which does not become float32"),
        ({"a": ROWS, "b": ROWS}, "no data for input 'x'"),
    ],
)
def test_rows_that_the_model_does_not_take(tmp_path: Path, arrays: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_fit(Signature((X,), (Y,)), None, written(tmp_path, **arrays))


def test_rows_that_it_takes(tmp_path: Path) -> None:
    check_fit(Signature((X,), (Y,)), written(tmp_path, x=ROWS, labels=np.arange(4)), None)
    fixed = TensorSpec("x", "float32", (8, 2))
    check_fit(Signature((fixed,), (Y,)), written(tmp_path, x=ROWS))  # fewer rows than its batch are filled up


def test_labels_that_a_metric_needs(tmp_path: Path) -> None:
    check_labels(written(tmp_path, x=ROWS), Goal(min_agreement=0.9))
    with pytest.raises(DataError, match=r"has no 'labels', which accuracy needs.*--min-sqnr"):
        check_labels(written(tmp_path, x=ROWS), Goal(metric="accuracy"))
    with pytest.raises(DataError, match="labels are float32; expected integer classes"):
        check_labels(written(tmp_path, x=ROWS, labels=np.zeros(4, np.float32)), Goal(metric="accuracy"))
    check_labels(written(tmp_path, x=ROWS, labels=np.zeros(4, np.int64)), Goal(metric="accuracy"))


def test_requests_of_another_size_than_the_model_takes() -> None:
    fixed = Signature((TensorSpec("x", "float32", (8, 2)),), (Y,))
    assert not check_batch(fixed, 1)
    assert not check_batch(fixed, 8)
    assert not check_batch(fixed, None)
    assert not check_batch(Signature((X,), (Y,)), 4)
    assert check_batch(Signature((X,), (Y,)), None)
    with pytest.raises(DataError, match="batch 4 for a model whose batch is fixed to 8; leave --batch out"):
        check_batch(fixed, 4)
