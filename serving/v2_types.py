"""Datatypes, shapes and limits of the Open Inference Protocol, version 2.

The protocol: https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from deploykit.errors import ModelError
from deploykit.extras import available, require
from deploykit.serving.requests import InvalidRequest, TooLarge
from deploykit.specs import Array, TensorSpec

# Ours to theirs. Complex numbers have none.
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64", "string": "BYTES",
}  # fmt: skip
DTYPES = {theirs: ours for ours, theirs in DATATYPES.items()}
# Of one element; of BYTES the length before each.
SIZES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8, "BYTES": 4,
}  # fmt: skip

_MIB = 2**20
# A float64 in JSON with its comma; what stands around the tensors in a request, for each of them.
_JSON_NUMBER = 26
_HEAD_BYTES = 64 * 1024
# What one string may take where nothing says how long they are.
_STRING_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may cost before a model sees it.

    Attributes:
        body_bytes: Body of a request, as sent and as inflated; more where the declared shapes of a model need more,
            less where they are fixed and smaller.
        elements: Elements of one tensor; more where the declared shapes need more.
        strings: Strings of one tensor, each an object of its own; more where the declared shapes need more.
        dims: Dimensions of one tensor.
        tensors: Inputs and outputs named in one request; more where the model has more.
        json_values: Commas in the JSON of a request: parsed values take ten times the memory of their text.
        json_lists: Opening brackets and braces in it, for the same reason.
        parameters: Parameters in one request, in one tensor.
        inflate_ratio: Inflated bytes for one byte that was sent, beyond the first MiB.
        body_s: Seconds for a body to arrive, and for an answer to be read.
        head_s: Seconds for the headers of a request to arrive.
        head_bytes: Bytes of the headers of a request.
        held_bytes: Bytes of all bodies that are there at once, on one port; one may always be there.
        prompt_s: Seconds after which a message of gRPC that is not there yet counts as the largest that it can become:
            how much of it has come is not known before its end.
    """

    body_bytes: int = 64 * _MIB
    elements: int = 64 * _MIB
    strings: int = _MIB
    dims: int = 32
    tensors: int = 64
    json_values: int = 8 * _MIB
    json_lists: int = _MIB
    parameters: int = 64
    inflate_ratio: int = 100
    body_s: float = 60.0
    head_s: float = 10.0
    head_bytes: int = 64 * 1024
    held_bytes: int = 1024 * _MIB
    prompt_s: float = 2.0

    @property
    def calls(self) -> int:
        """Calls of gRPC that are there at once, on one port: a MiB of `held_bytes` for each, and never less than 64."""
        return max(64, self.held_bytes // _MIB)

    def of(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], max_batch: int = 0) -> Limits:
        """The limits for a model, by what it declares."""
        return _limits_of(self, inputs, outputs, max_batch)


@lru_cache(maxsize=1024)
def _limits_of(
    limits: Limits, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], max_batch: int
) -> Limits:
    needed = [_needs(spec, max_batch) for spec in inputs]
    binary = sum(size for _, size, _ in needed) + _HEAD_BYTES * max(1, len(inputs))
    body = max(limits.body_bytes, binary)
    if all(fixed for *_, fixed in needed):
        text = sum(count for count, *_ in needed) * _JSON_NUMBER + _HEAD_BYTES * max(1, len(inputs))
        body = max(min(text, limits.body_bytes), binary)
    most = max((count for count, *_ in needed), default=0)
    return replace(
        limits,
        body_bytes=body,
        elements=max(limits.elements, most),
        strings=max(limits.strings, *(n for s, (n, *_) in zip(inputs, needed, strict=True) if s.dtype == "string"), 0),
        dims=max(limits.dims, *(len(spec.shape or ()) for spec in (*inputs, *outputs)), 0),
        tensors=max(limits.tensors, len(inputs), len(outputs)),
        json_values=max(limits.json_values, 2 * sum(count for count, *_ in needed)),
    )


