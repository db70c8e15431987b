"""Nests of tensors: tuples, lists, dictionaries, NamedTuples and dataclasses, taken apart and put together again."""

from __future__ import annotations

import copy
import dataclasses
import enum
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deploykit.errors import SourceError
from deploykit.extras import require

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor stands in a nest, by its place in the flat list."""

    index: int


def split(value: Any, path: Path, found: list[tuple[Path, Any]], label: str) -> Any:
    """Take the tensors out of a nest of example inputs.

    Args:
        value: The nest.
        path: Names on the way to it.
        found: Grows by the tensors, each with its path.
        label: The module, for messages.

    Returns:
        The nest with a `Slot` for every tensor; `join` is the inverse.

    Raises:
        SourceError: It holds something that may hide tensors, or tensors of a kind that ONNX does not have.
    """
    torch = require("torch", extra="torch")
    if isinstance(value, torch.Tensor):
        why = unusual(value)
        if why:
            raise SourceError(f"example input {_name(path)!r} of {label} is {why[0]}", hint=why[1])
        found.append((path, value))
        return Slot(len(found) - 1)
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        raise SourceError(
            f"example input {_name(path)!r} of {label} is a packed sequence, which ONNX does not have",
            hint="take the padded tensor and its lengths as inputs",
        )
    items = list(_children(value))
    if items:
        return _rebuild(value, [split(item, (*path, name), found, label) for name, item in items])
    if not _is_container(value) and not _is_constant(value):
        raise SourceError(
            f"example input {_name(path)!r} of {label} is a {type(value).__name__}",
            expected="tensors; constants (None, bool, int, float, str, …); tuples, lists, dictionaries and dataclasses",
            hint="wrap the module in one whose forward takes tensors"
            + (", or give torch.from_numpy(...)" if type(value).__module__ == "numpy" else ""),
        )
    return value


def join(template: Any, tensors: Any) -> Any:
    """Put tensors in the places of their slots; every container is a new one, for the module may write to it."""
    if isinstance(template, Slot):
        return tensors[template.index]
    if not _is_container(template):
        return template
    return _rebuild(template, [join(item, tensors) for _, item in _children(template)])


def constants(template: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Constants that a template holds fixed, by name; None is left out."""
    if isinstance(template, Slot) or template is None:
        return
    if _is_container(template):
        for name, item in _children(template):
            yield from constants(item, (*path, name))
    else:
        yield _name(path), template


def names_of(paths: Iterable[Path], taken: Iterable[str] = (), *, default: str, mark: str = "") -> list[str]:
    """A readable name for every path, each once: ``("state", "0")`` becomes ``state_0``.

    Args:
        paths: Names on the way to each tensor.
        taken: Names that are not free.
        default: For an empty path, and in front of a path that begins with a digit.
        mark: Added to a name that is taken.
    """
    reserved = set(taken)
    found: list[str] = []
    for path in paths:
        name = re.sub(r"[^\w.]+", "_", "_".join(path)).strip("_.") or default
        name = f"{default}_{name}" if name[0].isdigit() else name
        name = f"{name}{mark}" if name in reserved else name
        free, number = name, 1
        while free in found or free in reserved:
            number += 1
            free = f"{name}_{number}"
        found.append(free)
    return found


def flatten_outputs(value: Any, taken: tuple[str, ...]) -> dict[str, Any]:
    """Tensors in a nest of tuples, lists, dictionaries and dataclasses, by a readable name that is not ``taken``.

    Constants (None, numbers, sizes, strings) are left out: a graph has no outputs for them.

    Raises:
        SourceError: There is an object that might hold tensors and cannot be looked into.
    """
    leaves = list(_leaves(value, ()))
    names = names_of((path for path, _ in leaves), taken, default="output", mark="_out")
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def left_out(value: Any, path: Path = ()) -> list[str]:
    """Numbers and strings among a module's outputs, which a graph cannot return, as `way.to.it=3`."""
    if _is_container(value):
        return [text for name, item in _children(value) for text in left_out(item, (*path, name))]
    if not isinstance(value, int | float | complex | str):
        return []
    return [f"{'.'.join(path)}={value!r}" if path else repr(value)]


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    torch = require("torch", extra="torch")
    where = f"output {'.'.join(path) or 'of the module'}"
    if isinstance(value, torch.Tensor):
        why = unusual(value)
        if why:
            raise SourceError(f"{where} is {why[0]}", hint=why[1])
        yield path, value
    elif isinstance(value, torch.nn.utils.rnn.PackedSequence):
        raise SourceError(
            f"{where} is a packed sequence, which ONNX does not have",
            hint="return torch.nn.utils.rnn.pad_packed_sequence(...) of it",
        )
    elif _is_container(value):
        for name, item in _children(value):
            yield from _leaves(item, (*path, name))
    elif not _is_constant(value):
        raise SourceError(
            f"{where} is a {type(value).__name__}",
            expected="tensors, or tuples, lists, dictionaries and dataclasses of them",
            hint="wrap the module in one whose forward returns tensors",
        )


def unusual(tensor: Any) -> tuple[str, str] | None:
    """Why a tensor cannot be an input or output of an ONNX graph, and what to do; None where it can."""
    torch = require("torch", extra="torch")
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({tensor.layout})", "use its dense form: tensor.to_dense()"
    if getattr(tensor, "is_nested", False):
        return "a nested tensor", "use a padded one: torch.nested.to_padded_tensor(tensor, 0.0)"
    if tensor.is_quantized:
        return "a quantized tensor", "use its float form: tensor.dequantize()"
    if tensor.dtype.is_complex:
        return (
            f"complex ({tensor.dtype}), and runtimes do not compute with that",
            "use real and imaginary parts: torch.view_as_real(tensor)",
        )
    return None


def _name(path: Path) -> str:
    return ".".join(path)


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type | Slot)
    )


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(key), item) for key, item in zip(_fields(value), value, strict=True))
    elif _is_container(value):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def _fields(value: Any) -> Iterable[Any]:
    return getattr(value, "_fields", range(len(value)))


def _rebuild(value: Any, items: list[Any]) -> Any:
    """A container like ``value`` with other items in it."""
    if type(value) is dict:
        return dict(zip(value, items, strict=True))
    if isinstance(value, Mapping):
        made: Any = copy.copy(value)
        for key, item in zip(list(value), items, strict=True):
            made[key] = item
        return made
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return items
    made = copy.copy(value)
    for field, item in zip(dataclasses.fields(value), items, strict=True):
        object.__setattr__(made, field.name, item)
    return made


def _is_constant(value: Any) -> bool:
    torch = require("torch", extra="torch")
    kinds = (bool, int, float, complex, str, bytes, slice, range, enum.Enum, torch.SymInt, torch.dtype, torch.device)
    return value is None or isinstance(value, kinds)
