"""Nodes that stay in floating point among quantized ones, kept so.

ONNX Runtime quantizes them itself: where a Conv, ConvTranspose or Gemm reads a DequantizeLinear and writes to a
QuantizeLinear, its optimizer (WeightBiasQuantization) rounds the float weights, with one scale for all channels, and
runs the node in integers. What was left out because 8 bits destroy it would be destroyed all the same.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_TAKEN = ("Conv", "ConvTranspose", "Gemm")
_SKIPPED = ("Relu", "Clip")
_BOUNDS = ("float_island_lowest", "float_island_highest")


def shield_floats(model: onnx.ModelProto, quantized: Set[str]) -> int:
    """Put a Clip without effect between a DequantizeLinear and such a node, in place; runtimes do not look through it.

    Args:
        model: With Q/DQ pairs, in any order of its nodes.
        quantized: Names of the nodes that were chosen.

    Returns:
        How many nodes were shielded.
    """
    from onnx import helper, numpy_helper

    made_by = {o: n for n in model.graph.node for o in n.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    stored = {t.name for t in model.graph.initializer}
    added = []
    for node in model.graph.node:
        if node.op_type not in _TAKEN or node.name in quantized or node.input[1] not in stored:
            continue
        maker = made_by.get(node.input[0])
        if maker is None or maker.op_type != "DequantizeLinear" or not _is_quantized_next(node, readers):
            continue
        shielded = f"{node.name}_float_input"
        added.append(helper.make_node("Clip", [node.input[0], *_BOUNDS], [shielded], name=f"{shielded}_clip"))
        node.input[0] = shielded
    if added:
        model.graph.node.extend(added)
        limits = np.finfo(np.float32)
        model.graph.initializer.extend(
            numpy_helper.from_array(np.array(v, np.float32), n)
            for n, v in zip(_BOUNDS, (limits.min, limits.max), strict=True)
        )
    return len(added)


def _is_quantized_next(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> bool:
    found = readers.get(node.output[0], [])
    while len(found) == 1 and found[0].op_type in _SKIPPED:
        found = readers.get(found[0].output[0], [])
    return any(n.op_type == "QuantizeLinear" for n in found)
