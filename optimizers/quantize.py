"""8-bit quantization for ONNX Runtime and OpenVINO: dynamic and static.

Static: Q/DQ pairs, activations uint8 asymmetric, weights int8 symmetric per output channel. That is the one scheme that
both runtimes run in integer kernels on x86 (int8 activations lose ONNX Runtime's fusions on branches, uint8 weights
leave OpenVINO's convolutions in float).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.data import LABELS, Dataset
from deploykit.errors import OptimizationError, first_line
from deploykit.extras import require, version_of
from deploykit.machine import inspect_machine
from deploykit.modelfile import model_bytes, read_model, signature_of, write_model
from deploykit.optimizers.base import Opener, StepResult
from deploykit.optimizers.prepare import prepare
from deploykit.optimizers.ranges import MinMax, collect_ranges
from deploykit.optimizers.select_nodes import check_excluded, select_nodes, watched_tensors
from deploykit.specs import Array, Signature, fit_feeds

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
    quantization = require("onnxruntime.quantization", extra="ort")
    prepared, notes = prepare(read_model(model), per_channel=config.per_channel)
    bits, why = _weight_bits(config.weight_bits)
    check_excluded(prepared, config.exclude)
    kept = [n.name for n in prepared.graph.node if n.name in config.exclude or n.op_type in config.exclude]
    # onnxruntime splits a Gemm into a MatMul of this name and an Add before it looks at the names.
    excluded = [*kept, *(f"{name}_MatMul" for name in kept)]
    if not any(n.op_type in config.ops for n in prepared.graph.node):
        kinds = sorted({n.op_type for n in prepared.graph.node})
        raise OptimizationError(
            f"nothing to quantize: the model has none of {', '.join(config.ops)} (it has {', '.join(kinds[:8])})",
            hint="convolutional models want: deploykit quantize static --data FILE",
        )
    try:
        with _no_advice():
            quantization.quantize_dynamic(
                prepared,
                str(target),
                op_types_to_quantize=list(config.ops),
                per_channel=config.per_channel,
                reduce_range=bits == 7,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=excluded,
                use_external_data_format=model_bytes(model) > 1_900_000_000,
                extra_options={"MatMulConstBOnly": True},
            )
    except OSError:
        raise
    except Exception as exc:
        raise OptimizationError(f"onnxruntime's dynamic quantizer failed ({first_line(exc)})") from exc
    result = read_model(target)
    quantized = sum(
        n.op_type.endswith(("MatMulInteger", "DynamicQuantizeLSTM", "QAttention")) for n in result.graph.node
    )
    # Embeddings become integers behind a DequantizeLinear.
    if not quantized and not any(n.op_type == "DequantizeLinear" for n in result.graph.node):
        raise OptimizationError(
            "nothing was quantized: no matrix product has constant weights",
            hint="use: deploykit quantize static --data FILE",
        )
    params = {
        "ops": list(config.ops),
        "per_channel": config.per_channel,
        "exclude": list(config.exclude),
        "weight_bits": bits,
        "integer_nodes": quantized,
    }
    return StepResult(True, (*notes, *why), params, _tools())


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
    prepared, notes = prepare(read_model(model), per_channel=config.per_channel)
    bits, why = _weight_bits(config.weight_bits)
    check_excluded(prepared, config.exclude)
    nodes = select_nodes(prepared, frozenset(config.exclude))
    if not nodes:
        raise OptimizationError(
            "nothing to quantize: no convolution or matrix product with constant weights is left",
            hint="drop --exclude, or keep this model in floating point",
        )
    tensors = watched_tensors(prepared, frozenset(nodes))
    count = _Counter()
    with tempfile.TemporaryDirectory(prefix="deploykit-quantize-") as folder:
        path = Path(folder) / "prepared.onnx"
        write_model(prepared, path)
        feeds = _feeds(signature_of(prepared), data, config, count)
        ranges, _ = collect_ranges(path, tensors, feeds, open_model, Path(folder))
    usable, unseen = _usable_nodes(prepared, nodes, ranges)
    if unseen:
        notes.append(f"{len(unseen)} nodes stay in floating point, without a finite range: {', '.join(unseen[:3])}")
    if not usable:
        raise OptimizationError(
            "nothing to quantize: no chosen node has a finite range", hint="check the calibration data"
        )
    _insert(prepared, usable, ranges, config, bits, target)
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
        "float_nodes": len(prepared.graph.node) - len(usable),
    }
    return StepResult(True, (*notes, *why), params, _tools())


class _Counter:
    def __init__(self) -> None:
        self.samples = 0


def _feeds(signature: Signature, data: Dataset, config: StaticConfig, count: _Counter) -> Iterator[dict[str, Array]]:
    """Batches of the size that the model takes: a fixed first axis decides."""
    fixed = [s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], int)]
    size = fixed[0] if fixed else config.batch_size
    limit = config.max_samples
    for batch in data.batches(size):
        have = len(next(iter(batch.values())))
        if fixed and have != size:
            break  # the incomplete rest
        if limit is not None and count.samples >= limit:
            break
        keep = have if limit is None or fixed else min(have, limit - count.samples)
        count.samples += keep
        yield fit_feeds(signature, {k: v[:keep] for k, v in batch.items() if k != LABELS})


def _usable_nodes(model: onnx.ModelProto, nodes: list[str], ranges: MinMax) -> tuple[list[str], list[str]]:
    """Split the chosen nodes by whether all their activations have a range."""
    usable: list[str] = []
    unseen: list[str] = []
    for name in nodes:
        seen = all(t in ranges.low for t in watched_tensors(model, frozenset({name})))
        (usable if seen else unseen).append(name)
    return usable, unseen


def _insert(
    model: onnx.ModelProto, nodes: list[str], ranges: MinMax, config: StaticConfig, bits: int, target: Path
) -> None:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

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
    kinds = {n.name: n.op_type for n in model.graph.node}
    try:
        quantizer = QDQQuantizer(
            model,
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
        with _no_advice():
            quantizer.quantize_model()
        _keep_floats(quantizer.model.model, frozenset(nodes))
        quantizer.model.topological_sort()  # ONNX wants it; the pairs were appended at the end
        made = quantizer.model.model
    except Exception as exc:
        raise OptimizationError(f"onnxruntime's Q/DQ insertion failed ({first_line(exc)})") from exc
    write_model(made, target)


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
