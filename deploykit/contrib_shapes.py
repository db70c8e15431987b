"""Shapes that come out of ONNX Runtime's own operators (`com.microsoft`), which ONNX's inference does not know.

After the operators' documentation: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, ...]
# Shapes of the inputs (None where missing or not known) and attributes -> shapes of the outputs.
Rule = Callable[[Sequence[Shape | None], Mapping[str, Any]], list[Shape | None]]


def _need(shapes: Sequence[Shape | None], index: int) -> Shape:
    found = shapes[index] if index < len(shapes) else None
    if found is None:
        raise ValueError(f"the shape of input {index} is not known")
    return found


def _same(shapes: Sequence[Shape | None], attributes: Mapping[str, Any]) -> list[Shape | None]:
    return [_need(shapes, 0)]


def _matmul(a: int, b: int) -> Rule:
    def rule(shapes: Sequence[Shape | None], attributes: Mapping[str, Any]) -> list[Shape | None]:
        left, right = list(_need(shapes, a)), list(_need(shapes, b))
        if attributes.get("transA"):
            left[-1], left[-2] = left[-2], left[-1]
        if attributes.get("transB"):
            right[-1], right[-2] = right[-2], right[-1]
        batch = np.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2]))
        return [(*batch, left[-2], right[-1]) if len(left) > 1 else (*batch, right[-1])]

    return rule


def _gemm(a: int, b: int) -> Rule:
    def rule(shapes: Sequence[Shape | None], attributes: Mapping[str, Any]) -> list[Shape | None]:
        left, right = _need(shapes, a), _need(shapes, b)
        rows = left[1] if attributes.get("transA") else left[0]
        return [(rows, right[0] if attributes.get("transB") else right[1])]

    return rule


def _broadcast(a: int, b: int) -> Rule:
    return lambda shapes, attributes: [tuple(np.broadcast_shapes(_need(shapes, a), _need(shapes, b)))]


def _nbits(shapes: Sequence[Shape | None], attributes: Mapping[str, Any]) -> list[Shape | None]:
    return [(*_need(shapes, 0)[:-1], int(attributes["N"]))]


def _attention(shapes: Sequence[Shape | None], attributes: Mapping[str, Any]) -> list[Shape | None]:
    batch, length, _ = _need(shapes, 0)
    sizes = attributes.get("qkv_hidden_sizes")
    return [(batch, length, int(sizes[2]) if sizes else _need(shapes, 1)[1] // 3)]


def _multi_head(shapes: Sequence[Shape | None], attributes: Mapping[str, Any]) -> list[Shape | None]:
    query = _need(shapes, 0)
    value = shapes[2] if len(shapes) > 2 else None
    if len(query) == 5:  # query, key and value packed: batch, length, heads, 3, head size
        return [(query[0], query[1], query[2] * query[4])]
    hidden = query[-1] if value is None else value[1] * value[3] if len(value) == 4 else value[-1]
    return [(*query[:2], hidden)]


def _group_query(shapes: Sequence[Shape | None], attributes: Mapping[str, Any]) -> list[Shape | None]:
    query = _need(shapes, 0)
    if len(shapes) > 1 and shapes[1] is not None:
        return [query]
    heads, groups = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
    return [(*query[:-1], query[-1] // (heads + 2 * groups) * heads)]


def _embeddings(shapes: Sequence[Shape | None], attributes: Mapping[str, Any]) -> list[Shape | None]:
    batch, length = _need(shapes, 0)
    return [(batch, length, _need(shapes, 2)[1]), (batch,)]


_MICROSOFT: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasAdd", "SkipLayerNormalization", "GroupNorm",
            "SkipSimplifiedLayerNormalization", "RotaryEmbedding", "QLinearSigmoid", "QLinearLeakyRelu", "Trilu",
            "QLinearSoftmax", "QuantizeLinear", "DequantizeLinear", "BiasSoftmax", "GemmaRotaryEmbedding",
            "SkipGroupNorm", "Inverse",
        ),
        _same,
    ),
    "FusedMatMul": _matmul(0, 1),
    "TransposeMatMul": _matmul(0, 1),
    "MatMulIntegerToFloat": _matmul(0, 1),
    "MatMulInteger16": _matmul(0, 1),
    "DynamicQuantizeMatMul": _matmul(0, 1),
    "FusedGemm": _gemm(0, 1),
    "QGemm": _gemm(0, 3),
    "QLinearAdd": _broadcast(0, 3),
    "QLinearMul": _broadcast(0, 3),
    "MatMulNBits": _nbits,
    "MatMulBnb4": _nbits,
    "Attention": _attention,
    "QAttention": _attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _group_query,
    "EmbedLayerNormalization": _embeddings,
}  # fmt: skip
CONTRIB_SHAPES: dict[str, dict[str, Rule]] = {"com.microsoft": _MICROSOFT}
