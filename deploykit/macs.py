"""Multiply-accumulates of one node, from the shapes of its tensors.

Counted is what convolutions, matrix products, recurrences and attention multiply and add; one multiplication with its
addition is one MAC (half of the FLOPs that other tools report). Elementwise work, normalization, pooling and resampling
have none by convention. An operator that does such work and is not known here is reported, never taken for 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploykit.shaping import Value

if TYPE_CHECKING:
    import onnx

Dims = tuple[int, ...]


class UncountedError(Exception):
    """The node computes, and how much cannot be said."""


class _Shapes:
    """Known shapes of a node's inputs and outputs; asking for one that is not known ends the count."""

    def __init__(self, inputs: Sequence[Value | None], outputs: Sequence[Value | None], attributes: Mapping[str, Any]):
        self.attributes = attributes
        self._inputs, self._outputs = inputs, outputs

    def input(self, index: int) -> Dims:
        return self._dims(self._inputs, index, "input")

    def output(self, index: int = 0) -> Dims:
        return self._dims(self._outputs, index, "output")

    def has(self, index: int) -> bool:
        return index < len(self._inputs) and self._inputs[index] is not None

    def number(self, name: str, default: int | None = None) -> int:
        found = self.attributes.get(name, default)
        if found is None:
            raise UncountedError(f"it has no attribute {name}")
        return int(found)

    def _dims(self, values: Sequence[Value | None], index: int, role: str) -> Dims:
        value = values[index] if index < len(values) else None
        if value is None or value.dims is None:
            raise UncountedError(f"the shape of {role} {index} is not known")
        return value.dims


Rule = Callable[[_Shapes], int]


def _conv(weight: int) -> Rule:
    def rule(s: _Shapes) -> int:
        kernel = s.input(weight)  # outputs, inputs / groups, then the window
        channels = kernel[1] * s.number("group", 1)
        if s.input(0)[1] != channels:
            raise UncountedError(f"the weight is for {channels} channels, and the input has {s.input(0)[1]}")
        return math.prod(s.output()) * math.prod(kernel[1:])

    return rule


def _conv_transpose(s: _Shapes) -> int:
    return math.prod(s.input(0)) * math.prod(s.input(1)[1:])  # inputs, outputs / groups, then the window


def _matmul(a: int) -> Rule:
    def rule(s: _Shapes) -> int:
        left = s.input(a)
        inner = left[-2] if s.attributes.get("transA") and len(left) > 1 else left[-1]
        return math.prod(s.output()) * inner

    return rule


def _gemm(a: int) -> Rule:
    def rule(s: _Shapes) -> int:
        left = s.input(a)
        return math.prod(s.output()) * (left[0] if s.attributes.get("transA") else left[1])

    return rule


def _recurrent(s: _Shapes) -> int:
    """LSTM, GRU and RNN: W is (directions, gates * hidden, inputs) and R the same with hidden for inputs."""
    x = s.input(0)
    return x[0] * x[1] * (math.prod(s.input(1)) + math.prod(s.input(2)))


def _einsum(s: _Shapes) -> int:
    equation = s.attributes["equation"]
    text = re.sub(r"\s", "", equation.decode() if isinstance(equation, bytes) else str(equation))
    terms = text.partition("->")[0].split(",")
    if len(terms) == 1:
        return 0
    if len(terms) > 2:
        raise UncountedError(f"the order of the products in {text!r} is the runtime's choice")
    sizes: dict[str, int] = {}
    for index, term in enumerate(terms):
        shape = s.input(index)
        letters = term.replace("...", "")
        extra = len(shape) - len(letters)
        head = term.index("...") if "..." in term else len(letters)
        # The broadcast axes of "..." count from the right.
        names = [*letters[:head], *(f"...{extra - i}" for i in range(extra)), *letters[head:]]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    return math.prod(sizes.values())


def _attention_core(batch: int, length: int, total: int, qk: int, v: int) -> int:
    """Scores and weighted values: ``qk`` and ``v`` are hidden sizes over all heads of the query."""
    return batch * length * total * (qk + v)


