"""What goes in and out of a model: names, dtypes and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.errors import DataError

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Dim = int | str

DTYPES = frozenset(
    {
        "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
        "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "string",
    }
)  # fmt: skip


_SUM = re.compile(r"\s*\w+(?:\s*\+\s*\w+)+\s*")


def terms(dim: Dim) -> tuple[Dim, ...]:
    """What a dimension is the sum of: itself, or the parts of "past_sequence + 1"."""
    if isinstance(dim, int) or not _SUM.fullmatch(dim):
        return (dim,)
    return tuple(int(part) if part.isdecimal() else part for part in (p.strip() for p in dim.split("+")))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor.

    Attributes:
        name: Name in the model.
        dtype: One of `DTYPES`.
        shape: One entry a dimension: a fixed size, the name of a symbol ("batch"), or a sum of them
            ("past_sequence + sequence"); equal symbols are equal sizes. None where the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the dynamic dimensions, in order; a sum gives the names in it."""
        return tuple(t for d in self.shape or () for t in terms(d) if isinstance(t, str))

    def concrete(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape with every symbol replaced.

        Raises:
            DataError: A symbol has no size, or the rank is unknown.
        """
        if self.shape is None:
            raise DataError(f"the rank of {self.name!r} is unknown", hint="give real inputs with --data")
        missing = [s for s in self.symbols if s not in sizes]
        if missing:
            raise DataError(
                f"no size for dimension {missing[0]!r} of {self.name!r}",
                hint=f"add --dim {missing[0]}=SIZE or --data",
            )
        return tuple(sum(sizes[t] if isinstance(t, str) else t for t in terms(d)) for d in self.shape)

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ", ".join(str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a model, in the model's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        """All symbols of the inputs, each once, in order of appearance."""
        return tuple(dict.fromkeys(s for spec in self.inputs for s in spec.symbols))

    def __iter__(self) -> Iterator[TensorSpec]:
        yield from self.inputs
        yield from self.outputs


def fit_feeds(signature: Signature, feeds: Feeds) -> dict[str, Array]:
    """Check ``feeds`` against the inputs; widen dtypes where no value can change.

    Integers are cast where every value survives, float64 becomes float32 or narrower where it stays finite. Names
    beside the inputs are ignored, so that labels and spare columns may stay in a dataset. One array for a model of one
    input is that input's, whatever it is called.

    Returns:
        One array an input, in the order of the signature.

    Raises:
        DataError: A name is missing, or a rank, size or dtype does not fit, or one symbol has two sizes.
    """
    sizes: dict[str, tuple[int, str]] = {}
    out: dict[str, Array] = {}
    if len(signature.inputs) == 1 and len(feeds) == 1:
        feeds = {signature.inputs[0].name: next(iter(feeds.values()))}
    for spec in signature.inputs:
        if spec.name not in feeds:
            raise DataError(
                f"no data for input {spec.name!r} (the data has: {', '.join(feeds) or 'nothing'})",
                expected=", ".join(str(s) for s in signature.inputs),
            )
        array = _fit_dtype(spec, feeds[spec.name])
        if spec.shape is not None:
            _check_shape(spec, array.shape, sizes)
        out[spec.name] = array
    known = {symbol: size for symbol, (size, _) in sizes.items()}
    for spec in signature.inputs:
        _check_sums(spec, out[spec.name].shape, known)
    return out


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    wanted = spec.shape or ()
    if len(shape) != len(wanted):
        raise DataError(f"{spec.name!r} has shape {tuple(shape)}, {len(shape)} dimensions", expected=str(spec))
    for axis, (dim, size) in enumerate(zip(wanted, shape, strict=True)):
        if isinstance(dim, int):
            if dim != size:
                raise DataError(f"{spec.name!r} has shape {tuple(shape)}: axis {axis} is {size}", expected=str(spec))
            continue
        if len(terms(dim)) > 1:
            continue
        seen = sizes.setdefault(dim, (size, spec.name))
        if seen[0] != size:
            raise DataError(
                f"dimension {dim!r} is {seen[0]} in {seen[1]!r} and {size} in {spec.name!r}",
                expected="one size for one symbol",
            )


def _check_sums(spec: TensorSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    for axis, dim in enumerate(spec.shape or ()):
        parts = terms(dim)
        if len(parts) == 1 or any(isinstance(part, str) and part not in sizes for part in parts):
            continue
        wanted = sum(sizes[part] if isinstance(part, str) else part for part in parts)
        if shape[axis] != wanted:
            raise DataError(
                f"{spec.name!r} has shape {shape}: axis {axis} is {shape[axis]}", expected=f"{dim} = {wanted}"
            )


def _fit_dtype(spec: TensorSpec, value: Array) -> Array:
    array: Array = np.asarray(value)
    if spec.dtype == "string":
        if array.dtype.kind not in "OUS":
            raise DataError(f"{spec.name!r} is {array.dtype}", expected="strings")
        return array.astype(object)
    if array.dtype.name == spec.dtype:
        # Runtimes read the bytes as they lie there, whatever the byte order says.
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    try:
        wanted = np.dtype(spec.dtype)
    except TypeError:  # bfloat16, float8 and int4 are ml_dtypes' types
        raise DataError(f"{spec.name!r} is {array.dtype}", expected=f"ml_dtypes.{spec.dtype} values") from None
    kinds = array.dtype.kind + wanted.kind
    if kinds in ("ii", "uu", "iu", "ui"):
        info = np.iinfo(wanted)
        if array.size == 0 or (array.min() >= info.min and array.max() <= info.max):
            return array.astype(wanted)
    elif kinds in ("bi", "bu", "bf"):
        return array.astype(wanted)
    elif kinds == "ff":
        with np.errstate(over="ignore"):
            narrow = array.astype(wanted)
        if not np.array_equal(np.isinf(narrow), np.isinf(array)):
            raise DataError(f"{spec.name!r} holds values too large for {spec.dtype}", expected=str(spec))
        return narrow
    raise DataError(f"{spec.name!r} is {array.dtype}, which does not become {spec.dtype} unchanged", expected=str(spec))
