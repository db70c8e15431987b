"""Texts of different lengths: batches that end with their longest text, and hold texts of like length.

Rows of a dataset have one shape, so texts are filled up to the longest of all; more than half of what a batch computes
may be padding. What counts is told by `attention_mask`, 1 at real positions and 0 at the padding behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from deploykit.data import Dataset
from deploykit.errors import DataError
from deploykit.specs import Array

MASK = "attention_mask"
# Batches whose rows are sorted together: enough that lengths are alike, few enough that every epoch mixes anew.
_POOL = 32


def lengths_of(arrays: Mapping[str, Array], source: str) -> Array:
    """Real positions of every row, one at least.

    Args:
        arrays: By name; `attention_mask` [rows, positions] among them.
        source: What was read, for messages.

    Raises:
        DataError: There is no such mask, or padding stands before what is real.
    """
    mask = arrays.get(MASK)
    if mask is None or mask.ndim != 2:
        what = "none" if mask is None else f"one of shape {list(mask.shape)}"
        raise DataError(
            f"padding is to be left out, and {source} has no {MASK!r} that tells it",
            expected=f"{MASK} [rows, positions], not {what}", hint="leave --trim-padding out",
        )  # fmt: skip
    real = np.asarray(mask) != 0
    lengths = real.sum(1)
    if not np.array_equal(real, np.arange(real.shape[1]) < lengths[:, None]):
        raise DataError(
            f"padding stands before or between the real positions of {source}",
            expected="padding at the end of a row",
            hint="tokenize with padding_side='right', or leave --trim-padding out",
        )  # fmt: skip
    return np.asarray(np.maximum(lengths, 1))


def padded_share(arrays: Mapping[str, Array]) -> float:
    """Share of the positions that is padding; 0 where nothing tells it."""
    mask = arrays.get(MASK)
    return 0.0 if mask is None or mask.ndim != 2 or not mask.size else float(np.mean(np.asarray(mask) == 0))


def cut(arrays: Mapping[str, Array], positions: int) -> dict[str, Array]:
    """The first positions of every array that has the mask's: ids, labels of positions, and what is known of each."""
    whole = arrays[MASK].shape[1]

    def counted(array: Any) -> bool:
        if array.ndim < 2 or array.shape[1] != whole:
            return False
        # Real numbers [rows, n] are scores or features, whatever n is.
        return array.ndim > 2 or array.dtype.kind in "iub"

    return {n: np.ascontiguousarray(a[:, :positions]) if counted(a) else a for n, a in arrays.items()}


def trimmed(data: Dataset) -> Dataset:
    """The same rows in the same order, each batch cut behind its longest one.

    Raises:
        DataError: While it is read: the padding cannot be told.
    """

    def batches(size: int) -> Iterator[dict[str, Array]]:
        for batch in data.batches(size):
            yield cut(batch, int(lengths_of(batch, data.source).max()))

    return Dataset(data.source, batches, length=data.length, names=data.names)


def alike(order: Array, lengths: Array, count: int, rng: Any) -> list[Array]:
    """Batches of rows of like length, in random order.

    Args:
        order: The rows, in a random order.
        lengths: Of all rows.
        count: Batches; their sizes differ by one row at most.
        rng: Decides about the order of the batches.
    """
    found: list[Array] = []
    plain = np.array_split(order, count)
    for start in range(0, count, _POOL):
        pool = plain[start : start + _POOL]
        rows = np.concatenate(pool)
        ranked = rows[np.argsort(lengths[rows], kind="stable")]
        found += np.array_split(ranked, len(pool))
    return [found[place] for place in rng.permutation(count)]
