"""Static quantization: Q/DQ pairs with ranges from calibration data.

Activations are uint8 asymmetric, weights int8 symmetric per output channel. That is the one scheme that both runtimes
run in integer kernels on x86 (int8 activations lose ONNX Runtime's fusions on branches, uint8 weights leave OpenVINO's
convolutions in float).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.data import Dataset
from deploykit.errors import OptimizationError
from deploykit.extras import require
from deploykit.modelfile import signature_of
from deploykit.optimizers.base import Opener, StepResult
from deploykit.optimizers.calibration import Calibration, calibrate, check_writable, digest_of
from deploykit.optimizers.editing import own_copy
from deploykit.optimizers.embeddings import quantize_embeddings
from deploykit.optimizers.escalation import model_kind, settled
from deploykit.optimizers.feeding import Counter, feeds_of
from deploykit.optimizers.pairs import insert_pairs
from deploykit.optimizers.prepare import infer_shapes, prepare
from deploykit.optimizers.quantize_config import (
    StaticConfig,
    check_accuracy_options,
    tools,
    weight_bits,
)
from deploykit.optimizers.ranges import Ranges
from deploykit.optimizers.refine import Material, after_ranges, before_ranges, refines
from deploykit.optimizers.rewrite import rewrite
from deploykit.optimizers.select_nodes import (
    check_excluded,
    check_selected,
    kept_float,
    select_nodes,
    stand_ins,
    watched_tensors,
)
from deploykit.optimizers.thresholds import check_method
from deploykit.progress import Progress
from deploykit.specs import Array
from deploykit.weights import LightModel, open_light, write_copy, write_light

if TYPE_CHECKING:
    import onnx


def quantize_static(
    model: Path,
    config: StaticConfig,
    target: Path,
    open_model: Opener | None,
    data: Dataset | None,
    progress: Progress | None = None,
    keep_float: Path | None = None,
) -> StepResult:
    """Insert Q/DQ pairs with ranges from calibration data.

    Args:
        model: Floating-point ONNX file.
        config: How.
        target: Where the result goes.
        open_model: Runs a model file.
        data: Calibration data; labels are ignored. None where `StaticConfig.merge` holds all that counts.
        progress: Told how far the accuracy algorithms are.
        keep_float: Where the graph goes as it is before pairs are inserted.

    Raises:
        OptimizationError: Nothing to quantize, unusable options, or the quantizer failed.
        DataError: The data do not fit the model.
    """
    if open_model is None or (data is None and not config.merge):
        raise OptimizationError("static quantization needs calibration data", hint="add --data FILE")
    if config.merge_only and not config.merge:
        raise OptimizationError("merge_only, and nothing to merge", expected="files that --save-calibration wrote")
    check_method(config.calibration, config.percentile)
    check_accuracy_options(config)
    saved = _saved(config)
    said = []
    if (config.merge or config.save_calibration) and config.smooth == "auto":
        config = replace(config, smooth="off")
        said = ["SmoothQuant is off: it would change the activations by what this run alone was shown"]
    require("onnxruntime.quantization", extra="ort")
    bits, why = weight_bits(config.weight_bits)
    told = progress or Progress()
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=target.parent) as scratch:
        light = open_light(model, Path(scratch))
        config = settled(config, model_kind(light.proto))
        if data is None and refines(config):
            raise OptimizationError("bias correction and AdaRound need data to run on", hint="add --data FILE")
        light, nodes, notes = _to_be_quantized(light, config)
        prepared = light.proto
        if refines(config):
            light = own_copy(light, Path(scratch) / "own")
        data_again = Material(lambda: _feeds(light, data, config), open_model, target.parent)
        notes += before_ranges(light, nodes, config, bits, data_again, told)
        counted = config.calibration != "minmax" or config.save_calibration is not None
        with told.step("calibrate"):
            own = None if config.merge_only else data
            seen = _see(light, nodes, config, open_model, own, target.parent, counted=counted)
        for other in saved:
            seen.merge(other)
        notes += _not_finite(light, seen)
        serves = stand_ins(prepared, frozenset(nodes))
        ranges = seen.ranges(config.calibration, config.percentile).extended(serves)
        usable, unseen = _usable_nodes(prepared, nodes, ranges)
        if unseen:
            notes.append(f"{len(unseen)} nodes stay in floating point, without a finite range: {', '.join(unseen[:3])}")
        if not usable:
            raise OptimizationError(
                "nothing to quantize: no chosen node has a finite range", hint="check the calibration data"
            )
        if keep_float is not None:
            write_copy(light, keep_float)
        notes += after_ranges(light, usable, ranges, config, bits, data_again, told)
        notes += rewrite(prepared, last=True)
        embeddings = quantize_embeddings(light, kept_float(prepared, config.exclude))
        total = len(prepared.graph.node)
        made = insert_pairs(light, usable, ranges, config, bits)
        if not any(n.op_type == "DequantizeLinear" for n in made.graph.node):
            raise OptimizationError("nothing was quantized: onnxruntime put no Q/DQ pair into the graph")
        write_light(LightModel(made, light.folder), target)
        if config.save_calibration is not None:
            seen.save(Path(config.save_calibration))
    params = {
        "engine": "deploykit",
        "calibration": config.calibration,
        **({"percentile": config.percentile} if config.calibration == "percentile" else {}),
        **({"merged": list(config.merge)} if config.merge else {}),
        "data": data.source if data is not None else None,
        "samples": seen.samples,
        "per_channel": config.per_channel,
        "weight_bits": bits,
        "activations": "uint8 asymmetric",
        "weights": "int8 symmetric",
        "exclude": list(config.exclude),
        "smooth": config.smooth,
        "equalize": config.equalize,
        "bias_correction": config.bias_correction,
        "rounding": config.rounding,
        "quantized_nodes": len(usable),
        "embeddings": len(embeddings),
        "float_nodes": total - len(usable),
    }
    return StepResult(True, (*notes, *said, *why), params, tools())


def observe(model: Path, config: StaticConfig, open_model: Opener, data: Dataset, folder: Path) -> Calibration:
    """What data show of a model's activations, without a quantized model: what `save_calibration` would keep.

    Args:
        model: Floating-point ONNX file.
        config: The same as for the quantization that merges it.
        open_model: Runs a model file.
        data: A part of the calibration data. For the bits of one run over all of them, every part but the last holds a
            multiple of `batch_size` samples, or of the model's own batch where that is fixed.
        folder: For temporary files.

    Raises:
        OptimizationError: Nothing to quantize, or unusable options.
        DataError: The data do not fit the model.
    """
    _refuse_adaptive(config)
    with tempfile.TemporaryDirectory(prefix=".observe-", dir=folder) as scratch:
        light, nodes, _ = _to_be_quantized(open_light(model, Path(scratch)), config)
        return _see(light, nodes, config, open_model, data, Path(scratch), counted=True)


def _to_be_quantized(light: LightModel, config: StaticConfig) -> tuple[LightModel, list[str], list[str]]:
    """The graph that ranges are found for, names of the nodes that will be quantized, and notes."""
    prepared, notes = prepare(light.proto, per_channel=config.per_channel)
    notes += rewrite(prepared)
    prepared = infer_shapes(prepared)
    check_excluded(prepared, config.exclude)
    nodes = select_nodes(prepared, kept_float(prepared, config.exclude))
    check_selected(nodes)
    return LightModel(prepared, light.folder), nodes, notes


def _see(
    light: LightModel,
    nodes: list[str],
    config: StaticConfig,
    open_model: Opener,
    data: Dataset | None,
    folder: Path,
    *,
    counted: bool,
) -> Calibration:
    """Run the model over the data, if there are any."""
    if data is None:
        return Calibration(digest_of(light))
    serves = stand_ins(light.proto, frozenset(nodes))
    tensors = [*dict.fromkeys(serves.get(t, t) for t in watched_tensors(light.proto, frozenset(nodes)))]
    divisible = all(s.shape and isinstance(s.shape[0], str) for s in signature_of(light.proto).inputs)
    with tempfile.TemporaryDirectory(prefix=".ranges-", dir=folder) as place:
        return calibrate(
            light, tensors, _feeds(light, data, config), open_model, Path(place), counted=counted, divisible=divisible
        )


def _not_finite(light: LightModel, seen: Calibration) -> list[str]:
    """A note for every input whose data hold NaN or infinity; inside a model infinity may be a mask's."""
    inputs = {v.name for v in light.proto.graph.input}
    return [
        f"{tensor.nonfinite} of {tensor.count} values of input {name!r} are NaN or infinite and were left out of its "
        "range: check the calibration data"
        for name, tensor in seen.tensors.items()
        if name in inputs and tensor.nonfinite
    ]


