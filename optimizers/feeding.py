"""Calibration data as a model takes them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError, first_line
from deploykit.optimizers.quantize_config import StaticConfig
from deploykit.specs import Array, Signature, fit_feeds


class Counter:
    """How many samples were used."""

    def __init__(self) -> None:
        self.samples = 0


def feeds_of(signature: Signature, data: Dataset, config: StaticConfig, count: Counter) -> Iterator[dict[str, Array]]:
    """Batches of the size that the model takes, never more than `max_samples` together: a fixed first axis decides.

    A generator may yield pieces of any size; those that do not fill a fixed batch are put together.
    """
    for batch in batches_of(signature, data, config):
        count.samples += len(next(iter(batch.values())))
        yield fit_feeds(signature, batch)


def batch_of(signature: Signature, config: StaticConfig) -> tuple[int, bool]:
    """Samples of a batch, and whether the model takes no others."""
    fixed = [s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], int)]
    return (fixed[0], True) if fixed else (config.batch_size, False)


def batches_of(signature: Signature, data: Dataset, config: StaticConfig) -> Iterator[dict[str, Array]]:
    """What `feeds_of` makes feeds of: all arrays but the labels."""
    size, fixed = batch_of(signature, config)
    data = data.fitted(signature.inputs)
    limit, seen = config.max_samples, 0
    for batch in _filled(data, size) if fixed else data.batches(size):
        have = len(next(iter(batch.values())))
        left = have if limit is None else min(have, limit - seen)
        if left <= 0 or (fixed and left < size):
            break
        seen += left
        yield {k: v[:left] for k, v in batch.items() if k != LABELS}


def _filled(data: Dataset, size: int) -> Iterator[dict[str, Array]]:
    """Batches of exactly ``size``, across the borders of what the data come in; an incomplete rest is left out."""
    waiting: dict[str, Array] = {}
    for piece in data.batches(size):
        try:
            waiting = {n: np.concatenate([waiting[n], a]) for n, a in piece.items()} if waiting else piece
        except (KeyError, ValueError) as exc:
            raise DataError(
                f"{data.source}: batches do not fit together ({first_line(exc)})",
                expected="the same names and, but for the first axis, the same shapes in every batch",
            ) from exc
        while len(next(iter(waiting.values()))) >= size:
            yield {n: a[:size] for n, a in waiting.items()}
            waiting = {n: a[size:] for n, a in waiting.items()}
