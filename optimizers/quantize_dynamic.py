"""Dynamic quantization: int8 weights, activations quantized while the model runs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import OptimizationError, first_line
from deploykit.extras import require
from deploykit.optimizers.base import StepResult
from deploykit.optimizers.editing import own_copy
from deploykit.optimizers.embeddings import quantize_embeddings
from deploykit.optimizers.lazy_weights import lazy_weights
from deploykit.optimizers.prepare import infer_shapes, prepare
from deploykit.optimizers.quantize_config import SMOOTH, DynamicConfig, no_advice, tools, weight_bits
from deploykit.optimizers.rewrite import rewrite
from deploykit.optimizers.scheme import Scheme
from deploykit.optimizers.select_nodes import check_excluded, dynamic_nodes, kept_float
from deploykit.optimizers.smooth_quant import smooth_norms
from deploykit.weights import LightModel, open_light, write_copy, write_light

if TYPE_CHECKING:
    import onnx


def quantize_dynamic(model: Path, config: DynamicConfig, target: Path, keep_float: Path | None = None) -> StepResult:
    """Quantize weights of matrix products, recurrences and embeddings.

    Args:
        model: Floating-point ONNX file.
        config: What to quantize.
        target: Where the result goes.
        keep_float: Where the graph goes as it is before it is quantized.

    Raises:
        OptimizationError: Nothing to quantize, or the quantizer failed.
    """
    require("onnxruntime.quantization", extra="ort")
    bits, why = weight_bits(config.weight_bits)
    if config.smooth not in SMOOTH:
        raise OptimizationError(f"smooth {config.smooth!r}", expected=" or ".join(SMOOTH))
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=target.parent) as scratch:
        light = open_light(model, Path(scratch))
        prepared, notes = prepare(light.proto, per_channel=config.per_channel)
        notes += rewrite(prepared)
        prepared = infer_shapes(prepared)
        if config.smooth == "auto" and any(n.op_type == "LayerNormalization" for n in prepared.graph.node):
            light = own_copy(LightModel(prepared, light.folder), Path(scratch) / "own")
            chosen, _ = dynamic_nodes(prepared, config.ops, kept_float(prepared, config.exclude))
            notes += smooth_norms(light, chosen, Scheme(bits, config.per_channel))
        notes += rewrite(prepared, last=True)
        prepared = infer_shapes(prepared)
        check_excluded(prepared, config.exclude)
        nodes, other = dynamic_nodes(prepared, config.ops, kept_float(prepared, config.exclude))
        if not nodes:
            raise _nothing_dynamic(prepared, config.ops, other)
        kinds = {n.name: n.op_type for n in prepared.graph.node}
        if keep_float is not None:
            write_copy(LightModel(prepared, light.folder), keep_float)
        light = LightModel(prepared, light.folder)
        embeddings = quantize_embeddings(light, kept_float(prepared, config.exclude)) if "Gather" in config.ops else []
        nodes = [name for name in nodes if kinds[name] != "Gather"]
        made = _dynamic(light, config, nodes, bits) if nodes else light.proto
        quantized = sum(
            n.op_type.endswith(("MatMulInteger", "DynamicQuantizeLSTM", "QAttention")) for n in made.graph.node
        )
        if not quantized and not embeddings:
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
        "smooth": config.smooth,
        "integer_nodes": quantized,
        "embeddings": len(embeddings),
    }
    return StepResult(True, (*notes, *why), params, tools())


def _nothing_dynamic(model: onnx.ModelProto, ops: Sequence[str], other: str | None) -> OptimizationError:
    kinds = sorted({n.op_type for n in model.graph.node})
    if other is not None:
        return OptimizationError(
            f"nothing to quantize: the weights are {other}", expected="float32", hint="export the model in float32"
        )
    if _inside(model.graph, ops):
        return OptimizationError(
            f"nothing to quantize: outside the branches of If and the bodies of Loop and Scan there is none of "
            f"{', '.join(ops)} with constant weights",
            hint="export the branch that is needed as a model of its own, or keep it in floating point",
        )
    has = f" (it has {', '.join(kinds[:8])})" if kinds else ""
    convolutions = "convolutional models want: deploykit quantize static --data FILE"
    return OptimizationError(
        f"nothing to quantize: the model has none of {', '.join(ops)} with constant weights{has}",
        hint=convolutions
        if "Conv" in kinds
        else "simplify it first (deploykit simplify), or keep it in floating point",
    )


def _inside(graph: onnx.GraphProto, ops: Sequence[str]) -> bool:
    """Whether one of these operators stands in a graph that a node holds."""
    held = [g for node in graph.node for a in node.attribute for g in (a.g, *a.graphs)]
    return any(node.op_type in ops for g in held for node in g.node) or any(_inside(g, ops) for g in held)


def _dynamic(light: LightModel, config: DynamicConfig, nodes: list[str], bits: int) -> onnx.ModelProto:
    """Run onnxruntime's quantizer on the chosen nodes."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode, add_infer_metadata

    try:
        with no_advice(), lazy_weights(light.folder):
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
                sorted({*config.ops, *(["MatMul"] if "Gemm" in config.ops else [])} - {"Gather"}),
                {"MatMulConstBOnly": True},
            )
            quantizer.quantize_model()
    except OSError:
        raise
    except Exception as exc:
        raise OptimizationError(f"onnxruntime's dynamic quantizer failed ({first_line(exc)})") from exc
    made: onnx.ModelProto = quantizer.model.model
    return made
