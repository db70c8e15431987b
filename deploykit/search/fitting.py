"""Whether the data of a search fit its model: said when it is exported, and not after minutes, or never."""

from __future__ import annotations

from pathlib import Path

from deploykit.benchmarks.metrics import find_metric
from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError
from deploykit.goals import Goal
from deploykit.specs import Signature, fit_feeds


def check_labels(source: str, goal: Goal) -> None:
    """Refuse data without the labels that a metric needs, as far as that can be told without a model.

    Args:
        source: Of the data that accuracy is judged on.
        goal: What is asked for.

    Raises:
        DataError: There are none, or they are no classes.
    """
    if goal.metric is None:
        return
    found = Dataset.open(source)
    if found.has_labels is False:
        raise DataError(
            f"{source} has no {LABELS!r}, which {goal.metric} needs",
            hint="add them, or hold the model to its parent: --min-sqnr DB or --min-agreement SHARE",
        )
    labels = found.head(1).get(LABELS) if found.has_labels else None
    if labels is not None and not find_metric(goal.metric).takes_outputs and labels.dtype.kind not in "iub":
        raise DataError(f"{source}: labels are {labels.dtype}", expected="integer classes")


def check_batch(signature: Signature, batch: int | None) -> bool:
    """Refuse a number of samples in a request that the model does not take; 1 stands for what it takes.

    Returns:
        Whether that number is to be found out: it was not given, and the model takes any.

    Raises:
        DataError: Its batch is another, and fixed.
    """
    fixed = next((s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], int)), None)
    if fixed is not None and batch not in (None, 1, fixed):
        raise DataError(f"batch {batch} for a model whose batch is fixed to {fixed}", hint="leave --batch out")
    return batch is None and fixed is None


def check_fit(signature: Signature, *sources: str | None) -> None:
    """Refuse data whose first rows the model does not take.

    Args:
        signature: Of the model.
        sources: Of data; None among them is left out, and functions, which are called where their rows are used.

    Raises:
        DataError: A name is missing, or a shape or dtype does not fit.
    """
    fixed = next((s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], int)), 1)
    for source in dict.fromkeys(s for s in sources if s is not None and Path(s).exists()):
        found = Dataset.open(source)
        rows = found.fitted(signature.inputs).head(fixed)
        if len(next(iter(rows.values()))) < fixed:
            continue  # a batch is filled up where it is used
        try:
            fit_feeds(signature, {k: v for k, v in rows.items() if k != LABELS})
        except DataError as exc:
            raise DataError(f"{source}: {exc.what}", expected=exc.expected, hint=exc.hint) from exc
