"""Repairs that change numbers, each by less than a step of the scale: Q/DQ pairs moved to where runtimes fuse.

ONNX Runtime makes a QLinearConv of a convolution only where it reads one dequantized tensor with one scale and one
quantizer reads it; a matrix product becomes a MatMulIntegerToFloat only where no quantizer reads it. Each function
changes a graph in place and returns how often it applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deploykit.optimizers.editor import attribute, is_op
from deploykit.optimizers.repair_pairs import DEQUANTIZE, QUANTIZE, PairEditor, Params, one
from deploykit.optimizers.repair_types import clip_bounds, saturates, spread

if TYPE_CHECKING:
    import onnx

    from deploykit.specs import Array

_CONV = ("Conv", "ConvTranspose")
_INT32_LIMIT = 2**30


def one_scale_for_depthwise(graph: PairEditor) -> int:
    """One scale an activation instead of one a channel, where a depthwise convolution reads it.

    The codes stay the same: the product before it is scaled so that all channels fill the range of the largest, and
    the depthwise weights take that back. Both are scales only; rounding of these is all that changes.
    """
    count = 0
    for node in graph.nodes:
        params = graph.params(node) if is_op(node, QUANTIZE) else None
        if params is None or params.per_tensor or params.axis != 1 or np.ptp(params.zero) or graph.kept(node.output[0]):
            continue
        between, product = _product_before(graph, node, params)
        if product is None:
            continue
        readers = _depthwise_readers(graph, node, params)
        if readers is None or not np.all(params.scale > 0):
            continue
        largest = params.scale.max()
        if not _scale_product(graph, product, largest / params.scale):
            continue
        single = Params(np.asarray(largest), params.zero.reshape(-1)[:1].reshape(()), 0)
        graph.set_params(node, single)
        if between is not None and is_op(between, "Clip"):
            graph.replace(between.output[0], between.input[0])  # its bound has moved, and the quantizer implies it
        for dequantize, convolution in readers:
            graph.set_params(dequantize, single)
            _scale_weight(graph, convolution, params.scale / largest)
        count += 1
    return count


def _product_before(
    graph: PairEditor, node: onnx.NodeProto, params: Params
) -> tuple[onnx.NodeProto | None, onnx.NodeProto | None]:
    """What stands between a convolution and the Q node that alone reads it, and the convolution; it lets factors through."""
    source, reader, between = node.input[0], node, graph.maker(node.input[0])
    bounds = clip_bounds(graph, between) if between is not None else None
    if between is not None and graph.reader(source) is node and (
        is_op(between, "Relu", "LeakyRelu") or (bounds is not None and saturates(params, *bounds))
    ):
        source, reader = between.input[0], between
    else:
        between = None
    product = graph.maker(source, "Conv")
    return (between, product) if product is not None and graph.reader(source) is reader else (None, None)


def _depthwise_readers(
    graph: PairEditor, node: onnx.NodeProto, params: Params
) -> list[tuple[onnx.NodeProto, onnx.NodeProto]] | None:
    """The DQ nodes behind a Q node with the depthwise convolutions that read them; None where others read too."""
    found = []
    for dequantize in graph.readers(node.output[0]):
        mine = graph.params(dequantize) if is_op(dequantize, DEQUANTIZE) else None
        if mine is None or not mine.same(params) or graph.kept(dequantize.output[0]):
            return None
        for reader in graph.readers(dequantize.output[0]):
            weight = graph.weight(reader.input[1]) if is_op(reader, "Conv") else None
            if weight is None or int(attribute(reader, "group", 1)) != params.scale.size:
                return None
            if not weight[1].per_tensor and weight[1].axis != 0:
                return None
            found.append((dequantize, reader))
    return found


def _scale_product(graph: PairEditor, node: onnx.NodeProto, factor: Array) -> bool:
    """Multiply the outputs of a convolution with stored weights, a channel; False where that cannot be done."""
    weight = graph.weight(node.input[1])
    if weight is None or (not weight[1].per_tensor and weight[1].axis != 0):
        return False
    if len(node.input) > 2 and node.input[2]:
        bias, codes = graph.values(node.input[2]), graph.weight(node.input[2])
        if bias is not None:
            made = graph.add_constant(f"{node.input[2]}_scaled", (bias * factor).astype(bias.dtype))
            graph.set_input(node, 2, made)
        elif codes is not None:
            _rescale(graph, node, 2, factor)
        else:
            return False
    _rescale(graph, node, 1, factor)
    return True


def _scale_weight(graph: PairEditor, node: onnx.NodeProto, factor: Array) -> None:
    """Multiply the weights of a depthwise convolution, a channel of its input."""
    shape = graph.shape(node.input[1]) or graph.shape(graph.weight(node.input[1])[0].input[0])  # type: ignore[index]
    outputs = int((shape or [factor.size])[0] or factor.size)
    _rescale(graph, node, 1, np.repeat(factor, outputs // factor.size))


def _rescale(graph: PairEditor, node: onnx.NodeProto, index: int, factor: Array) -> None:
    """Give a node's stored weight scales multiplied with a factor an output channel; other readers keep theirs."""
    found = graph.weight(node.input[index])
    if found is None:
        return
    dequantize, params = found
    scale = (params.scale.reshape(-1) * factor.reshape(-1)).astype(params.scale.dtype)
    zero = np.broadcast_to(params.zero.reshape(-1), scale.shape).copy()
    name = dequantize.input[0]
    stored = [
        name,
        graph.store(f"{node.input[index]}_scale", scale),
        graph.store(f"{node.input[index]}_zero_point", zero),
    ]
    graph.set_input(node, index, graph.add(DEQUANTIZE, stored, f"{node.input[index]}_rescaled", axis=0))
