"""PyTorch modules: flat named inputs and outputs around any forward, and two ways to ONNX."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import Dataset, ValueRange, user_frame
from deploykit.errors import DeploykitError, ExportError, SourceError, TimeLimitError, first_line
from deploykit.exporters import torch_onnx
from deploykit.exporters.base import DEFAULT_OPSET, Case, ExportOptions, Source, Way
from deploykit.exporters.binding import Call
from deploykit.exporters.boundaries import Boundaries
from deploykit.exporters.bounded import run_bounded
from deploykit.exporters.capture import ModuleTensors
from deploykit.exporters.modules import computes_in_half, count_modules, has_fast_path, prepare, recurrent_layers
from deploykit.exporters.observing import export_feeds, observed_range, rank_notes, widen
from deploykit.exporters.reasons import torch_reason
from deploykit.exporters.shapes import (
    asks_for_dynamic,
    cases_from_data,
    example_sizes,
    make_cases,
    observed_outputs,
    plan_inputs,
    vary,
)
from deploykit.exporters.steadiness import copy_of, minds_earlier_calls, same
from deploykit.extras import version_of
from deploykit.specs import Array, Feeds, Signature, TensorSpec

__all__ = ["Call", "TorchSource", "export_feeds", "observed_range"]

# CPU seconds that a way may take while another one is left: most exports take less than half of it.
_LIMIT_S = 40.0
_LIMIT_PER_MODULE_S = 0.2
_PATIENCE = 5


@dataclass(frozen=True, slots=True)
class _Given:
    """What a source was made from, beside its module; see `TorchSource`."""

    examples: dict[str, Array]
    options: ExportOptions
    specs: tuple[TensorSpec, ...] | None
    draw: Callable[[dict[str, int]], dict[str, Array]] | None
    ranges: dict[str, ValueRange]
    limits: Mapping[str, tuple[int, int]] | None
    check: Sequence[dict[str, int]] | None
    data: str
    notes: tuple[str, ...]


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
        self.call = call
        self._given = _Given(
            examples, options, None if specs is None else tuple(specs), draw, dict(ranges or {}), limits, check,
            options.data or data, tuple(notes),
        )  # fmt: skip
        self._begin(module)

    @property
    def scripted(self) -> bool:
        """Whether it is TorchScript."""
        return self._scripted

    def renewed(self, module: Any = None) -> TorchSource:
        """This source with other weights: run anew for its reference outputs.

        Args:
            module: Another module that takes the same inputs; None for the same one, which was changed in place.

        Raises:
            SourceError: It does not run on the example inputs.
        """
        other = copy.copy(self)
        other._begin(self.module if module is None else module)
        return other

    def observe(self) -> None:
        """Run the same module anew for its reference outputs, because its weights or its structure were changed.

        Raises:
            SourceError: It does not run, or gives other outputs when it runs again.
            ExportError: It runs at one shape only, where others were asked for.
        """
        self._begin(self.module)

    @property
    def examples(self) -> dict[str, Array]:
        """The example inputs by name, in order."""
        return dict(self._examples)

    def _begin(self, module: Any) -> None:
        """Run a module on the examples, and at other sizes."""
        given, options, label = self._given, self._given.options, self.label
        examples, call = given.examples, self.call
        ready = prepare(module, label)
        self.module = ready.module
        self.precision = ready.precision
        found = [*given.notes, *ready.notes]
        if call.fixed:
            found.append(f"held fixed in the graph: {', '.join(call.fixed)}")
        self._widened = ready.widened
        if ready.widened:
            examples = {n: widen(a) for n, a in examples.items()}
        self._module = torch_onnx.flatten_module(ready.module, call)
        self._wide: Any = None
        self._examples = examples
        self._options = options
        self._draw = given.draw
        self._said: dict[Way, tuple[str, ...]] = {}
        self._scripted = torch_onnx.is_scripted(ready.module)
        self._recurrent = () if self._scripted else tuple(recurrent_layers(ready.module))
        self._size = count_modules(ready.module)
        if self._scripted and options.way == "torch.export":
            raise ExportError(f"{label} is TorchScript, which torch.export cannot read", hint="leave --exporter out")
        observed = {n: r for n, a in examples.items() if (r := observed_range(a)) is not None}
        self.ranges = observed | given.ranges
        specs, limits = given.specs, given.limits
        dynamic = plan_inputs(examples, options) if specs is None else specs
        if specs is None and not options.dynamic and not options.inputs and not any(s.symbols for s in dynamic):
            found.append(
                "the first axes of the inputs differ, so all shapes are fixed; --dynamic INPUT:AXIS=NAME,… names some"
            )
        self.data = given.data
        self._state: dict[str, Any] = {}
        found += self._run_example()
        if self.precision is not None and self._wide is None:
            self.precision = self.precision if computes_in_half(lambda: self._reference(examples)) else None
        if options.data:
            cases = cases_from_data(dynamic, Dataset.open(options.data), self._reference)
        else:
            dynamic, cases, refused = self._observe(dynamic, limits, given.check)
            found += refused
        self.cases = tuple(cases)
        self.signature = Signature(dynamic, observed_outputs(cases))
        self._boundaries = Boundaries(dynamic, examples, self._reference, given.draw, limits)
        found += rank_notes(cases)
        if self._recurrent and options.way == "auto":
            found.append(
                f"TorchScript goes first, because it keeps a recurrent layer as one operator: {self._recurrent[0]}"
                + (f" and {len(self._recurrent) - 1} more" if len(self._recurrent) > 1 else "")
            )
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

    def _run_example(self) -> list[str]:
        """Run the example twice, with other inputs in between, so that a state which decides about outputs shows.

        Raises:
            SourceError: It does not run, or the second time with other outputs.
        """
        before = torch_onnx.copy_buffers(self._module)
        notes = []
        untouched, others, between = copy_of(self._module), {}, {}
        try:
            with torch_onnx.watch_autocast() as seen:
                outputs = self._reference(self._examples)
            if seen and torch_onnx.runs_without_autocast(self._module, self._examples):
                outputs = self._reference(self._examples)
                notes.append(
                    "autocast in forward is switched off, for CPU runtimes do not compute in bfloat16; the model is "
                    "exported in float32"
                )
            with contextlib.suppress(Exception):
                rng = np.random.default_rng(2)
                others = {n: vary(a, a.shape, rng) for n, a in self._examples.items()}
                between = self._reference(others)
            again = self._reference(self._examples)
        except DeploykitError:
            raise
        except Exception as exc:
            self._explain(exc)
            shapes = ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in self._examples.items())
            raise SourceError(
                f"{self.label} does not accept its example inputs {shapes} ({first_line(exc)}{user_frame(exc)})",
                expected="a module that runs on the example inputs",
                hint="mend the example inputs, or --input",
            ) from exc
        if not outputs:
            raise SourceError(f"{self.label} returns no tensors", expected="at least one tensor as output")
        unsteady = [name for name, array in outputs.items() if not same(array, again.get(name))]
        unsteady += [name for name in again if name not in outputs]
        if unsteady:
            raise SourceError(
                f"{self.label} gives another {unsteady[0]!r} when it runs again on the same inputs",
                expected="outputs that depend on nothing but the inputs",
                hint="take random numbers and state out of forward: make the state an input and an output",
            )
        if has_fast_path(self._module):
            notes += self._compare_fast_path(outputs)
        if self._module.left_out:
            notes.append(f"outputs that are no tensors are left out: {', '.join(self._module.left_out)}")
        written = torch_onnx.changed_buffers(self._module, before)
        if written:
            self._state = before
            self._check_state(written, outputs)
            notes.append(
                f"forward writes to {', '.join(written[:3])}, on which no output depends; the graph does not keep it"
            )
        stale = minds_earlier_calls(self._module, untouched, others, between)
        if stale:
            raise SourceError(
                f"{self.label} gives another {stale!r} when it ran on other inputs before: it keeps something of them",
                expected="outputs that depend on nothing but the inputs",
                hint="compute it in __init__, or make it an input and an output of forward",
            )
        return notes

    def _check_state(self, written: Sequence[str], outputs: Mapping[str, Array]) -> None:
        """Refuse a module whose outputs follow from a buffer that an earlier call wrote.

        Raises:
            SourceError: With other values in the buffer, the example gives other outputs.
        """
        torch_onnx.restore_buffers(self._module, self._state, change=written)
        try:
            others = torch_onnx.run_module(self._module, self._examples)
        except Exception:  # noqa: BLE001 - it minds the values, whatever it says about them
            others = {}
        self._restore()
        if any(not same(array, others.get(name)) for name, array in outputs.items()):
            raise SourceError(
                f"{self.label} keeps a state in {written[0]!r}: forward writes to it, and the next call reads it",
                expected="outputs that depend on nothing but the inputs",
                hint="make the state an input and an output of forward",
            )

    def _compare_fast_path(self, outputs: Mapping[str, Array]) -> list[str]:
        """Whether torch's fused kernels for transformers, which stay off here, give other numbers."""
        try:
            fast = torch_onnx.run_module(self._module, self._examples, fast_path=True)
        except RuntimeError:
            return []
        if all(same(array, fast.get(name)) for name, array in outputs.items()):
            return []
        return [
            "compared without torch's fast path for nn.TransformerEncoder, which writes zeros at padded positions, or "
            "cuts them off; the graph does not"
        ]

    def _explain(self, exc: Exception) -> None:
        """Raise an error that says more than torch's.

        Raises:
            SourceError: The reason is known.
        """
        missing = re.search(r"'_OpNamespace' '(\w+)' object has no attribute '(\w+)'", str(exc))
        if missing:
            raise SourceError(
                f"{self.label} uses the operator {missing[1]}::{missing[2]}, which is not there",
                hint=f"install {missing[1]}, and import it in the factory's file",
            ) from exc
        if self._widened and "BFloat16" in str(exc):
            raise SourceError(
                f"{self.label} casts to bfloat16 in forward{user_frame(exc)}, and CPU runtimes do not compute in that",
                expected="a module that also runs in float32",
                hint="take the casts out, or use the dtype of the weights: x.to(self.weight.dtype)",
            ) from exc

    def _restore(self) -> None:
        """The buffers as they were, where forward writes to them."""
        if self._state:
            torch_onnx.restore_buffers(self._module, self._state)

    def _reference(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs of the module; of its float32 twin where torch's CPU kernels lack float16."""
        self._restore()
        if self._wide is None:
            try:
                return torch_onnx.run_module(self._module, feeds)
            except RuntimeError as exc:
                if self.precision != "float16" or "not implemented for 'Half'" not in str(exc):
                    raise
            self._wide = copy.deepcopy(self._module).float()
        wide = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in feeds.items()}
        outputs = torch_onnx.run_module(self._wide, wide)
        return {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in outputs.items()}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the module; inputs may come in any order."""
        return self._reference({s.name: feeds[s.name] for s in self.signature.inputs})

    def tensors(self, feeds: Feeds) -> ModuleTensors:
        """The result of every operator."""
        return ModuleTensors(self._module, {s.name: feeds[s.name] for s in self.signature.inputs})

    @property
    def ways(self) -> tuple[Way, ...]:
        """torch.export first, or TorchScript for recurrent layers; fixed shapes only where nobody asked for others."""
        has_dynamic = bool(self.signature.symbols)
        names: tuple[str, ...] = (self._options.way,)
        if self._scripted:
            names = ("torchscript",)
        elif self._options.way == "auto":
            names = ("torchscript", "torch.export") if self._recurrent else ("torch.export", "torchscript")
        patient = len(names) == 1 or self._options.timeout_s is not None
        ways = [Way(name, has_dynamic, patient=patient) for name in names]
        if has_dynamic and not asks_for_dynamic(self._options):
            ways += [Way(name, False, patient=patient) for name in names]
        return tuple(ways)

    def notes_on(self, way: Way) -> tuple[str, ...]:
        """What the tracer left out, and sizes that were not tried."""
        return (*self._said.get(way, ()), *(self._boundaries.notes if way.dynamic else ()))

    def _limit_s(self, way: Way) -> float:
        if self._options.timeout_s is not None:
            return self._options.timeout_s
        return (_LIMIT_S + _LIMIT_PER_MODULE_S * self._size) * (_PATIENCE if way.patient else 1)

    def cases_for(self, way: Way) -> tuple[Case, ...]:
        """For fixed shapes: three sets of values at the example's shape."""
        if way.dynamic or not self.signature.symbols:
            return (*self.cases, *self._boundaries.cases)
        if self._fixed_cases is None:
            specs = self.signature.inputs
            draw = self._fixed_draw(specs)
            self._fixed_cases = tuple(make_cases(self._fixed(specs), self._examples, self._reference, draw=draw)[0])
        return self._fixed_cases

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Export, then put names and shapes in order."""
        self._restore()
        written = self._translate(self._module, way, target, opset)
        self._said[way] = written.notes
        if way.dynamic and self.signature.symbols:
            self._boundaries.learn(written.edges, self.cases)

    def draft(self, module: Any, way: Way, target: Path) -> None:
        """Write another module with the same inputs and outputs as ONNX, such as this one with fewer channels.

        For what is timed on the way to a result: nobody compares it.

        Raises:
            ExportError: This way does not lead there.
        """
        flat = torch_onnx.flatten_module(module, self.call)
        torch_onnx.run_module(flat, self._examples)  # the names of its outputs are known after the first run
        self._translate(flat, way, target, self._options.opset)

    def program(self) -> Any:
        """The module as a program of `torch.export`: tensors by position, in the order of the inputs.

        Returns:
            A `torch.export.ExportedProgram`; it gives a tuple of the outputs' tensors.

        Raises:
            ExportError: torch.export cannot read the module.
        """
        feeds = export_feeds(self.signature.inputs, self._examples)
        try:
            return torch_onnx.export_program(self._module, feeds, self.signature.inputs)
        except Exception as exc:
            raise ExportError(torch_reason(exc, [s.name for s in self.signature.inputs])) from exc

    def _translate(self, module: Any, way: Way, target: Path, opset: int | None) -> torch_onnx.Written:
        inputs = self.signature.inputs if way.dynamic else self._fixed(self.signature.inputs)
        job = torch_onnx.Job(
            module=module,
            feeds=export_feeds(inputs, self._examples) if way.dynamic else self._examples,
            signature=Signature(inputs, observed_outputs(self.cases_for(way))),
            opset=opset or DEFAULT_OPSET,
        )
        torch_onnx.preload(way.name)
        limit = self._limit_s(way)
        try:
            return run_bounded(lambda: torch_onnx.write(job, way.name, target), limit)
        except TimeLimitError as exc:
            raise TimeLimitError(exc.what, hint=f"give it more: --timeout {10 * limit:g}") from exc

    def tools(self) -> dict[str, str]:
        """torch, onnxscript, and transformers where it built the module."""
        names = ["torch", "onnxscript", "onnx", *(["transformers"] if self.kind == "huggingface" else [])]
        return {name: found for name in names if (found := version_of(name))}
