"""Zarr 3 stores of any origin, read by rows: a chunk is decoded when its rows are asked for, and one block is kept.

What `deploykit data pack` writes says in its attributes what its metadata and its files hash to. The first is checked
when a store is opened, the second by `Store.verify`; the checksum of each chunk is checked whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from deploykit.archives import FREE_BYTES
from deploykit.errors import DataError, first_line
from deploykit.extras import require
from deploykit.specs import Array
from deploykit.zarr_format import (
    EXTRA,
    ArrayMeta,
    absent,
    decode_chunk,
    decode_index,
    index_bytes,
    most_bytes,
    parse_array,
)

METADATA = "zarr.json"
# Attributes of ours stand under this name, of the group and of its arrays.
OURS = "deploykit"
VERSION = 1
# Those that say what the rest hashes to.
_HASHES = ("metadata", "digest")
_ARRAYS = 1000
_METADATA_BYTES = 2**20
# A store of many equal values packs well; what decodes to so many times its size was made to take forever.
_RATIO = 5000
_PIECE = 2**20
_REPACK = "copy it again, or pack it again: deploykit data pack SOURCE -o DIR.zarr"
# What damaged and hostile chunks make the codecs raise.
_DAMAGE = (ValueError, RuntimeError, OSError, EOFError, struct.error, OverflowError)


def is_store(path: Path) -> bool:
    """Whether a directory is a Zarr store, of this or of the older format."""
    return any((path / name).is_file() for name in (METADATA, ".zgroup", ".zarray"))


class Store:
    """A group of arrays, or one array, on the local disk. Nothing but metadata is read before rows are asked for.

    Attributes:
        path: Its directory.
        arrays: By name.
        told: What `deploykit data pack` or `select` noted; empty for stores of other origin.

    Raises:
        DataError: It is none, it is damaged or unsafe, or asks for what is not read here.
        MissingDependencyError: The extra is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for module in ("numcodecs", "google_crc32c"):
            require(module, extra=EXTRA)
        root = _read_json(path / METADATA, path)
        attributes = root.get("attributes")
        told = attributes.get(OURS) if isinstance(attributes, dict) else None
        self.told: dict[str, Any] = told if isinstance(told, dict) else {}
        documents = {path.stem: root} if root.get("node_type") == "array" else _children(path)
        self._whole = root.get("node_type") == "array"
        self.arrays = {name: self._parse(name, document) for name, document in documents.items()}
        self._check_metadata(root, documents)
        self._check_size()

    def _parse(self, name: str, document: Mapping[str, Any]) -> ArrayMeta:
        try:
            return parse_array(name, document)
        except ValueError as exc:
            raise DataError(
                f"{self.path}: array {name!r} {exc}",
                expected="numbers or text of a fixed length, compressed by Blosc, Zstandard or gzip",
            ) from exc

    def _check_metadata(self, root: Mapping[str, Any], documents: Mapping[str, Any]) -> None:
        if self.told.get("version", VERSION) != VERSION:
            raise DataError(f"{self.path} was packed by another version of DeployKit", hint=_REPACK)
        if self.packed and self.told.get("metadata") != metadata_hash(root, {} if self._whole else documents):
            raise DataError(f"{self.path}: its {METADATA} files were changed since it was packed", hint=_REPACK)

    def _check_size(self) -> None:
        claimed = sum(array.nbytes for array in self.arrays.values())
        if claimed <= FREE_BYTES:
            return
        size = sum(file.lstat().st_size for file in self.path.rglob("*"))
        if claimed > _RATIO * size:
            raise DataError(
                f"{self.path} would decode from {size} to {claimed} bytes", expected="a store that was filled"
            )

    @property
    def packed(self) -> bool:
        """Whether it says what it hashes to: then every chunk has to be there."""
        return "digest" in self.told

    def rows(self, names: tuple[str, ...] | None = None) -> Callable[[int, int], dict[str, Array]]:
        """A reader of rows, with a block of chunks of each array in memory; one for each thread and purpose.

        Args:
            names: Of the arrays that are read; all by default.

        Returns:
            A function of the first row and the one behind the last, which gives new arrays as stored, in native byte
            order. It raises DataError where a chunk is damaged, and says which.
        """
        readers = {name: _Rows(self, self.arrays[name]) for name in (self.arrays if names is None else names)}
        return lambda start, stop: {name: reader.read(start, stop) for name, reader in readers.items()}

    def folder(self, array: ArrayMeta) -> Path:
        """Where the files of an array are."""
        return self.path if self._whole else self.path / array.name

    def digest(self) -> str:
        """sha256 over the hash of the metadata and, array by array, the files in the order of the rows.

        Raises:
            DataError: A file cannot be read.
        """
        total = hashlib.sha256(str(self.told.get("metadata")).encode())
        for name, array in sorted(self.arrays.items()):
            total.update(f"\n{name}\n".encode())
            for place in np.ndindex(*array.files):
                key = array.key(place)
                try:
                    with open_regular(self.path, self.folder(array) / key) as stream:
                        total.update(os.fstat(stream.fileno()).st_size.to_bytes(8, "little"))
                        while piece := stream.read(_PIECE):
                            total.update(piece)
                except OSError as exc:
                    raise self.damaged(array, key, exc) from exc
        return total.hexdigest()

    def content(self, array: ArrayMeta, seen: Callable[[int], None] | None = None) -> str:
        """sha256 of an array's values in little byte order, by which every chunk is decoded and checked.

        Args:
            array: One of `arrays`.
            seen: Told how many bytes were decoded.

        Raises:
            DataError: A chunk is damaged.
        """
        total, reader, step = hashlib.sha256(), _Rows(self, array), array.chunk[0]
        for start in range(0, array.shape[0], step):
            values = reader.read(start, min(start + step, array.shape[0]))
            total.update(content_bytes(values).data)
            if seen is not None:
                seen(values.nbytes)
        return total.hexdigest()

    def verify(self, seen: Callable[[int], None] | None = None) -> None:
        """Decode every chunk; of what was packed here, compare values and files with what was noted then.

        Raises:
            DataError: A chunk is damaged, or something is not what was packed.
        """
        noted = self.told.get("content")
        for name, array in self.arrays.items():
            found = self.content(array, seen)
            if self.packed and (not isinstance(noted, dict) or noted.get(name) != found):
                raise DataError(f"{self.path}: the values of {name!r} are not those that were packed", hint=_REPACK)
        if self.packed and self.digest() != self.told["digest"]:
            raise DataError(f"{self.path}: its files are not those that were packed", hint=_REPACK)

    def damaged(self, array: ArrayMeta, key: str, exc: BaseException | str) -> DataError:
        """The error about a chunk that cannot be read."""
        why = exc if isinstance(exc, str) else first_line(exc)
        return DataError(f"{self.path}: chunk {key} of {array.name!r} cannot be read ({why})", hint=_REPACK)


