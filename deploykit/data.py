"""Datasets: named arrays, read in batches, and inputs made up where there are none.

The first axis of every array counts the samples. Labels stand under the reserved name `labels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DataError, DeploykitError, SourceError, first_line
from deploykit.functions import load_object as load_object
from deploykit.functions import user_frame as user_frame
from deploykit.npz_reader import members_of, read_batches
from deploykit.pictures import is_picture, make_pictures
from deploykit.scaling import Scaling
from deploykit.specs import Array, Dim, Signature, TensorSpec
from deploykit.zarr_reader import OURS, Store, is_store

LABELS = "labels"
_FORMS = "FILE.npz, DIR.zarr, a directory of .npy files, or module:function"
# Reads rows from the first to before the second number.
Rows = Callable[[int, int], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class ValueRange:
    """Values that an input may take: integers in [low, high], or normally distributed reals.

    Attributes:
        low: Smallest value (integers), or mean minus one standard deviation (reals).
        high: Largest value (integers), or mean plus one standard deviation (reals).
    """

    low: float
    high: float


class Dataset:
    """Named arrays in batches, lazily.

    Args:
        source: What is read, for messages and manifests.
        batches: Called with the batch size; yields dictionaries of arrays with equal first axes.
        length: Number of samples; None where only reading tells.
        names: Names of the arrays, `labels` included; None where only reading tells.
        rows: Makes a reader of any rows, for one thread; None where the source can only be read from its beginning.
        scalings: How stored values become those that are given, by array.
        dtypes: Of the arrays that have a scaling, as stored.
        column: Called with a name and the batch size: yields one array alone, as stored; None where arrays can only be
            read together.
    """

    def __init__(
        self,
        source: str,
        batches: Callable[[int], Iterator[dict[str, Array]]],
        *,
        length: int | None = None,
        names: tuple[str, ...] | None = None,
        rows: Callable[[], Rows] | None = None,
        scalings: Mapping[str, Scaling] | None = None,
        dtypes: Mapping[str, str] | None = None,
        column: Callable[[str, int], Iterator[Array]] | None = None,
    ) -> None:
        self.source = source
        self.length = length
        self.names = names
        self.scalings = dict(scalings or {})
        self._batches = batches
        self._rows = rows
        self._dtypes = dict(dtypes or {})
        self._column = column

    @classmethod
    def open(cls, source: str | Path) -> Dataset:
        """Open `FILE.npz`, a Zarr store, a directory of `.npy` files, or `module:function` (`file.py:function`).

        The function returns a dictionary of arrays, or yields dictionaries, one a batch.

        Raises:
            DataError: Nothing there, unreadable, of unequal lengths, or empty.
        """
        text = str(source)
        path = Path(text)
        if path.is_dir():
            return _from_store(path) if is_store(path) else _from_directory(path)
        if path.is_file():
            if path.suffix != ".npz":
                raise DataError(f"{path} is not a dataset", expected=_FORMS)
            return _from_npz(path)
        if path.suffix in (".npz", ".zarr") or ":" not in text:
            raise DataError(f"dataset {text} does not exist", expected=_FORMS)
        return _from_function(text)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], source: str = "memory") -> Dataset:
        """A dataset over arrays in memory.

        Raises:
            DataError: Lengths differ, or there is nothing.
        """
        length = _common_length(source, {k: np.asarray(v) for k, v in arrays.items()})
        return cls(
            source, lambda size: _slices(arrays, length, size), length=length, names=tuple(arrays),
            rows=lambda: _slicer(arrays),
        )  # fmt: skip

    @property
    def has_labels(self) -> bool | None:
        """Whether there are labels; None where only reading tells."""
        return None if self.names is None else LABELS in self.names

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Batches of at most ``size`` samples; each a dictionary of arrays of shape [n, ...].

        Raises:
            DataError: The source fails while it is read.
        """
        if size < 1:
            raise DataError(f"batch size {size}", expected="1 or more")
        for batch in self._batches(size):
            yield self._given(batch)

    def _given(self, batch: dict[str, Array]) -> dict[str, Array]:
        if not self.scalings:
            return batch
        return {n: self.scalings[n].apply(a) if n in self.scalings else a for n, a in batch.items()}

    def take(self, indices: Sequence[int], size: int) -> Iterator[dict[str, Array]]:
        """The samples of these numbers, in batches of at most ``size``.

        Args:
            indices: Ascending.
            size: 1 or more.

        Raises:
            DataError: The source fails while it is read, or holds fewer samples.
        """
        if self._rows is not None and (self.length is None or not indices or indices[-1] < self.length):
            read = self._rows()
            for start in range(0, len(indices), size):
                parts = [read(i, i + 1) for i in indices[start : start + size]]
                yield self._given({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
            return
        wanted, first, done = np.asarray(indices, np.int64), 0, 0
        for batch in self.batches(size):
            count = len(next(iter(batch.values())))
            here = wanted[done : np.searchsorted(wanted, first + count)] - first
            if len(here):
                yield {name: array[here] for name, array in batch.items()}
            first, done = first + count, done + len(here)
            if done == len(wanted):
                return
        raise DataError(f"{self.source} holds {first} samples", expected=f"more than {int(wanted[-1])}")

    def column(self, name: str, size: int) -> Iterator[Array]:
        """One of `names` in batches, as stored; where it lies by itself, nothing else is read.

        Raises:
            DataError: The source fails while it is read.
        """
        if self._column is not None:
            yield from self._column(name, size)
            return
        for batch in self._batches(size):
            yield batch[name]

    def stored(self) -> Dataset:
        """The same data as they are stored, without their scalings."""
        return self._with({})

    def fitted(self, inputs: Sequence[TensorSpec]) -> Dataset:
        """The same data as a model takes them.

        What is stored in the very type of an input is given as stored, and its scaling is left to the model: images
        of bytes to one with the normalization in its graph.
        """
        names = [name for name in self.names or () if name != LABELS]
        kinds = {spec.name: spec.dtype for spec in inputs}
        if len(inputs) == 1 and len(names) == 1:  # whatever it is called, as in `fit_feeds`
            kinds = {names[0]: inputs[0].dtype}
        return self._with({n: s for n, s in self.scalings.items() if kinds.get(n) != self._dtypes[n]})

    def _with(self, scalings: Mapping[str, Scaling]) -> Dataset:
        if len(scalings) == len(self.scalings):
            return self
        return Dataset(
            self.source, self._batches, length=self.length, names=self.names, rows=self._rows, scalings=scalings,
            dtypes=self._dtypes,
        )  # fmt: skip

    def head(self, count: int) -> dict[str, Array]:
        """The first ``count`` samples, or all where there are fewer.

        Raises:
            DataError: There is none, or the batches of a function do not fit together.
        """
        parts: list[dict[str, Array]] = []
        found = 0
        for batch in self.batches(count):
            parts.append(batch)
            found += len(next(iter(batch.values())))
            if found >= count:
                break
        if not parts:
            raise DataError(f"{self.source} holds no samples")
        if len(parts) == 1:
            return {name: array[:count] for name, array in parts[0].items()}
        try:
            return {name: np.concatenate([p[name] for p in parts])[:count] for name in parts[0]}
        except (KeyError, ValueError) as exc:
            raise DataError(
                f"{self.source}: batches do not fit together ({first_line(exc)})",
                expected="the same names and, but for the first axis, the same shapes in every batch",
            ) from exc


def _common_length(source: str, arrays: Mapping[str, Any]) -> int:
    if not arrays:
        raise DataError(f"{source} holds no arrays", expected="one array an input")
    flat = [name for name, a in arrays.items() if len(a.shape) == 0]
    if flat:
        raise DataError(f"{source}: {flat[0]!r} is a scalar", expected="the samples along the first axis")
    lengths = {name: int(a.shape[0]) for name, a in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{source}: arrays of different lengths {lengths}", expected="one row a sample in every array")
    length = next(iter(lengths.values()))
    if length == 0:
        raise DataError(f"{source} holds no samples")
    return length


def _slices(arrays: Mapping[str, Array], length: int, size: int) -> Iterator[dict[str, Array]]:
    for start in range(0, length, size):
        yield {name: np.asarray(a[start : start + size]) for name, a in arrays.items()}


def _slicer(arrays: Mapping[str, Array]) -> Rows:
    return lambda start, stop: {name: np.asarray(a[start:stop]) for name, a in arrays.items()}


def _from_store(path: Path) -> Dataset:
    store = Store(path)
    length = _common_length(str(path), store.arrays)
    scalings = {}
    for name, array in store.arrays.items():
        told = array.attributes.get(OURS)
        if isinstance(told, dict) and "scaling" in told:
            try:
                scalings[name] = Scaling.from_dict(told["scaling"], array.shape)
            except ValueError as exc:
                raise DataError(f"{path}: array {name!r} {exc}", hint="pack it again") from exc

    def batches(size: int) -> Iterator[dict[str, Array]]:
        read = store.rows()
        for start in range(0, length, size):
            yield read(start, min(start + size, length))

    def column(name: str, size: int) -> Iterator[Array]:
        read = store.rows((name,))
        for start in range(0, length, size):
            yield read(start, min(start + size, length))[name]

    return Dataset(
        str(path), batches, length=length, names=tuple(store.arrays), rows=store.rows, scalings=scalings,
        dtypes={name: store.arrays[name].dtype.name for name in scalings}, column=column,
    )  # fmt: skip


def _from_directory(path: Path) -> Dataset:
    files = sorted(path.glob("*.npy"))
    if not files:
        raise DataError(f"{path} holds no .npy files", expected=_FORMS)
    arrays: dict[str, Array] = {}
    for file in files:
        try:
            # Not numpy.load, which would take an .npz, or a pickle, under this name.
            arrays[file.stem] = np.lib.format.open_memmap(file, mode="r")
        except (ValueError, OSError, EOFError) as exc:
            raise DataError(f"cannot read {file} ({first_line(exc)})", expected="a .npy file without objects") from exc
    length = _common_length(str(path), arrays)
    return Dataset(
        str(path), lambda size: _slices(arrays, length, size), length=length, names=tuple(arrays),
        rows=lambda: _slicer(arrays),
    )  # fmt: skip


def _from_npz(path: Path) -> Dataset:
    members = members_of(path)
    length = _common_length(str(path), members)
    return Dataset(
        str(path), lambda size: read_batches(path, members, length, size), length=length, names=tuple(members),
        column=lambda name, size: (b[name] for b in read_batches(path, {name: members[name]}, length, size)),
    )  # fmt: skip


def _from_function(text: str) -> Dataset:
    try:
        function = load_object(text)
    except SourceError as exc:
        raise DataError(str(exc)) from exc
    if not callable(function):
        raise DataError(f"{text} is no function", expected="a function that returns or yields dictionaries of arrays")

    def batches(size: int) -> Iterator[dict[str, Array]]:
        try:
            made = function()
            groups = [made] if isinstance(made, Mapping) else made
            if not isinstance(groups, Iterable):
                raise DataError(f"{text} returned {type(made).__name__}", expected="a dictionary of arrays, or several")
            yield from _regroup(text, groups, size)
        except DeploykitError:
            raise
        except Exception as exc:
            raise DataError(f"{text} failed ({first_line(exc)}{user_frame(exc)})", hint="mend the function") from exc

    return Dataset(text, batches)


def _regroup(source: str, groups: Iterable[Any], size: int) -> Iterator[dict[str, Array]]:
    """Cut what a function yields into pieces of at most ``size``; pieces never cross what was yielded as one.

    They are copies where more may come: the function may fill the same arrays again.
    """
    make = np.asarray if isinstance(groups, list) else np.array
    for group in groups:
        if not isinstance(group, Mapping):
            raise DataError(f"{source} yielded {type(group).__name__}", expected="dictionaries of arrays")
        arrays = {str(k): make(v) for k, v in group.items()}
        yield from _slices(arrays, _common_length(source, arrays), size)


def generate(
    specs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    *,
    ranges: Mapping[str, ValueRange] | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """Make up inputs that a model can take: shapes from ``sizes``, integers inside ``ranges``.

    Made-up inputs prove shapes and equality of two graphs; they prove no accuracy.

    Args:
        specs: The inputs.
        sizes: A size for every symbol.
        ranges: Values an input may take; without one, reals are N(0, 1) or pictures, integers 0 or 1. Masks without
            one, told by their name, are ones and then zeros along the last axis, as padding is; every row has a one.
        seed: For numpy's default generator.

    Raises:
        DataError: A symbol has no size, or a dtype cannot be made up.
    """
    rng = np.random.default_rng(seed)
    found = ranges or {}
    return {spec.name: _draw(spec, spec.concrete(sizes), found.get(spec.name), rng) for spec in specs}


def _draw(spec: TensorSpec, shape: tuple[int, ...], limits: ValueRange | None, rng: np.random.Generator) -> Array:
    if spec.dtype == "string":
        raise DataError(f"cannot make up strings for {spec.name!r}", hint="give real inputs with --data")
    if limits is None and shape and "mask" in spec.name.lower() and spec.dtype != "bfloat16":
        lengths = rng.integers(1, max(shape[-1], 1) + 1, (*shape[:-1], 1))
        return np.asarray(np.arange(shape[-1]) < lengths).astype(np.dtype(spec.dtype))
    if spec.dtype == "bfloat16":
        import ml_dtypes

        return np.asarray(rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        low, high = (int(limits.low), int(limits.high)) if limits else (0, 1)
        if spec.dtype == "uint8" and (low, high) == (0, 255) and is_picture(shape):
            return np.asarray(np.clip(np.rint(make_pictures(shape, rng) * 48 + 128), 0, 255), np.uint8)
        return rng.integers(low, high + 1, shape).astype(dtype)
    if limits is None and is_picture(shape):
        return make_pictures(shape, rng).astype(dtype)
    middle, spread = ((limits.low + limits.high) / 2, (limits.high - limits.low) / 2) if limits else (0.0, 1.0)
    return np.asarray(rng.standard_normal(shape) * (spread or 1.0) + middle).astype(dtype)


def batch_size_of(signature: Signature, feeds: Mapping[str, Array]) -> int:
    """Size of the first dynamic first axis, or of the first axis; 1 where there is none."""
    first: list[tuple[Dim, int]] = [
        (spec.shape[0], int(feeds[spec.name].shape[0]))
        for spec in signature.inputs
        if spec.shape and spec.name in feeds and feeds[spec.name].ndim
    ]
    dynamic = [size for dim, size in first if isinstance(dim, str)]
    return (dynamic or [size for _, size in first] or [1])[0]
