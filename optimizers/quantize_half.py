"""Weights in 16-bit floating point: half the size, for a loss that hardly any model shows.

Two ways to compute with them:

- "storage": each weight is stored in 16 bits behind a Cast to float32. Runtimes unpack it when they load the model, and
  compute as before; OpenVINO keeps it packed where it computes in 16 bits itself. CPUs run this at the speed of the
  parent, since ONNX Runtime has no 16-bit kernels for x86 (onnxruntime#16778: it surrounds every node with Casts).
- "native": the graph computes in float16, for devices that do. Inputs and outputs keep their types. What float16 cannot
  hold, or no operator of the standard takes, stays in float32 between Casts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.data import Dataset
from deploykit.errors import OptimizationError
from deploykit.extras import version_of
from deploykit.modelfile import signature_of
from deploykit.optimizers.base import Opener, StepResult
from deploykit.optimizers.calibration import calibrate
from deploykit.optimizers.editing import Editor, own_copy
from deploykit.optimizers.feeding import Counter, feeds_of
from deploykit.optimizers.half_compute import compute_in_half
from deploykit.optimizers.prepare import infer_shapes, prepare
from deploykit.optimizers.quantize_config import HalfConfig, StaticConfig
from deploykit.optimizers.select_nodes import check_excluded, kept_float
from deploykit.specs import Array, Feeds
from deploykit.weights import LightModel, move_out, open_light, write_light

if TYPE_CHECKING:
    import onnx

PRECISIONS, COMPUTES = ("fp16", "bf16"), ("storage", "native")
# Scalars, biases and normalization weights: nobody would notice their size.
_SMALLEST_ELEMENTS = 1 << 10
_FLOAT = 1  # onnx.TensorProto.FLOAT


def quantize_half(
    model: Path,
    config: HalfConfig,
    target: Path,
    open_model: Opener | None = None,
    data: Dataset | None = None,
    cases: Sequence[Feeds] = (),
) -> StepResult:
    """Store weights in 16 bits.

    Args:
        model: Floating-point ONNX file.
        config: How; `compute` is settled.
        target: Where the result goes.
        open_model: Runs a model file; what computes in float16 is first watched in float32.
        data: Real inputs to watch it on.
        cases: Other inputs, where there are no data.

    Raises:
        OptimizationError: Nothing to store, or unusable options.
    """
    if config.precision not in PRECISIONS:
        raise OptimizationError(f"precision {config.precision!r}", expected=" or ".join(PRECISIONS))
    if config.compute not in COMPUTES:
        raise OptimizationError(f"compute {config.compute!r}", expected=" or ".join(("auto", *COMPUTES)))
    if config.precision == "bf16" and config.compute == "native":
        raise OptimizationError(
            "a graph that computes in bfloat16 runs in too few runtimes to be verified",
            hint="store in it (--compute storage); OpenVINO computes in bfloat16 by itself where the CPU can",
        )
    with tempfile.TemporaryDirectory(prefix=".half-", dir=target.parent) as scratch:
        light = open_light(model, Path(scratch))
        prepared, notes = prepare(light.proto, per_channel=config.precision == "bf16")
        check_excluded(prepared, config.exclude)
        light = LightModel(infer_shapes(prepared), light.folder)
        if config.compute == "native":
            known = _watch(light, open_model, data, cases, target.parent)
            if not known:
                notes.append("activations were not watched: what leaves the range of float16 would not be seen here")
            stored, floats = compute_in_half(light, kept_float(light.proto, config.exclude), known)
        else:
            light = own_copy(light, Path(scratch) / "own")  # beside it, large weights in 16 bits find their place
            stored, floats = _store(light, config)
        if not stored:
            raise OptimizationError(
                f"nothing to store in {config.precision}: no float32 weight has {_SMALLEST_ELEMENTS} values or more",
                hint="keep the model as it is",
            )
        write_light(light, target)
    if floats:
        notes.append(f"{len(floats)} stay in float32: {', '.join(floats[:3])}{', ...' if len(floats) > 3 else ''}")
    params = {
        "precision": config.precision, "compute": config.compute, "exclude": list(config.exclude),
        "stored": stored, "float32": len(floats),
    }  # fmt: skip
    return StepResult(True, tuple(notes), params, {"onnx": version_of("onnx") or "unknown"})


def _watch(
    light: LightModel, open_model: Opener | None, data: Dataset | None, cases: Sequence[Feeds], folder: Path
) -> dict[str, float]:
    """The largest magnitude of each float32 activation; empty where there is nothing to run the model on.

    ONNX Runtime's CPU provider computes a float16 graph in float32 between Casts that it takes away, so that a
    comparison there shows no value that a device would lose.
    """
    if open_model is None or (data is None and not cases):
        return {}
    graph = light.proto.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    made = [name for node in graph.node for name in node.output if kinds.get(name) == _FLOAT]
    inputs = signature_of(light.proto)
    batches = feeds_of(inputs, data, StaticConfig(), Counter()) if data is not None else iter(cases)
    with tempfile.TemporaryDirectory(prefix=".watched-", dir=folder) as place:
        divisible = all(s.shape and isinstance(s.shape[0], str) for s in inputs.inputs)
        seen = calibrate(light, made, batches, open_model, Path(place), counted=False, divisible=divisible)
    ranges = seen.ranges("minmax", 100.0)
    # What has no range was not finite.
    return {n: max(-ranges.low[n], ranges.high[n]) if n in ranges.low else float("inf") for n in made}


def _store(light: LightModel, config: HalfConfig) -> tuple[int, list[str]]:
    """Put large weights into 16 bits behind a Cast, in place; the number of them, and those that do not fit."""
    from onnx import TensorProto, helper

    editor, excluded = Editor(light), kept_float(light.proto, config.exclude)
    graph, stored, floats = light.proto.graph, 0, list[str]()
    fresh: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    kept: list[onnx.TensorProto] = []
    for tensor in graph.initializer:
        name = str(tensor.name)
        readers = editor.readers.get(name, [])
        small = int(np.prod(tensor.dims, dtype=np.int64)) < _SMALLEST_ELEMENTS
        if not editor.is_weight(name) or small or name in editor.outputs or not readers:
            kept.append(tensor)
            continue
        if any({n.name, n.op_type} & excluded for n in readers):
            floats.append(f"{name} (excluded)")
            kept.append(tensor)
            continue
        made = to_half(name, editor.read(name), config.precision)
        if made is None:
            floats.append(f"{name} (beyond the range of {config.precision})")
            kept.append(tensor)
            continue
        made.name = editor.free_name(f"{name}_{config.precision}")
        if editor.is_external(name):
            move_out(made, light.folder / "half.data")
        kept.append(made)
        renamed[name] = f"{name}_float32"
        fresh.append(helper.make_node("Cast", [made.name], [renamed[name]], f"{name}_unpacked", to=TensorProto.FLOAT))
        stored += 1
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    inputs = [v for v in graph.input if v.name not in renamed]
    for values, those in ((graph.node, [*fresh, *graph.node]), (graph.initializer, kept), (graph.input, inputs)):
        held = list(those)
        del values[:]
        values.extend(held)
    return stored, floats


def to_half(name: str, values: Array, precision: str) -> onnx.TensorProto | None:
    """A weight in 16 bits, rounded to the nearest; None where it holds values that this cannot hold."""
    from onnx import TensorProto, helper

    if precision == "fp16":
        largest = float(np.finfo(np.float16).max)
        if not (np.abs(values) <= largest).all():
            return None
        return helper.make_tensor(name, TensorProto.FLOAT16, values.shape, values.astype("<f2").tobytes(), raw=True)
    if not np.isfinite(values).all():
        return None
    bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
    # Round to nearest, ties to even: half of the dropped part less one, and one more where the last kept bit is set.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    if ((rounded & 0x7F80) == 0x7F80).any():  # rounded up to infinity
        return None
    return helper.make_tensor(name, TensorProto.BFLOAT16, values.shape, rounded.astype("<u2").tobytes(), raw=True)
