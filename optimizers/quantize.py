"""8-bit quantization for ONNX Runtime and OpenVINO: dynamic and static.

Static: Q/DQ pairs, activations uint8 asymmetric, weights int8 symmetric per output channel. That is the one scheme that
both runtimes run in integer kernels on x86 (int8 activations lose ONNX Runtime's fusions on branches, uint8 weights
leave OpenVINO's convolutions in float).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError, OptimizationError, first_line
from deploykit.extras import require, version_of
from deploykit.machine import inspect_machine
from deploykit.modelfile import signature_of
from deploykit.optimizers.base import Opener, StepResult
from deploykit.optimizers.lazy_weights import lazy_weights
from deploykit.optimizers.prepare import prepare
from deploykit.optimizers.ranges import MinMax, collect_ranges
from deploykit.optimizers.select_nodes import check_excluded, dynamic_nodes, select_nodes, watched_tensors
from deploykit.specs import Array, Signature, fit_feeds
from deploykit.weights import LightModel, open_light, write_light

if TYPE_CHECKING:
    import onnx

DYNAMIC_OPS = ("MatMul", "Gemm", "Attention", "LSTM", "Gather")
WEIGHT_BITS = ("auto", "8", "7")


@dataclass(frozen=True, slots=True)
class DynamicConfig:
    """Dynamic quantization: int8 weights, activations quantized while the model runs.

    Attributes:
        ops: Operator types to quantize. Convolutions are left out: ConvInteger is many times slower than float.
        per_channel: One scale an output channel.
        exclude: Node names and operator types that stay in floating point.
        weight_bits: "8", "7", or "auto": 7 where the CPU lacks VNNI, because there the sum of two 8-bit products
            saturates at 16 bits.
    """

    ops: tuple[str, ...] = DYNAMIC_OPS
    per_channel: bool = True
    exclude: tuple[str, ...] = ()
    weight_bits: str = "auto"


@dataclass(frozen=True, slots=True)
class StaticConfig:
    """Static quantization with ranges from calibration data.

    Attributes:
        calibration: "minmax".
        per_channel: One scale an output channel of a weight.
        exclude: Node names and operator types that stay in floating point.
        batch_size: Samples in one calibration run.
        max_samples: Calibration samples used at most; None for all.
        weight_bits: As in `DynamicConfig`.
    """

    calibration: str = "minmax"
    per_channel: bool = True
    exclude: tuple[str, ...] = ()
    batch_size: int = 8
    max_samples: int | None = None
    weight_bits: str = "auto"


def quantize_dynamic(model: Path, config: DynamicConfig, target: Path) -> StepResult:
    """Quantize weights of matrix products, recurrences and embeddings.

    Raises:
        OptimizationError: Nothing to quantize, or the quantizer failed.
    """
    require("onnxruntime.quantization", extra="ort")
    bits, why = _weight_bits(config.weight_bits)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=target.parent) as scratch:
        light = open_light(model, Path(scratch))
        prepared, notes = prepare(light.proto, per_channel=config.per_channel)
        check_excluded(prepared, config.exclude)
        nodes, other = dynamic_nodes(prepared, config.ops, frozenset(config.exclude))
        if not nodes:
            raise _nothing_dynamic(prepared, config.ops, other)
        made = _dynamic(LightModel(prepared, light.folder), config, nodes, bits)
        quantized = sum(
            n.op_type.endswith(("MatMulInteger", "DynamicQuantizeLSTM", "QAttention")) for n in made.graph.node
        )
        # Embeddings become integers behind a DequantizeLinear.
        if not quantized and not any(n.op_type == "DequantizeLinear" for n in made.graph.node):
            raise OptimizationError(
                "nothing was quantized: no matrix product has constant weights",
                hint="use: deploykit quantize static --data FILE",
            )
        write_light(LightModel(made, light.folder), target)
    params = {
        "ops": list(config.ops),
        "per_channel": config.per_channel,
        "exclude": list(config.exclude),
        "weight_bits": bits,
        "integer_nodes": quantized,
    }
    return StepResult(True, (*notes, *why), params, _tools())


def _nothing_dynamic(model: onnx.ModelProto, ops: Sequence[str], other: str | None) -> OptimizationError:
    kinds = sorted({n.op_type for n in model.graph.node})
    if other is not None:
        return OptimizationError(
            f"nothing to quantize: the weights are {other}", expected="float32", hint="export the model in float32"
        )
    has = f" (it has {', '.join(kinds[:8])})" if kinds else ""
    convolutions = "convolutional models want: deploykit quantize static --data FILE"
    return OptimizationError(
        f"nothing to quantize: the model has none of {', '.join(ops)} with constant weights{has}",
        hint=convolutions
        if "Conv" in kinds
        else "simplify it first (deploykit simplify), or keep it in floating point",
    )


def _dynamic(light: LightModel, config: DynamicConfig, nodes: list[str], bits: int) -> onnx.ModelProto:
    """Run onnxruntime's quantizer on the chosen nodes."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode, add_infer_metadata

    try:
        with _no_advice(), lazy_weights(light.folder):
            add_infer_metadata(light.proto)
            quantizer = ONNXQuantizer(
                light.proto,
                config.per_channel,
                bits == 7,
                QuantizationMode.IntegerOps,
                False,
                QuantType.QInt8,
                QuantType.QUInt8,
                None,
                # onnxruntime splits a Gemm into a MatMul of this name and an Add before it looks at the names.
                [*nodes, *(f"{name}_MatMul" for name in nodes)],
                [],
                # ... and "MatMul" has to be among the types for its half of a Gemm.
                sorted({*config.ops, *(["MatMul"] if "Gemm" in config.ops else [])}),
                {"MatMulConstBOnly": True},
            )
            quantizer.quantize_model()
    except OSError:
        raise
    except Exception as exc:
        raise OptimizationError(f"onnxruntime's dynamic quantizer failed ({first_line(exc)})") from exc
    made: onnx.ModelProto = quantizer.model.model
    return made


