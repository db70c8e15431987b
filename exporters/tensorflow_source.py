"""Functions of TensorFlow tensors as a source: Keras models with that backend, and signatures of SavedModels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import Dataset, ValueRange, generate
from deploykit.errors import DeploykitError, ExportError, OptionError, SourceError, first_line
from deploykit.exporters.base import DEFAULT_OPSET, Case, ExportOptions, Source, Way
from deploykit.exporters.pytorch import observed_range
from deploykit.exporters.shapes import (
    asks_for_dynamic,
    cases_from_data,
    example_sizes,
    make_cases,
    observed_outputs,
    parse_input,
    plan_inputs,
)
from deploykit.exporters.tensorflow_graph import import_tensorflow, write_function
from deploykit.extras import version_of
from deploykit.specs import DTYPES, Array, Dim, Feeds, Signature, TensorSpec

_SIZE_GUESS = {"batch": 2, "sequence": 16, "height": 64, "width": 64}
_AXES = {2: ("batch", "sequence"), 3: ("batch", "sequence", "features"), 4: ("batch", "height", "width", "channels")}


@dataclass(frozen=True, slots=True)
class Callee:
    """A function of tensors.

    Attributes:
        inputs: Names, dtypes and shapes as the source declares them; free dimensions have symbols.
        outputs: Names.
        call: Takes one tensor an input, returns one an output.
        ranges: Values that inputs may take, where the source tells.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    call: Callable[..., Sequence[Any]]
    ranges: dict[str, ValueRange] = field(default_factory=dict)


def declared(name: str, dtype: str, shape: Sequence[int | None], label: str) -> TensorSpec:
    """An input as a signature declares it: None becomes `batch`, `sequence`, `height`, `width` or `dimN`.

    Raises:
        SourceError: Of a dtype that ONNX Runtime cannot feed into the rest (strings, tables).
    """
    if dtype == "string" or dtype not in DTYPES:
        raise SourceError(
            f"input {name!r} of {label} is {dtype}",
            expected="numbers: TensorFlow's text operators and tables have no ONNX form",
            hint="export the part behind the text layers, and run those beside it",
        )
    names = _AXES.get(len(shape), ())
    dims: list[Dim] = []
    for axis, size in enumerate(shape):
        symbol = names[axis] if axis < len(names) else "batch" if axis == 0 else f"dim{axis}"
        dims.append(symbol if size is None or size < 0 else int(size))
    return TensorSpec(name, dtype, tuple(dims))


