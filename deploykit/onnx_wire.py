"""What an ONNX file refers to, read off its bytes without a library.

A serving image holds a runtime and no `onnx`, and the runtime must not be shown a file before every location of
external data in it was looked at. This walks the wire format of protobuf, skips all values, and is stricter than
parsers are: what two parsers could take for different things is refused.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import ModelError

_Buffer = bytes | mmap.mmap
# Which fields of which message lead to tensors: number, message below, whether there can be several.
_BELOW: Mapping[str, Mapping[int, tuple[str, bool]]] = {
    "ModelProto": {7: ("GraphProto", False), 20: ("TrainingInfoProto", True), 25: ("FunctionProto", True)},
    "TrainingInfoProto": {1: ("GraphProto", False), 2: ("GraphProto", False)},
    "GraphProto": {1: ("NodeProto", True), 5: ("TensorProto", True), 15: ("SparseTensorProto", True)},
    "FunctionProto": {7: ("NodeProto", True), 11: ("AttributeProto", True)},
    "NodeProto": {5: ("AttributeProto", True)},
    "AttributeProto": {
        5: ("TensorProto", False), 6: ("GraphProto", False), 10: ("TensorProto", True), 11: ("GraphProto", True),
        22: ("SparseTensorProto", False), 23: ("SparseTensorProto", True),
    },
    "SparseTensorProto": {1: ("TensorProto", False), 2: ("TensorProto", False)},
}  # fmt: skip
_OP_TYPE = 4
_TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14
_EXTERNAL = 1
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# protobuf's own limit on messages inside one another.
_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Wire:
    """What was found in a file.

    Attributes:
        external: Name and entries of every tensor whose values are elsewhere; no entries where a key is given twice.
        operators: Types of all nodes, those of functions and inner graphs among them.
    """

    external: tuple[tuple[str, dict[str, str]], ...]
    operators: frozenset[str]


class _Malformed(ValueError):
    """Bytes that are no ONNX file, or that parsers may read differently."""


def read_wire(path: Path) -> Wire:
    """Look through an ONNX file.

    Raises:
        ModelError: It cannot be read, is no ONNX file, or is ambiguous.
    """
    try:
        with path.open("rb") as stream:
            if not path.stat().st_size:
                raise ModelError(f"{path} is empty", expected="an .onnx file")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return scan(data)
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except _Malformed as exc:
        raise ModelError(f"{path} is not an ONNX file, or is cut off ({exc})", hint="export it again") from exc


def scan(data: _Buffer) -> Wire:
    """Look through the bytes of an ONNX file.

    Raises:
        ValueError: They are none, or are ambiguous.
    """
    external: list[tuple[str, dict[str, str]]] = []
    operators: set[str] = set()
    left: list[tuple[str, int, int, int]] = [("ModelProto", 0, len(data), 1)]
    graphs = 0
    while left:
        message, start, end, depth = left.pop()
        if depth > _DEPTH:
            raise _Malformed(f"messages nested more than {_DEPTH} deep")
        graphs += message == "GraphProto"
        if message == "TensorProto":
            found = _tensor(data, start, end)
            external += [found] if found is not None else []
            continue
        below, once = _BELOW[message], set()
        for number, kind, at, to in _fields(data, start, end):
            if kind != _LENGTH:
                continue
            if message == "NodeProto" and number == _OP_TYPE:
                operators.add(_text(data, at, to))
            if number not in below:
                continue
            inner, several = below[number]
            if not several and number in once:
                raise _Malformed(f"a {message} with two of what it can have one of")
            once.add(number)
            left.append((inner, at, to, depth + 1))
    if not graphs:
        raise _Malformed("it holds no graph")
    return Wire(tuple(external), frozenset(operators))


def _tensor(data: _Buffer, start: int, end: int) -> tuple[str, dict[str, str]] | None:
    """Name and entries of a tensor; None where its values are in it."""
    name, entries, elsewhere, twice = "", dict[str, str](), False, False
    for number, kind, at, to in _fields(data, start, end):
        if number == _DATA_LOCATION and kind == _VARINT:
            # Enums are 32 bits wide, and parsers drop the others.
            elsewhere = elsewhere or _varint(data, at, to)[0] & 0xFFFFFFFF == _EXTERNAL
        elif number == _TENSOR_NAME and kind == _LENGTH:
            name = _text(data, at, to)
        elif number == _EXTERNAL_DATA and kind == _LENGTH:
            key, value = _entry(data, at, to)
            twice = twice or key in entries
            entries[key] = value
    return (name, {} if twice else entries) if elsewhere else None


def _entry(data: _Buffer, start: int, end: int) -> tuple[str, str]:
    found = {1: "", 2: ""}
    for number, kind, at, to in _fields(data, start, end):
        if kind == _LENGTH and number in found:
            found[number] = _text(data, at, to)
    return found[1], found[2]


def _text(data: _Buffer, at: int, to: int) -> str:
    try:
        return data[at:to].decode()
    except UnicodeDecodeError as exc:
        raise _Malformed("a text that is not UTF-8") from exc


def _fields(data: _Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type and place of every field of a message."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise _Malformed(f"a field of number {number}")
        if kind == _LENGTH:
            length, at = _varint(data, at, end)
            to = at + length
        elif kind == _VARINT:
            to = _varint(data, at, end)[1]
        elif kind in (_FIXED64, _FIXED32):
            to = at + (8 if kind == _FIXED64 else 4)
        else:
            raise _Malformed(f"a field of wire type {kind}")
        if to > end:
            raise _Malformed("a field that ends beyond its message")
        yield number, kind, at, to
        at = to


def _varint(data: _Buffer, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Malformed("a number that is cut off, or too long")
