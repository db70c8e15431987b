"""Tensors as bytes: the binary tensor data extension of HTTP, and the raw contents of gRPC.

Little-endian, row-major, nothing between elements. A BYTES element is its length in 4 bytes, then its bytes, which have
to be UTF-8 here, because the models' strings are text.
"""

from __future__ import annotations

import struct

import numpy as np

from deploykit.serving.requests import InvalidRequest
from deploykit.serving.v2_types import SIZES, numpy_dtype, shown
from deploykit.specs import Array

_LENGTH = struct.Struct("<I")


def read_tensor(name: str, datatype: str, shape: tuple[int, ...], count: int, data: memoryview) -> Array:
    """The array that the bytes hold. Numbers are not copied: the array lies over ``data``.

    Args:
        name: For messages.
        datatype: A name of the protocol.
        shape: Checked.
        count: Elements in it.
        data: Bytes.

    Raises:
        InvalidRequest: Their number is not what the shape needs, or they are no such elements.
    """
    if datatype == "BYTES":
        return _read_strings(name, count, data).reshape(shape)
    needed = count * SIZES[datatype]
    if len(data) != needed:
        raise InvalidRequest(
            f"{shown(name)} has {len(data)} bytes of data", expected=f"{needed} for {datatype} and shape {list(shape)}"
        )
    array = np.frombuffer(data, numpy_dtype(datatype)) if count else np.empty(0, numpy_dtype(datatype))
    if datatype == "BOOL" and count and array.view(np.uint8).max() > 1:
        raise InvalidRequest(f"{shown(name)} is BOOL and holds other bytes than 0 and 1")
    return array.reshape(shape)


def _read_strings(name: str, count: int, data: memoryview) -> Array:
    total, at = len(data), 0
    if count * _LENGTH.size > total:
        raise InvalidRequest(f"{shown(name)} has {total} bytes of data, too few for {count} strings")
    out = np.empty(count, object)
    raw = data.tobytes()  # whose parts cost less than a view's
    for index in range(count):
        if total - at < _LENGTH.size:
            raise InvalidRequest(f"{shown(name)} ends after {index} of {count} strings")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if length > total - at:
            raise InvalidRequest(
                f"string {index} of {shown(name)} says that it has {length} bytes", expected=f"at most {total - at}"
            )
        try:
            out[index] = raw[at : at + length].decode()
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"string {index} of {shown(name)} is not UTF-8", hint="send bytes as a tensor of UINT8"
            ) from None
        at += length
    if at != total:
        raise InvalidRequest(f"{total - at} bytes follow the {count} strings of {shown(name)}")
    return out


def write_tensor(array: Array) -> memoryview:
    """The bytes of an array; not copied where it is contiguous and holds numbers."""
    if array.dtype.kind in "OUS":
        return memoryview(_write_strings(array))
    if array.dtype.str.startswith(">"):
        array = array.astype(array.dtype.newbyteorder("<"))
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data


def _write_strings(array: Array) -> bytes:
    parts: list[bytes] = []
    for item in array.reshape(-1).tolist():
        data = item if isinstance(item, bytes) else str(item).encode("utf-8", "surrogateescape")
        parts += (_LENGTH.pack(len(data)), data)
    return b"".join(parts)