class TensorFlowSource(Source):
    """A function with declared inputs.

    Args:
        callee: The function.
        options: What the user asked for.
        label: What the user called the source.
        kind: "keras" or "savedmodel".
        example: Example inputs by name; None to make some up.
    """

    def __init__(
        self, callee: Callee, options: ExportOptions, label: str, kind: str, example: Feeds | None = None
    ) -> None:
        self.kind, self.label = kind, label
        self._callee, self._options = callee, options
        refuse_torch_options(options)
        asked = {spec.name: limits for spec, limits in map(parse_input, options.inputs)}
        self.ranges = callee.ranges | {name: limits for name, limits in asked.items() if limits is not None}
        specs = callee.inputs
        if example is None:
            example = self._made_up(specs, options.dims)
            self.data = options.data or "generated"
        else:
            self.data = options.data or "example"
            self.ranges = {n: r for n, a in example.items() if (r := observed_range(a))} | self.ranges
            for spec in specs:
                _check_example(spec, example[spec.name], label)
        self._example = dict(example)
        if options.dynamic or options.inputs:
            specs = _asked(specs, plan_inputs(self._example, options))
        self._run_example()
        draw = None if self.data == "example" else self._draw(specs)
        if options.data:
            cases, notes = cases_from_data(specs, Dataset.open(options.data), self._reference), list[str]()
        else:
            cases, notes = make_cases(specs, self._example, self._reference, draw=draw)
        self.cases, self.notes = tuple(cases), tuple(notes)
        self.signature = Signature(tuple(specs), observed_outputs(cases))

    def _made_up(self, specs: Sequence[TensorSpec], dims: Mapping[str, int]) -> dict[str, Array]:
        sizes = {s: dims.get(s, _SIZE_GUESS.get(s, 8)) for spec in specs for s in spec.symbols}
        return generate(specs, sizes, ranges=self.ranges)

    def _draw(self, specs: Sequence[TensorSpec]) -> Callable[[dict[str, int]], dict[str, Array]]:
        seeds = iter(range(1, 1000))
        fixed = {s: n for s, n in example_sizes(specs, self._example).items()}
        return lambda sizes: generate(specs, fixed | sizes, ranges=self.ranges, seed=next(seeds))

    def _run_example(self) -> None:
        try:
            self._reference(self._example)
        except DeploykitError:
            raise
        except Exception as exc:
            shapes = ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in self._example.items())
            raise SourceError(
                f"{self.label} does not run on {shapes} ({first_line(exc)})",
                hint="give real inputs with --data, sizes with --dim, or values with --input",
            ) from exc

    def _reference(self, feeds: Feeds) -> dict[str, Array]:
        tf = import_tensorflow()
        found = self._callee.call(*(tf.constant(feeds[s.name]) for s in self._callee.inputs))
        return {n: np.asarray(v) for n, v in zip(self._callee.outputs, found, strict=True)}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the function."""
        return self._reference(feeds)

    @property
    def ways(self) -> tuple[Way, ...]:
        """With the free dimensions; with fixed ones only where nobody asked for free ones."""
        dynamic = bool(self.signature.symbols)
        ways = [Way("tf2onnx", dynamic)]
        if dynamic and not asks_for_dynamic(self._options):
            ways.append(Way("tf2onnx", False))
        return tuple(ways)

    def _fixed(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s.name, s.dtype, self._example[s.name].shape) for s in self.signature.inputs)

    def cases_for(self, way: Way) -> tuple[Case, ...]:
        """For fixed shapes: several sets of values at the example's shape."""
        if way.dynamic or not self.signature.symbols:
            return self.cases
        draw = None if self.data == "example" else self._draw(self._fixed())
        return tuple(make_cases(self._fixed(), self._example, self._reference, draw=draw)[0])

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Freeze, convert, and put names and shapes in order."""
        inputs = self.signature.inputs if way.dynamic else self._fixed()
        wanted = Signature(inputs, observed_outputs(self.cases_for(way)))
        write_function(self._callee.call, wanted, target, opset or DEFAULT_OPSET)

    def tools(self) -> dict[str, str]:
        """TensorFlow, Keras, tf2onnx and onnx."""
        found = {n: version_of(n) for n in ("tensorflow", "tensorflow-cpu", "keras", "tf2onnx", "onnx")}
        return {name: version for name, version in found.items() if version}


def refuse_torch_options(options: ExportOptions) -> None:
    """`--exporter` names roads of PyTorch.

    Raises:
        ExportError: It was given.
    """
    if options.way != "auto":
        raise OptionError(f"--exporter {options.way} is for PyTorch", hint="leave it out")


def _check_example(spec: TensorSpec, example: Array, label: str) -> None:
    shape = spec.shape or ()
    fits = len(shape) == example.ndim and all(
        isinstance(d, str) or d == n for d, n in zip(shape, example.shape, strict=True)
    )
    if not fits or example.dtype.name != spec.dtype:
        raise SourceError(
            f"the example of {label} is {example.dtype}{list(example.shape)} for {spec.name!r}", expected=str(spec)
        )


def _asked(given: Sequence[TensorSpec], planned: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The user's dimensions, where the source leaves them free."""
    for old, new in zip(given, planned, strict=True):
        for axis, (had, wish) in enumerate(zip(old.shape or (), new.shape or (), strict=True)):
            if isinstance(had, int) and isinstance(wish, str):
                raise ExportError(
                    f"the source fixes axis {axis} of {old.name!r} at {had}",
                    expected=f"--dynamic without {wish!r} there",
                )
    return tuple(planned)
