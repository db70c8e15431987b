"""Zarr 3 arrays as they are read here: metadata and chunks of any origin, checked before a codec sees a byte.

Zarr's own library decodes whatever a store's metadata name (pickles among it), allocates what a chunk's first bytes
claim, and takes a chunk that is not there for an empty one. Here codecs are those of `_COMPRESSORS` and crc32c, and a
chunk has to say that it decodes to the very size that the metadata give it.

Specifications: https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html, the codecs beside it, and of the types
`fixed_length_utf32` and `null_terminated_bytes` https://github.com/zarr-developers/zarr-extensions.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.extras import require
from deploykit.specs import Array

EXTRA = "data"
# Decoded bytes of all chunks that hold one range of rows: what reading a row may take.
BLOCK_LIMIT = 2**30
_CHUNKS_IN_SHARD = 2**20
_COLUMNS = 2**16
_RANK = 32
_COMPRESSORS = ("blosc", "zstd", "gzip")
_CHECKSUM = "crc32c"
PLAIN = frozenset(
    {
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    }
)  # fmt: skip
_TEXT = {"fixed_length_utf32": ("U", 4), "null_terminated_bytes": ("S", 1)}
_TEXT_BYTES = 2**16
_NONE = 2**64 - 1
Raw = bytes | bytearray


@dataclass(frozen=True, slots=True)
class Sharding:
    """How the chunks of an array lie together in files.

    Attributes:
        shape: Of the array's part that is in one file.
        at_end: Whether the index is the file's end, or its beginning.
        checked: Whether a CRC-32C follows the index.
    """

    shape: tuple[int, ...]
    at_end: bool
    checked: bool


@dataclass(frozen=True, slots=True)
class ArrayMeta:
    """One array of a store.

    Attributes:
        name: Its directory below the store; empty where the store is one array.
        shape: All of it.
        dtype: As stored, byte order included.
        chunk: Shape of what is compressed as one.
        codecs: What made bytes of a chunk's bytes, in the order of writing.
        sharding: None where each chunk is a file.
        prefix: First part of a chunk's key, "c" or empty.
        separator: Between the numbers of a key.
        fill: Value of chunks that are not there; None where it is none that can be read.
        attributes: What else the writer noted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: tuple[int, ...]
    codecs: tuple[str, ...]
    sharding: Sharding | None
    prefix: str
    separator: str
    fill: Any
    attributes: Mapping[str, Any]

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk, decoded; those at the edge are as large."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Size of the array, decoded."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """How many chunks there are along each axis."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.chunk, strict=True))

    @property
    def files(self) -> tuple[int, ...]:
        """How many files there are along each axis."""
        steps = self.sharding.shape if self.sharding else self.chunk
        return tuple(-(-size // step) for size, step in zip(self.shape, steps, strict=True))

    @property
    def in_file(self) -> tuple[int, ...]:
        """How many chunks are in a file along each axis."""
        if self.sharding is None:
            return (1,) * len(self.chunk)
        return tuple(size // step for size, step in zip(self.sharding.shape, self.chunk, strict=True))

    def key(self, place: tuple[int, ...]) -> str:
        """Path of a file below the array's directory."""
        numbers = [str(number) for number in place]
        return self.separator.join([self.prefix, *numbers] if self.prefix else numbers or ["0"])

    def described(self) -> str:
        """Its compression in words: "blosc, crc32c, 64 chunks a file"."""
        parts = list(self.codecs) or ["not compressed"]
        return ", ".join(parts + ([f"{math.prod(self.in_file)} chunks a file"] if self.sharding else []))