def _feeds(light: LightModel, data: Dataset | None, config: StaticConfig) -> Iterator[dict[str, Array]]:
    assert data is not None  # what runs the model again was refused without them
    return feeds_of(signature_of(light.proto), data, config, Counter())


def _saved(config: StaticConfig) -> list[Calibration]:
    """What other runs saw of the model.

    Raises:
        OptimizationError: The model would not be theirs any more.
        OutputExistsError: The file to be written is there already.
        DataError: One cannot be read.
    """
    if config.merge or config.save_calibration:
        _refuse_adaptive(config)
    if config.save_calibration is not None:
        check_writable(Path(config.save_calibration))
    return [Calibration.load(Path(file)) for file in config.merge]


def _refuse_adaptive(config: StaticConfig) -> None:
    """Refuse what makes the graph hang on the data of one run."""
    if isinstance(config.smooth, float | int) or config.equalize:
        raise OptimizationError(
            "a saved calibration does not go with --smooth or --equalize, which change the activations by their data",
            hint="leave one of both out",
        )


def _usable_nodes(model: onnx.ModelProto, nodes: list[str], ranges: Ranges) -> tuple[list[str], list[str]]:
    """Split the chosen nodes by whether all their activations have a range."""
    usable: list[str] = []
    unseen: list[str] = []
    for name in nodes:
        seen = all(t in ranges.low for t in watched_tensors(model, frozenset({name})))
        (usable if seen else unseen).append(name)
    return usable, unseen
