"""Attention as exporters write it, joined into ONNX Runtime's own operators.

What `onnxruntime.transformers` looks for is the attention of older exporters: of what torch.export writes for
`scaled_dot_product_attention`, and of what TorchScript writes for newer models, it joins none. Here the shapes are
followed instead of the way in which they are computed: split heads, scaled scores, a mask that is added, a softmax with
or without a guard against rows of NaN, and joined heads.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftattention
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.optimizers.editor import GraphEditor, attribute, is_op
from deploykit.optimizers.prepare import prepare
from deploykit.optimizers.rewrite_attention import drop_idle_guards, drop_idle_masks, guarded_softmax, turn_keys_once
from deploykit.optimizers.shape_terms import shape_terms

if TYPE_CHECKING:
    import onnx

    from deploykit.specs import Array

_DOMAIN = "com.microsoft"
_FLOAT = 1
_SPLIT, _KEYS = [0, 2, 1, 3], [0, 2, 3, 1]  # of [batch, length, heads, size]
_Size = int | str


@dataclass(frozen=True, slots=True)
class _Heads:
    """A tensor [batch, length, heads * size] before it is split into heads.

    Attributes:
        name: Of the tensor.
        sizes: Batch and length, as numbers or symbols.
        heads: How many.
        size: Of one.
        factor: What the heads are multiplied with afterwards.
    """

    name: str
    sizes: tuple[_Size, _Size]
    heads: int
    size: int
    factor: float


def has_attention(model: onnx.ModelProto) -> bool:
    """Whether a softmax is multiplied with something computed, as in attention."""
    graph = GraphEditor(model)
    for node in graph.nodes:
        if not is_op(node, "Softmax"):
            continue
        reached = [*graph.readers(node.output[0])]
        for passed in reached:  # grows while it is walked
            if is_op(passed, "Where", "Cast", "Dropout", "Identity"):
                reached += [r for r in graph.readers(passed.output[0]) if not any(r is known for known in reached)]
        if any(is_op(n, "MatMul") and all(graph.maker(i) is not None for i in n.input) for n in reached):
            return True
    return False


def fuse_attention(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Join attention into `Attention` where query, key and value are made of one tensor, else `MultiHeadAttention`.

    Args:
        model: Left as it is. Weights may be external.

    Returns:
        A copy, and how many blocks were joined.
    """
    known = {value.name for value in model.graph.value_info}
    made, _ = prepare(model, per_channel=False, quantized=True)
    for equal in (_drop_copies, turn_keys_once, drop_idle_masks, drop_idle_guards):
        graph = GraphEditor(made)
        if equal(graph):
            graph.finish()
    graph = GraphEditor(made)
    masks: dict[tuple[str, _Size, _Size], str] = {}
    count = sum(_fuse(graph, node, masks) for node in graph.nodes if is_op(node, "Softmax"))
    graph.finish()
    for index in range(len(made.graph.value_info) - 1, -1, -1):
        if made.graph.value_info[index].name not in known:
            del made.graph.value_info[index]
    if count and _DOMAIN not in {entry.domain for entry in made.opset_import}:
        entry = made.opset_import.add()
        entry.domain, entry.version = _DOMAIN, 1
    return made, count


def _drop_copies(graph: GraphEditor) -> int:
    """Take away Identity, and casts to the type that a tensor has."""
    count = 0
    for node in graph.nodes:
        same = is_op(node, "Cast") and attribute(node, "to") == graph.elem_type(node.input[0])
        if same or is_op(node, "Identity"):
            count += graph.replace(node.output[0], node.input[0])
    return count


