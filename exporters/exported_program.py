"""`.pt2`: programs that `torch.export.save` wrote."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.data import Dataset, ValueRange, generate
from deploykit.errors import ExportError, SourceError, first_line
from deploykit.exporters import torch_onnx
from deploykit.exporters.base import DEFAULT_OPSET, ExportOptions, Source, Way
from deploykit.exporters.pytorch import observed_range
from deploykit.exporters.shapes import cases_from_data, make_cases, observed_outputs
from deploykit.extras import require, version_of
from deploykit.specs import Array, Dim, Feeds, Signature, TensorSpec


class ExportedProgramSource(Source):
    """A saved `torch.export.ExportedProgram`; its dynamic dimensions were decided when it was made.

    Args:
        path: The `.pt2` file.
        options: `--dynamic` may rename dimensions, not add them.
    """

    kind = "pt2"

    def __init__(self, path: Path, options: ExportOptions) -> None:
        self.label = str(path)
        self._program = _load(path)
        if options.way == "torchscript":
            raise ExportError(f"{path} cannot go through TorchScript", hint="leave --exporter out")
        if options.inputs:
            raise ExportError(f"the inputs of {path} are fixed in the file", hint="leave --input out")
        specs, limits = _inputs(self._program, options)
        self._module = _Runner(self._program, tuple(s.name for s in specs))
        examples, self.data = self._examples(specs, limits)
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
            cases, notes = make_cases(specs, examples, self._reference, limits=limits)
            self.notes = tuple(notes)
        self.cases = tuple(cases)
        self.signature = Signature(specs, observed_outputs(cases))

    def _reference(self, feeds: Feeds) -> dict[str, Array]:
        return torch_onnx.run_module(self._module, feeds)

    def _examples(
        self, specs: tuple[TensorSpec, ...], limits: Mapping[str, tuple[int, int]]
    ) -> tuple[dict[str, Array], str]:
        torch = require("torch", extra="torch")
        given = self._program.example_inputs
        if given:
            from torch.utils import _pytree

            tensors = [t for t in _pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]
            if len(tensors) == len(specs):
                return {s.name: torch_onnx.to_numpy(t) for s, t in zip(specs, tensors, strict=True)}, "example"
        sizes = {s: max(limits.get(s, (2, 0))[0], 2) for spec in specs for s in spec.symbols}
        return generate(specs, sizes), "generated"

    @property
    def ways(self) -> tuple[Way, ...]:
        """There is one."""
        return (Way("torch.export", True),)

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Translate the program as it is."""
        torch_onnx.write(torch_onnx.Job(self._program, {}, self.signature, opset or DEFAULT_OPSET), way.name, target)

    def tools(self) -> dict[str, str]:
        """torch and onnxscript."""
        return {name: found for name in ("torch", "onnxscript", "onnx") if (found := version_of(name))}


def _load(path: Path) -> Any:
    torch = require("torch", extra="torch")
    if not path.is_file():
        raise SourceError(f"{path} does not exist", expected="a file written by torch.export.save")
    if not zipfile.is_zipfile(path):
        raise SourceError(f"{path} is not a .pt2 archive, or is cut off", expected="a file written by torch.export.save")
    try:
        return torch.export.load(str(path))
    except Exception as exc:
        raise SourceError(
            f"torch cannot load {path} ({first_line(exc)})",
            expected=f"a file written by torch.export.save of torch {torch.__version__} or older",
            hint="save it again with this version",
        ) from exc


class _Runner:
    """The program's module with inputs by position and outputs by name."""

    def __init__(self, program: Any, names: tuple[str, ...]) -> None:
        self._module = program.module()
        spec = program.call_spec.in_spec
        self._spec = spec
        self.input_names = names
        self.output_names: tuple[str, ...] = ()

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        from torch.utils import _pytree

        args, kwargs = _pytree.tree_unflatten(list(tensors), self._spec)
        outputs = torch_onnx.flatten_outputs(self._module(*args, **kwargs))
        self.output_names = tuple(f"{n}_out" if n in self.input_names else n for n in outputs)
        return tuple(outputs.values())


def _inputs(program: Any, options: ExportOptions) -> tuple[tuple[TensorSpec, ...], dict[str, tuple[int, int]]]:
    """Input specs with readable symbols, and the sizes that the program allows."""
    placeholders = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    names: dict[str, str] = {}
    specs: list[TensorSpec] = []
    limits: dict[str, tuple[int, int]] = {}
    for name in program.graph_signature.user_inputs:
        value = placeholders.get(name)
        if not hasattr(value, "shape"):
            raise SourceError(f"input {name!r} is a {type(value).__name__}", expected="tensors as inputs")
        dims: list[Dim] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                dims.append(size)
                continue
            symbol = names.setdefault(str(size), _readable(name, axis, value, set(names.values())))
            bounds = program.range_constraints.get(size.node.expr)
            if bounds is not None:
                limits[symbol] = (int(max(bounds.lower, 1)), int(min(bounds.upper, 1 << 30)))
            dims.append(symbol)
        specs.append(TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(dims)))
    return _renamed(specs, limits, options)


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
) -> tuple[tuple[TensorSpec, ...], dict[str, tuple[int, int]]]:
    wishes = [text for text in options.dynamic if text not in ("batch", "none")]
    renames: dict[str, str] = {}
    for text in wishes:
        name, _, rest = text.rpartition(":")
        spec = next((s for s in specs if s.name == name), None)
        for part in rest.split(","):
            axis, _, symbol = part.strip().partition("=")
            shape = (spec.shape or ()) if spec else ()
            if not axis.isdigit() or int(axis) >= len(shape) or not isinstance(shape[int(axis)], str) or not symbol:
                raise ExportError(
                    f"--dynamic {text!r} asks for a dimension that is fixed in the .pt2 file",
                    hint="export it again with torch.export(..., dynamic_shapes=...)",
                )
            renames[str(shape[int(axis)])] = symbol
    if "none" in options.dynamic and any(s.symbols for s in specs):
        raise ExportError("--dynamic none cannot be applied to a .pt2 file with dynamic dimensions", hint="leave it out")
    return (
        tuple(
            TensorSpec(s.name, s.dtype, tuple(renames.get(d, d) if isinstance(d, str) else d for d in s.shape or ()))
            for s in specs
        ),
        {renames.get(k, k): v for k, v in limits.items()},
    )
