"""Import of an existing ONNX file, byte for byte."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.data import Dataset, ValueRange, generate
from deploykit.errors import DeploykitError, ExportError, InferenceError
from deploykit.exporters.base import Case, ExportOptions, OnnxRunner, Source, Way
from deploykit.exporters.shapes import (
    cases_from_data,
    example_sizes,
    make_cases,
    observed_outputs,
    one_by_one,
    sizes_to_check,
)
from deploykit.extras import version_of
from deploykit.modelfile import check_model, copy_model, read_model, signature_of
from deploykit.nodes import quantized_ops, random_ops
from deploykit.specs import Array, Feeds, Signature, TensorSpec, terms

if TYPE_CHECKING:
    import onnx


# Samples of sound in the frames of usual detectors and recognizers, and a second of it.
_LENGTHS = (128, 512, 576, 1024, 16000)
_Run = Callable[[Feeds], dict[str, Array]]
# Nodes whose outputs hold values of their first input, or of any input for Concat.
_SAME_VALUES = (
    "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Slice", "Transpose", "Expand", "Tile", "Concat",
    "Split", "Dropout", "Pad",
)  # fmt: skip
# Token, position and segment ids by their place among the inputs, and the table that each indexes.
_EMBEDDING_TABLES = {"EmbedLayerNormalization": ((0, 2), (1, 4), (8, 3))}
_REPEATS = 4
# Larger constants are weights, and no rows of numbers to compare ids with.
_CLASSES = 1 << 17


class OnnxSource(Source):
    """An ONNX file; its reference outputs are its own without graph optimizations.

    Args:
        path: The file.
        options: `--opset`, `--dynamic`, `--input` and `--exporter` do not apply to a graph that is there already.
        run_onnx: Runs the file without optimizations.
    """

    kind = "onnx"

    def __init__(self, path: Path, options: ExportOptions, run_onnx: OnnxRunner) -> None:
        self.label = str(path)
        self._path = path
        model = read_model(path, weights=False)
        check_model(model, path)
        self._refuse_options(options, model)
        inputs = signature_of(model).inputs
        self.ranges = vocabulary_ranges(model, inputs)
        run = run_onnx(path)
        self.data = options.data or "generated"
        if options.data:
            cases = cases_from_data(inputs, Dataset.open(options.data), run)
            self.notes = ()
        else:
            cases, notes = self._made_up(inputs, self._example(inputs, options, run), run)
            self.notes = tuple(notes)
        # A runtime computes such a graph in integers, where the reference computes in floating point.
        self.quantized = bool(quantized_ops(model))
        _refuse_random(path, random_ops(model), run, cases[0])
        self.cases = tuple(cases)
        declared = signature_of(model).outputs
        observed = {s.name: s for s in observed_outputs(cases)}
        merged = tuple(_merge(s, observed[s.name]) for s in declared)
        self.notes += tuple(
            f"the file declares {one}; it is {other}"
            for one, other in zip(declared, merged, strict=True)
            if _contradicts(one, other)
        )
        self.signature = Signature(inputs, merged)

    def _example(self, inputs: tuple[TensorSpec, ...], options: ExportOptions, run: _Run) -> dict[str, Array]:
        """Made-up inputs that the graph accepts, at the first of some usual sizes.

        Raises:
            InferenceError: It accepts none.
        """
        first: DeploykitError | None = None
        for sizes in likely_sizes(inputs, options):
            examples = generate(inputs, sizes, ranges=self.ranges)
            try:
                run(examples)
            except DeploykitError as exc:
                first = first or exc
                continue
            return examples
        assert first is not None
        raise InferenceError(
            f"{self._path} does not run on made-up inputs ({first.what})",
            hint="give real ones: --data FILE, or --dim NAME=SIZE",
        ) from first

    def _made_up(self, inputs: tuple[TensorSpec, ...], examples: Feeds, run: _Run) -> tuple[list[Case], list[str]]:
        """Cases of made-up inputs, at one shape where the graph takes no other, whatever it declares."""
        seeds = itertools.count(1)

        def draw(specs: tuple[TensorSpec, ...], sizes: dict[str, int]) -> dict[str, Array]:
            return generate(specs, sizes, ranges=self.ranges, seed=next(seeds))

        states = batch_axes(inputs)

        def tie(sizes: dict[str, int]) -> dict[str, int]:
            """States stay as long as the batch where they are in the example."""
            return sizes | {name: sizes[batch] for name, batch in states.items() if known[name] == known[batch]}

        known = example_sizes(inputs, examples)
        try:
            return make_cases(inputs, examples, run, draw=lambda sizes: draw(inputs, sizes), tie=tie)
        except ExportError as exc:
            # One dimension that the graph fixes in truth must not keep the others from being checked.
            batch = {str(s.shape[0]) for s in inputs if s.shape}
            plans = [plan for wanted in sizes_to_check(known, batch=batch)[1:] for plan in one_by_one(known, wanted)]
            with contextlib.suppress(ExportError):
                cases, _ = make_cases(
                    inputs, examples, run, draw=lambda sizes: draw(inputs, sizes), tie=tie, check=plans
                )
                still = [f"{s}={n}" for s, n in known.items() if all(case.sizes[s] == n for case in cases)]
                return cases, [f"checked at {', '.join(still)} only, because {exc.what.partition('; ')[2]}"]
            fixed = tuple(TensorSpec(s.name, s.dtype, examples[s.name].shape) for s in inputs)
            cases, notes = make_cases(fixed, examples, run, draw=lambda sizes: draw(fixed, sizes))
            return cases, [f"checked at one shape only, because {exc.what}", *notes]

    def _refuse_options(self, options: ExportOptions, model: onnx.ModelProto) -> None:
        have = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
        asked = [
            name
            for name, value in (
                ("--dynamic", options.dynamic),
                ("--input", options.inputs),
                ("--exporter", options.way != "auto"),
            )
            if value
        ]
        if options.opset is not None and options.opset != have:
            asked.append(f"--opset {options.opset}")
        if asked:
            raise ExportError(
                f"{', '.join(asked)} cannot be applied to {self._path}, whose graph is made (opset {have})",
                hint="export it again from its source",
            )

    @property
    def ways(self) -> tuple[Way, ...]:
        """There is one: copy it."""
        return (Way("copy", True),)

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Copy the file and its external data."""
        copy_model(self._path, target)

    def tools(self) -> dict[str, str]:
        """onnx."""
        return {"onnx": version_of("onnx") or "unknown"}