def quantize_static(
    model: Path, config: StaticConfig, target: Path, open_model: Opener | None, data: Dataset | None
) -> StepResult:
    """Insert Q/DQ pairs with ranges from calibration data.

    Args:
        model: Floating-point ONNX file.
        config: How.
        target: Where the result goes.
        open_model: Runs a model file.
        data: Calibration data; labels are ignored.

    Raises:
        OptimizationError: Nothing to quantize, unusable options, or the quantizer failed.
        DataError: The data do not fit the model.
    """
    if open_model is None or data is None:
        raise OptimizationError("static quantization needs calibration data", hint="add --data FILE")
    if config.calibration != "minmax":
        raise OptimizationError(f"unknown calibration {config.calibration!r}", expected="minmax")
    require("onnxruntime.quantization", extra="ort")
    bits, why = _weight_bits(config.weight_bits)
    count = _Counter()
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=target.parent) as scratch:
        light = open_light(model, Path(scratch))
        prepared, notes = prepare(light.proto, per_channel=config.per_channel)
        light = LightModel(prepared, light.folder)
        check_excluded(prepared, config.exclude)
        nodes = select_nodes(prepared, frozenset(config.exclude))
        if not nodes:
            raise OptimizationError(
                "nothing to quantize: no convolution or matrix product with constant float32 weights is left",
                hint="simplify it first (deploykit simplify), drop --exclude, or keep it in floating point",
            )
        tensors = watched_tensors(prepared, frozenset(nodes))
        with tempfile.TemporaryDirectory(prefix=".ranges-", dir=target.parent) as folder:
            feeds = _feeds(signature_of(prepared), data, config, count)
            ranges, _ = collect_ranges(light, tensors, feeds, open_model, Path(folder))
        usable, unseen = _usable_nodes(prepared, nodes, ranges)
        if unseen:
            notes.append(f"{len(unseen)} nodes stay in floating point, without a finite range: {', '.join(unseen[:3])}")
        if not usable:
            raise OptimizationError(
                "nothing to quantize: no chosen node has a finite range", hint="check the calibration data"
            )
        total = len(prepared.graph.node)
        made = _insert(light, usable, ranges, config, bits)
        if not any(n.op_type == "DequantizeLinear" for n in made.graph.node):
            raise OptimizationError("nothing was quantized: onnxruntime put no Q/DQ pair into the graph")
        write_light(LightModel(made, light.folder), target)
    params = {
        "calibration": config.calibration,
        "data": data.source,
        "samples": count.samples,
        "per_channel": config.per_channel,
        "weight_bits": bits,
        "activations": "uint8 asymmetric",
        "weights": "int8 symmetric",
        "exclude": list(config.exclude),
        "quantized_nodes": len(usable),
        "float_nodes": total - len(usable),
    }
    return StepResult(True, (*notes, *why), params, _tools())


class _Counter:
    def __init__(self) -> None:
        self.samples = 0


def _feeds(signature: Signature, data: Dataset, config: StaticConfig, count: _Counter) -> Iterator[dict[str, Array]]:
    """Batches of the size that the model takes, never more than `max_samples` together: a fixed first axis decides.

    A generator may yield pieces of any size; those that do not fill a fixed batch are put together.
    """
    fixed = [s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], int)]
    size = fixed[0] if fixed else config.batch_size
    limit = config.max_samples
    for batch in _filled(data, size) if fixed else data.batches(size):
        have = len(next(iter(batch.values())))
        left = have if limit is None else min(have, limit - count.samples)
        if left <= 0 or (fixed and left < size):
            break
        count.samples += left
        yield fit_feeds(signature, {k: v[:left] for k, v in batch.items() if k != LABELS})


