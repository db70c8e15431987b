"""Metrics of scikit-learn: one on classes, one on the outputs themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deploykit.errors import DataError
from deploykit.extras import require
from deploykit.specs import Array


@dataclass(frozen=True, slots=True)
class BalancedAccuracy:
    """The mean over the classes of the share of their rows that is found; a rare class counts as much as others."""

    higher_is_better: bool = True
    takes: str = "predictions"

    def score(self, labels: Array, predictions: Array) -> float:
        """Score integer classes; padding is left out already."""
        return float(require("sklearn.metrics", extra="sklearn").balanced_accuracy_score(labels, predictions))


@dataclass(frozen=True, slots=True)
class LogLoss:
    """The mean negative logarithm of the probability that the true class was given."""

    higher_is_better: bool = False
    takes: str = "outputs"

    def score(self, labels: Array, predictions: Array) -> float:
        """Score probabilities, [rows, classes].

        Raises:
            DataError: They are none, or a label is no class.
        """
        rows = predictions.astype(np.float64)
        if rows.ndim != 2 or (rows < 0).any() or not np.allclose(rows.sum(1), 1, atol=1e-2):
            raise DataError(
                "log-loss needs probabilities, [rows, classes]", hint="name that output: --output-name NAME"
            )
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= rows.shape[1]:
            raise DataError(f"log-loss needs labels from 0 to {rows.shape[1] - 1}")
        rows /= rows.sum(1, keepdims=True)
        metrics = require("sklearn.metrics", extra="sklearn")
        return float(metrics.log_loss(labels, rows, labels=np.arange(rows.shape[1])))


balanced_accuracy = BalancedAccuracy()
log_loss = LogLoss()
