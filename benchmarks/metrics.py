"""Accuracy, macro precision, recall and F1, by scikit-learn's definitions (zero_division=0); others by plugins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from deploykit.errors import DataError, PluginError
from deploykit.plugins import Plugin, find, names
from deploykit.specs import Array

METRICS = ("accuracy", "f1", "precision", "recall")


class Metric(Protocol):
    """What an entry point of `deploykit.metrics` is.

    Attributes:
        higher_is_better: Which way is good.
        takes: "predictions" for classes, "outputs" for the judged output itself.
    """

    higher_is_better: bool
    takes: str

    def score(self, labels: Array, predictions: Array) -> float:
        """Score all rows of a dataset at once.

        Args:
            labels: As the dataset has them, [rows] or [rows, positions]; of classes, one dimension without padding.
            predictions: Classes in the shape of the labels, or the output, [rows, ...], in float32 or float64.

        Raises:
            DataError: The labels cannot be scored.
        """


@dataclass(frozen=True, slots=True)
class Scorer:
    """One of our own metrics, or a plugin's.

    Attributes:
        name: How the user asks for it.
        plugin: Whose it is; None for ours.
        metric: The plugin's object.
    """

    name: str
    plugin: Plugin | None = None
    metric: Metric | None = None

    @property
    def higher_is_better(self) -> bool:
        """Which way is good."""
        return self.metric is None or self.metric.higher_is_better

    @property
    def takes_outputs(self) -> bool:
        """Whether it needs the outputs themselves, and not the classes in them."""
        return self.metric is not None and self.metric.takes == "outputs"

    @property
    def tools(self) -> dict[str, str]:
        """Distributions that take part, for the lineage."""
        return {} if self.plugin is None else self.plugin.tools

    def score(self, labels: Array, found: Array) -> float:
        """Score classes, or outputs where it takes those.

        Raises:
            DataError: The labels do not fit.
            PluginError: The plugin fails, or gives no finite number.
        """
        if self.plugin is None or self.metric is None:
            return float(getattr(classification_scores(labels, found), self.name))
        if not self.takes_outputs:
            labels, found = without_padded_labels(labels, found)
        elif len(labels) != len(found):
            raise DataError(f"{len(labels)} labels, {len(found)} rows of outputs")
        with self.plugin.blamed("scored"):
            value = self.metric.score(labels, found)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
            raise PluginError(f"the {self.plugin} scored {value!r}", expected="a finite number")
        return float(value)


def check_metric(name: str) -> None:
    """See that there is a metric of this name; a plugin is not loaded for that.

    Raises:
        DataError: There is none.
    """
    if name not in METRICS and find("metrics", name) is None:
        raise DataError(f"unknown metric {name!r}", expected=", ".join((*METRICS, *names("metrics"))))


def find_metric(name: str) -> Scorer:
    """The metric of that name.

    Raises:
        DataError: There is none.
        PluginError: It is a plugin's, and does not load.
    """
    check_metric(name)
    plugin = None if name in METRICS else find("metrics", name)
    return Scorer(name) if plugin is None else Scorer(name, plugin, plugin.load())


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
    truth, guess = without_padded_labels(labels, predicted)
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


def without_padded_labels(labels: Array, predicted: Array) -> tuple[Array, Array]:
    """Labels from 0 on, and the predictions at them; each one dimension of int64.

    Raises:
        DataError: Shapes differ, the labels are no integers, or none is left.
    """
    if labels.shape != predicted.shape:
        raise DataError(f"labels of shape {list(labels.shape)}, predictions of shape {list(predicted.shape)}")
    if labels.dtype.kind not in "iub":
        raise DataError(f"labels are {labels.dtype}", expected="integer classes")
    kept = labels.astype(np.int64) >= 0
    truth, guess = labels[kept].astype(np.int64), predicted[kept].astype(np.int64)
    if truth.size == 0:
        raise DataError("no labels of 0 or above")
    return truth, guess
