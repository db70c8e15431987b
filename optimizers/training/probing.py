"""What can be said before hours are spent: whether module, data and settings fit together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from deploykit.data import LABELS, Dataset, user_frame
from deploykit.errors import DataError, DeploykitError, OptimizationError, first_line
from deploykit.extras import require
from deploykit.optimizers.training.config import TrainConfig
from deploykit.optimizers.training.evaluating import Evaluation, device_of, evaluating
from deploykit.optimizers.training.losses import CLASSIFIERS, Objective, Supervised, are_probabilities
from deploykit.optimizers.training.outputs import Feed, first_output, tensors_of
from deploykit.optimizers.training.rows import Rows, Survey
from deploykit.progress import Progress

_PROBED_ROWS = 2


def probe(
    module: Any,
    rows: Rows,
    config: TrainConfig,
    objective: Objective | None,
    supervised: Supervised,
    feed: Feed,
    told: Progress,
    judged: tuple[Dataset, Survey] | None = None,
) -> None:
    """Run a few rows, so that what does not fit is said before hours are spent.

    Args:
        module: On the CPU.
        rows: To train on.
        config: Settings.
        objective: In place of the config's loss.
        supervised: The config's loss; told whether the module gives probabilities.
        feed: How a batch is given to the module.
        told: Notes.
        judged: The evaluation data, and what was seen of them.

    Raises:
        DataError: The rows do not fit the module, or labels do not fit its output.
        OptimizationError: Mixup of inputs that cannot be mixed.
    """
    torch = require("torch", extra="train")
    if config.mixup:
        whole = [name for name, array in rows.inputs.items() if array.dtype.kind != "f"]
        if whole:
            raise OptimizationError(f"mixup cannot mix {whole[0]!r}, which holds no real numbers", hint="leave it out")
    if objective is None and LABELS not in rows.arrays:
        raise DataError(f"{rows.source} has no {LABELS!r}, which the loss needs", hint="add them")
    batch = tensors_of(rows.take(np.arange(min(_PROBED_ROWS, rows.length))), device_of(module))
    try:
        with evaluating(module), torch.no_grad():
            output = first_output(feed(module, batch))
    except DeploykitError:
        raise
    except Exception as exc:
        shapes = ", ".join(f"{name} {a.dtype}{list(a.shape[1:])}" for name, a in rows.inputs.items())
        raise DataError(
            f"the module does not take rows of {rows.source} ({first_line(exc)}{user_frame(exc)})",
            expected=f"a forward that runs on {shapes}, with a batch axis before",
        ) from exc
    if objective is not None:
        return
    if config.loss in CLASSIFIERS:
        supervised.probabilities = are_probabilities(output)
        if supervised.probabilities:
            told.note("the output holds probabilities, whose logarithm the loss is computed from")
    _check_labels(rows.source, rows.seen, config.loss, output, batch[LABELS].ndim)
    if judged is not None:
        data, seen = judged
        if seen.labels is None:
            raise DataError(f"{data.source} has no {LABELS!r}, which the loss needs", hint="add them")
        _check_labels(data.source, seen, config.loss, output, batch[LABELS].ndim)
    with torch.no_grad():
        supervised.loss(output, batch[LABELS])


def try_evaluation(evaluation: Evaluation, module: Any) -> float:
    """Measure what is watched once before the training: better now than after the first epoch.

    Returns:
        The metric, or the loss, of the module as it is.

    Raises:
        DataError: The evaluation data do not fit the module, the loss or the metric.
        OptimizationError: The number is not finite.
    """
    try:
        value = evaluation.watched(evaluation.measure(module))
    except (DeploykitError, MemoryError):
        raise
    except Exception as exc:
        if type(exc).__name__ == "OutOfMemoryError":
            raise
        raise DataError(
            f"{evaluation.name} cannot be measured on {evaluation.data.source} ({first_line(exc)}{user_frame(exc)})",
            expected="evaluation data that the module runs on, with labels that the metric and the loss take",
        ) from exc
    if not math.isfinite(value):
        raise OptimizationError(
            f"{evaluation.name} is {value} on {evaluation.data.source} before the training", expected="a finite number"
        )
    return value


def _check_labels(source: str, seen: Survey, loss: str, output: Any, ndim: int) -> None:
    """Refuse labels that the output has no class for, or that say nothing.

    Args:
        source: Whose they are.
        seen: What was seen of all of them.
        loss: The config's.
        output: What the module gave for some rows.
        ndim: Axes of the labels of a batch.

    Raises:
        DataError: There are such.
    """
    labels = seen.labels
    if labels is None or loss not in (*CLASSIFIERS, "ctc"):
        return
    if np.dtype(labels.dtype).kind not in "iub":
        raise DataError(
            f"labels of {source} are {labels.dtype}", expected="integer classes",
            hint="for real targets take the loss mse or cosine",
        )  # fmt: skip
    single = loss != "ctc" and (output.ndim == ndim or output.shape[-1] == 1)
    classes = 2 if single else output.shape[-1]
    if labels.top >= classes:
        raise DataError(
            f"{source} has label {labels.top}",
            expected=f"classes from 0 to {classes - 1}, which is what the output has",
        )
    if labels.top < 0:
        raise DataError(f"{source} has no label of 0 or above", expected="classes; what is below 0 is padding")
    if loss == "ctc":
        _check_symbols(source, seen, output.shape[1] if output.ndim == 3 else None)


def _check_symbols(source: str, seen: Survey, frames: int | None) -> None:
    """Refuse labels that CTC cannot align; what shape they have to have, the loss says itself.

    Raises:
        DataError: One is longer than the output, holds the blank, or has padding within.
    """
    labels = seen.labels
    if labels is None or frames is None or not labels.frames:
        return
    if labels.frames > frames:
        raise DataError(f"a label of {source} needs {labels.frames} frames, and the output has {frames}")
    if labels.blank:
        raise DataError(
            f"a label of {source} has the symbol 0, which is the blank of ctc", expected="symbols from 1 on"
        )
    if labels.gap:
        raise DataError(f"a label of {source} has padding before its end", expected="numbers below 0 at the end only")


@contextlib.contextmanager
def dropout_of(module: Any, rate: float | None) -> Iterator[int]:
    """Another rate of every dropout in a module, for as long as it is trained; None for their own.

    Raises:
        OptimizationError: There is none.
    """
    if rate is None:
        yield 0
        return
    before = [(part, name, getattr(part, name)) for part in module.modules() if (name := _rate_of(part)) is not None]
    try:
        yield set_dropout(module, rate)
    finally:
        for part, name, own in before:
            setattr(part, name, own)


def _rate_of(part: Any) -> str | None:
    """The name of the attribute that holds a module's dropout; None where it has none."""
    nn = require("torch.nn", extra="train")
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return "p"
    has = isinstance(part, nn.MultiheadAttention) or (isinstance(part, nn.RNNBase) and part.num_layers > 1)
    return "dropout" if has else None


def set_dropout(module: Any, rate: float) -> int:
    """Set the rate of every dropout in a module.

    Returns:
        How many there are.

    Raises:
        OptimizationError: There is none.
    """
    changed = 0
    for part in module.modules():
        name = _rate_of(part)
        if name is not None:
            setattr(part, name, rate)
            changed += 1
    if not changed:
        raise OptimizationError("the module has no dropout layer", hint="leave dropout out")
    return changed
