"""What can be said before hours are spent: whether module, data and settings fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deploykit.data import LABELS, user_frame
from deploykit.errors import DataError, DeploykitError, OptimizationError, first_line
from deploykit.extras import require
from deploykit.optimizers.training.config import TrainConfig
from deploykit.optimizers.training.evaluating import device_of, evaluating
from deploykit.optimizers.training.losses import CLASSIFIERS, Objective, Supervised, are_probabilities
from deploykit.optimizers.training.outputs import Feed, first_output, tensors_of
from deploykit.optimizers.training.rows import Rows
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
) -> None:
    """Run a few rows, so that what does not fit is said before hours are spent.

    Raises:
        DataError: The rows do not fit the module, or the labels do not fit its output.
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
        single = output.ndim == batch[LABELS].ndim or output.shape[-1] == 1
        _check_classes(rows.arrays, rows.source, 2 if single else output.shape[-1])
    if config.loss == "ctc":
        _check_classes(rows.arrays, rows.source, output.shape[-1])
        _check_frames(rows, output.shape[1] if output.ndim == 3 else 0)
    with torch.no_grad():
        supervised.loss(output, batch[LABELS])


def _check_frames(rows: Rows, frames: int) -> None:
    """Refuse labels that are longer than the output; a repeated symbol takes a blank in between.

    Raises:
        DataError: One is.
    """
    labels = np.asarray(rows.arrays[LABELS])
    if labels.ndim != 2:
        return  # the loss says what it expects
    repeated = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] >= 0)
    need = int(((labels >= 0).sum(1) + repeated.sum(1)).max())
    if need > frames:
        raise DataError(f"a label of {rows.source} needs {need} frames, and the output has {frames}")


def _check_classes(rows: Mapping[str, Any], source: str, classes: int) -> None:
    """Refuse labels for which an output has no class.

    Raises:
        DataError: There is one.
    """
    labels = rows[LABELS]
    if labels.dtype.kind not in "iub":
        raise DataError(
            f"labels of {source} are {labels.dtype}", expected="integer classes",
            hint="for real targets take the loss mse or cosine",
        )  # fmt: skip
    top = int(np.max(labels))
    if top >= classes:
        raise DataError(
            f"{source} has label {top}", expected=f"classes from 0 to {classes - 1}, which is what the output has"
        )


def set_dropout(module: Any, rate: float) -> int:
    """Set the rate of every dropout in a module.

    Returns:
        How many there are.

    Raises:
        OptimizationError: There is none.
    """
    nn = require("torch.nn", extra="train")
    changed = 0
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = rate
        elif isinstance(part, nn.MultiheadAttention) or isinstance(part, nn.RNNBase) and part.num_layers > 1:
            part.dropout = rate
        else:
            continue
        changed += 1
    if not changed:
        raise OptimizationError("the module has no dropout layer", hint="leave dropout out")
    return changed
