"""Tensors between two processes: memory that both have mapped, in place of bytes that are sent.

An arena belongs to one request in flight. The side that writes it makes it larger where it has to, up to a limit, and
the other follows; on Linux it cannot be made smaller, so that neither side can take memory away that the other reads.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.extras import available
from deploykit.specs import Array

# Where a tensor may begin: what vector instructions and caches like.
_ALIGN = 64
_FIRST_BYTES = 2**16
# What an arena keeps from one request to the next.
_KEPT_BYTES = 2**26


class ArenaFull(Exception):
    """The tensors are larger together than an arena may become."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor that is to be written, of one part or of several parts whose rows are joined.

    Attributes:
        name: Name in the model.
        dtype: As in `TensorSpec`.
        parts: Arrays of that dtype, of any strides, which differ in their first dimension only.
    """

    name: str
    dtype: str
    parts: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all parts together."""
        first = self.parts[0].shape
        return first if len(self.parts) == 1 else (sum(p.shape[0] for p in self.parts), *first[1:])


class Arena:
    """Memory that two processes share.

    Args:
        descriptor: Of the file that backs it; this object closes it.
        limit: Most bytes that it may have.
    """

    def __init__(self, descriptor: int, limit: int) -> None:
        self.descriptor = descriptor
        self._limit = limit
        self._map: mmap.mmap | None = None
        self._size = 0
        self._used = 0

    @classmethod
    def create(cls, limit: int) -> Arena:
        """A new, empty one."""
        if hasattr(os, "memfd_create"):
            import fcntl

            made = os.memfd_create("deploykit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            fcntl.fcntl(made, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            return cls(made, limit)
        with tempfile.TemporaryFile(prefix="deploykit-") as file:
            return cls(os.dup(file.fileno()), limit)

    def reserve(self, nbytes: int) -> None:
        """Make room for what is to be written.

        Raises:
            ArenaFull: It would be larger than it may be.
        """
        self._used = max(self._used, nbytes)
        if nbytes <= self._size:
            return
        if nbytes > self._limit:
            raise ArenaFull(f"{nbytes} bytes of tensors at once; {self._limit} are allowed")
        size = min(self._limit, max(_FIRST_BYTES, 1 << (nbytes - 1).bit_length()))
        have = os.fstat(self.descriptor).st_size
        if have < size:
            os.ftruncate(self.descriptor, size)
        self._grow(min(max(size, have), self._limit))

    def warm(self, nbytes: int) -> None:
        """Have the memory there that requests of that size will need, as far as an arena keeps it between two."""
        nbytes = min(nbytes, _KEPT_BYTES, self._limit)
        if nbytes > 0:
            self.reserve(nbytes)
            self.view(0, np.dtype(np.uint8), (nbytes,))[:: mmap.PAGESIZE] = 0
            self._used = 0

    def follow(self, nbytes: int) -> None:
        """See what the other side has written.

        Raises:
            ArenaFull: The other side made it larger than it may be, or says so.
        """
        self._used = max(self._used, nbytes)
        if nbytes <= self._size:
            return
        size = os.fstat(self.descriptor).st_size
        if nbytes > size or size > self._limit:
            raise ArenaFull(f"{nbytes} bytes of tensors in {size} bytes of memory; {self._limit} are allowed")
        self._grow(size)

    def _grow(self, size: int) -> None:
        # Arrays that look at the old mapping keep it alive.
        self._map = mmap.mmap(self.descriptor, size)
        self._size = size

    def view(self, offset: int, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        """An array of this memory; it is good until the memory is written again."""
        if self._map is None or offset < 0 or offset + dtype.itemsize * math.prod(shape) > self._size:
            raise ArenaFull(f"a tensor of shape {tuple(shape)} at {offset} of {self._size} bytes")
        return np.ndarray(tuple(shape), dtype, self._map, offset)

    def trim(self) -> None:
        """Give the system back what an unusually large request took: its bytes are 0 then, for both sides."""
        if min(self._used, self._size) > _KEPT_BYTES and self._map is not None and hasattr(mmap, "MADV_REMOVE"):
            self._map.madvise(mmap.MADV_REMOVE, _KEPT_BYTES, self._size - _KEPT_BYTES)
        self._used = 0

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give up the memory, as soon as no array looks at it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1
        self._map = None
        self._size = 0


Placed = tuple[str, str, list[int], int, int]
"""Where a tensor was written: name, dtype, shape, offset and bytes; JSON keeps it as it is."""


def write(arena: Arena, tensors: Sequence[Joined]) -> tuple[list[Placed], int]:
    """Write tensors, each copied once.

    Returns:
        Where each is, and the bytes of all.

    Raises:
        ArenaFull: They are larger than the arena may become.
    """
    texts: dict[str, tuple[Array, bytes]] = {}
    placed: list[Placed] = []
    offset = 0
    for tensor in tensors:
        shape = tensor.shape
        if tensor.dtype == "string":
            texts[tensor.name] = lengths, blob = _texts(tensor.parts)
            nbytes = lengths.nbytes + len(blob)
        else:
            nbytes = _stored(tensor.dtype).itemsize * math.prod(shape)
        placed.append((tensor.name, tensor.dtype, list(shape), offset, nbytes))
        offset += -(-nbytes // _ALIGN) * _ALIGN
    arena.reserve(max(offset, 1))
    for tensor, (name, dtype, shape_, begin, _) in zip(tensors, placed, strict=True):
        if dtype == "string":
            lengths, blob = texts[name]
            arena.view(begin, lengths.dtype, lengths.shape)[...] = lengths
            arena.view(begin + lengths.nbytes, np.dtype(np.uint8), (len(blob),))[...] = np.frombuffer(blob, np.uint8)
            continue
        whole, row = arena.view(begin, _stored(dtype), shape_), 0
        for part in tensor.parts:
            here = whole if len(tensor.parts) == 1 else whole[row : row + part.shape[0]]
            np.copyto(here, part.view(np.uint16) if dtype == "bfloat16" else part)
            row += part.shape[0] if part.ndim else 0
    return placed, offset


def read(arena: Arena, placed: Sequence[Sequence[Any]], total: int) -> dict[str, Array]:
    """Look at tensors that the other side wrote; copy what has to stay.

    Raises:
        ArenaFull: They are not within the arena.
    """
    arena.follow(max(total, 1))
    found: dict[str, Array] = {}
    for name, dtype, shape, offset, nbytes in placed:
        if dtype == "string":
            count = math.prod(shape)
            lengths = arena.view(offset, np.dtype(np.int64), (count,))
            blob = arena.view(offset + lengths.nbytes, np.dtype(np.uint8), (nbytes - lengths.nbytes,)).tobytes()
            found[name] = _split(blob, lengths).reshape(shape)
            continue
        view = arena.view(offset, _stored(dtype), shape)
        found[name] = view.view(_bfloat16()) if dtype == "bfloat16" else view
    return found


def size_of(inputs: Mapping[str, Array]) -> int:
    """Bytes that tensors take in an arena, from above."""
    total = 0
    for array in inputs.values():
        if array.dtype.kind in "OUS":
            total += sum(len(t) * (1 if isinstance(t, bytes) else 4) + 8 for t in array.ravel().tolist())
        else:
            total += array.nbytes
    return total + _ALIGN * len(inputs)


def _stored(dtype: str) -> np.dtype[Any]:
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def _bfloat16() -> np.dtype[Any]:
    if not available("ml_dtypes"):
        return np.dtype(np.uint16)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def _texts(parts: Sequence[Array]) -> tuple[Array, bytes]:
    """Lengths and bytes of strings, which may be `str` or UTF-8."""
    pieces = [
        t if isinstance(t, bytes) else str(t).encode("utf-8", "surrogateescape")
        for part in parts
        for t in part.ravel().tolist()
    ]
    return np.fromiter((len(p) for p in pieces), np.int64, len(pieces)), b"".join(pieces)


def _split(blob: bytes, lengths: Array) -> Array:
    ends = np.cumsum(lengths).tolist()
    found = np.empty(len(ends), object)
    begin = 0
    for n, end in enumerate(ends):
        found[n] = blob[begin:end].decode("utf-8", "surrogateescape")
        begin = end
    return found
