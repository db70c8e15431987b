"""The verb `show_data`: what is in a dataset, and whether all of it can be read."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import Dataset
from deploykit.errors import DataError, first_line
from deploykit.npz_reader import UNREADABLE
from deploykit.progress import Progress
from deploykit.zarr_reader import OURS, Store, is_store

# Member of an archive that `deploykit data select` wrote: which samples of what they are.
SELECTION = "selection.json"
_SELECTION_BYTES = 2**26
# What is checked of a store that was packed.
CHECKED = "CRC-32C of every chunk, sha256 of values and files"
_BATCH = 256


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """One array of a dataset.

    Attributes:
        name: Its name.
        dtype: Of what is given.
        shape: Samples first; -1 for their number where it is not known.
        nbytes: Of what is given; None where the number of samples is not known.
        stored: Its type where it lies.
        disk_bytes: What it takes there; None where that is not known by array.
        compression: In words.
        chunk: Shape of what is compressed as one; None where there are no chunks.
        scaling: How stored values become those that are given, in words; None where they are the same.
        error: Of values that were rounded to float16: "max_abs", and "relative_rms", both against what was packed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None
    stored: str
    disk_bytes: int | None = None
    compression: str = ""
    chunk: tuple[int, ...] | None = None
    scaling: str | None = None
    error: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What is in a dataset.

    Attributes:
        source: As it was named.
        form: "zarr", "npz", "npy" or "function".
        length: Number of samples; None where only reading tells, and nothing was read.
        arrays: One each.
        disk_bytes: All of it; None for functions.
        verified: What was checked, in words; empty where nothing was.
        digest: sha256 that a packed store gives of itself.
        selection: What `deploykit data select` noted: "indices", "method", "seed" and others; None for other data.
    """

    source: str
    form: str
    length: int | None
    arrays: tuple[ArraySummary, ...]
    disk_bytes: int | None
    verified: str
    digest: str | None = None
    selection: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int | None:
        """Of all that is given; None where the number of samples is not known."""
        found = [array.nbytes for array in self.arrays]
        return None if None in found else sum(n for n in found if n is not None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "nbytes": self.nbytes}


def show_data(source: str | Path, *, verify: bool = True, progress: Progress | None = None) -> DataSummary:
    """Say what is in a dataset, and read all of it once.

    Args:
        source: Anything that `Dataset.open` reads.
        verify: Whether to read all of it: of packed data that compares checksums of every chunk, and hashes of values
            and files; of `.npz` files the checksum of every member.
        progress: Told how far it is.

    Raises:
        DataError: It cannot be read, or is not what was packed.
    """
    told, path = progress or Progress(), Path(source)
    dataset = Dataset.open(source)
    if path.is_dir() and is_store(path):
        return _of_store(path, dataset, verify, told)
    form = "npy" if path.is_dir() else "npz" if path.is_file() else "function"
    length: int | None = dataset.length
    if verify:
        with told.step(f"read {source}"):
            length, found = _read(dataset, told)
    else:
        found = dataset.head(1)
    members = _members(path) if form == "npz" else {}
    arrays = []
    for name, array in found.items():
        known = members.get(name)
        shape = (-1 if length is None else length, *array.shape[1:])
        nbytes = None if length is None else math.prod(shape) * array.dtype.itemsize
        arrays.append(
            ArraySummary(
                name, array.dtype.name, shape, nbytes, array.dtype.name,
                disk_bytes=known.compress_size if known else None,
                compression="deflated" if known and known.compress_type else "",
            )
        )  # fmt: skip
    checked = {"npz": "CRC-32 of every member", "npy": "read once", "function": "read once"}[form]
    return DataSummary(
        str(source), form, length, tuple(arrays), _disk_bytes(path), checked if verify else "",
        selection=_selection(path) if form == "npz" else None,
    )  # fmt: skip


def _of_store(path: Path, dataset: Dataset, verify: bool, told: Progress) -> DataSummary:
    store, done = Store(path), 0
    total = sum(array.nbytes for array in store.arrays.values())

    def seen(count: int) -> None:
        nonlocal done
        done += count
        told.advance(done // 2**20, total // 2**20, "MiB")

    if verify:
        with told.step(f"verify {path}"):
            store.verify(seen)
    arrays = []
    for name, array in store.arrays.items():
        scaling, ours = dataset.scalings.get(name), array.attributes.get(OURS)
        native = array.dtype.newbyteorder("=")
        given = np.dtype(scaling.dtype) if scaling else native
        error = ours.get("float16") if isinstance(ours, dict) else None
        arrays.append(
            ArraySummary(
                name, given.name, array.shape, math.prod(array.shape) * given.itemsize, native.name,
                disk_bytes=_disk_bytes(store.folder(array)), compression=array.described(), chunk=array.chunk,
                scaling=scaling.described() if scaling else None, error=error if isinstance(error, dict) else None,
            )
        )  # fmt: skip
    checked = CHECKED if store.packed else "every chunk decoded"
    digest, selection = store.told.get("digest"), store.told.get("selection")
    chosen = selection if isinstance(selection, dict) else None
    return DataSummary(
        str(path), "zarr", dataset.length, tuple(arrays), _disk_bytes(path), checked if verify else "",
        digest=digest if isinstance(digest, str) else None, selection=chosen,
    )  # fmt: skip


def _read(dataset: Dataset, told: Progress) -> tuple[int, dict[str, Any]]:
    """Read everything; the number of samples, and one batch of them."""
    count, last = 0, dict[str, Any]()
    for batch in dataset.batches(_BATCH):
        last = batch
        count += len(next(iter(batch.values())))
        told.advance(count, dataset.length, "samples")
    if not last:
        raise DataError(f"{dataset.source} holds no samples")
    return count, last


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


def _selection(path: Path) -> dict[str, Any] | None:
    """What is noted in an archive about where its samples come from."""
    try:
        with zipfile.ZipFile(path) as archive:
            if SELECTION not in archive.namelist():
                return None
            with archive.open(SELECTION) as stream:
                found = json.loads(stream.read(_SELECTION_BYTES))
    except (*UNREADABLE, RecursionError) as exc:
        raise DataError(f"cannot read {SELECTION} in {path} ({first_line(exc)})", hint="select again") from exc
    return found if isinstance(found, dict) else None


def _disk_bytes(path: Path) -> int | None:
    if path.is_dir():
        return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else None
