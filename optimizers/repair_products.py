"""Repairs of transformers that change numbers, each by less than a step of the scale.

ONNX Runtime makes a MatMulIntegerToFloat or QGemm of a product of a dequantized activation and a stored weight. A
quantizer behind it would stand before the bias and the Gelu; the bias of a Gemm has to be int32. Each function changes
a graph in place and returns how often it applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploykit.optimizers.editor import attribute, is_op
from deploykit.optimizers.repair_pairs import DEQUANTIZE, QUANTIZE, PairEditor
from deploykit.optimizers.repair_place import bias_codes, store_bias

if TYPE_CHECKING:
    import onnx

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Flatten")
# What neither runtime computes faster from codes, or only at the price of a larger fusion in float.
_FLOAT_OPS = (
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Sigmoid", "Gelu", "Softmax", "LayerNormalization",
    "ReduceMean", "Where", "IsNaN", "Neg", "Exp", "Max",
)  # fmt: skip
# A step as large as this is no rounding: the range held the constant of an attention mask.
MASK_STEP = 1e6


def int32_biases(graph: PairEditor) -> int:
    """A float bias of an integer Gemm becomes int32: with another one it is computed in float, every weight anew."""
    count = 0
    for node in graph.nodes:
        if not is_op(node, "Gemm") or len(node.input) < 3 or not node.input[2]:
            continue
        source, weight, bias = (
            graph.pair_before(node.input[0]),
            graph.weight(node.input[1]),
            graph.values(node.input[2]),
        )
        if source is None or weight is None or bias is None or bias.dtype != np.float32:
            continue
        turned = int(attribute(node, "transB", 0))
        if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0):
            continue
        shape = graph.shape(weight[0].input[0])
        if shape is None or bias.size != shape[0 if turned else 1]:
            continue
        if not weight[1].per_tensor and weight[1].axis != (0 if turned else 1):
            continue
        made = bias_codes(bias, source[2], weight[1])
        if made is not None:
            store_bias(graph, node, *made)
            count += 1
    return count


def float_attention(graph: PairEditor) -> int:
    """Products of two activations are computed in float: their integer kernels are no faster, and round twice."""
    count = 0
    for node in graph.nodes:
        if not is_op(node, "MatMul") or any(graph.weight(n) or graph.stored(n) for n in node.input):
            continue
        for index in (0, 1):
            reader, name = _first_reader(graph, node, index)
            found = graph.pair(name)
            if found is not None and not _is_mask(found[2].scale):
                graph.set_input(reader, list(reader.input).index(name), found[0].input[0])
                count += 1
    return count


def _first_reader(graph: PairEditor, node: onnx.NodeProto, index: int) -> tuple[onnx.NodeProto, str]:
    """Go up from an input over what only moves values and has no other readers."""
    reader, name = node, node.input[index]
    while True:
        maker = graph.maker(name)
        if maker is None or not is_op(maker, *_MOVES) or graph.kept(name):
            return reader, name
        outputs = [o for o in maker.output if o]
        if any(graph.kept(o) for o in outputs) or sum(len(graph.readers(o)) for o in outputs) != 1:
            return reader, name
        reader, name = maker, maker.input[0]


def _is_mask(scale: np.ndarray) -> bool:
    return bool(np.any(scale > MASK_STEP))


def mask_ranges(graph: PairEditor) -> int:
    """How many quantizers have a range that holds the constant of an attention mask."""
    found = [graph.params(n) for n in graph.nodes if is_op(n, QUANTIZE)]
    return sum(p is not None and _is_mask(p.scale) for p in found)


def drop_idle_pairs(graph: PairEditor) -> int:
    """Take Q/DQ pairs away that stand between the float operators of a transformer, and behind its products.

    Convolutional trunks keep theirs: there, sums of codes are fast.
    """
    if not any(is_op(n, "LayerNormalization", "Erf", "Gelu") for n in graph.nodes):
        return 0
    count = 0
    for node in graph.nodes:
        if not is_op(node, QUANTIZE) or graph.kept(node.output[0]):
            continue
        params, maker = graph.params(node), graph.maker(node.input[0])
        if (
            params is None
            or maker is None
            or _is_mask(params.scale)
            or not is_op(maker, "MatMul", "Gemm", *_FLOAT_OPS, *_MOVES)
        ):
            continue
        readers = graph.readers(node.output[0])
        if not all(is_op(r, DEQUANTIZE) and not graph.kept(r.output[0]) for r in readers):
            continue
        if not all(_is_float(graph, r.output[0]) for r in readers):
            continue
        for reader in readers:
            graph.replace(reader.output[0], node.input[0])
        count += 1
    return count


def _is_float(graph: PairEditor, name: str) -> bool:
    """Whether all that read a tensor, over what moves it, compute in float."""
    for reader in graph.readers(name):
        if is_op(reader, *_MOVES):
            if not all(_is_float(graph, o) for o in reader.output):
                return False
        elif not is_op(reader, *_FLOAT_OPS):
            return False
    return not graph.kept(name)


def float_constants(graph: PairEditor) -> int:
    """Stored codes that a float operator reads become the numbers they stand for; the bits are the same."""
    count = 0
    for node in graph.nodes:
        found = graph.weight(node.output[0]) if is_op(node, DEQUANTIZE) else None
        if found is None or graph.kept(node.output[0]):
            continue
        readers = graph.readers(node.output[0])
        codes = graph.values(node.input[0])
        if codes is None or codes.size > 1 << 20 or found[1].scale.dtype != np.float32 or not found[1].per_tensor:
            continue
        if not all(is_op(r, *_FLOAT_OPS) and not _sums_codes(graph, r) for r in readers):
            continue
        numbers = (codes.astype(np.int32) - found[1].zero.astype(np.int32)).astype(np.float32) * found[1].scale
        stored = graph.add_constant(f"{node.output[0]}_float", numbers.astype(np.float32))
        count += graph.replace(node.output[0], stored)
    return count


def _sums_codes(graph: PairEditor, node: onnx.NodeProto) -> bool:
    """Whether a node is one of those that ONNX Runtime computes on codes, between a DQ and a Q node."""
    return is_op(node, "Add", "Mul", "Where") and any(is_op(r, QUANTIZE) for r in graph.readers(node.output[0]))


def fold_factors(graph: PairEditor) -> int:
    """A constant factor behind a layer normalization that nobody else reads (SmoothQuant's) moves into its weights."""
    count = 0
    for node in graph.nodes:
        if not is_op(node, "Mul"):
            continue
        for index in (0, 1):
            factor, norm = graph.constant(node.input[index]), graph.maker(node.input[1 - index], "LayerNormalization")
            if factor is None or norm is None or graph.reader(norm.output[0]) is not node:
                continue
            weights = [graph.constant(n) for n in norm.input[1:] if n]
            if any(w is None or w.ndim != 1 or factor.size not in (1, w.size) for w in weights):
                continue
            if factor.ndim and factor.shape[-1] != factor.size:
                continue
            for position, weight in enumerate(weights, start=1):
                made = graph.add_constant(f"{norm.input[position]}_scaled", np.asarray(weight * factor.reshape(-1)))
                graph.set_input(norm, position, made)
            count += graph.replace(node.output[0], norm.output[0])
            break
    return count