def _fuse(graph: GraphEditor, soft: onnx.NodeProto, masks: dict[tuple[str, _Size, _Size], str]) -> bool:
    """Join the attention around a softmax."""
    guarded = next((n for n in _after(graph, soft) if guarded_softmax(graph, n) == soft.output[0]), None)
    weights = soft.output[0] if guarded is None else guarded.output[0]
    product = graph.reader(weights, "MatMul")
    turned = graph.reader(product.output[0], "Transpose") if product is not None else None
    joined = graph.reader(turned.output[0], "Reshape") if turned is not None else None
    if product is None or turned is None or joined is None or product.input[0] != weights:
        return False
    if attribute(soft, "axis", -1) not in (-1, 3) or list(attribute(turned, "perm", [])) != _SPLIT:
        return False
    scores, mask = _masked(graph, soft.input[0])
    found, factor = _unscaled(graph, scores)
    dots = graph.maker(found, "MatMul")
    if dots is None:
        return False
    query, key = _heads(graph, dots.input[0], _SPLIT), _heads(graph, dots.input[1], _KEYS)
    value = _heads(graph, product.input[1], _SPLIT)
    if query is None or key is None or value is None or value.factor != 1:
        return False
    split = {(h.heads, h.size) for h in (query, key, value)}
    if len(split) > 1 or key.sizes != value.sizes or not _is_joined(graph, joined, query):
        return False
    bias = None if mask is None else _bias(graph, mask, query, key, masks)
    if mask is not None and bias is None:
        return False
    made = _node(graph, query, key, value, bias or "", factor * query.factor * key.factor)
    if guarded is not None:
        nothing = graph.add_constant(made + "_zero", np.array(0, np.float32))
        made = graph.add("Where", [graph.add("IsNaN", [made], made + "_nan"), nothing, made], made + "_safe")
    return graph.replace(joined.output[0], made)


