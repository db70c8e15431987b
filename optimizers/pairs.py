"""Q/DQ pairs around the chosen nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import OptimizationError, first_line
from deploykit.optimizers.islands import shield_floats
from deploykit.optimizers.lazy_weights import lazy_weights
from deploykit.optimizers.quantize_config import StaticConfig, no_advice
from deploykit.optimizers.ranges import Ranges
from deploykit.weights import LightModel

if TYPE_CHECKING:
    import onnx


def insert_pairs(
    light: LightModel, nodes: list[str], ranges: Ranges, config: StaticConfig, bits: int
) -> onnx.ModelProto:
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
        with no_advice(), lazy_weights(light.folder):
            quantizer.quantize_model()
        _keep_floats(quantizer.model.model, frozenset(nodes))
        shield_floats(quantizer.model.model, frozenset(nodes))
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