def _contrib_attention(s: _Shapes) -> int:
    (batch, length, width), (_, merged) = s.input(0), s.input(1)
    sizes = s.attributes.get("qkv_hidden_sizes") or [merged // 3] * 3
    past = s.input(4)[3] if s.has(4) and len(s.input(4)) == 5 else 0
    return batch * length * width * merged + _attention_core(batch, length, length + past, sizes[0], sizes[2])


def _multi_head(s: _Shapes) -> int:
    query = s.input(0)
    if len(query) == 5:
        batch, length, heads, _, size = query
        return _attention_core(batch, length, length, heads * size, heads * size)
    if len(query) != 3 or not s.has(1):
        raise UncountedError("its layout is not known here")
    key = s.input(1)
    total = key[2] if len(key) == 4 else key[1]
    if s.has(6):
        total += s.input(6)[2]
    return _attention_core(query[0], query[1], total, query[2], s.output()[-1])


def _group_query(s: _Shapes) -> int:
    query, out = s.input(0), s.output()
    past = s.input(3)[2] if s.has(3) else 0
    return _attention_core(query[0], query[1], query[1] + past, out[-1], out[-1])


def _standard_attention(s: _Shapes) -> int:
    """`Attention` of opset 23: inputs of rank 4 (batch, heads, length, size) or 3 (batch, length, heads * size)."""
    query, key, value = s.input(0), s.input(1), s.input(2)
    past = s.input(4)[2] if s.has(4) else 0
    if len(query) == 4:
        return query[0] * query[1] * query[2] * (key[2] + past) * (query[3] + value[3])
    heads, groups = s.number("q_num_heads"), s.number("kv_num_heads")
    total = key[1] + past
    return query[0] * query[1] * total * (query[2] + heads * value[2] // groups)


def _nbits(s: _Shapes) -> int:
    return math.prod(s.output()) * s.number("K")


_RULES: dict[str, dict[str, Rule]] = {
    "": {
        "Conv": _conv(1),
        "ConvInteger": _conv(1),
        "QLinearConv": _conv(3),
        "DeformConv": _conv(1),
        "ConvTranspose": _conv_transpose,
        "MatMul": _matmul(0),
        "MatMulInteger": _matmul(0),
        "QLinearMatMul": _matmul(0),
        "Gemm": _gemm(0),
        "LSTM": _recurrent,
        "GRU": _recurrent,
        "RNN": _recurrent,
        "Einsum": _einsum,
        "Attention": _standard_attention,
    },
    "com.microsoft": {
        "FusedMatMul": _matmul(0),
        "TransposeMatMul": _matmul(0),
        "MatMulIntegerToFloat": _matmul(0),
        "MatMulInteger16": _matmul(0),
        "DynamicQuantizeMatMul": _matmul(0),
        "FusedGemm": _gemm(0),
        "QGemm": _gemm(0),
        "FusedConv": _conv(1),
        "MatMulNBits": _nbits,
        "MatMulBnb4": _nbits,
        "DynamicQuantizeLSTM": _recurrent,
        "Attention": _contrib_attention,
        "QAttention": _contrib_attention,
        "MultiHeadAttention": _multi_head,
        "GroupQueryAttention": _group_query,
    },
}
# Standard operators that multiply and add in bulk, and for which no such count is agreed on.
_BULK = frozenset({"DFT", "STFT", "LinearAttention", "CausalConvWithState", "Det"})
# Of the runtime's own operators, those that only move, scale or look up.
_FREE_CONTRIB = frozenset(
    {
        "BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "BitmaskBiasDropout", "BitmaskDropout",
        "CropAndResize", "DequantizeLinear", "EmbedLayerNormalization", "ExpandDims", "FastGelu",
        "GatherBlockQuantized",
        "GatherND", "Gelu", "GemmaRotaryEmbedding", "GridSample", "GroupNorm", "IsAllFinite", "MurmurHash3",
        "NGramRepeatBlock", "Pad", "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QLinearGlobalAveragePool",
        "QLinearLeakyRelu", "QLinearMul", "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere",
        "QuantizeLinear", "QuickGelu", "Range", "ReduceSumInteger", "RelativePositionBias", "RemovePadding",
        "RestorePadding", "RotaryEmbedding", "SkipGroupNorm", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization", "Tokenizer", "Trilu", "UnfoldTensor", "Unique", "QEmbedLayerNormalization",
        "MaxpoolWithMask",
    }
)  # fmt: skip


def computes(op: str, domain: str) -> bool:
    """Whether an operator does the arithmetic that is counted, or may do it."""
    if op in _RULES.get(domain, {}):
        return True
    if domain == "":
        return op in _BULK
    if domain == "com.microsoft":
        return op not in _FREE_CONTRIB
    return not domain.startswith("ai.onnx")


def count_macs(
    node: onnx.NodeProto, domain: str, inputs: Sequence[Value | None], outputs: Sequence[Value | None]
) -> int:
    """Multiply-accumulates of one run of a node without its bodies.

    Raises:
        UncountedError: It computes, and a shape or a rule is missing.
    """
    import onnx

    if not computes(node.op_type, domain):
        return 0
    rule = _RULES.get(domain, {}).get(node.op_type)
    if rule is None:
        raise UncountedError(f"there is no rule for {domain or 'ai.onnx'}.{node.op_type}")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.HasField("g")}
    try:
        return rule(_Shapes(inputs, outputs, attributes))
    except (IndexError, ValueError, KeyError) as exc:
        raise UncountedError(f"its shapes do not fit together ({exc})") from exc