def _refuse_random(path: Path, ops: list[str], run: _Run, case: Case) -> None:
    """Refuse a model that draws random numbers which reach its outputs.

    Raises:
        ExportError: The same inputs give other outputs.
    """
    if not ops:
        return
    for _ in range(_REPEATS):  # few random bits may well be the same twice
        for name, have in run(case.feeds).items():
            want = case.outputs[name]
            real = want.dtype.kind in "fc" and have.shape == want.shape
            if not (np.allclose(have, want, rtol=1e-3, equal_nan=True) if real else np.array_equal(have, want)):
                raise ExportError(
                    f"{path} gives another {name!r} each time for the same inputs (it has {', '.join(ops)})",
                    expected="a deterministic model",
                    hint="export it again from its source, in inference mode",
                )


def _merge(declared: TensorSpec, observed: TensorSpec) -> TensorSpec:
    """Declared names of dimensions, where they are names; observation decides the rest, whatever the file says."""
    if declared.shape is None or observed.shape is None or len(declared.shape) != len(observed.shape):
        return TensorSpec(declared.name, declared.dtype, observed.shape)
    dims = tuple(
        d if isinstance(d, str) and not d.startswith(f"{declared.name}_dim") else o
        for d, o in zip(declared.shape, observed.shape, strict=True)
    )
    return TensorSpec(declared.name, declared.dtype, dims)


def _contradicts(declared: TensorSpec, found: TensorSpec) -> bool:
    """Whether a file's declaration is wrong, and not only less than could be said."""
    if declared.shape is None or found.shape is None:
        return False
    if len(declared.shape) != len(found.shape):
        return True
    return any(isinstance(d, int) and d != f for d, f in zip(declared.shape, found.shape, strict=True))


def guess_sizes(inputs: tuple[TensorSpec, ...], options: ExportOptions) -> dict[str, int]:
    """Sizes for made-up inputs: `--dim`, else 2 for first axes, 64 for axes of images, 16 otherwise."""
    sizes = dict(options.dims)
    for spec in inputs:
        for axis, dim in enumerate(spec.shape or ()):
            image = len(spec.shape or ()) == 4 and spec.dtype.startswith("float")
            for symbol in terms(dim):
                if isinstance(symbol, str):
                    sizes.setdefault(symbol, 2 if axis == 0 else 64 if image else 16)
    return sizes


def likely_sizes(inputs: tuple[TensorSpec, ...], options: ExportOptions) -> list[dict[str, int]]:
    """Sizes to try in turn: those of `guess_sizes`, batch 1, larger images, longer sequences, 1 for all that is open.

    Each of them also with the unnamed axes of states (`state: [2, ?, 128]`) as long as the batch.
    """
    usual = guess_sizes(inputs, options)
    first = {s.shape[0] for s in inputs if s.shape and isinstance(s.shape[0], str)}
    single = usual | {name: 1 for name in usual if name in first}
    images = {name: 224 if size == 64 else size for name, size in single.items()}
    states = batch_axes(inputs)
    lengths = [name for name, size in usual.items() if size == 16 and name not in states]
    plans = [usual, single, images]
    plans += [base | dict.fromkeys(lengths, length) for length in _LENGTHS for base in (usual, single)]
    found: list[dict[str, int]] = []
    for plan in (*plans, dict.fromkeys(usual, 1)):
        for wanted in (plan, plan | {name: plan[batch] for name, batch in states.items()}):
            if wanted | dict(options.dims) not in found:
                found.append(wanted | dict(options.dims))
    return found


