"""`.pt2`: programs that `torch.export.save` wrote, loaded without unpickling, with their inputs and outputs by name."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import nesting
from deploykit.archives import unsafe_archive
from deploykit.errors import DeploykitError, ModelError, SourceError, first_line
from deploykit.extras import require
from deploykit.specs import Dim, TensorSpec

_INSTEAD = "save a program whose example inputs are plain tensors"


def load_program(path: Path, error: type[DeploykitError] = ModelError, instead: str = _INSTEAD) -> Any:
    """Load a program without unpickling anything.

    Args:
        path: The `.pt2` file.
        error: What is raised.
        instead: What to do with a file that would have to be unpickled.

    Returns:
        A `torch.export.ExportedProgram`.

    Raises:
        DeploykitError: Of the type ``error``: missing, damaged, made by a newer torch, or it holds pickled objects.
        MissingDependencyError: torch is not installed.
    """
    torch = require("torch", extra="torch")
    if not path.is_file():
        raise error(f"{path} does not exist", expected="a file written by torch.export.save")
    if not zipfile.is_zipfile(path):
        raise error(f"{path} is not a .pt2 archive, or is cut off", expected="a file written by torch.export.save")
    _refuse_pickles(torch, path, error, instead)
    try:
        return torch.export.load(str(path))
    except Exception as exc:
        raise error(
            f"torch cannot load {path} ({first_line(exc)})",
            expected=f"a file written by torch.export.save of torch {torch.__version__} or older",
            hint="save it again with this version",
        ) from exc


def _refuse_pickles(torch: Any, path: Path, error: type[DeploykitError], instead: str) -> None:
    """Refuse what torch.export.load would unpickle without a guard.

    It takes a full unpickler, which runs whatever code the file holds, for example inputs that are no plain
    tensors, for payloads that the archive marks as pickled, and for custom objects. Plain programs have none.
    """
    try:
        if why := unsafe_archive(path):
            raise error(f"{path} {why}", expected="a file written by torch.export.save")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            suspect = "two members of one name" if len(set(names)) < len(names) else ""
            for name in names:
                suspect = suspect or _pickled(torch, name, archive)
    except DeploykitError:
        raise
    except Exception as exc:  # what zlib, lzma and json say to bytes that somebody chose is no short list
        raise error(f"{path} is damaged ({first_line(exc)})", hint="save it again with torch.export.save") from exc
    if suspect:
        raise error(
            f"{path} holds {suspect}, and loading it could run code",
            expected="a program of plain tensors",
            hint=instead,
        )


def _pickled(torch: Any, name: str, archive: zipfile.ZipFile) -> str:
    """What in one member needs the full unpickler; empty where nothing does."""
    if name.endswith(".pt"):
        data = archive.read(name)
        try:
            torch.load(io.BytesIO(data), weights_only=True) if data else None
        except Exception:  # noqa: BLE001 - whatever the reason, the full unpickler would be next
            return f"pickled objects in {name}"
    elif name.endswith("_config.json"):
        payloads = json.loads(archive.read(name)).get("config", {})
        plain = ("weight_", "tensor_")
        if any(p.get("use_pickle") or not str(p.get("path_name")).startswith(plain) for p in payloads.values()):
            return f"pickled payloads by {name}"
    return ""


class ProgramModule:
    """The program's module with tensors by position and outputs by name.

    Args:
        program: The exported program.
        slots: Every input of the program in order: a name for a tensor, a value in a tuple for a constant.
    """

    def __init__(self, program: Any, slots: tuple[str | tuple[Any], ...]) -> None:
        self.program_module = program.module()
        self._spec = program.call_spec.in_spec
        self._slots = slots
        self.output_names: tuple[str, ...] = ()

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        from torch.utils import _pytree

        left = iter(tensors)
        leaves = [next(left) if isinstance(slot, str) else slot[0] for slot in self._slots]
        args, kwargs = _pytree.tree_unflatten(leaves, self._spec)
        taken = tuple(slot for slot in self._slots if isinstance(slot, str))
        outputs = nesting.flatten_outputs(self.program_module(*args, **kwargs), taken)
        self.output_names = tuple(outputs)
        return tuple(outputs.values())


@dataclass(frozen=True, slots=True)
class ProgramInputs:
    """What goes into a program.

    Attributes:
        specs: The tensors, with readable symbols for dynamic dimensions.
        limits: Smallest and largest size, by symbol.
        slots: Every input in order, see `ProgramModule`.
        symbols: The program's expression and our symbol for a dynamic size, by the size's own text.
    """

    specs: tuple[TensorSpec, ...]
    limits: Mapping[str, tuple[int, int]]
    slots: tuple[str | tuple[Any], ...]
    symbols: Mapping[str, tuple[Any, str]]


def read_inputs(program: Any) -> ProgramInputs:
    """Read the inputs off a program's graph.

    Raises:
        SourceError: One is neither a tensor nor a constant.
    """
    from torch.export.graph_signature import ConstantArgument, InputKind

    placeholders = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    symbols: dict[str, tuple[Any, str]] = {}
    specs: list[TensorSpec] = []
    limits: dict[str, tuple[int, int]] = {}
    slots: list[str | tuple[Any]] = []
    for entry in program.graph_signature.input_specs:
        if entry.kind is not InputKind.USER_INPUT:
            continue
        if isinstance(entry.arg, ConstantArgument):
            slots.append((entry.arg.value,))
            continue
        name = entry.arg.name
        value: Any = placeholders.get(name)
        if not hasattr(value, "shape"):
            raise SourceError(f"input {name!r} is a {type(value).__name__}", expected="tensors as inputs")
        slots.append(name)
        dims = tuple(_dim(program, name, axis, value, symbols, limits) for axis in range(value.ndim))
        specs.append(TensorSpec(name, str(value.dtype).removeprefix("torch."), dims))
    return ProgramInputs(tuple(specs), limits, tuple(slots), symbols)


def read_outputs(program: Any, inputs: ProgramInputs) -> tuple[tuple[TensorSpec, ...], tuple[int, ...]]:
    """Read the outputs off a program's graph.

    Returns:
        The tensors, by the names that `ProgramModule` gives them, and where each stands among the leaves of the
        program's result.
    """
    from torch.export.graph_signature import OutputKind
    from torch.utils import _pytree

    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    leaves = [
        values.get(entry.arg.name) if hasattr(entry.arg, "name") else getattr(entry.arg, "value", None)
        for entry in program.graph_signature.output_specs
        if entry.kind is OutputKind.USER_OUTPUT
    ]
    nest = _pytree.tree_unflatten(leaves, program.call_spec.out_spec)
    found = nesting.flatten_outputs(nest, tuple(spec.name for spec in inputs.specs))
    specs = tuple(
        TensorSpec(
            name,
            str(value.dtype).removeprefix("torch."),
            tuple(_size(size, f"{name}_dim{axis}", inputs) for axis, size in enumerate(value.shape)),
        )
        for name, value in found.items()
    )
    return specs, tuple(next(i for i, leaf in enumerate(leaves) if leaf is value) for value in found.values())


def _size(size: Any, fallback: str, inputs: ProgramInputs) -> Dim:
    if isinstance(size, int):
        return size
    found = inputs.symbols.get(str(size))
    return found[1] if found else fallback


def _dim(
    program: Any,
    name: str,
    axis: int,
    value: Any,
    symbols: dict[str, tuple[Any, str]],
    limits: dict[str, tuple[int, int]],
) -> Dim:
    """Size of one axis, or its symbol; new symbols and their limits are written down."""
    size = value.shape[axis]
    if isinstance(size, int):
        return size
    if str(size) not in symbols:
        taken = {word for _, word in symbols.values()}
        symbols[str(size)] = size.node.expr, _readable(name, axis, value, taken)
    symbol = symbols[str(size)][1]
    bounds = program.range_constraints.get(size.node.expr)
    if bounds is not None:
        # torch writes 2 where nobody gave a lower limit, because it traces with 2; a true limit refuses to run.
        low = 1 if bounds.lower <= 2 else int(bounds.lower)
        limits[symbol] = (low, int(min(bounds.upper, 1 << 30)))
    return symbol


def _readable(name: str, axis: int, value: Any, taken: set[str]) -> str:
    """The field's word for an axis: batch, sequence, height, width; otherwise the input's name and the axis."""
    floating = value.dtype.is_floating_point
    word = "batch" if axis == 0 else ""
    if value.ndim == 4 and floating and axis >= 2:
        word = ("height", "width")[axis - 2]
    elif value.ndim in (2, 3) and axis == 1 and not (floating and value.ndim == 2):
        word = "sequence"
    return word if word and word not in taken else f"{name}_dim{axis}"