def parse_array(name: str, told: Mapping[str, Any]) -> ArrayMeta:
    """Read an array's `zarr.json`.

    Args:
        name: Of the array.
        told: The document.

    Raises:
        ValueError: It breaks the specification, is too large, or asks for what is not read here.
    """
    shape = _sizes(told.get("shape"), "shape", least=0)
    dtype = _dtype(told.get("data_type"))
    outer = _chunk_shape(_named(told.get("chunk_grid"), "chunk_grid"), len(shape))
    prefix, separator = _key_form(_named(told.get("chunk_key_encoding"), "chunk_key_encoding"))
    if told.get("storage_transformers"):
        raise ValueError("has storage transformers")
    codecs = told.get("codecs")
    if not isinstance(codecs, list) or not 1 <= len(codecs) <= 4:
        raise ValueError("has no list of codecs")
    first, config = _named(codecs[0], "codec")
    sharding, chunk = None, outer
    if first == "sharding_indexed":
        if len(codecs) > 1:
            raise ValueError("has codecs around its shards")
        sharding, chunk, codecs = _sharding(config, outer)
    swapped, chain = _chain(codecs)
    attributes = told.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise ValueError("has attributes that are no object")
    dtype = dtype.newbyteorder(">" if swapped else "<")
    found = ArrayMeta(
        name, shape, dtype, chunk, chain, sharding, prefix, separator, _fill(told.get("fill_value"), dtype), attributes
    )
    row = math.prod(-(-size // step) for size, step in zip(shape[1:], chunk[1:], strict=True))
    if row > _COLUMNS:
        raise ValueError(f"has chunks {list(chunk)}, more than {_COLUMNS} of them for a row")
    if found.chunk_bytes * max(1, row) > BLOCK_LIMIT:
        raise ValueError(f"has chunks {list(chunk)}, so that a row takes more than {BLOCK_LIMIT} bytes")
    if found.nbytes >= 2**63:
        raise ValueError(f"has shape {list(shape)}")
    return found


def _named(value: Any, what: str) -> tuple[str, dict[str, Any]]:
    """What metadata call a thing by: an object with name and configuration, or the name alone."""
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"has no {what}")
    config = value.get("configuration") or {}
    if not isinstance(config, dict):
        raise ValueError(f"has a {what} whose configuration is no object")
    return value["name"], config


def _sizes(value: Any, what: str, *, least: int) -> tuple[int, ...]:
    fits = isinstance(value, list) and len(value) <= _RANK
    if not fits or not all(type(v) is int and least <= v < 2**63 for v in value):
        raise ValueError(f"has {what} {str(value)[:80]}")
    return tuple(value)


def _dtype(told: Any) -> np.dtype[Any]:
    name, config = _named(told, "data_type")
    if name in PLAIN:
        return np.dtype(name)
    if name in _TEXT:
        kind, width = _TEXT[name]
        size = config.get("length_bytes")
        if type(size) is int and width <= size <= _TEXT_BYTES and size % width == 0:
            return np.dtype(f"{kind}{size // width}")
    raise ValueError(f"holds values of type {name[:80]!r}, which are not read here")


def _chunk_shape(told: tuple[str, dict[str, Any]], rank: int) -> tuple[int, ...]:
    name, config = told
    if name != "regular":
        raise ValueError(f"has chunks in a grid {name[:80]!r}")
    shape = _sizes(config.get("chunk_shape"), "chunks", least=1)
    if len(shape) != rank:
        raise ValueError(f"has {rank} dimensions and chunks of {len(shape)}")
    return shape


def _key_form(told: tuple[str, dict[str, Any]]) -> tuple[str, str]:
    name, config = told
    if name not in ("default", "v2"):
        raise ValueError(f"has keys of form {name[:80]!r}")
    separator = config.get("separator", "/" if name == "default" else ".")
    if separator not in ("/", "."):
        raise ValueError(f"has keys with the separator {str(separator)[:8]!r}")
    return "c" if name == "default" else "", separator


def _sharding(config: Mapping[str, Any], outer: tuple[int, ...]) -> tuple[Sharding, tuple[int, ...], list[Any]]:
    chunk = _chunk_shape(("regular", dict(config)), len(outer))
    if any(size % step for size, step in zip(outer, chunk, strict=True)):
        raise ValueError(f"has shards {list(outer)} of chunks {list(chunk)}")
    if math.prod(size // step for size, step in zip(outer, chunk, strict=True)) > _CHUNKS_IN_SHARD:
        raise ValueError(f"has more than {_CHUNKS_IN_SHARD} chunks in a file")
    codecs, index = config.get("codecs"), config.get("index_codecs")
    if not isinstance(codecs, list) or not isinstance(index, list) or not 1 <= len(codecs) <= 4:
        raise ValueError("has shards without codecs")
    swapped, chain = _chain(index)
    where = config.get("index_location", "end")
    if swapped or chain not in ((), (_CHECKSUM,)) or where not in ("start", "end"):
        raise ValueError("has an index of shards of another form")
    return Sharding(outer, where == "end", bool(chain)), chunk, codecs


def _chain(codecs: list[Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether the byte order is big, and the codecs from bytes to bytes."""
    named = [_named(codec, "codec") for codec in codecs]
    if not named or named[0][0] != "bytes":
        raise ValueError(f"is encoded by {named[0][0][:80]!r}" if named else "has no codecs")
    order = named[0][1].get("endian", "little")
    chain = tuple(name for name, _ in named[1:])
    known = all(name == _CHECKSUM or name in _COMPRESSORS for name in chain)
    if order not in ("little", "big") or not known or len(chain) > 3 or sum(name in _COMPRESSORS for name in chain) > 1:
        raise ValueError(f"is encoded by {', '.join(n[:80] for n in chain) or 'an unknown byte order'}")
    return order == "big", chain


def _fill(value: Any, dtype: np.dtype[Any]) -> Any:
    """A fill value of the usual forms; None for others, which only matter where chunks are missing."""
    if dtype.kind in "US":
        return dtype.type() if value == "" else None
    special = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    if isinstance(value, str):
        value = special.get(value) if dtype.kind == "f" else None
    if isinstance(value, bool) != (dtype.kind == "b") or not isinstance(value, bool | int | float):
        return None
    try:
        return dtype.type(value)
    except (OverflowError, ValueError):
        return None


# --- chunks ----------------------------------------------------------------------------------------------------------


def most_bytes(meta: ArrayMeta) -> int:
    """What a chunk may take on disk: no codec makes more of one that does not compress."""
    return meta.chunk_bytes + meta.chunk_bytes // 8 + 2**16


def decode_chunk(meta: ArrayMeta, raw: bytes) -> Array:
    """Decode a chunk, in the native byte order.

    Args:
        meta: The array.
        raw: What lies on the disk.

    Returns:
        An array of the shape `meta.chunk`, which may be read-only.

    Raises:
        ValueError: Its checksum is another, or it is no chunk of this array.
        RuntimeError: A codec failed.
        MissingDependencyError: The extra is not installed.
    """
    # A checksum takes 4 bytes, and nothing else stands before a compressor.
    sizes = [meta.chunk_bytes + 4 * number for number in range(len(meta.codecs))]
    data: Raw = raw
    for codec, size in zip(reversed(meta.codecs), reversed(sizes), strict=True):
        data = _without_checksum(data) if codec == _CHECKSUM else _DECODERS[codec](data, size)
    if len(data) != meta.chunk_bytes:
        raise ValueError(f"{len(data)} bytes instead of {meta.chunk_bytes}")
    values = np.frombuffer(data, meta.dtype).reshape(meta.chunk)
    return values if meta.dtype.isnative else values.astype(meta.dtype.newbyteorder("="))


def decode_index(meta: ArrayMeta, raw: bytes) -> Array:
    """The index of a shard: `[chunks, 2]` of uint64, offset and size of each; those of `absent` are not there.

    Raises:
        ValueError: Its checksum is another, or its size.
    """
    assert meta.sharding is not None
    data = _without_checksum(raw) if meta.sharding.checked else raw
    return np.frombuffer(data, "<u8").reshape(math.prod(meta.in_file), 2)


def index_bytes(meta: ArrayMeta) -> int:
    """Size of a shard's index."""
    assert meta.sharding is not None
    return 16 * math.prod(meta.in_file) + 4 * meta.sharding.checked


def absent(entry: Array) -> bool:
    """Whether a row of an index says that its chunk is empty."""
    return int(entry[0]) == _NONE and int(entry[1]) == _NONE


def _without_checksum(data: Raw) -> Raw:
    value = require("google_crc32c", extra=EXTRA).value
    if len(data) < 4 or value(bytes(data[:-4])) != int.from_bytes(data[-4:], "little"):
        raise ValueError("its checksum is another")
    return data[:-4]


def _blosc(data: Raw, size: int) -> Raw:
    """Blosc 1: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst."""
    if len(data) < 16:
        raise ValueError("it is cut off")
    _, _, flags, _, decoded, _, encoded = struct.unpack("<4B3I", data[:16])
    if decoded != size or encoded != len(data):
        raise ValueError(f"it would decode to {decoded} bytes instead of {size}")
    if flags >> 5 not in (1, 3, 4):  # LZ4, zlib, Zstandard
        raise ValueError("it is compressed by BloscLZ or Snappy")
    return bytes(require("numcodecs.blosc", extra=EXTRA).decompress(data))


def _zstd(data: Raw, size: int) -> Raw:
    if _zstd_size(data) != size:
        raise ValueError(f"it does not say that it decodes to {size} bytes")
    room = bytearray(size)
    require("numcodecs.zstd", extra=EXTRA).decompress(data, room)
    return room


def _zstd_size(data: Raw) -> int | None:
    """Size that a frame says it decodes to, RFC 8878, section 3.1.1.1; None where it says none."""
    if len(data) < 6 or data[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("it is no Zstandard frame")
    single = data[4] >> 5 & 1
    width = (single, 2, 4, 8)[data[4] >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[data[4] & 3]
    if not width:
        return None
    return int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)


def _gzip(data: Raw, size: int) -> Raw:
    stream = zlib.decompressobj(31)
    try:
        found = stream.decompress(data, size + 1)
    except zlib.error as exc:
        raise ValueError(f"it does not decompress ({exc})") from exc
    if len(found) != size or not stream.eof:
        raise ValueError(f"it does not decode to {size} bytes")
    return found


_DECODERS = {"blosc": _blosc, "zstd": _zstd, "gzip": _gzip}