def _after(graph: GraphEditor, soft: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [n for n in graph.readers(soft.output[0]) if is_op(n, "Where")]


def _masked(graph: GraphEditor, name: str) -> tuple[str, str | None]:
    """The scores, and what is added to them."""
    node = graph.maker(name, "Add")
    if node is None:
        return name, None
    for index in (0, 1):
        if graph.maker(_unscaled(graph, node.input[index])[0], "MatMul") is not None:
            return node.input[index], node.input[1 - index]
    return name, None


def _unscaled(graph: GraphEditor, name: str) -> tuple[str, float]:
    """What a tensor is before it is multiplied with constants, and with what."""
    factor = 1.0
    while (node := graph.maker(name)) is not None and is_op(node, "Mul", "Div"):
        sides = (0, 1) if node.op_type == "Mul" else (1,)
        index = next((i for i in sides if graph.scalar(node.input[i])), None)
        if index is None:
            break
        scalar = graph.scalar(node.input[index])
        assert scalar is not None
        factor, name = (factor * scalar if node.op_type == "Mul" else factor / scalar), node.input[1 - index]
    return name, factor


def _heads(graph: GraphEditor, name: str, perm: list[int]) -> _Heads | None:
    """What is split into heads and turned to give a tensor; None where that cannot be shown."""
    found, factor = _unscaled(graph, name)
    turned = graph.maker(found, "Transpose")
    if turned is None or list(attribute(turned, "perm", [])) != perm:
        return None
    inner, more = _unscaled(graph, turned.input[0])
    split = graph.maker(inner, "Reshape")
    shape = graph.shape(split.input[0]) if split is not None else None
    terms = shape_terms(graph, split.input[1]) if split is not None else None
    if split is None or shape is None or terms is None or len(shape) != 3 or len(terms) != 4:
        return None
    width, sizes = shape[2], _same_sizes(graph, split, 2)
    if sizes is None or not isinstance(width, int) or graph.elem_type(split.input[0]) != _FLOAT:
        return None
    heads, size = terms[2], terms[3]
    if not isinstance(heads, int) or not isinstance(size, int) or (heads < 1 and size < 1):
        return None
    heads, size = (heads if heads > 0 else width // size), (size if size > 0 else width // heads)
    return _Heads(split.input[0], sizes, heads, size, factor * more) if heads * size == width else None


def _is_joined(graph: GraphEditor, node: onnx.NodeProto, query: _Heads) -> bool:
    """Whether a Reshape of [batch, length, heads, size] joins the last two axes."""
    terms = shape_terms(graph, node.input[1])
    if terms is None or len(terms) != 3 or terms[2] not in (-1, query.heads * query.size):
        return False
    given = [_size_of(graph, t, s) for t, s in zip(terms[:2], query.sizes, strict=True)]
    open_axes = [*given, terms[2]].count(-1)
    return open_axes < 2 and all(g in (-1, s) for g, s in zip(given, query.sizes, strict=True))


def _same_sizes(graph: GraphEditor, node: onnx.NodeProto, axes: int) -> tuple[_Size, _Size] | None:
    """The first two sizes of a Reshape's input, where it keeps them."""
    shape, terms = graph.shape(node.input[0]), shape_terms(graph, node.input[1])
    if shape is None or terms is None or None in shape[:axes]:
        return None
    first, second = shape[0], shape[1]
    assert first is not None and second is not None
    given = [_size_of(graph, t, s) for t, s in zip(terms[:2], (first, second), strict=True)]
    if [*given, *terms[2:]].count(-1) > 1 or any(g not in (-1, s) for g, s in zip(given, (first, second), strict=True)):
        return None
    return first, second


def _size_of(graph: GraphEditor, term: object, copied: _Size) -> object:
    """A term as number or symbol; 0 copies the input's size."""
    if isinstance(term, int):
        return copied if term == 0 else term
    shape = graph.shape(getattr(term, "tensor", ""))
    return None if shape is None else shape[getattr(term, "axis", 0)]


def _bias(
    graph: GraphEditor, mask: str, query: _Heads, key: _Heads, masks: dict[tuple[str, _Size, _Size], str]
) -> str | None:
    """A mask as [batch or 1, heads or 1, length of queries, length of keys]; other forms are broadcast once."""
    shape, wanted = graph.shape(mask), (query.sizes[1], key.sizes[1])
    if shape is None or len(shape) > 4 or graph.elem_type(mask) != _FLOAT:
        return None
    if len(shape) == 4 and tuple(shape[2:]) == wanted:
        return mask
    if (mask, *wanted) not in masks:
        one = graph.add_constant("attention_axis", np.array([1], np.int64))
        lengths = [graph.add("Gather", [graph.add("Shape", [h.name], h.name + "_shape"), one], h.name + "_length")
                   for h in (query, key)]  # fmt: skip
        sizes = graph.add("Concat", [one, one, *lengths], mask + "_sizes", axis=0)
        masks[mask, *wanted] = graph.add("Expand", [mask, sizes], mask + "_bias")
    return masks[mask, *wanted]


def _node(graph: GraphEditor, query: _Heads, key: _Heads, value: _Heads, bias: str, scale: float) -> str:
    """Add the operator; three products of one tensor with constants become one."""
    parts = [_projection(graph, h.name) for h in (query, key, value)]
    settings: dict[str, Any] = {"domain": _DOMAIN, "num_heads": query.heads, "scale": float(scale)}
    known = [p for p in parts if p is not None]
    if len(known) == 3 and len({source for source, _, _ in known}) == 1:
        weight = graph.add_constant(query.name + "_weights", np.concatenate([w for _, w, _ in known], axis=1))
        added = graph.add_constant(query.name + "_biases", np.concatenate([b for _, _, b in known]))
        inputs = [known[0][0], weight, added, "", "", bias]
        return graph.add("Attention", _trimmed(inputs), query.name + "_attention", **settings)
    inputs = [query.name, key.name, value.name, "", "", bias]
    return graph.add("MultiHeadAttention", _trimmed(inputs), query.name + "_attention", **settings)


def _trimmed(inputs: list[str]) -> list[str]:
    while not inputs[-1]:
        inputs.pop()
    return inputs


def _projection(graph: GraphEditor, name: str) -> tuple[str, Array, Array] | None:
    """Source, weights and biases of a product with constants; None where it is none, or they are not in memory."""
    node, added = graph.maker(name), None
    if node is not None and is_op(node, "Add"):
        index = next((i for i in (0, 1) if graph.constant(node.input[i]) is not None), None)
        if index is None:
            return None
        added, node = graph.constant(node.input[index]), graph.maker(node.input[1 - index])
    if node is None or not is_op(node, "MatMul") or graph.rank(node.input[0]) != 3:
        return None
    weights = graph.constant(node.input[1])
    if weights is None or weights.ndim != 2 or weights.dtype != np.float32:
        return None
    added = np.zeros(weights.shape[1], np.float32) if added is None else added
    if added.size not in (1, weights.shape[1]):
        return None
    return node.input[0], weights, np.broadcast_to(added.reshape(-1), weights.shape[1:]).astype(np.float32)