def _filled(data: Dataset, size: int) -> Iterator[dict[str, Array]]:
    """Batches of exactly ``size``, across the borders of what the data come in; an incomplete rest is left out."""
    waiting: dict[str, Array] = {}
    for piece in data.batches(size):
        try:
            waiting = {n: np.concatenate([waiting[n], a]) for n, a in piece.items()} if waiting else piece
        except (KeyError, ValueError) as exc:
            raise DataError(
                f"{data.source}: batches do not fit together ({first_line(exc)})",
                expected="the same names and, but for the first axis, the same shapes in every batch",
            ) from exc
        while len(next(iter(waiting.values()))) >= size:
            yield {n: a[:size] for n, a in waiting.items()}
            waiting = {n: a[size:] for n, a in waiting.items()}


def _usable_nodes(model: onnx.ModelProto, nodes: list[str], ranges: MinMax) -> tuple[list[str], list[str]]:
    """Split the chosen nodes by whether all their activations have a range."""
    usable: list[str] = []
    unseen: list[str] = []
    for name in nodes:
        seen = all(t in ranges.low for t in watched_tensors(model, frozenset({name})))
        (usable if seen else unseen).append(name)
    return usable, unseen


def _insert(light: LightModel, nodes: list[str], ranges: MinMax, config: StaticConfig, bits: int) -> onnx.ModelProto:
    """Run onnxruntime's quantizer on the chosen nodes."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    limits = {
        name: TensorData(lowest=np.float32(ranges.low[name]), highest=np.float32(ranges.high[name]))
        for name in ranges.low
    }
    options: Mapping[str, Any] = {
        "ActivationSymmetric": False,
        "WeightSymmetric": True,
        "MatMulConstBOnly": True,
        # A quantized output would stand between a product and the bias and Gelu that ONNX Runtime fuses with it.
        "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
    }
    kinds = {n.name: n.op_type for n in light.proto.graph.node}
    try:
        add_infer_metadata(light.proto)
        quantizer = QDQQuantizer(
            light.proto,
            config.per_channel,
            bits == 7,
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, limits),
            nodes,
            [],
            sorted({kinds[n] for n in nodes}),
            dict(options),
        )
        with _no_advice(), lazy_weights(light.folder):
            quantizer.quantize_model()
        _keep_floats(quantizer.model.model, frozenset(nodes))
        quantizer.model.topological_sort()  # ONNX wants it; the pairs were appended at the end
        made: onnx.ModelProto = quantizer.model.model
    except Exception as exc:
        raise OptimizationError(f"onnxruntime's Q/DQ insertion failed ({first_line(exc)})") from exc
    return made


def _keep_floats(model: onnx.ModelProto, quantized: frozenset[str]) -> None:
    """Give nodes that stay in floating point the tensor itself, in place, where they were given its 8-bit copy.

    The quantizer redirects every reader of a tensor: the residual stream of a transformer would be rounded because the
    product beside it is quantized. What a quantized node makes is left: a second reader would undo its fusion.
    """
    nodes = model.graph.node
    makers = {out: n.name for n in nodes for out in n.output}
    sources = {n.output[0]: n.input[0] for n in nodes if n.op_type == "QuantizeLinear"}
    copies = {
        n.output[0]: sources[n.input[0]] for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in sources
    }
    for node in nodes:
        if node.name in quantized or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for i, name in enumerate(node.input):
            if name in copies and makers.get(copies[name]) not in quantized:
                node.input[i] = copies[name]


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Keep onnxruntime's advice to pre-process, which `prepare` has done, off the root logger.

    Without a handler there, `logging.warning` would install one for the whole process.
    """
    root = logging.getLogger()
    handler = logging.NullHandler()

    def wanted(record: logging.LogRecord) -> bool:
        return "run pre-processing before quantization" not in record.getMessage()

    root.addFilter(wanted)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(wanted)


def _weight_bits(asked: str) -> tuple[int, list[str]]:
    """Bits of a weight, and the reason where it was our choice."""
    if asked not in WEIGHT_BITS:
        raise OptimizationError(f"weight bits {asked!r}", expected=" or ".join(WEIGHT_BITS))
    if asked != "auto":
        return int(asked), []
    if inspect_machine().int8_dot:
        return 8, []
    return 7, [
        "weights have 7 bits: this CPU has no VNNI, and 8-bit products would saturate; "
        "for a target with VNNI use --weight-bits 8"
    ]


def _tools() -> dict[str, str]:
    return {name: version_of(name) or "unknown" for name in ("onnxruntime", "onnx")}
