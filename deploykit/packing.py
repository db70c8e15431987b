"""The verb `pack_data`: any dataset into a chunked, compressed and checksummed Zarr store; and samples of one into one.

Images of bytes stay bytes. Where a mean and a deviation are given, they are kept beside them: a model that takes reals
is given normalized ones, one with the normalization in its graph the bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError
from deploykit.extras import require
from deploykit.listing import CHECKED, SELECTION, DataSummary, show_data
from deploykit.progress import Progress
from deploykit.scaling import Scaling
from deploykit.specs import Array
from deploykit.staging import check_free, staged, staged_file
from deploykit.zarr_format import EXTRA
from deploykit.zarr_writer import Layout, StoreWriter, check_alike, storable

# What is read at once; the writer cuts it as it needs.
_BATCH_BYTES = 2**22
_BATCH_ROWS = 4096
_HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Normalization:
    """What a model was trained to see of an image: `(value * rescale - mean) / std`, by channel.

    Attributes:
        mean: One, or one a channel, of values after `rescale`; none for 0.
        std: Likewise; none for 1.
        rescale: Factor of the stored values; 1/255 for bytes.
        axis: Of the channels: 1 for `[n, channels, height, width]`, -1 where they come last.
        names: Of the arrays; empty for all of uint8 but the labels.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    rescale: float = 1 / 255
    axis: int = 1
    names: tuple[str, ...] = ()

    def scaling(self, name: str, array: Array) -> Scaling:
        """As it is stored beside an array.

        Raises:
            DataError: It does not fit the array.
        """
        if array.dtype != np.uint8:
            raise DataError(f"{name!r} is {array.dtype}", expected="uint8, to be normalized when it is read")
        count = max(len(self.mean), len(self.std), 1)
        mean = np.broadcast_to(np.array(self.mean or (0.0,), np.float64), count)
        std = np.broadcast_to(np.array(self.std or (1.0,), np.float64), count)
        axis = self.axis + array.ndim if self.axis < 0 else self.axis
        made = Scaling("float32", tuple((self.rescale / std).tolist()), tuple((-mean / std).tolist()), axis)
        try:
            made.check(array.shape)
        except ValueError as exc:
            raise DataError(f"{name!r} {exc}", hint="say where the channels are: --channel-axis -1") from exc
        return made

    def check(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            DataError: A deviation of 0, or numbers of different counts.
        """
        if not all(map(math.isfinite, (*self.mean, *self.std, self.rescale))) or not all(v > 0 for v in self.std):
            raise DataError(f"mean {list(self.mean)}, deviation {list(self.std)}", expected="deviations above 0")
        if self.rescale <= 0:
            raise DataError(f"rescale {self.rescale:g}", expected="a factor above 0, like 0.00392156862745098")
        if len({len(v) for v in (self.mean, self.std) if len(v) > 1}) > 1:
            raise DataError(
                f"{len(self.mean)} means and {len(self.std)} deviations", expected="one of each, or one a channel"
            )


def pack_data(
    source: str | Path,
    output: str | Path,
    *,
    normalization: Normalization | None = None,
    float16: bool = False,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> DataSummary:
    """Pack a dataset into a Zarr store, in bounded memory; what was written is read back and compared.

    Args:
        source: Anything that `Dataset.open` reads; a store that was packed keeps its scalings.
        output: Where the store will stand; its name ends in `.zarr`.
        normalization: Of images of uint8, for models that take normalized reals.
        float16: Round float32 and float64, but for labels, to float16. They are given in their own type again, and the
            summary says by how much they are off.
        layout: Sizes and level of compression.
        progress: Told about steps and notes.

    Returns:
        What `show_data` says about it.

    Raises:
        DataError: The source cannot be read or stored, or the options do not fit it.
        OutputExistsError: Something is at the output.
        MissingDependencyError: The extra "data" is not installed.
    """
    told = progress or Progress()
    check_output(output, ".zarr")
    if normalization is not None:
        normalization.check()
    layout = layout or Layout()
    if not 1 <= layout.level <= 9 or layout.chunk_bytes < 1 or layout.file_bytes < 1:
        raise DataError(f"{layout}", expected="level 1 to 9, and sizes of at least a byte")
    dataset = Dataset.open(source)
    stored = dataset.stored()
    with staged(output) as folder, told.step(f"pack {source}"):
        batches = stored.batches(_batch_rows(stored))
        first = next(batches, None)
        if first is None:
            raise DataError(f"{source} holds no samples")
        notes, halves = _plan(first, dataset, normalization, float16)
        writer, done = StoreWriter(folder, layout, notes), 0
        for batch in chain([first], batches):
            writer.add({name: halves[name].convert(a) if name in halves else a for name, a in batch.items()})
            done += len(next(iter(batch.values())))
            told.advance(done, stored.length, "samples")
        writer.finish({}, {name: {"float16": half.error()} for name, half in halves.items()})
    for name, half in halves.items():
        error = half.error()
        told.note(
            f"{name!r} is rounded to float16: off by {error['max_abs']:.3g} at most, by {error['relative_rms']:.2g} of "
            "its root mean square"
        )
    return replace(show_data(output, verify=False), verified=CHECKED)


def _batch_rows(dataset: Dataset) -> int:
    if dataset.length is None:  # a function's arrays are in memory whatever is asked for
        return _BATCH_ROWS
    row = sum(array.nbytes for array in dataset.head(1).values())
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row)))


def _plan(
    first: Mapping[str, Array], dataset: Dataset, normalization: Normalization | None, float16: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, _Half]]:
    """Notes of arrays whose values are given otherwise than stored, and those that are rounded on the way."""
    scalings: dict[str, Scaling] = dict(dataset.scalings)
    halves: dict[str, _Half] = {}
    inputs = {name: array for name, array in first.items() if name != LABELS}
    if normalization is not None:
        names = normalization.names or tuple(n for n, a in inputs.items() if a.dtype == np.uint8)
        missing = next((n for n in names if n not in inputs), None)
        if missing is not None or not names:
            raise DataError(
                f"{dataset.source} has no array {missing!r}" if names else f"{dataset.source} has no array of uint8",
                expected=f"one of {', '.join(inputs)}" if names else "images of bytes, to be normalized when read",
            )
        scalings |= {name: normalization.scaling(name, inputs[name]) for name in names}
    if float16:
        halves = {n: _Half(n) for n, a in inputs.items() if a.dtype.kind == "f" and a.dtype.itemsize in (4, 8)}
        if not halves:
            raise DataError(f"{dataset.source} has no array of float32 or float64", hint="leave --float16 out")
        scalings |= {name: Scaling(inputs[name].dtype.newbyteorder("=").name) for name in halves}
    return {name: {"scaling": scaling.as_dict()} for name, scaling in scalings.items()}, halves


@dataclass(slots=True)
class _Half:
    """Rounds an array to float16, and sums up by how much it is off."""

    name: str
    _max: float = 0.0
    _error: float = 0.0
    _power: float = 0.0

    def convert(self, values: Array) -> Array:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        real = np.isfinite(values)
        if not np.isfinite(half[real]).all():
            raise DataError(
                f"{self.name!r} holds {float(np.abs(values[real]).max()):g}, and float16 ends at {_HALF_MAX:g}",
                hint="leave --float16 out",
            )
        exact = values[real].astype(np.float64)
        off = np.abs(half[real].astype(np.float64) - exact)
        self._max = max(self._max, float(off.max(initial=0.0)))
        self._error += float(np.square(off).sum())
        self._power += float(np.square(exact).sum())
        return half

    def error(self) -> dict[str, float]:
        return {"max_abs": self._max, "relative_rms": math.sqrt(self._error / self._power) if self._power else 0.0}


# --- samples of a dataset --------------------------------------------------------------------------------------------


def check_output(output: str | Path, *suffixes: str) -> None:
    """Refuse an output that cannot be written, before the work is done.

    Raises:
        DataError: Its name does not say what it is.
        OutputExistsError: Something is there.
        MissingDependencyError: It is a store, and the extra "data" is not installed.
    """
    if Path(output).suffix not in suffixes:
        raise DataError(f"cannot write {output}", expected=f"a name that ends in {' or '.join(suffixes)}")
    check_free(Path(output))
    if Path(output).suffix == ".zarr":
        require("zarr", extra=EXTRA)


def check_samples(first: Mapping[str, Array], output: str | Path) -> None:
    """Refuse samples that cannot be written to an output.

    Raises:
        DataError: An array is of a type that cannot be stored there.
    """
    for name, array in first.items():
        if Path(output).suffix == ".zarr":
            storable(name, array.dtype)
        elif array.dtype.hasobject:
            raise DataError(f"array {name!r} holds Python objects", hint="convert it: .astype('U32') for text")


def write_samples(
    dataset: Dataset, indices: Sequence[int], output: str | Path, record: Mapping[str, Any], notes: Mapping[str, Any]
) -> None:
    """Write samples of a dataset as a dataset: a Zarr store, with its scalings, or an `.npz`, with values as given.

    Args:
        dataset: Where they come from.
        indices: Their numbers, ascending.
        output: Ends in `.zarr` or `.npz`; nothing may be there.
        record: Where they come from and how they were chosen; kept as JSON.
        notes: Attributes of the arrays of a store, by name.

    Raises:
        DataError: The source fails, or cannot be stored.
        OutputExistsError: Something is at the output.
    """
    check_output(output, ".zarr", ".npz")
    if Path(output).suffix == ".zarr":
        stored = dataset.stored()
        with staged(output) as folder:
            writer = StoreWriter(folder, Layout(), notes)
            for batch in stored.take(indices, _batch_rows(stored)):
                writer.add(batch)
            writer.finish({"selection": dict(record)}, {})
        return
    with staged_file(output) as file, tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = _mapped(dataset.take(indices, _batch_rows(dataset)), len(indices), Path(scratch))
        with zipfile.ZipFile(file, "w") as archive:
            for name, path in made.items():
                # Without the time of the day, so that the same choice is the same file.
                with (
                    archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as target,
                    path.open("rb") as rows,
                ):
                    shutil.copyfileobj(rows, target)
            archive.writestr(zipfile.ZipInfo(SELECTION), json.dumps(record))


def scaling_notes(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Attributes that keep the scalings of a dataset."""
    return {name: {"scaling": scaling.as_dict()} for name, scaling in dataset.scalings.items()}


def _mapped(batches: Iterable[Mapping[str, Array]], count: int, folder: Path) -> dict[str, Path]:
    """One `.npy` file an array, written through maps, so that they need not fit into memory."""
    maps: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    for start, batch in _numbered(batches):
        if not maps:
            check_samples(batch, "samples.npz")
            for number, (name, array) in enumerate(batch.items()):
                paths[name] = folder / f"{number}.npy"
                shape = (count, *array.shape[1:])
                maps[name] = np.lib.format.open_memmap(paths[name], mode="w+", dtype=array.dtype, shape=shape)
        if batch.keys() != maps.keys():
            raise DataError("samples do not fit together", expected="the same names in every batch")
        for name, array in batch.items():
            check_alike(name, array, maps[name].dtype, maps[name].shape[1:])
            maps[name][start : start + len(array)] = array
    for array in maps.values():
        array.flush()
    return paths


def _numbered(batches: Iterable[Mapping[str, Array]]) -> Iterator[tuple[int, Mapping[str, Array]]]:
    start = 0
    for batch in batches:
        yield start, batch
        start += len(next(iter(batch.values())))