def batch_axes(inputs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """Unnamed axes that are likely the batch, those after the layers of a recurrent state, by the batch's name."""
    batch = next((s.shape[0] for s in inputs if s.shape and isinstance(s.shape[0], str)), None)
    if batch is None:
        return {}
    return {
        s.shape[1]: batch
        for s in inputs
        if s.shape and len(s.shape) == 3 and isinstance(s.shape[0], int) and s.shape[1] == f"{s.name}_dim1"
    }


def vocabulary_ranges(model: onnx.ModelProto, inputs: tuple[TensorSpec, ...]) -> dict[str, ValueRange]:
    """Legal values of integer inputs that index a table of weights (token ids), found in the graph.

    Follows each input through nodes that only move values to Gather nodes over an initializer, which may be quantized,
    and to where they become one-hot rows (OneHot, or Equal with 0, 1, 2, ...); into the branches of If and bodies of
    Loop as well, and into ONNX Runtime's fused embeddings.
    """
    weights = _tables(model)
    counts = _counts(model.graph)
    found: dict[str, ValueRange] = {}
    for spec in inputs:
        if spec.dtype in ("int32", "int64"):
            sizes = _sizes_indexed(model.graph.node, {spec.name}, weights, counts)
            if sizes:
                found[spec.name] = ValueRange(0, min(sizes) - 1)
    return found


def _sizes_indexed(
    nodes: Iterable[onnx.NodeProto],
    names: set[str],
    weights: Mapping[str, Sequence[int]],
    counts: Mapping[tuple[str, str], int],
) -> list[int]:
    """Sizes of all table axes that some tensors, and what is moved from them, index."""
    sizes: list[int] = []
    for node in nodes:  # topologically sorted, by the standard
        reads = node.input if node.op_type == "Concat" else node.input[:1]
        if node.op_type in _SAME_VALUES and names.intersection(reads):
            names.update(node.output)
        elif node.op_type in ("Gather", "GatherElements") and node.input[1] in names and node.input[0] in weights:
            shape = weights[node.input[0]]
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            sizes += [shape[axis]] if -len(shape) <= axis < len(shape) else []
        elif node.op_type in ("OneHot", "Equal") and names.intersection(node.input[:2]):
            sizes += [counts[node.op_type, name] for name in node.input[:2] if (node.op_type, name) in counts]
        for ids, table in _EMBEDDING_TABLES.get(node.op_type, ()):
            if max(ids, table) < len(node.input) and node.input[ids] in names and node.input[table] in weights:
                sizes.append(weights[node.input[table]][0])
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                inner = {t.name: list(t.dims) for t in graph.initializer}
                sizes += _sizes_indexed(graph.node, set(names), {**weights, **inner}, {**counts, **_counts(graph)})
    return [size for size in sizes if size > 0]


def _counts(graph: onnx.GraphProto) -> dict[tuple[str, str], int]:
    """How many classes the constants of a graph tell apart, by the operator that would say so and the constant's name.

    That is n for an n as the depth of OneHot, and for 0, 1, ..., n - 1 beside Equal; where values were read at all.
    """
    from onnx import numpy_helper

    made = ((n.output[0], a.t) for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value")
    found = {}
    for name, tensor in (*((w.name, w) for w in graph.initializer), *made):
        held = tensor.raw_data or tensor.int64_data or tensor.int32_data or tensor.float_data
        size = math.prod(tensor.dims)
        if not held or not 0 < size <= _CLASSES:
            continue
        values = numpy_helper.to_array(tensor).reshape(-1)
        if size == 1 and values.dtype.kind in "iuf" and np.isfinite(values[0]):
            found["OneHot", name] = int(values[0])
        elif size > 2 and np.array_equal(values, np.arange(size)):
            found["Equal", name] = size
    return found


def _tables(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of all constants, and of what is only another form of one."""
    tables = {w.name: list(w.dims) for w in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            tables.update((node.output[0], list(a.t.dims)) for a in node.attribute if a.name == "value")
        elif node.op_type in ("DequantizeLinear", "Cast", "Identity") and node.input[0] in tables:
            tables[node.output[0]] = tables[node.input[0]]
    return tables
