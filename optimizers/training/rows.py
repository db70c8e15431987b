"""The data of a training: read once, then drawn from in a new order every epoch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError
from deploykit.optimizers.training.outputs import tensors_of
from deploykit.optimizers.training.padding import alike, cut, lengths_of
from deploykit.specs import Array

# Above that, rows are kept on the disk and mapped.
IN_MEMORY_BYTES = 1 << 30
_READ = 256


class Rows:
    """All samples of a dataset.

    Args:
        arrays: By name, each [length, ...].
        source: What was read, for messages.
        trim: Whether what is taken ends with the longest of the rows, see `padding`.

    Raises:
        DataError: The padding cannot be told.
    """

    def __init__(self, arrays: Mapping[str, Array], source: str, *, trim: bool = False) -> None:
        self.arrays = dict(arrays)
        self.source = source
        self.length = len(next(iter(self.arrays.values())))
        self.lengths = lengths_of(self.arrays, source) if trim else None

    @property
    def inputs(self) -> dict[str, Array]:
        """All but the labels."""
        return {name: array for name, array in self.arrays.items() if name != LABELS}

    def take(self, index: Array) -> dict[str, Array]:
        """Copies of some rows."""
        taken = {name: np.ascontiguousarray(array[index]) for name, array in self.arrays.items()}
        return taken if self.lengths is None else cut(taken, int(self.lengths[index].max()))


class Batches:
    """Batches of one epoch, for as many epochs as are asked for.

    Sizes differ by one row at most, so that no rest of a single row meets a batch normalization. The order follows from
    seed and epoch alone; where to begin is asked when the first batch is drawn.

    Args:
        rows: The samples.
        size: Rows of a batch at most.
        seed: Of the order.
        where: Gives the epoch, and the batches of it that were seen already.
    """

    def __init__(self, rows: Rows, size: int, seed: int, where: Callable[[], tuple[int, int]]) -> None:
        self._rows = rows
        self._seed = seed
        self._where = where
        self._count = -(-rows.length // size)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever this one begins."""
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Tensors on the CPU, by name."""
        epoch, begun = self._where()
        rng = np.random.default_rng((self._seed, epoch))
        order, lengths = rng.permutation(self._rows.length), self._rows.lengths
        parts = np.array_split(order, self._count) if lengths is None else alike(order, lengths, self._count, rng)
        for index in parts[begun:]:
            yield tensors_of(self._rows.take(index), "cpu")


def gather(data: Dataset, folder: Path, limit_bytes: int = IN_MEMORY_BYTES, *, trim: bool = False) -> Rows:
    """Read all of a dataset into memory, or, where it is large, into files.

    Args:
        data: Read once.
        folder: An empty one, or one that is not there, for the files.
        limit_bytes: Bytes of rows that are kept in memory.
        trim: See `Rows`.

    Raises:
        DataError: It is empty, its batches do not fit together, or the padding cannot be told.
    """
    parts: dict[str, list[Array]] = {}
    form: dict[str, tuple[str, tuple[int, ...]]] = {}
    held = length = 0
    spilled = False
    for batch in data.batches(_READ):
        found = {name: (a.dtype.str, a.shape[1:]) for name, a in batch.items()}
        form = form or found
        if found != form:
            raise DataError(f"{data.source}: {_difference(form, found)}", expected="rows of one shape and type")
        length += len(next(iter(batch.values())))
        for name, array in batch.items():
            parts.setdefault(name, []).append(np.array(array))  # a view would hold what it is a view of
            held += array.nbytes
        if held > limit_bytes:
            _spill(parts, list(form), folder)
            spilled, held, parts = True, 0, {}
    if not length:
        raise DataError(f"{data.source} holds no samples")
    if not spilled:
        return Rows({name: np.concatenate(arrays) for name, arrays in parts.items()}, data.source, trim=trim)
    _spill(parts, list(form), folder)
    mapped = {
        name: np.memmap(folder / f"{number}.rows", np.dtype(kind), "r", shape=(length, *shape))
        for number, (name, (kind, shape)) in enumerate(form.items())
    }
    return Rows(mapped, data.source, trim=trim)


def discard(folder: Path) -> None:
    """Remove the files of `gather`, also those of a killed run."""
    shutil.rmtree(folder, ignore_errors=True)


def _spill(parts: Mapping[str, list[Array]], names: Sequence[str], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        with (folder / f"{number}.rows").open("ab") as file:
            for array in parts.get(name, ()):
                file.write(np.ascontiguousarray(array).data)


def _difference(want: Mapping[str, Any], have: Mapping[str, Any]) -> str:
    if want.keys() != have.keys():
        return f"one batch has {', '.join(want)}, another {', '.join(have)}"
    name = next(n for n in want if want[n] != have[n])
    texts = [f"{np.dtype(kind)} [{', '.join(map(str, shape))}]" for kind, shape in (want[name], have[name])]
    return f"rows of {name!r} are {texts[0]} in one batch and {texts[1]} in another"
