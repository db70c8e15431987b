"""Zarr 3 stores, written as the data come: chunks of whole rows, many a file, each compressed and with a checksum."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DataError
from deploykit.extras import require
from deploykit.specs import Array
from deploykit.zarr_format import BLOCK_LIMIT, EXTRA, PLAIN
from deploykit.zarr_reader import METADATA, OURS, VERSION, Store, content_bytes, metadata_hash, read_documents

# Longest text, and a name that is one directory on every system.
_TEXT_BYTES = 2**16
_NAME = re.compile(r"(?!\.|__)[^/\\\x00-\x1f\x7f]{1,200}")
_SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")


@dataclass(frozen=True, slots=True)
class Layout:
    """How arrays are cut and compressed.

    Attributes:
        chunk_bytes: Of the rows that are compressed as one, before; a row that is larger is a chunk of its own.
        file_bytes: Of the chunks that one file holds, before; what the writer keeps in memory of an array.
        level: Of Blosc, 1 to 9.
    """

    chunk_bytes: int = 2**20
    file_bytes: int = 2**25
    level: int = 5


class StoreWriter:
    """Writes batches of arrays into a directory; `finish` completes it.

    Args:
        folder: An empty directory.
        layout: How arrays are cut and compressed.
        notes: Attributes of arrays, by name.

    Raises:
        MissingDependencyError: The extra is not installed.
    """

    def __init__(self, folder: Path, layout: Layout, notes: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder, self._layout, self._notes = folder, layout, notes
        zarr, storage = require("zarr", extra=EXTRA), require("zarr.storage", extra=EXTRA)
        self._group = zarr.create_group(storage.LocalStore(folder), zarr_format=3)
        self._arrays: dict[str, _ArrayWriter] = {}

    def add(self, batch: Mapping[str, Array]) -> None:
        """Write the next samples.

        Args:
            batch: Arrays with equal first axes; names, types and other axes as in the first batch, but for text, which
                may be shorter.

        Raises:
            DataError: They do not fit together, or cannot be stored.
        """
        if not self._arrays:
            self._arrays = {
                name: _ArrayWriter(self._group, name, array, self._layout, self._notes.get(name, {}))
                for name, array in batch.items()
            }
        if batch.keys() != self._arrays.keys():
            raise _misfit(f"one has {', '.join(batch)}, the first {', '.join(self._arrays)}")
        for name, array in batch.items():
            self._arrays[name].add(array)

    def finish(self, told: Mapping[str, Any], notes: Mapping[str, Mapping[str, Any]]) -> Store:
        """Write what is left and what hashes the rest, read everything back, and compare.

        Args:
            told: What the group's attributes are to say besides.
            notes: What else arrays' attributes are to say, now that all values were seen.

        Returns:
            The store.

        Raises:
            DataError: What was written is not what was given.
        """
        content = {}
        for name, writer in self._arrays.items():
            content[name] = writer.finish(notes.get(name, {}))
        self._group.attrs[OURS] = {"version": VERSION, **told, "content": content}
        root, documents = read_documents(self._folder)
        hashed = {"version": VERSION, **told, "content": content, "metadata": metadata_hash(root, documents)}
        self._group.attrs[OURS] = hashed
        hashed["digest"] = Store(self._folder).digest()
        self._group.attrs[OURS] = hashed
        store = Store(self._folder)
        store.verify()
        return store


class _ArrayWriter:
    """Collects the rows of an array until they fill a file."""

    def __init__(self, group: Any, name: str, first: Array, layout: Layout, notes: Mapping[str, Any]) -> None:
        self.name, self._group, self._layout, self._notes = name, group, layout, notes
        self.dtype, self.shape = storable(name, first.dtype), first.shape[1:]
        row = max(1, math.prod(self.shape) * self.dtype.itemsize)
        if row > BLOCK_LIMIT:
            raise DataError(f"a row of {name!r} takes {row} bytes", expected=f"{BLOCK_LIMIT} at most")
        self._rows = max(1, layout.chunk_bytes // row)
        self._file_rows = self._rows * max(1, layout.file_bytes // (self._rows * row))
        self._waiting: list[Array] = []
        self._count = self._written = 0
        self._array: Any = None
        self._hash = hashlib.sha256()

    def add(self, values: Array) -> None:
        """Take rows, and write a file where there are enough of them.

        Raises:
            DataError: They are of another type or shape than the first.
        """
        check_alike(self.name, values, self.dtype, self.shape)
        self._waiting.append(values.astype(self.dtype, copy=False))
        self._count += len(values)
        if self._count >= self._file_rows:
            rows = np.concatenate(self._waiting)
            whole = len(rows) // self._file_rows * self._file_rows
            for start in range(0, whole, self._file_rows):
                self._write(rows[start : start + self._file_rows])
            self._waiting, self._count = [rows[whole:].copy()], len(rows) - whole

    def finish(self, notes: Mapping[str, Any]) -> str:
        """Write what is left; sha256 of all values."""
        if self._count or self._array is None:
            self._write(np.concatenate(self._waiting))
        if notes:
            with _quiet():
                self._array.attrs[OURS] = {**self._array.attrs.get(OURS, {}), **notes}
        return self._hash.hexdigest()

    def _write(self, rows: Array) -> None:
        end = self._written + len(rows)
        with _quiet():
            if self._array is None:
                self._array = self._create(rows)
            else:
                self._array.resize((end, *self.shape))
            if rows.size:
                self._array[self._written : end] = rows
        self._hash.update(content_bytes(rows).data)
        self._written = end

    def _create(self, first: Array) -> Any:
        """The array on disk, cut by what is known now: all there is, or a file full of it."""
        codecs = require("zarr.codecs", extra=EXTRA)
        rows = min(self._rows, len(first))
        files = -(-len(first) // rows)  # chunks in one
        inner = tuple(max(1, size) for size in self.shape)
        blosc = codecs.BloscCodec(
            cname="zstd", clevel=self._layout.level, shuffle=self._best_shuffle(first[:rows]), typesize=self._word,
        )  # fmt: skip
        return self._group.create_array(
            self.name,
            shape=(len(first), *self.shape),
            dtype=self.dtype,
            chunks=(rows, *inner),
            shards=(rows * files, *inner) if files > 1 else None,
            compressors=[blosc, codecs.Crc32cCodec()],
            attributes={OURS: dict(self._notes)} if self._notes else None,
            config={"write_empty_chunks": True},  # so that one that is not there is one that was lost
        )

    @property
    def _word(self) -> int:
        """Bytes that belong together, for the shuffles."""
        return {"U": 4, "S": 1}.get(self.dtype.kind, self.dtype.itemsize)

    def _best_shuffle(self, values: Array) -> str:
        """The order of bytes or bits by which a first chunk becomes smallest."""
        if not values.size:
            return _SHUFFLES[0]
        blosc = require("numcodecs.blosc", extra=EXTRA)
        data = np.frombuffer(content_bytes(values), {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}[self._word])
        names = [n for n in _SHUFFLES if n != "shuffle" or self._word > 1]
        sizes = [
            len(blosc.compress(data, b"zstd", self._layout.level, number)) for number in map(_SHUFFLES.index, names)
        ]
        return names[sizes.index(min(sizes))]


def storable(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that an array is stored in.

    Raises:
        DataError: It cannot be stored, or not under its name.
    """
    if not _NAME.fullmatch(name) or name == METADATA:
        raise DataError(f"array {name!r} cannot be stored under its name", hint="name it without slashes")
    if dtype.name in PLAIN or (dtype.kind in "US" and 0 < dtype.itemsize <= _TEXT_BYTES):
        return dtype.newbyteorder("=")
    raise DataError(
        f"array {name!r} is {dtype}", expected="numbers, bool, or text of a fixed length",
        hint="convert it: .astype(numpy.float32), or .astype('U32') for text",
    )  # fmt: skip


def check_alike(name: str, values: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Refuse a batch of an array that does not go on as the first began; text may be shorter.

    Args:
        name: Of the array.
        values: The batch.
        dtype: Of the first one.
        shape: Of a sample in the first one.

    Raises:
        DataError: It is of another type or shape: it would be cut off or rounded without a word.
    """
    kind = values.dtype.kind
    same = kind == dtype.kind and values.dtype.itemsize == dtype.itemsize
    shorter = kind == dtype.kind and kind in "US" and values.dtype.itemsize < dtype.itemsize
    if values.shape[1:] != shape or not (same or shorter):
        raise _misfit(f"{name!r} is {values.dtype}{list(values.shape[1:])} in one, {dtype}{list(shape)} before")


def _misfit(why: str) -> DataError:
    return DataError(
        f"batches do not fit together: {why}",
        expected="the same names, types and, but for the first axis, shapes in every batch",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Text of fixed lengths is an extension to Zarr, which it warns about each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
