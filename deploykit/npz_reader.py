"""Arrays in a .npz file, read by rows: a file that is larger than memory is no trouble."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from deploykit.errors import DataError, first_line
from deploykit.specs import Array

# What zipfile and numpy raise for archives that are cut off, damaged, encrypted or packed by an unknown method.
UNREADABLE = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Member:
    """An array of the archive, by its header."""

    name: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def members_of(path: Path) -> dict[str, Member]:
    """The arrays of a .npz file, by name; only their headers are read.

    Raises:
        DataError: It cannot be read.
    """
    found: dict[str, Member] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    name = info.filename.removesuffix(".npy")
                    with archive.open(info) as stream:
                        found[name] = _read_header(stream, name)
    except UNREADABLE as exc:
        raise DataError(
            f"cannot read {path} ({first_line(exc)})", expected="a .npz file written by numpy.savez"
        ) from exc
    return found


def read_batches(path: Path, members: Mapping[str, Member], length: int, size: int) -> Iterator[dict[str, Array]]:
    """Stream rows out of the archive.

    Args:
        path: The file.
        members: The arrays that are wanted, as `members_of` found them.
        length: Rows of each.
        size: Rows of a batch; the last may have fewer.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            streams = {name: archive.open(f"{name}.npy") for name in members}
            whole: dict[str, Array] = {}
            for name, stream in streams.items():
                _read_header(stream, name)
                if members[name].fortran:
                    with archive.open(f"{name}.npy") as again:
                        whole[name] = np.lib.format.read_array(again, allow_pickle=False)
            for start in range(0, length, size):
                count = min(size, length - start)
                yield {
                    name: whole[name][start : start + count] if name in whole else _rows(stream, members[name], count)
                    for name, stream in streams.items()
                }
    except UNREADABLE as exc:
        raise DataError(f"cannot read {path} ({first_line(exc)})", hint="write it again with numpy.savez") from exc


def _rows(stream: IO[bytes], member: Member, count: int) -> Array:
    shape = (count, *member.shape[1:])
    wanted = math.prod(shape) * member.dtype.itemsize
    data = stream.read(wanted)
    if len(data) != wanted:
        raise EOFError(f"{member.name} is cut off")
    return np.frombuffer(data, member.dtype).reshape(shape)


def _read_header(stream: IO[bytes], name: str) -> Member:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    return Member(name, tuple(shape), bool(fortran), dtype)
