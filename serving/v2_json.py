"""Requests and answers of the Open Inference Protocol over HTTP: a JSON object, and bytes behind it.

Numbers are read strictly: no fraction for an integer, no integer for a truth value, nothing out of range. JSON has no
NaN and no infinity. A request that holds one is refused. In an answer NaN is `null`, which numpy's clients (Triton's,
KServe's) read as NaN; an infinity makes its tensor hold the words NaN, Infinity and -Infinity, as Triton writes them:
Triton's client and Python's json read that, a strict parser fails instead of reading another number. Binary data have
no such limits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import numpy as np

from deploykit.extras import require
from deploykit.serving.requests import InferRequest, InferResult, InvalidRequest, Parameter, TooLarge
from deploykit.serving.v2_binary import read_tensor, write_tensor
from deploykit.serving.v2_numbers import LEAST_BYTES, Numbers, dump_numbers, set_aside
from deploykit.serving.v2_types import (
    Limits,
    check_datatype,
    check_shape,
    datatype_of,
    dtype_of,
    narrow,
    numpy_dtype,
    shown,
)
from deploykit.specs import Array

_FIELDS = frozenset({"id", "parameters", "inputs", "outputs"})
_TEXT = 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """In which form a client wants the outputs.

    Attributes:
        binary: Whether as binary data, where nothing is said of one output.
        outputs: Whether as binary data, by name.
    """

    binary: bool = False
    outputs: Mapping[str, bool] = field(default_factory=dict)


def parse_object(text: bytes | memoryview, limits: Limits) -> dict[str, Any]:
    """A JSON object whose cost in memory is bounded before it is parsed.

    The parser gives up at a depth of 1024; what this module reads of the object is never nested deeper than a tensor
    may have dimensions.

    Raises:
        InvalidRequest: It is none.
        TooLarge: It holds too many values.
    """
    return _loads(_counted(text, limits))


def _counted(text: bytes | memoryview, limits: Limits) -> bytes:
    raw = text.tobytes() if isinstance(text, memoryview) else text
    if raw.count(b"[") + raw.count(b"{") > limits.json_lists:
        raise TooLarge("the JSON holds too many lists", expected=f"at most {limits.json_lists}")
    if raw.count(b",") > limits.json_values:
        raise TooLarge(
            "the JSON holds too many values", expected=f"at most {limits.json_values}", hint="send binary data"
        )
    return raw


def _loads(raw: bytes) -> dict[str, Any]:
    orjson = require("orjson", extra="serve")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        hint = "JSON has no NaN and no Infinity: send binary data" if b"NaN" in raw or b"Infinity" in raw else None
        raise InvalidRequest(f"the body is not JSON: {_first(exc)}", hint=hint) from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body is JSON, but no object", expected='{"inputs": [...]}')
    return value


def _first(exc: Exception) -> str:
    return str(exc).partition("\n")[0][:200]


def parse_request(
    body: memoryview, header_length: int | None, *, model: str, version: str | None, limits: Limits
) -> tuple[InferRequest, Wanted]:
    """What a body asks for.

    Args:
        body: All of it, inflated.
        header_length: Length of the JSON in front of the binary data; None where there are none.
        model: From the address.
        version: Likewise.
        limits: Of the model.

    Raises:
        InvalidRequest: It does not say what the protocol says.
        TooLarge: It is over a limit.
    """
    head, tail = (body, body[:0]) if header_length is None else (body[:header_length], body[header_length:])
    raw = _counted(head, limits)
    rest, lists = set_aside(raw) if len(raw) > LEAST_BYTES else (raw, {})
    found = _request(_loads(rest), tail, model, version, limits, lists)
    # A list that no tensor has: it stands where none belongs, or its key is there twice.
    return _request(_loads(raw), tail, model, version, limits, {}) if lists else found


def _request(
    said: dict[str, Any], tail: memoryview, model: str, version: str | None, limits: Limits, lists: dict[int, Numbers]
) -> tuple[InferRequest, Wanted]:
    """What an object asks for; lists that its tensors have are taken out of `lists`."""
    for name, value in said.items():
        if name not in _FIELDS and isinstance(value, (dict, list)):
            raise InvalidRequest(f"unknown field {shown(name)}", expected=", ".join(sorted(_FIELDS)))
    identity = said.get("id") or ""
    if not isinstance(identity, str) or len(identity) > _TEXT:
        raise InvalidRequest("the id is no string, or a long one", expected=f"at most {_TEXT} characters")
    parameters = read_parameters("the request", said.get("parameters"), limits)
    binary = _flag("binary_data_output", parameters.pop("binary_data_output", False))
    deadline = take_deadline(parameters)
    refuse_sequences(parameters)
    wanted, names = _outputs(said.get("outputs"), binary, limits)
    request = InferRequest(
        model=model,
        inputs=_inputs(said.get("inputs"), tail, limits, lists),
        version=version,
        id=identity,
        outputs=names,
        deadline=deadline,
        parameters=parameters,
    )
    return request, wanted


def take_deadline(parameters: dict[str, Parameter]) -> float | None:
    """The time at which the parameter `timeout`, in microseconds as in Triton, is over; it is taken out.

    Raises:
        InvalidRequest: It is no whole number.
    """
    timeout = parameters.pop("timeout", None)
    if isinstance(timeout, str) and timeout.isascii() and timeout.isdigit():
        timeout = int(timeout[:20])
    if timeout is None:
        return None
    if type(timeout) is not int or timeout < 0:
        raise InvalidRequest(f"timeout is {shown(timeout)}", expected="microseconds, a whole number from 0 on")
    return time.monotonic() + timeout / 1e6 if timeout else None


def refuse_sequences(parameters: Mapping[str, Parameter]) -> None:
    """Refuse what would change the answer and is not offered.

    Raises:
        InvalidRequest: The request is part of a sequence.
    """
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if parameters.get(name):
            raise InvalidRequest(f"{name} is set, and models of sequences are not served here")


def read_parameters(of: str, said: object, limits: Limits) -> dict[str, Parameter]:
    """The parameters of a request or of a tensor.

    Raises:
        InvalidRequest: They are no object of strings, numbers and truth values, or there are too many.
    """
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise InvalidRequest(f"parameters of {of} are no object")
    if len(said) > limits.parameters:
        raise InvalidRequest(f"{of} has {len(said)} parameters", expected=f"at most {limits.parameters}")
    for name, value in said.items():
        if not isinstance(value, (bool, int, float, str)):
            raise InvalidRequest(f"parameter {shown(name)} of {of} is no string, number or truth value")
    return cast("dict[str, Parameter]", said)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {shown(value)}", expected="true or false")
    return value


def _named(kind: str, said: object, limits: Limits) -> list[tuple[str, dict[str, Any], dict[str, Parameter]]]:
    """Every tensor that is named, with its object and its parameters."""
    if not isinstance(said, list):
        raise InvalidRequest(f"{kind}s are {'missing' if said is None else 'no list'}")
    if len(said) > limits.tensors:
        raise InvalidRequest(f"{len(said)} {kind}s", expected=f"at most {limits.tensors}")
    found: dict[str, tuple[str, dict[str, Any], dict[str, Parameter]]] = {}
    for index, item in enumerate(said):
        if not isinstance(item, dict):
            raise InvalidRequest(f"{kind} {index} is no object")
        name = item.get("name")
        if not isinstance(name, str):
            raise InvalidRequest(f"{kind} {index} has no name")
        if name in found:
            raise InvalidRequest(f"{kind} {shown(name)} is there twice")
        parameters = read_parameters(f"{kind} {shown(name)}", item.get("parameters"), limits)
        refuse_extensions(name, parameters)
        found[name] = name, item, parameters
    return list(found.values())


def refuse_extensions(name: str, parameters: Mapping[str, object]) -> None:
    """Refuse extensions that are not offered.

    Raises:
        InvalidRequest: The tensor lies in shared memory, or classes are asked for.
    """
    for extension in ("shared_memory_region", "classification"):
        if parameters.get(extension):
            raise InvalidRequest(f"{extension} is set for {shown(name)}, and that extension is not offered here")


def _outputs(said: object, binary: bool, limits: Limits) -> tuple[Wanted, tuple[str, ...] | None]:
    if said is None or said == []:
        return Wanted(binary), None
    forms = {}
    for name, _, parameters in _named("output", said, limits):
        forms[name] = _flag("binary_data", parameters.get("binary_data", binary))
    return Wanted(binary, forms), tuple(forms)


def _inputs(said: object, tail: memoryview, limits: Limits, lists: dict[int, Numbers]) -> dict[str, Array]:
    at = 0
    arrays = {}
    for name, item, parameters in _named("input", said, limits):
        datatype = check_datatype(name, item.get("datatype"))
        dims = item.get("shape")
        if not isinstance(dims, list):
            raise InvalidRequest(f"shape of {shown(name)} is no list")
        shape, count = check_shape(name, dims, limits, datatype)
        size = parameters.get("binary_data_size")
        if size is None:
            if item.get("data") is None:
                raise InvalidRequest(f"{shown(name)} has neither data nor binary_data_size")
            data = item["data"]
            numbers = lists.pop(data, None) if type(data) is int else None
            if numbers is not None:
                arrays[name] = _in_pieces(name, datatype, shape, count, numbers)
            else:
                arrays[name] = _from_json(name, datatype, shape, count, data)
            continue
        if item.get("data") is not None:
            raise InvalidRequest(f"{shown(name)} has both data and binary_data_size")
        if type(size) is not int or not 0 <= size <= len(tail) - at:
            raise InvalidRequest(
                f"binary_data_size of {shown(name)} is {shown(size)}",
                expected=f"at most the {len(tail) - at} bytes that are left behind the JSON",
                hint="Inference-Header-Content-Length has to be the length of the JSON",
            )
        arrays[name] = read_tensor(name, datatype, shape, count, tail[at : at + size])
        at += size
    if at != len(tail):
        raise InvalidRequest(f"{len(tail) - at} bytes of the body belong to no input")
    return arrays


_KINDS: dict[str, frozenset[type]] = {
    "b": frozenset({bool}),
    "u": frozenset({int}),
    "i": frozenset({int}),
    "f": frozenset({int, float}),
    "O": frozenset({str}),
}


def _from_json(name: str, datatype: str, shape: tuple[int, ...], count: int, data: object) -> Array:
    if not isinstance(data, list):
        raise InvalidRequest(f"data of {shown(name)} are no list")
    return _values(name, datatype, shape, _flat(name, shape, count, data)).reshape(shape)


def _in_pieces(name: str, datatype: str, shape: tuple[int, ...], count: int, numbers: Numbers) -> Array:
    dims = shape if numbers.nested else (count,)
    pieces = numbers.pieces(dims, _misfit(name, shape, count))
    return np.concatenate([_values(name, datatype, shape, piece) for piece in pieces]).reshape(shape)


def _values(name: str, datatype: str, shape: tuple[int, ...], flat: list[Any]) -> Array:
    """Values of a tensor, or some of them, as an array of one dimension."""
    kind = "O" if datatype == "BYTES" else "f" if datatype == "BF16" else numpy_dtype(datatype).kind
    strange = set(map(type, flat)) - _KINDS[kind]
    if strange:
        raise InvalidRequest(
            f"data of {shown(name)} hold {_kind_name(strange)}", expected=f"values of {datatype} in shape {list(shape)}"
        )
    if kind == "O":
        strings = np.empty(len(flat), object)
        strings[:] = flat
        return strings
    dtype = numpy_dtype(datatype)
    if dtype.kind in "iu":
        return narrow(name, datatype, flat)
    with np.errstate(over="ignore"):
        array: Array = np.array(flat, np.float64 if datatype == "BF16" else dtype)
        array = array.astype(dtype, copy=False)
    if kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(f"data of {shown(name)} hold values too large for {datatype}")
    return array


def _misfit(name: str, shape: tuple[int, ...], count: int) -> InvalidRequest:
    return InvalidRequest(f"data of {shown(name)} do not fit its shape", expected=f"{count} values, {list(shape)}")


def _kind_name(types: set[type]) -> str:
    names = {bool: "truth values", int: "numbers", float: "fractions", str: "strings", list: "lists", dict: "objects"}
    return ", ".join(sorted(names.get(t, "nulls") for t in types))


def _flat(name: str, shape: tuple[int, ...], count: int, data: list[Any]) -> list[Any]:
    """The values of a list that is flat, or nested as the shape says."""
    wrong = _misfit(name, shape, count)
    level = data
    if len(shape) > 1 and data and isinstance(data[0], list):
        if len(data) != shape[0]:
            raise wrong
        for size in shape[1:]:
            if set(map(type, level)) - {list} or set(map(len, level)) - {size}:
                raise wrong
            level = list(chain.from_iterable(level))
    if len(level) != count:
        raise wrong
    return level


def json_values(result: InferResult, wanted: Wanted) -> int:
    """How many values `write_response` would write in JSON."""
    return sum(a.size for name, a in result.outputs.items() if not wanted.outputs.get(name, wanted.binary))


def write_response(result: InferResult, wanted: Wanted) -> tuple[bytes, list[memoryview]]:
    """JSON of an answer, and the bytes that follow it; none where every output is in the JSON."""
    orjson = require("orjson", extra="serve")
    outputs = []
    tensors = []
    for name, array in result.outputs.items():
        item: dict[str, Any] = {"name": name, "datatype": datatype_of(dtype_of(array)), "shape": list(array.shape)}
        if wanted.outputs.get(name, wanted.binary):
            data = write_tensor(array)
            item["parameters"] = {"binary_data_size": len(data)}
            tensors.append(data)
        else:
            item["data"] = _to_json(array)
        outputs.append(item)
    answer: dict[str, Any] = {"model_name": result.model, "model_version": result.version, "outputs": outputs}
    if result.id:
        answer = {"id": result.id, **answer}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), tensors


def _to_json(array: Array) -> Any:
    """Values in row-major order, as orjson takes them."""
    if array.dtype.kind in "OUS":
        return [_text(item) for item in array.reshape(-1).tolist()]
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    flat: Array = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1)
    if flat.dtype.kind == "f" and np.isinf(flat).any():
        return _words(flat)
    return require("orjson", extra="serve").Fragment(dump_numbers(flat))


def _text(item: object) -> str:
    """A string of a model, which need not be UTF-8."""
    data = item if isinstance(item, bytes) else str(item).encode("utf-8", "surrogateescape")
    return data.decode("utf-8", "replace")


def _words(flat: Array) -> Any:
    """Numbers with the words NaN, Infinity and -Infinity among them."""
    orjson = require("orjson", extra="serve")
    parts = dump_numbers(flat)[1:-1].split(b",")
    for word, where in ((b"NaN", np.isnan(flat)), (b"Infinity", flat == np.inf), (b"-Infinity", flat == -np.inf)):
        for index in np.flatnonzero(where).tolist():
            parts[index] = word
    return orjson.Fragment(b"[" + b",".join(parts) + b"]")
