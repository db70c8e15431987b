"""PyTorch modules: flat named inputs and outputs around any forward, and two ways to ONNX."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import Dataset, ValueRange, generate, user_frame
from deploykit.errors import DeploykitError, ExportError, SourceError, first_line
from deploykit.exporters import torch_onnx
from deploykit.exporters.base import DEFAULT_OPSET, Case, ExportOptions, Source, Way
from deploykit.exporters.shapes import (
    asks_for_dynamic,
    cases_from_data,
    example_sizes,
    make_cases,
    observed_outputs,
    parse_input,
    plan_inputs,
    vary,
)
from deploykit.extras import require, version_of
from deploykit.specs import Array, Feeds, Signature, TensorSpec

_SIZE_GUESS = {"batch": 2, "sequence": 16, "height": 64, "width": 64}


@dataclass(frozen=True, slots=True)
class Call:
    """How a flat list of named tensors becomes a call of the module.

    Attributes:
        names: Input names, in order.
        positional: How many of them are passed by position; the others by keyword.
        constants: Keyword arguments that are no tensors, held fixed.
    """

    names: tuple[str, ...]
    positional: int
    constants: Mapping[str, Any]


class TorchSource(Source):
    """A module with example inputs.

    Args:
        module: In any mode; exported in evaluation mode.
        examples: Example inputs by name, as numpy arrays.
        call: How they are passed.
        options: What the user asked for.
        label: What the user called the source.
        draw: Makes inputs for given sizes; by default variations of the example.
        ranges: Values that made-up inputs may take; by default what the examples show.
        limits: Sizes that the module allows, by symbol.
        check: Sizes to compare at, beside the example's.
    """

    kind = "pytorch"

    def __init__(
        self,
        module: Any,
        examples: dict[str, Array],
        call: Call,
        options: ExportOptions,
        label: str,
        *,
        specs: Sequence[TensorSpec] | None = None,
        draw: Callable[[dict[str, int]], dict[str, Array]] | None = None,
        ranges: dict[str, ValueRange] | None = None,
        limits: Mapping[str, tuple[int, int]] | None = None,
        check: Sequence[dict[str, int]] | None = None,
        data: str = "example",
        kind: str = "pytorch",
        notes: Sequence[str] = (),
        assets: tuple[Path, ...] = (),
    ) -> None:
        self.kind = kind
        self.label = label
        self.assets = assets
        found = list(notes)
        if any(part.training for part in module.modules()):
            found.append("the module was in training mode; it is exported in evaluation mode")
        self._module = torch_onnx.flatten_module(_on_cpu(module, label), call)
        self._examples = examples
        self._options = options
        self._draw = draw
        observed = {n: r for n, a in examples.items() if (r := observed_range(a)) is not None}
        self.ranges = observed | (ranges or {})
        dynamic = plan_inputs(examples, options) if specs is None else tuple(specs)
        self.data = options.data or data
        self._run_example()
        if options.data:
            cases = cases_from_data(dynamic, Dataset.open(options.data), self._reference)
        else:
            dynamic, cases, refused = self._observe(dynamic, limits, check)
            found += refused
        self.cases = tuple(cases)
        self.signature = Signature(dynamic, observed_outputs(cases))
        self.notes = tuple(found)
        self._fixed_cases: tuple[Case, ...] | None = None

    def _observe(
        self,
        specs: tuple[TensorSpec, ...],
        limits: Mapping[str, tuple[int, int]] | None,
        check: Sequence[dict[str, int]] | None,
    ) -> tuple[tuple[TensorSpec, ...], list[Case], list[str]]:
        """Run the module at several shapes; fall back to the example's where nobody asked for dynamic ones."""
        try:
            found = make_cases(specs, self._examples, self._reference, draw=self._draw, limits=limits, check=check)
            return specs, *found
        except ExportError as exc:
            if asks_for_dynamic(self._options):
                raise
            fixed = self._fixed(specs)
            cases, notes = make_cases(fixed, self._examples, self._reference, draw=self._fixed_draw(specs))
            return fixed, cases, [f"the shapes are fixed, because {exc.what}", *notes]

    def _fixed(self, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s.name, s.dtype, self._examples[s.name].shape) for s in specs)

    def _fixed_draw(self, specs: Sequence[TensorSpec]) -> Callable[[dict[str, int]], dict[str, Array]] | None:
        draw, sizes = self._draw, example_sizes(specs, self._examples)
        return None if draw is None else lambda _: draw(sizes)

    def _run_example(self) -> None:
        try:
            outputs = self._reference(self._examples)
            again = self._reference(self._examples)
        except DeploykitError:
            raise
        except Exception as exc:
            shapes = ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in self._examples.items())
            raise SourceError(
                f"{self.label} does not accept its example inputs {shapes} ({first_line(exc)}{user_frame(exc)})",
                expected="a module that runs on the example inputs",
                hint="mend the example that the factory returns, or --input",
            ) from exc
        if not outputs:
            raise SourceError(f"{self.label} returns no tensors", expected="at least one tensor as output")
        unsteady = [name for name, array in outputs.items() if not _same(array, again.get(name))]
        if unsteady:
            raise SourceError(
                f"{self.label} gives another {unsteady[0]!r} when it runs again on the same inputs",
                expected="outputs that depend on nothing but the inputs",
                hint="take random numbers and state out of forward",
            )

    def _reference(self, feeds: Feeds) -> dict[str, Array]:
        return torch_onnx.run_module(self._module, feeds)

    @property
    def ways(self) -> tuple[Way, ...]:
        """torch.export first; fixed shapes only where nobody asked for dynamic ones."""
        has_dynamic = bool(self.signature.symbols)
        names = ("torch.export", "torchscript") if self._options.way == "auto" else (self._options.way,)
        ways = [Way(name, has_dynamic) for name in names]
        if has_dynamic and not asks_for_dynamic(self._options):
            ways += [Way(name, False) for name in names]
        return tuple(ways)

    def cases_for(self, way: Way) -> tuple[Case, ...]:
        """For fixed shapes: three sets of values at the example's shape."""
        if way.dynamic or not self.signature.symbols:
            return self.cases
        if self._fixed_cases is None:
            specs = self.signature.inputs
            draw = self._fixed_draw(specs)
            self._fixed_cases = tuple(make_cases(self._fixed(specs), self._examples, self._reference, draw=draw)[0])
        return self._fixed_cases

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Export, then put names and shapes in order."""
        cases = self.cases_for(way)
        inputs = self.signature.inputs if way.dynamic else self._fixed(self.signature.inputs)
        job = torch_onnx.Job(
            module=self._module,
            feeds=export_feeds(inputs, self._examples) if way.dynamic else self._examples,
            signature=Signature(inputs, observed_outputs(cases)),
            opset=opset or DEFAULT_OPSET,
        )
        torch_onnx.write(job, way.name, target)

    def tools(self) -> dict[str, str]:
        """torch, onnxscript, and transformers where it built the module."""
        names = ["torch", "onnxscript", "onnx", *(["transformers"] if self.kind == "huggingface" else [])]
        return {name: found for name in names if (found := version_of(name))}


def _on_cpu(module: Any, label: str) -> Any:
    """The module on the CPU, in evaluation mode.

    Raises:
        SourceError: It has no values yet (a module on the meta device), or cannot be moved.
    """
    try:
        return module.eval().cpu()
    except Exception as exc:
        raise SourceError(
            f"{label} cannot be moved to the CPU ({first_line(exc)})",
            expected="a module whose weights are loaded",
            hint="mend the factory",
        ) from exc


def _same(first: Array, second: Array | None) -> bool:
    """Equal, but for sums in another order."""
    if second is None or first.shape != second.shape:
        return False
    if first.dtype.kind not in "fc":
        return bool(np.array_equal(first, second))
    scale = float(np.nanmax(np.abs(first), initial=0.0)) or 1.0
    return bool(np.allclose(first / scale, second / scale, rtol=1e-3, atol=1e-3, equal_nan=True))


def export_feeds(specs: Sequence[TensorSpec], examples: Feeds) -> dict[str, Array]:
    """The example with every dynamic dimension at least 2: torch.export takes 0 and 1 for constants."""
    rng = np.random.default_rng(1)
    sizes = {k: max(2, v) for k, v in example_sizes(specs, examples).items()}
    made = {}
    for spec in specs:
        shape = spec.concrete(sizes)
        example = examples[spec.name]
        if shape == example.shape:
            made[spec.name] = example
        else:
            made[spec.name] = vary(example, shape, rng)
    return made


def observed_range(example: Array) -> ValueRange | None:
    """What an example tells about legal values: the extremes of integers, mean and spread of reals."""
    if example.size == 0 or example.dtype.kind not in "iuf":
        return None
    if example.dtype.kind in "iu":
        return ValueRange(float(example.min()), float(example.max()))
    mean, spread = float(np.mean(example, dtype=np.float64)), float(np.std(example, dtype=np.float64)) or 1.0
    return ValueRange(mean - spread, mean + spread)


def bind_examples(module: Any, given: Any, label: str) -> tuple[dict[str, Array], Call]:
    """Name the example inputs after the parameters of `forward`.

    Args:
        module: The module.
        given: A tensor, a tuple of tensors, or a dictionary of keyword arguments.
        label: For messages.

    Raises:
        SourceError: They cannot be bound to `forward`, or hold something else than tensors and constants.
    """
    torch = require("torch", extra="torch")
    args = () if isinstance(given, Mapping) else tuple(given) if isinstance(given, list | tuple) else (given,)
    kwargs = dict(given) if isinstance(given, Mapping) else {}
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as exc:
        raise SourceError(
            f"the example inputs of {label} do not fit forward{signature} ({first_line(exc)})",
            hint="mend the example that the factory returns, or --input",
        ) from exc
    named: dict[str, Any] = {}
    positional = 0
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": v for i, v in enumerate(value)}
            positional += len(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
            positional += kind is not inspect.Parameter.KEYWORD_ONLY and not kwargs
    tensors = {n: v for n, v in named.items() if isinstance(v, torch.Tensor)}
    constants = {n: v for n, v in named.items() if not isinstance(v, torch.Tensor)}
    for name, value in constants.items():
        if value is not None and not isinstance(value, bool | int | float | str):
            raise SourceError(
                f"example input {name!r} of {label} is a {type(value).__name__}",
                expected="tensors, or constants (None, bool, int, float, str)",
                hint="wrap the module in one whose forward takes tensors",
            )
    if not tensors:
        raise SourceError(
            f"the example inputs of {label} hold no tensor",
            expected="a tensor, a tuple or a dictionary of them",
        )
    if constants and positional:
        # Constants between positional tensors: pass everything by keyword instead.
        star = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values())
        if star:
            raise SourceError(
                f"{label} mixes constants with *args", hint="wrap the module in one that takes tensors only"
            )
        positional = 0
    arrays = {n: torch_onnx.to_numpy(v) for n, v in tensors.items()}
    return arrays, Call(tuple(tensors), positional, constants)


def made_up_examples(
    module: Any, options: ExportOptions, label: str
) -> tuple[dict[str, Array], Call, dict[str, ValueRange]]:
    """Example inputs from `--input`, for a module that comes without.

    Raises:
        SourceError: There is no `--input`, or they do not fit `forward`.
    """
    if not options.inputs:
        parameters = ", ".join(n for n in inspect.signature(module.forward).parameters) or "x"
        name = parameters.split(",")[0]
        raise SourceError(
            f"{label} gives a module without example inputs (its forward takes: {parameters})",
            expected="(module, example_inputs) from the factory, or --input for every input",
            hint=f"add for example: --input '{name}=float32[batch,3,224,224]'",
        )
    parsed = [parse_input(text) for text in options.inputs]
    specs = [spec for spec, _ in parsed]
    ranges = {spec.name: limits for spec, limits in parsed if limits is not None}
    sizes = {s: options.dims.get(s, _SIZE_GUESS.get(s, 16)) for spec in specs for s in spec.symbols}
    arrays = generate(specs, sizes, ranges=ranges)
    bound, call = bind_examples(module, {n: torch_onnx.from_numpy(a) for n, a in arrays.items()}, label)
    return bound, call, ranges
