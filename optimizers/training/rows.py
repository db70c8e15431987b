"""The data of a training: read once, then drawn from in a new order every epoch."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError, storage_error
from deploykit.optimizers.training.outputs import tensors_of
from deploykit.optimizers.training.padding import alike, cut, lengths_of
from deploykit.specs import Array

# Above that, rows are kept on the disk and mapped.
IN_MEMORY_BYTES = 1 << 30
_READ = 256
# Arrays that a verb adds to the user's own, such as a teacher's answers, have names that begin so.
MADE = "deploykit."


@dataclass(frozen=True, slots=True)
class Labels:
    """What was seen of the labels of a dataset.

    Attributes:
        dtype: Their type.
        top: The largest integer; -1 where there is none from 0 on, or they are no integers.
        frames: Frames that the longest one takes in CTC: its symbols, and a blank between two equal ones.
        blank: Whether a 0 is among them, which is the blank in CTC.
        gap: Whether padding comes before the end of one.
    """

    dtype: str
    top: int
    frames: int
    blank: bool
    gap: bool


@dataclass(frozen=True, slots=True)
class Survey:
    """What was read of a dataset.

    Attributes:
        rows: How many.
        arrays: Names of the user's arrays, sorted.
        sha256: Of names, types, shapes and values.
        labels: What the labels are; None where there are none.
    """

    rows: int
    arrays: tuple[str, ...]
    sha256: str
    labels: Labels | None

    def plan(self) -> dict[str, Any]:
        """By which a training knows its data again."""
        return {"rows": self.rows, "arrays": ", ".join(self.arrays), "sha256": self.sha256}


class Surveyor:
    """Looks at a dataset batch by batch; how it is cut into batches makes no difference."""

    def __init__(self) -> None:
        self._rows = 0
        self._hashes: dict[str, Any] = {}
        self._forms: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._labels: Labels | None = None

    def see(self, batch: Mapping[str, Array]) -> None:
        """Look at a batch."""
        self._rows += len(next(iter(batch.values())))
        for name, array in batch.items():
            if name.startswith(MADE):
                continue
            digest = self._hashes.setdefault(name, hashlib.sha256(name.encode()))
            form = array.dtype.str, array.shape[1:]
            if self._forms.get(name) != form:
                self._forms[name] = form
                digest.update(repr(form).encode())
            if array.dtype.kind != "O":
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        if LABELS in batch:
            self._labels = _joined(self._labels, _labels(batch[LABELS]))

    def found(self, source: str) -> Survey:
        """What was seen of all batches.

        Raises:
            DataError: Nothing.
        """
        if not self._rows:
            raise DataError(f"{source} holds no samples")
        whole = hashlib.sha256()
        for name in sorted(self._hashes):
            whole.update(self._hashes[name].digest())
        return Survey(self._rows, tuple(sorted(self._hashes)), whole.hexdigest(), self._labels)


def survey(data: Dataset) -> Survey:
    """Read a dataset, and keep nothing but what it is.

    Raises:
        DataError: It is empty.
    """
    seen = Surveyor()
    for batch in data.batches(_READ):
        seen.see(batch)
    return seen.found(data.source)


def _labels(labels: Array) -> Labels:
    whole = labels.dtype.kind in "iub"
    if not whole or not labels.size:
        return Labels(str(labels.dtype), -1, 0, False, False)
    real = labels >= 0 if labels.dtype.kind == "i" else np.ones(labels.shape, bool)
    frames, gap = 0, False
    if labels.ndim == 2:
        repeated = (labels[:, 1:] == labels[:, :-1]) & real[:, 1:]
        frames = int((real.sum(1) + repeated.sum(1)).max())
        gap = bool((real[:, 1:] & ~real[:, :-1]).any())
    return Labels(str(labels.dtype), max(-1, int(labels.max())), frames, bool((labels == 0).any()), gap)


def _joined(one: Labels | None, other: Labels) -> Labels:
    if one is None:
        return other
    return Labels(
        one.dtype, max(one.top, other.top), max(one.frames, other.frames), one.blank or other.blank,
        one.gap or other.gap,
    )  # fmt: skip


class Rows:
    """All samples of a dataset.

    Args:
        arrays: By name, each [length, ...].
        source: What was read, for messages.
        seen: What they are; found out where it is not given.
        trim: Whether what is taken ends with the longest of the rows, see `padding`.

    Raises:
        DataError: The padding cannot be told.
    """

    def __init__(
        self, arrays: Mapping[str, Array], source: str, seen: Survey | None = None, *, trim: bool = False
    ) -> None:
        self.arrays = dict(arrays)
        self.source = source
        self.length = len(next(iter(self.arrays.values())))
        if seen is None:
            surveyor = Surveyor()
            surveyor.see(self.arrays)
            seen = surveyor.found(source)
        self.seen = seen
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
        StorageError: The files cannot be written.
    """
    seen = Surveyor()
    parts: dict[str, list[Array]] = {}
    form: dict[str, tuple[str, tuple[int, ...]]] = {}
    held = length = 0
    spilled = False
    for batch in data.batches(_READ):
        here = {name: (a.dtype.str, a.shape[1:]) for name, a in batch.items()}
        form = form or here
        if here != form:
            raise DataError(f"{data.source}: {_difference(form, here)}", expected="rows of one shape and type")
        seen.see(batch)
        length += len(next(iter(batch.values())))
        for name, array in batch.items():
            parts.setdefault(name, []).append(np.array(array))  # a view would hold what it is a view of
            held += array.nbytes
        if held > limit_bytes:
            _spill(parts, list(form), folder)
            spilled, held, parts = True, 0, {}
    found = seen.found(data.source)
    if not spilled:
        return Rows({name: np.concatenate(arrays) for name, arrays in parts.items()}, data.source, found, trim=trim)
    _spill(parts, list(form), folder)
    mapped = {
        name: np.memmap(folder / f"{number}.rows", np.dtype(kind), "r", shape=(length, *shape))
        for number, (name, (kind, shape)) in enumerate(form.items())
    }
    return Rows(mapped, data.source, found, trim=trim)


def discard(folder: Path) -> None:
    """Remove the files of `gather`, also those of a killed run."""
    shutil.rmtree(folder, ignore_errors=True)


def _spill(parts: Mapping[str, list[Array]], names: Sequence[str], folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        for number, name in enumerate(names):
            with (folder / f"{number}.rows").open("ab") as file:
                for array in parts.get(name, ()):
                    file.write(np.ascontiguousarray(array).data)
    except OSError as exc:
        raise storage_error(exc, folder) or exc from exc


def _difference(want: Mapping[str, Any], have: Mapping[str, Any]) -> str:
    if want.keys() != have.keys():
        return f"one batch has {', '.join(want)}, another {', '.join(have)}"
    name = next(n for n in want if want[n] != have[n])
    texts = [f"{np.dtype(kind)} [{', '.join(map(str, shape))}]" for kind, shape in (want[name], have[name])]
    return f"rows of {name!r} are {texts[0]} in one batch and {texts[1]} in another"
