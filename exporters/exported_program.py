"""`.pt2`: programs that `torch.export.save` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.data import Dataset, generate
from deploykit.errors import ExportError, SourceError, first_line
from deploykit.exporters import torch_onnx
from deploykit.exporters.base import DEFAULT_OPSET, ExportOptions, Source, Way
from deploykit.exporters.bounded import run_bounded
from deploykit.exporters.capture import ModuleTensors
from deploykit.exporters.pytorch import observed_range
from deploykit.exporters.shapes import cases_from_data, make_cases, observed_outputs
from deploykit.extras import require, version_of
from deploykit.programs import ProgramModule, load_program, read_inputs
from deploykit.specs import Array, Feeds, Signature, TensorSpec

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
        self._program = load_program(path, SourceError, "export file.py:factory instead")
        if options.way == "torchscript":
            raise ExportError(f"{path} cannot go through TorchScript", hint="leave --exporter out")
        if options.inputs:
            raise ExportError(f"the inputs of {path} are fixed in the file", hint="leave --input out")
        specs, limits, slots, ties = _inputs(self._program, options)
        self._module = ProgramModule(self._program, slots)
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


def _inputs(
    program: Any, options: ExportOptions
) -> tuple[tuple[TensorSpec, ...], dict[str, tuple[int, int]], tuple[str | tuple[Any], ...], _Ties]:
    """Input specs as `--dynamic` names them, the sizes that the program allows, all slots, and ties."""
    found = read_inputs(program)
    renamed, bounds, names = _renamed(list(found.specs), dict(found.limits), options)
    return renamed, bounds, found.slots, _ties(program, found.symbols).renamed(names)


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
