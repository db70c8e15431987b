"""Static quantization: Q/DQ pairs with ranges from calibration data.

Activations are uint8 asymmetric, weights int8 symmetric per output channel. That is the one scheme that both runtimes
run in integer kernels on x86 (int8 activations lose ONNX Runtime's fusions on branches, uint8 weights leave OpenVINO's
convolutions in float).
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.data import Dataset
from deploykit.errors import OptimizationError
from deploykit.extras import require
from deploykit.modelfile import signature_of
from deploykit.optimizers.base import Opener, StepResult
from deploykit.optimizers.calibration import Calibration, calibrate, check_writable
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
from deploykit.optimizers.select_nodes import check_excluded, check_selected, select_nodes, stand_ins, watched_tensors
from deploykit.optimizers.thresholds import check_method
from deploykit.progress import Progress
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
        data: Calibration data; labels are ignored.
        progress: Told how far the accuracy algorithms are.
        keep_float: Where the graph goes as it is before pairs are inserted.

    Raises:
        OptimizationError: Nothing to quantize, unusable options, or the quantizer failed.
        DataError: The data do not fit the model.
    """
    if open_model is None or data is None:
        raise OptimizationError("static quantization needs calibration data", hint="add --data FILE")
    check_method(config.calibration, config.percentile)
    check_accuracy_options(config)
    saved = _saved(config)
    said = []
    if (config.merge or config.save_calibration) and config.smooth == "auto":
        config = replace(config, smooth="off")
        said = ["SmoothQuant is off: it would change the activations by what this run alone was shown"]
    require("onnxruntime.quantization", extra="ort")
    bits, why = weight_bits(config.weight_bits)
    count, told = Counter(), progress or Progress()
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=target.parent) as scratch:
        light = open_light(model, Path(scratch))
        config = settled(config, model_kind(light.proto))
        prepared, notes = prepare(light.proto, per_channel=config.per_channel)
        notes += rewrite(prepared)
        prepared = infer_shapes(prepared)
        light = LightModel(prepared, light.folder)
        check_excluded(prepared, config.exclude)
        nodes = select_nodes(prepared, frozenset(config.exclude))
        check_selected(nodes)
        if refines(config):
            light = own_copy(light, Path(scratch) / "own")
        inputs = signature_of(prepared)
        data_again = Material(lambda: feeds_of(inputs, data, config, Counter()), open_model, target.parent)
        notes += before_ranges(light, nodes, config, bits, data_again, told)
        serves = stand_ins(prepared, frozenset(nodes))
        tensors = [*dict.fromkeys(serves.get(t, t) for t in watched_tensors(prepared, frozenset(nodes)))]
        with tempfile.TemporaryDirectory(prefix=".ranges-", dir=target.parent) as folder, told.step("calibrate"):
            seen = calibrate(
                light, tensors, feeds_of(inputs, data, config, count), open_model, Path(folder),
                counted=config.calibration != "minmax" or config.save_calibration is not None,
                divisible=all(s.shape and isinstance(s.shape[0], str) for s in inputs.inputs),
            )  # fmt: skip
        for other in saved:
            seen.merge(other)
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
        embeddings = quantize_embeddings(light, frozenset(config.exclude))
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
        "data": data.source,
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


def _saved(config: StaticConfig) -> list[Calibration]:
    """What other runs saw of the model.

    Raises:
        OptimizationError: The model would not be theirs any more.
        OutputExistsError: The file to be written is there already.
        DataError: One cannot be read.
    """
    if (config.merge or config.save_calibration) and (isinstance(config.smooth, float | int) or config.equalize):
        raise OptimizationError(
            "a saved calibration does not go with --smooth or --equalize, which change the activations by their data",
            hint="leave one of both out",
        )
    if config.save_calibration is not None:
        check_writable(Path(config.save_calibration))
    return [Calibration.load(Path(file)) for file in config.merge]


def _usable_nodes(model: onnx.ModelProto, nodes: list[str], ranges: Ranges) -> tuple[list[str], list[str]]:
    """Split the chosen nodes by whether all their activations have a range."""
    usable: list[str] = []
    unseen: list[str] = []
    for name in nodes:
        seen = all(t in ranges.low for t in watched_tensors(model, frozenset({name})))
        (usable if seen else unseen).append(name)
    return usable, unseen
