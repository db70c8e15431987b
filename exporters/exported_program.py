"""`.pt2`: programs that `torch.export.save` wrote."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.data import Dataset, generate
from deploykit.errors import ExportError, SourceError, first_line
from deploykit.exporters import nesting, torch_onnx
from deploykit.exporters.base import DEFAULT_OPSET, ExportOptions, Source, Way
from deploykit.exporters.bounded import run_bounded
from deploykit.exporters.capture import ModuleTensors
from deploykit.exporters.pytorch import observed_range
from deploykit.exporters.shapes import cases_from_data, make_cases, observed_outputs
from deploykit.extras import require, version_of
from deploykit.specs import Array, Dim, Feeds, Signature, TensorSpec

# CPU seconds for the translation; there is no other way.
_LIMIT_S = 1200.0
_AGAIN = "export it again with torch.export(..., dynamic_shapes=...)"


class ExportedProgramSource(Source):
    """A saved `torch.export.ExportedProgram`; its dynamic dimensions were decided when it was made.

    Args:
        path: The `.pt2` file.
        options: `--dynamic` may rename dimensions, not add them.
    """

    kind = "pt2"

    def __init__(self, path: Path, options: ExportOptions) -> None:
        self.label = str(path)
        self._limit_s = options.timeout_s or _LIMIT_S
        self._program = _load(path)
        if options.way == "torchscript":
            raise ExportError(f"{path} cannot go through TorchScript", hint="leave --exporter out")
        if options.inputs:
            raise ExportError(f"the inputs of {path} are fixed in the file", hint="leave --input out")
        specs, limits, slots, ties = _inputs(self._program, options)
        self._module = _Runner(self._program, slots)
        examples, self.data = self._examples(specs, limits, ties)
        self.ranges = {n: r for n, a in examples.items() if (r := observed_range(a)) is not None}
        try:
            self._reference(examples)
        except Exception as exc:
            raise SourceError(f"{path} does not run on its own example inputs ({first_line(exc)})") from exc
        if options.data:
            self.data = options.data
            cases = cases_from_data(specs, Dataset.open(options.data), self._reference)
            self.notes = ()
        else:
            cases, notes = make_cases(specs, examples, self._reference, limits=limits, tie=ties.apply)
            self.notes = tuple(notes)
        self.cases = tuple(cases)
        self.signature = Signature(specs, observed_outputs(cases))

    def _reference(self, feeds: Feeds) -> dict[str, Array]:
        return torch_onnx.run_module(self._module, feeds)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the module; inputs may come in any order."""
        return self._reference({s.name: feeds[s.name] for s in self.signature.inputs})

    def tensors(self, feeds: Feeds) -> ModuleTensors:
        """The result of every operator."""
        return ModuleTensors(self._module, {s.name: feeds[s.name] for s in self.signature.inputs})

    def _examples(
        self, specs: tuple[TensorSpec, ...], limits: Mapping[str, tuple[int, int]], ties: _Ties
    ) -> tuple[dict[str, Array], str]:
        torch = require("torch", extra="torch")
        given = self._program.example_inputs
        if given:
            from torch.utils import _pytree

            tensors = [t for t in _pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]
            if len(tensors) == len(specs):
                return {s.name: torch_onnx.to_numpy(t) for s, t in zip(specs, tensors, strict=True)}, "example"
        sizes = {s: max(limits.get(s, (2, 0))[0], 2) for spec in specs for s in spec.symbols}
        return generate(specs, ties.apply(sizes)), "generated"

    @property
    def ways(self) -> tuple[Way, ...]:
        """There is one."""
        return (Way("torch.export", True),)

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Translate the program as it is."""
        torch_onnx.preload(way.name)

        def work() -> torch_onnx.Written:
            program = self._program
            if not all(size.is_symbol for size in program.range_constraints):
                # torch 2.13 cannot decompose a loaded program with sizes like 2*s ("expected sympy.Symbol").
                program = torch_onnx.export_again(self._module, self.cases[0].feeds, self.signature.inputs)
            job = torch_onnx.Job(program, {}, self.signature, opset or DEFAULT_OPSET)
            return torch_onnx.write(job, way.name, target)

        run_bounded(work, self._limit_s)

    def tools(self) -> dict[str, str]:
        """torch and onnxscript."""
        return {name: found for name in ("torch", "onnxscript", "onnx") if (found := version_of(name))}


@dataclass(frozen=True, slots=True)
class _Ties:
    """Dimensions that follow from a symbol of the program: `factor * symbol + offset`.

    Attributes:
        derived: Symbol of the program, factor, offset and smallest value of the symbol, by the dimension's name.
        named: Names of the dimensions that are a symbol themselves, by symbol.
    """

    derived: Mapping[str, tuple[str, int, int, int]]
    named: Mapping[str, str]

    def apply(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes, with every derived one made to fit its symbol's; the first stands for a symbol without a name."""
        values = {symbol: sizes[name] for symbol, name in self.named.items() if name in sizes}
        found = dict(sizes)
        for name, (symbol, factor, offset, low) in self.derived.items():
            value = values.setdefault(symbol, max(low, (sizes[name] - offset) // factor))
            found[name] = factor * value + offset
        return found

    def renamed(self, names: Mapping[str, str]) -> _Ties:
        """With other names of dimensions."""
        return _Ties(
            {names.get(n, n): tie for n, tie in self.derived.items()},
            {symbol: names.get(n, n) for symbol, n in self.named.items()},
        )


def _linear(expression: Any) -> tuple[str, int, int] | None:
    """Symbol, factor and offset of `factor * symbol + offset`; None for anything else."""
    symbols = list(expression.free_symbols)
    if len(symbols) != 1:
        return None
    zero, one, two = (int(expression.subs(symbols[0], n)) for n in (0, 1, 2))
    linear = two - one == one - zero and one != zero
    return (str(symbols[0]), one - zero, zero) if linear else None


def _ties(program: Any, symbols: Mapping[str, tuple[Any, str]]) -> _Ties:
    derived: dict[str, tuple[str, int, int, int]] = {}
    named: dict[str, str] = {}
    lows = {str(s): 1 if r.lower <= 2 else int(r.lower) for s, r in program.range_constraints.items()}
    for expression, name in symbols.values():
        if expression.is_symbol:
            named[str(expression)] = name
        elif (found := _linear(expression)) is not None:
            derived[name] = (*found, lows.get(found[0], 1))
    return _Ties(derived, named)


def _load(path: Path) -> Any:
    torch = require("torch", extra="torch")
    if not path.is_file():
        raise SourceError(f"{path} does not exist", expected="a file written by torch.export.save")
    if not zipfile.is_zipfile(path):
        raise SourceError(
            f"{path} is not a .pt2 archive, or is cut off", expected="a file written by torch.export.save"
        )
    _refuse_pickles(torch, path)
    try:
        return torch.export.load(str(path))
    except Exception as exc:
        raise SourceError(
            f"torch cannot load {path} ({first_line(exc)})",
            expected=f"a file written by torch.export.save of torch {torch.__version__} or older",
            hint="save it again with this version",
        ) from exc


def _refuse_pickles(torch: Any, path: Path) -> None:
    """Refuse what torch.export.load would unpickle without a guard.

    It takes a full unpickler, which runs whatever code the file holds, for example inputs that are no plain
    tensors, for payloads that the archive marks as pickled, and for custom objects. Plain programs have none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            suspect = "two members of one name" if len(set(names)) < len(names) else ""
            for name in names:
                suspect = suspect or _pickled(torch, name, archive)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as exc:
        raise SourceError(
            f"{path} is damaged ({first_line(exc)})", hint="save it again with torch.export.save"
        ) from exc
    if suspect:
        raise SourceError(
            f"{path} holds {suspect}, and loading it could run code",
            expected="a program of plain tensors",
            hint="export file.py:factory instead",
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


class _Runner:
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


def _inputs(
    program: Any, options: ExportOptions
) -> tuple[tuple[TensorSpec, ...], dict[str, tuple[int, int]], tuple[str | tuple[Any], ...], _Ties]:
    """Input specs with readable symbols, the sizes that the program allows, all slots (see `_Runner`), and ties."""
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
    renamed, bounds, names = _renamed(specs, limits, options)
    return renamed, bounds, tuple(slots), _ties(program, symbols).renamed(names)


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


def _renamed(
    specs: list[TensorSpec], limits: dict[str, tuple[int, int]], options: ExportOptions
) -> tuple[tuple[TensorSpec, ...], dict[str, tuple[int, int]], dict[str, str]]:
    if "batch" in options.dynamic and not any(s.shape and isinstance(s.shape[0], str) for s in specs):
        raise ExportError("--dynamic 'batch' asks for a dimension that is fixed in the .pt2 file", hint=_AGAIN)
    renames: dict[str, str] = {}
    for text in options.dynamic:
        if text in ("batch", "none"):
            continue
        name, _, rest = text.rpartition(":")
        shape = next((s.shape or () for s in specs if s.name == name), ())
        for part in rest.split(","):
            axis, _, symbol = part.strip().partition("=")
            fixed = not axis.isdecimal() or int(axis) >= len(shape) or isinstance(shape[int(axis)], int)
            if fixed or not symbol.isidentifier():
                raise ExportError(
                    f"--dynamic {text!r} asks for a dimension that is fixed in the .pt2 file", hint=_AGAIN
                )
            renames[str(shape[int(axis)])] = symbol
    if "none" in options.dynamic and any(s.symbols for s in specs):
        raise ExportError(
            "--dynamic none cannot be applied to a .pt2 file with dynamic dimensions", hint="leave it out"
        )
    return (
        tuple(
            TensorSpec(s.name, s.dtype, tuple(renames.get(d, d) if isinstance(d, str) else d for d in s.shape or ()))
            for s in specs
        ),
        {renames.get(k, k): v for k, v in limits.items()},
        renames,
    )