def _needs(spec: TensorSpec, max_batch: int) -> tuple[int, int, bool]:
    """Elements and bytes of an input whose free dimensions are 1 (the first: the batch), and whether none is free."""
    shape = spec.shape or ()
    sizes = [dim if isinstance(dim, int) else max(1, max_batch) if axis == 0 else 1 for axis, dim in enumerate(shape)]
    count = math.prod(sizes)
    fixed = spec.shape is not None and all(isinstance(dim, int) for dim in shape) and spec.dtype != "string"
    each = _STRING_BYTES if spec.dtype == "string" else SIZES[datatype_of(spec.dtype)]
    return count, count * each, fixed


def datatype_of(dtype: str) -> str:
    """The protocol's name of a dtype of ours.

    Raises:
        ModelError: It has none.
    """
    try:
        return DATATYPES[dtype]
    except KeyError:
        raise ModelError(
            f"{dtype} has no name in the Open Inference Protocol",
            expected=", ".join(DATATYPES),
            hint="give the model a float input or output",
        ) from None


def dtype_of(array: Array) -> str:
    """Our name of an array's dtype; strings are numpy's own or objects."""
    return "string" if array.dtype.kind in "OUS" else array.dtype.name


@lru_cache(maxsize=32)
def numpy_dtype(datatype: str) -> np.dtype[Any]:
    """Little-endian dtype of numbers as they lie in a body."""
    kind: np.dtype[Any] = np.dtype(require("ml_dtypes").bfloat16 if datatype == "BF16" else DTYPES[datatype])
    return kind if datatype == "BF16" else kind.newbyteorder("<")


def narrow(name: str, datatype: str, values: Sequence[int]) -> Array:
    """Whole numbers as an array of their type; numpy before version 2 wraps what is out of range.

    Raises:
        InvalidRequest: One is out of range.
    """
    dtype = numpy_dtype(datatype)
    info = np.iinfo(dtype)
    try:
        if datatype == "UINT64":
            if min(values, default=0) < 0:
                raise OverflowError
            return np.array(values, dtype)
        wide: Array = np.array(values, np.int64)
        if wide.size and not info.min <= wide.min() <= wide.max() <= info.max:
            raise OverflowError
    except OverflowError:
        raise InvalidRequest(
            f"{shown(name)} holds values outside of {datatype}", expected=f"{info.min} to {info.max}"
        ) from None
    return wide.astype(dtype, copy=False)


def metadata(spec: TensorSpec) -> dict[str, Any]:
    """What clients are told of an input or output; -1 is a free dimension."""
    shape = [-1] if spec.shape is None else [dim if isinstance(dim, int) else -1 for dim in spec.shape]
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": shape}


def shown(text: object) -> str:
    """Something of a client's, short enough for a message."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."


def check_datatype(name: str, datatype: object) -> str:
    """The datatype of a tensor in a request.

    Raises:
        InvalidRequest: There is no such one, or no model can have it here.
    """
    if datatype == "BF16" and not available("ml_dtypes"):
        raise InvalidRequest(f"datatype of {shown(name)} is BF16", expected="that of a model that this server can run")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise InvalidRequest(f"datatype of {shown(name)} is {shown(datatype)}", expected=f"one of {', '.join(DTYPES)}")
    return datatype


def check_shape(name: str, shape: Sequence[object], limits: Limits, datatype: str = "") -> tuple[tuple[int, ...], int]:
    """The shape of a tensor in a request, and its number of elements.

    Raises:
        InvalidRequest: A dimension is no whole number, or is negative; or there are too many.
        TooLarge: It has too many elements.
    """
    if len(shape) > limits.dims:
        raise InvalidRequest(f"{shown(name)} has {len(shape)} dimensions", expected=f"at most {limits.dims}")
    count, room = 1, 1
    sizes = []
    for dim in shape:
        if type(dim) is not int or dim < 0:
            raise InvalidRequest(f"shape of {shown(name)} holds {shown(dim)}", expected="whole numbers from 0 on")
        count *= dim
        # An empty tensor of huge other dimensions has no elements, and numpy refuses it all the same.
        room *= max(1, dim)
        if room > limits.elements:
            raise TooLarge(f"{shown(name)} has too many elements", expected=f"at most {limits.elements}")
        sizes.append(dim)
    if datatype == "BYTES" and count > limits.strings:
        raise TooLarge(f"{shown(name)} has {count} strings", expected=f"at most {limits.strings}")
    return tuple(sizes), count
