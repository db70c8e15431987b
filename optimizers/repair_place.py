"""Repairs of convolutional nets that change numbers, each by less than a step of the scale.

ONNX Runtime makes a QLinearConv of a convolution only where it reads a tensor with one scale and one quantizer alone
reads it. Each function changes a graph in place and returns how often it applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.optimizers.editor import attribute, is_op
from deploykit.optimizers.repair_pairs import DEQUANTIZE, QUANTIZE, PairEditor, Params
from deploykit.optimizers.repair_types import clip_bounds, family, saturates

if TYPE_CHECKING:
    import onnx

    from deploykit.specs import Array

_INT32_LIMIT = 2.0**31 - 1
_CODES = 255  # steps of uint8
_HALF_CODES = 127  # steps of int8 above its middle
# ONNX Runtime carries a pair over these.
_CARRIED = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool")
_PAD_VALUE = 2  # of Pad's inputs


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
    """A Relu or Clip, if any, between a convolution and the Q node that alone reads it, and the convolution."""
    source, reader, between = node.input[0], node, graph.maker(node.input[0])
    bounds = clip_bounds(graph, between) if between is not None else None
    if (
        between is not None
        and graph.reader(source) is node
        and (is_op(between, "Relu", "LeakyRelu") or (bounds is not None and saturates(params, *bounds)))
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


def drop_before_clips(graph: PairEditor) -> int:
    """Take a Q/DQ pair away that stands before a Relu or Clip with a quantizer of its own behind it.

    What is left rounds once instead of twice.
    """
    count = 0
    for node in graph.nodes:
        if clip_bounds(graph, node) is None or graph.reader(node.output[0], QUANTIZE) is None:
            continue
        found = graph.pair(node.input[0])
        if found is None or graph.reader(node.input[0]) is not node:
            continue
        quantize, dequantize, _ = found
        if graph.reader(quantize.output[0]) is dequantize and graph.reader(quantize.input[0]) is quantize:
            graph.set_input(node, 0, quantize.input[0])
            count += 1
    return count


def unsign_positive(graph: PairEditor) -> int:
    """Codes that are symmetric about zero, of numbers that are never negative, get all 255 steps for the positive half.

    Half of the codes were unused, and a Relu is fused with a convolution only where zero is the smallest code.
    """
    count = 0
    for node in graph.nodes:
        params = graph.params(node) if is_op(node, QUANTIZE) else None
        if params is None or not params.per_tensor or params.zero.dtype != np.uint8 or int(params.zero.item()) != 128:
            continue
        maker = graph.maker(node.input[0])
        bounds = clip_bounds(graph, maker) if maker is not None else None
        if bounds is None or bounds[0] < 0:
            continue
        members = family(graph, node)
        both = [(m, graph.params(m)) for m in members if is_op(m, QUANTIZE, DEQUANTIZE)]
        others = any(is_op(m, QUANTIZE) and m is not node for m in members)
        if not members or others or any(p is None or not p.same(params) for _, p in both):
            continue
        finer = Params(
            np.asarray(params.scale * params.scale.dtype.type(_HALF_CODES / _CODES)).reshape(()),
            np.zeros((), np.uint8),
            0,
        )
        readers = [r for m, _ in both if is_op(m, DEQUANTIZE) for r in graph.readers(m.output[0])]
        biases = [(r, _bias_for(graph, r, finer)) for r in readers if _has_codes_as_bias(graph, r)]
        fitting = [(r, found) for r, found in biases if found is not None]
        if len(fitting) < len(biases):
            continue  # a bias would leave the range of int32
        for member, _ in both:
            graph.set_params(member, finer)
        for reader, (codes, scale) in fitting:
            store_bias(graph, reader, codes, scale)
        count += 1
    return count


def _has_codes_as_bias(graph: PairEditor, node: onnx.NodeProto) -> bool:
    """Whether a product reads an int32 bias, whose scale kernels take to be the input's times the weight's."""
    if not is_op(node, "Conv", "ConvTranspose", "Gemm") or len(node.input) < 3 or not node.input[2]:
        return False
    found = graph.weight(node.input[2])
    return found is not None and found[1].zero.dtype == np.int32


def _bias_for(graph: PairEditor, node: onnx.NodeProto, params: Params) -> tuple[Array, Array] | None:
    """The int32 bias of a product in the units that another input scale makes."""
    found, weight = graph.weight(node.input[2]), graph.weight(node.input[1])
    codes = graph.values(found[0].input[0]) if found else None
    if found is None or weight is None or codes is None:
        return None
    return bias_codes(np.asarray(codes * found[1].scale.astype(np.float64).reshape(-1)), params, weight[1])


def bias_codes(bias: Array, params: Params, weight: Params) -> tuple[Array, Array] | None:
    """A bias as int32 with the scale that integer kernels imply: the input's times the weight's.

    Returns:
        Codes and scale; None where they do not fit into int32.
    """
    scale = np.asarray(params.scale * weight.scale.reshape(-1), np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = np.rint(bias.reshape(-1).astype(np.float64) / scale.astype(np.float64))
    if not np.all(np.abs(codes) <= _INT32_LIMIT):
        return None
    return codes.astype(np.int32), scale


def store_bias(graph: PairEditor, node: onnx.NodeProto, codes: Array, scale: Array) -> None:
    """Let a product read this bias."""
    scale = scale.reshape(()) if scale.size == 1 else scale
    stored = graph.add_constant(f"{node.output[0]}_bias", codes)
    zero = graph.store(f"{node.output[0]}_bias_zero_point", np.zeros(scale.shape, np.int32))
    extra: dict[str, Any] = {"axis": 0} if scale.size > 1 else {}
    inputs = [stored, graph.store(f"{node.output[0]}_bias_scale", scale), zero]
    graph.set_input(node, 2, graph.add(DEQUANTIZE, inputs, f"{node.output[0]}_bias_dequantized", **extra))


def quantize_sums(graph: PairEditor) -> int:
    """A convolution whose output goes into a quantized sum in float gets a quantizer.

    Its range follows: what is outside makes a sum that the quantizer behind it saturates.
    """
    count = 0
    for node in graph.nodes:
        total = _quantizer_behind(graph, node.output[0]) if is_op(node, "Add") else None
        if total is None:
            continue
        for index in (0, 1):
            other, product = graph.pair(node.input[1 - index]), graph.maker(node.input[index], "Conv")
            if other is None or product is None or graph.reader(node.input[index]) is not node:
                continue
            if graph.pair_before(product.input[0]) is None or graph.weight(product.input[1]) is None:
                continue
            if not other[2].per_tensor or other[2].zero.dtype != np.uint8:
                continue
            low = float(total.lowest().item()) - float(other[2].highest().item())
            high = float(total.highest().item()) - float(other[2].lowest().item())
            scale = np.asarray((high - low) / _CODES, np.float32)
            zero = np.asarray(np.clip(np.rint(-low / scale), 0, _CODES), np.uint8)
            graph.set_input(node, index, graph.add_pair(node.input[index], Params(scale, zero, 0)))
            count += 1
            break
    return count


def _quantizer_behind(graph: PairEditor, name: str) -> Params | None:
    """Parameters of the quantizer that alone reads a tensor, directly or behind a Relu or Clip that it implies."""
    reader = graph.reader(name)
    params = graph.params(reader) if reader is not None and is_op(reader, QUANTIZE) else None
    if reader is not None and params is None:
        bounds, behind = clip_bounds(graph, reader), graph.reader(reader.output[0], QUANTIZE)
        params = graph.params(behind)
        if bounds is None or params is None or not saturates(params, *bounds):
            return None
    return params if params is not None and params.per_tensor and params.zero.dtype == np.uint8 else None


def repeat_behind_moves(graph: PairEditor) -> int:
    """A product or convolution behind a Flatten or Pad gets the pair before that once more.

    ONNX Runtime carries a pair over a Reshape or Transpose, and not over these. Zeros are codes of every pair.
    """
    count = 0
    for node in graph.nodes:
        if not is_op(node, "Conv", "Gemm", "MatMul") or graph.weight(node.input[1]) is None:
            continue
        name, carried = node.input[0], True
        while (maker := graph.maker(name)) is not None:
            if not is_op(maker, *_CARRIED, "Flatten") and not _pads_zeros(graph, maker):
                break
            carried &= is_op(maker, *_CARRIED)
            name = maker.input[0]
        found = None if carried else graph.pair(name)
        if found is not None and found[2].per_tensor:
            graph.set_input(node, 0, graph.add_pair(node.input[0], found[2]))
            count += 1
    return count


def _pads_zeros(graph: PairEditor, node: onnx.NodeProto) -> bool:
    if not is_op(node, "Pad") or attribute(node, "mode", b"constant") != b"constant":
        return False
    return len(node.input) <= _PAD_VALUE or not node.input[_PAD_VALUE] or graph.scalar(node.input[_PAD_VALUE]) == 0


def read_codes(graph: PairEditor) -> int:
    """All readers of a convolution get its dequantized output, so that the quantizer alone reads the float one."""
    count = 0
    for node in graph.nodes:
        if not is_op(node, "Conv") or graph.kept(node.output[0]) or graph.weight(node.input[1]) is None:
            continue
        readers = graph.readers(node.output[0])
        quantizers = [r for r in readers if is_op(r, QUANTIZE)]
        if len(quantizers) != 1 or len(readers) == 1:
            continue
        dequantize = next((r for r in graph.readers(quantizers[0].output[0]) if is_op(r, DEQUANTIZE)), None)
        found = graph.pair(dequantize.output[0]) if dequantize is not None else None
        if dequantize is None or found is None or not found[2].per_tensor:
            continue
        for reader in readers:
            for index, name in enumerate(reader.input):
                if reader is not quantizers[0] and name == node.output[0]:
                    graph.set_input(reader, index, dequantize.output[0])
        count += 1
    return count