class _Rows:
    """Reads rows of one array; keeps the block of chunks that was asked for last, and the last index of a shard."""

    def __init__(self, store: Store, array: ArrayMeta) -> None:
        self._store, self._array = store, array
        self._block, self._values = -1, np.empty(0)
        self._indexed: tuple[int, ...] = ()
        self._index = np.empty((0, 2), "<u8")

    def read(self, start: int, stop: int) -> Array:
        array = self._array
        if 0 in array.shape[1:] or stop <= start:
            return np.empty((max(0, stop - start), *array.shape[1:]), array.dtype.newbyteorder("="))
        step = array.chunk[0]
        parts = []
        for block in range(start // step, (stop - 1) // step + 1):
            if block != self._block:
                self._block, self._values = -1, np.empty(0)  # not two of them at once
                self._values = self._load(block)
                self._block = block
            parts.append(self._values[max(0, start - block * step) : stop - block * step])
        return np.concatenate(parts)  # a copy, so that a few rows do not hold the block

    def _load(self, block: int) -> Array:
        array = self._array
        count = min(array.chunk[0], array.shape[0] - block * array.chunk[0])
        columns = array.grid[1:]
        if math.prod(columns) == 1:
            inner = tuple(slice(0, size) for size in array.shape[1:])
            return self._chunk((block, *(0 for _ in columns)))[(slice(0, count), *inner)]
        whole = np.empty((count, *array.shape[1:]), array.dtype.newbyteorder("="))
        for place in np.ndindex(*columns):
            target = tuple(
                slice(number * step, min((number + 1) * step, size))
                for number, step, size in zip(place, array.chunk[1:], array.shape[1:], strict=True)
            )
            part = tuple(slice(0, there.stop - there.start) for there in target)
            whole[(slice(0, count), *target)] = self._chunk((block, *place))[(slice(0, count), *part)]
        return whole

    def _chunk(self, place: tuple[int, ...]) -> Array:
        """A chunk by its number along each axis."""
        array = self._array
        file = tuple(number // count for number, count in zip(place, array.in_file, strict=True))
        key = array.key(file)
        try:
            with open_regular(self._store.path, self._store.folder(array) / key) as stream:
                raw = self._bytes(stream, place, file)
            if raw is not None:
                return decode_chunk(array, raw)
        except FileNotFoundError:
            pass  # an empty chunk need not be written
        except _DAMAGE as exc:
            raise self._store.damaged(array, self._told(key, place), exc) from exc
        if self._store.packed or array.fill is None:
            raise self._store.damaged(array, self._told(key, place), "it is not there")
        return np.full(array.chunk, array.fill, array.dtype.newbyteorder("="))

    def _told(self, key: str, place: tuple[int, ...]) -> str:
        return key if self._array.sharding is None else f"{list(place)} in {key}"

    def _bytes(self, stream: IO[bytes], place: tuple[int, ...], file: tuple[int, ...]) -> bytes | None:
        """The bytes of a chunk as they lie in its file; None where a shard does not have it."""
        array, size = self._array, os.fstat(stream.fileno()).st_size
        start, count = 0, size
        if array.sharding is not None:
            if self._indexed != file:
                self._indexed, self._index = (), self._read_index(stream, size)
                self._indexed = file
            inside = tuple(number % count for number, count in zip(place, array.in_file, strict=True))
            entry = self._index[int(np.ravel_multi_index(inside, array.in_file))]
            if absent(entry):
                return None
            start, count = int(entry[0]), int(entry[1])
        if count > most_bytes(array) or start + count > size:
            raise ValueError(f"{count} bytes at {start} of {size}")
        stream.seek(start)
        raw = stream.read(count)
        if len(raw) != count:
            raise EOFError("cut off")
        return raw

    def _read_index(self, stream: IO[bytes], size: int) -> Array:
        array, wanted = self._array, index_bytes(self._array)
        if size < wanted:
            raise ValueError("it is too short for its index")
        assert array.sharding is not None
        stream.seek(size - wanted if array.sharding.at_end else 0)
        return decode_index(array, stream.read(wanted))


def content_bytes(values: Array) -> Array:
    """The values in order as little-endian bytes, which do not depend on chunks or codecs."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(-1) if little.size else np.empty(0, np.uint8)


def metadata_hash(root: Mapping[str, Any], documents: Mapping[str, Any]) -> str:
    """sha256 over the group's document, but for the hashes in it, and those of its arrays."""
    attributes = dict(root.get("attributes") or {})
    attributes[OURS] = {k: v for k, v in dict(attributes.get(OURS) or {}).items() if k not in _HASHES}
    told = [{**root, "attributes": attributes}, sorted(documents.items())]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_documents(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The metadata of a group and, by name, of its arrays.

    Raises:
        DataError: They cannot be read.
    """
    return _read_json(path / METADATA, path), _children(path)


def open_regular(root: Path, file: Path) -> IO[bytes]:
    """Open a regular file below a directory, by a way without links.

    Raises:
        OSError: It is not there, or cannot be read.
        ValueError: It is a link or a special file, or the way to it is one.
    """
    here = file.parent
    while here != root:
        if here.is_symlink():
            raise ValueError("a link leads to it")
        here = here.parent
    try:
        # A pipe that was put in its place must not block.
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as exc:
        if file.is_symlink():
            raise ValueError("it is a link") from exc
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is no regular file")
    return os.fdopen(handle, "rb")


def _children(path: Path) -> dict[str, dict[str, Any]]:
    """Documents of the arrays right below a group; groups and other files are left alone."""
    found: dict[str, dict[str, Any]] = {}
    for folder in _folders(path):
        if (folder / METADATA).is_file():
            document = _read_json(folder / METADATA, path)
            if document.get("node_type") == "array":
                found[folder.name] = document
        if len(found) > _ARRAYS:
            raise DataError(f"{path} holds more than {_ARRAYS} arrays", expected="a dataset")
    return found


def _folders(path: Path) -> Iterator[Path]:
    try:
        yield from sorted(entry for entry in path.iterdir() if entry.is_dir())
    except OSError as exc:
        raise DataError(f"cannot read {path} ({first_line(exc)})") from exc


def _read_json(file: Path, root: Path) -> dict[str, Any]:
    if not file.exists() and any((file.parent / name).is_file() for name in (".zgroup", ".zarray")):
        raise DataError(f"{root} is of Zarr's format 2", expected="format 3", hint="convert it: zarr migrate v3")
    try:
        with open_regular(root, file) as stream:
            raw = stream.read(_METADATA_BYTES + 1)
        if len(raw) > _METADATA_BYTES:
            raise ValueError(f"larger than {_METADATA_BYTES} bytes")
        found = json.loads(raw)
        if (
            not isinstance(found, dict)
            or found.get("zarr_format") != 3
            or found.get("node_type") not in ("array", "group")
        ):
            raise ValueError("neither group nor array of Zarr's format 3")
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"cannot read {file} ({first_line(exc)})", expected="a Zarr store of format 3") from exc
    return found
