"""Accuracy, macro precision, recall and F1, by scikit-learn's definitions (zero_division=0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deploykit.errors import DataError
from deploykit.specs import Array


@dataclass(frozen=True, slots=True)
class Scores:
    """Classification metrics, each 0 to 1; precision, recall and F1 are unweighted means over the classes."""

    samples: int
    accuracy: float
    precision: float
    recall: float
    f1: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)


def predictions(outputs: dict[str, Array]) -> Array:
    """Predicted classes, shape [batch] or [batch, positions], from the first output that can hold them.

    Scores [batch, classes] (or [batch, positions, classes]) give the largest; a single score [batch] or [batch, 1]
    gives class 1 above 0, or above 0.5 where all scores lie in 0 to 1; integer outputs are classes already.

    Raises:
        DataError: No output looks like a classifier's.
    """
    return decide([reduce_outputs(outputs)])


def reduce_outputs(outputs: dict[str, Array]) -> Array:
    """One batch's classes (integers), or its single scores (reals, [batch]), for `decide`; small either way.

    Raises:
        DataError: No output looks like a classifier's.
    """
    for array in outputs.values():
        if array.dtype.kind in "iu" and array.ndim >= 1:
            return array
        if array.dtype.kind != "f":
            continue
        if array.ndim in (2, 3) and array.shape[-1] > 1:
            return np.asarray(array.argmax(-1))
        if array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1):
            return array.reshape(-1)
    shapes = {name: list(a.shape) for name, a in outputs.items()}
    raise DataError(
        f"outputs {shapes} hold no classes",
        expected="[batch, classes]",
        hint="leave the labels out of the data",
    )


def decide(batches: Sequence[Array]) -> Array:
    """Classes of all batches. Whether single scores are probabilities is decided over all of them, never per batch."""
    values = np.concatenate(batches)
    if values.dtype.kind != "f":
        return values
    limit = 0.5 if ((values >= 0) & (values <= 1)).all() else 0.0
    return np.asarray((values > limit).astype(np.int64))


def classification_scores(labels: Array, predicted: Array) -> Scores:
    """Score predictions.

    Args:
        labels: Integer classes; entries below 0 are left out (padding).
        predicted: Integer classes of the same shape.

    Raises:
        DataError: Shapes differ, or the labels are no integers.
    """
    if labels.shape != predicted.shape:
        raise DataError(f"labels of shape {list(labels.shape)}, predictions of shape {list(predicted.shape)}")
    if labels.dtype.kind not in "iub":
        raise DataError(f"labels are {labels.dtype}", expected="integer classes")
    kept = labels.astype(np.int64) >= 0
    truth, guess = labels[kept].astype(np.int64), predicted[kept].astype(np.int64)
    if truth.size == 0:
        raise DataError("no labels of 0 or above")
    classes = np.union1d(truth, guess)
    hits = np.array([np.sum((truth == c) & (guess == c)) for c in classes], np.float64)
    guessed = np.array([np.sum(guess == c) for c in classes], np.float64)
    actual = np.array([np.sum(truth == c) for c in classes], np.float64)
    precision = np.divide(hits, guessed, out=np.zeros_like(hits), where=guessed > 0)
    recall = np.divide(hits, actual, out=np.zeros_like(hits), where=actual > 0)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return Scores(
        int(truth.size),
        float(np.mean(truth == guess)),
        float(precision.mean()),
        float(recall.mean()),
        float(f1.mean()),
    )
