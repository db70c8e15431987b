"""Whether a request fits a model: names, dtypes and shapes, before anything waits or runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from deploykit.serving.requests import InvalidRequest
from deploykit.specs import Array, Signature, TensorSpec, terms


def check_inputs(signature: Signature, inputs: Mapping[str, Array]) -> None:
    """Refuse inputs that do not fit.

    Raises:
        InvalidRequest: A name is unknown or missing, a dtype, rank or size is another one, or one symbol has two sizes.
    """
    sizes: dict[str, int] = {}
    if extra := inputs.keys() - {spec.name for spec in signature.inputs}:
        raise InvalidRequest(f"the model has no input {min(extra)!r}", expected=", ".join(map(str, signature.inputs)))
    for spec in signature.inputs:
        if spec.name not in inputs:
            raise InvalidRequest(f"there is no input {spec.name!r}", expected=", ".join(map(str, signature.inputs)))
        array = inputs[spec.name]
        if not _fits(spec.dtype, array):
            raise InvalidRequest(f"{spec.name!r} is {array.dtype}", expected=str(spec))
        if spec.shape is not None:
            _check_shape(spec, spec.shape, array.shape, sizes)
    for spec in signature.inputs:
        _check_sums(spec, inputs[spec.name].shape, sizes)


def check_outputs(signature: Signature, wanted: tuple[str, ...] | None) -> None:
    """Refuse outputs that the model does not have.

    Raises:
        InvalidRequest: There is one.
    """
    known = [spec.name for spec in signature.outputs]
    for name in wanted or ():
        if name not in known:
            raise InvalidRequest(f"the model has no output {name!r}", expected=", ".join(known))


_terms = lru_cache(maxsize=1024)(terms)


@lru_cache(maxsize=64)
def _native(dtype: str) -> np.dtype[Any] | None:
    return None if dtype in ("string", "bfloat16") else np.dtype(dtype)


def _fits(dtype: str, array: Array) -> bool:
    native = _native(dtype)
    if native is not None and array.dtype == native:
        return True
    if dtype == "string":
        return array.dtype.kind in "OUS"
    if dtype == "bfloat16":  # without ml_dtypes, numpy only has its bits
        return array.dtype.name in ("bfloat16", "uint16")
    return array.dtype.name == dtype


def _check_shape(
    spec: TensorSpec, wanted: tuple[int | str, ...], shape: tuple[int, ...], sizes: dict[str, int]
) -> None:
    if len(shape) != len(wanted):
        raise InvalidRequest(f"{spec.name!r} has shape {list(shape)}", expected=f"{len(wanted)} dimensions: {spec}")
    for dim, size in zip(wanted, shape, strict=True):
        if isinstance(dim, int):
            if dim != size:
                raise InvalidRequest(f"{spec.name!r} has shape {list(shape)}", expected=str(spec))
        elif len(_terms(dim)) == 1 and sizes.setdefault(dim, size) != size:
            raise InvalidRequest(
                f"dimension {dim!r} of {spec.name!r} is {size}", expected=f"{sizes[dim]}, as in another input"
            )


def _check_sums(spec: TensorSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    for dim, size in zip(spec.shape or (), shape, strict=False):
        parts = _terms(dim)
        if len(parts) == 1 or any(isinstance(p, str) and p not in sizes for p in parts):
            continue
        wanted = sum(sizes[p] if isinstance(p, str) else p for p in parts)
        if size != wanted:
            raise InvalidRequest(f"{spec.name!r} has shape {list(shape)}", expected=f"{dim} = {wanted}")
