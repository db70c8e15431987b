"""Where a factor for each channel of an activation can go without another node: into weights that make the activation.

Followed backwards are operators that a positive factor passes through unchanged (Relu, Transpose, Reshape, the product
of attention probabilities with values, ...) up to one that has weights for each channel: a normalization, a constant
factor, a matrix product, a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.optimizers.editing import Editor, attributes, standard
from deploykit.specs import Array

if TYPE_CHECKING:
    import onnx

# f(a x) = a f(x) for a > 0, value by value.
_PASSING = ("Relu", "LeakyRelu", "Identity")
# The same for a factor of each channel; the largest value of a channel stays what it is in the first.
_PRODUCTS = ("MatMul", "Gemm", "Conv")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool")


@dataclass(frozen=True, slots=True)
class Edit:
    """One weight that takes the factor.

    Attributes:
        node: Who reads it.
        index: As which input.
        axis: The weight's axis that channels lie on.
    """

    node: onnx.NodeProto
    index: int
    axis: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a factor goes.

    Attributes:
        edits: The weights that take it.
        bound: The smallest upper bound of a Clip that was passed: what a factor may not bring values above.
    """

    edits: list[Edit]
    bound: float = float("inf")


def find_place(editor: Editor, tensor: str, rank: int, *, into_products: bool) -> list[Edit] | None:
    """The weights that would take a factor for each channel (last axis) of a tensor; None where there is no such place.

    Args:
        editor: The graph.
        tensor: The activation. Whether others read it too is the caller's business.
        rank: Its number of axes.
        into_products: Whether weights of products may take it (with one scale a tensor, that changes their rounding).
    """
    return _walk(editor, tensor, (rank - 1,), rank, into_products)


def find_convolution(editor: Editor, tensor: str, rank: int) -> Place | None:
    """As `find_place`, for channels on axis 1, also behind a Clip from 0 to a bound, as in Relu6."""
    name, bound = tensor, float("inf")
    while True:
        node = editor.makers.get(name)
        if standard(node, "Clip"):
            limits = _limits(editor, node)
            if limits is None or limits[0] not in (0.0, float("-inf")):
                return None
            bound = min(bound, limits[1])
        elif not standard(node, *_PASSING, "MaxPool"):
            break
        assert node is not None
        name = node.input[0]
        if len(editor.readers[name]) != 1 or name in editor.outputs:
            return None
    edits = _walk(editor, name, (1,), rank, True)
    return None if edits is None else Place(edits, bound)


def _limits(editor: Editor, node: onnx.NodeProto | None) -> tuple[float, float] | None:
    """Bounds of a Clip; None where they are not constant."""
    assert node is not None
    given = attributes(node)
    found = [given.get("min", float("-inf")), given.get("max", float("inf"))]
    for i, name in enumerate(node.input[1:3]):
        if name and not editor.is_weight(name):
            return None
        if name:
            found[i] = editor.read(name).item()
    return float(str(found[0])), float(str(found[1]))


def apply_edits(editor: Editor, edits: list[Edit], factors: Array) -> bool:
    """Multiply weights, each along its axis, with ``factors`` ``[channels]``.

    Returns:
        False where a weight is shared with another reader and cannot be copied: nothing is changed then.
    """
    if any(e.node.op_type in _PRODUCTS and e.index == 1 and editor.is_shared(e.node.input[1]) for e in edits):
        return False  # a copy would get another name, and whoever treats that product knows the old one
    names = [editor.private(e.node, e.index) for e in edits]
    if None in names:
        return False
    for edit, name in zip(edits, names, strict=True):
        assert name is not None
        values = editor.read(name)
        shape = [1] * values.ndim
        shape[edit.axis] = -1
        editor.write(name, values * factors.reshape(shape))
    return True


def _walk(editor: Editor, tensor: str, layout: tuple[int, ...], rank: int, deep: bool) -> list[Edit] | None:
    """Follow one tensor back; its channels lie on the axes ``layout``, the last of them changing fastest."""
    node = editor.makers.get(tensor)
    if node is None:
        return None
    if standard(node, *_PASSING) or (standard(node, *_POOLS) and layout == (1,)):
        return _before(editor, node.input[0], layout, rank, deep)
    if standard(node, "Transpose"):
        perm = _perm(node, rank)
        return _before(editor, node.input[0], tuple(perm[a] for a in layout), rank, deep)
    if standard(node, "Reshape"):
        return _through_reshape(editor, node, layout, deep)
    guarded = _guarded(editor, node)
    if guarded is not None:
        return _walk(editor, guarded, layout, rank, deep)
    if standard(node, "MatMul") and not editor.is_constant(node.input[1]):
        return _through_attention(editor, node, layout, rank, deep)
    return _end(editor, node, layout, rank, deep)


def _guarded(editor: Editor, node: onnx.NodeProto) -> str | None:
    """The tensor that `Where(IsNaN(tensor), 0, tensor)` guards, where nothing else reads it."""
    if not standard(node, "Where") or not editor.is_weight(node.input[1]) or editor.read(node.input[1]).any():
        return None
    test, name = editor.makers.get(node.input[0]), str(node.input[2])
    alone = len(editor.readers[name]) == 2 and name not in editor.outputs
    return name if alone and test is not None and standard(test, "IsNaN") and test.input[0] == name else None


def _before(editor: Editor, tensor: str, layout: tuple[int, ...], rank: int, deep: bool) -> list[Edit] | None:
    """As `_walk`, for a tensor that only the node which was just passed may read."""
    if len(editor.readers[tensor]) != 1 or tensor in editor.outputs:
        return None
    return _walk(editor, tensor, layout, rank, deep)


def _end(editor: Editor, node: onnx.NodeProto, layout: tuple[int, ...], rank: int, deep: bool) -> list[Edit] | None:
    """A node with weights of its own for each channel."""
    last = layout == (rank - 1,)
    if standard(node, "LayerNormalization") and last:
        axis = attributes(node).get("axis", -1)
        scales = [i for i in (1, 2) if i < len(node.input) and node.input[i]]
        plain = axis in (-1, rank - 1) and len([o for o in node.output if o]) == 1
        known = all(editor.is_weight(node.input[i]) and len(editor.dims(node.input[i])) == 1 for i in scales)
        return [Edit(node, i, 0) for i in scales] if plain and known else None
    if standard(node, "BatchNormalization") and layout == (1,) and len(node.output) == 1:
        return [Edit(node, i, 0) for i in (1, 2)] if all(editor.is_weight(node.input[i]) for i in (1, 2)) else None
    if standard(node, "Mul", "Add") and last:
        return _constant_operand(editor, node, rank, deep)
    if not deep:
        return None
    if standard(node, "MatMul") and last and editor.is_weight(node.input[1]) and len(editor.dims(node.input[1])) == 2:
        return [Edit(node, 1, 1)]
    if standard(node, "Gemm") and last and editor.is_weight(node.input[1]):
        return _with_bias(editor, node, Edit(node, 1, 0 if attributes(node).get("transB", 0) else 1))
    if standard(node, "Conv") and layout == (1,) and editor.is_weight(node.input[1]):
        return _with_bias(editor, node, Edit(node, 1, 0))
    return None


def _with_bias(editor: Editor, node: onnx.NodeProto, edit: Edit) -> list[Edit] | None:
    if len(node.input) < 3 or not node.input[2]:
        return [edit]
    name = node.input[2]
    channels = editor.dims(node.input[1])[edit.axis]
    if not editor.is_weight(name) or not editor.dims(name) or editor.dims(name)[-1] != channels:
        return None
    return [edit, Edit(node, 2, len(editor.dims(name)) - 1)]


def _constant_operand(editor: Editor, node: onnx.NodeProto, rank: int, deep: bool) -> list[Edit] | None:
    """A factor for each channel takes the other one; so does a summand, but what it is added to must as well."""
    constant = next((i for i in (0, 1) if editor.is_weight(node.input[i])), None)
    if constant is None:
        return None
    dims = editor.dims(node.input[constant])
    if not dims or len(dims) > rank or any(d != 1 for d in dims[:-1]) or dims[-1] == 1:
        return None
    edit = Edit(node, constant, len(dims) - 1)
    if node.op_type == "Mul":
        return [edit]
    rest = _before(editor, node.input[1 - constant], (rank - 1,), rank, deep)
    return None if rest is None else [edit, *rest]


def _through_reshape(editor: Editor, node: onnx.NodeProto, layout: tuple[int, ...], deep: bool) -> list[Edit] | None:
    """Only where the trailing axes are split or joined: `[..., a * b]` from `[..., a, b]`, or the other way."""
    have, want = editor.shape(node.output[0]), editor.shape(node.input[0])
    if have is None or want is None:
        return None
    sizes = [have[a] for a in layout]
    if layout != tuple(range(len(have) - len(layout), len(have))) or None in sizes:
        return None
    total = 1
    for size in sizes:
        total *= size or 0
    found: list[int] = []
    product = 1
    for axis in range(len(want) - 1, -1, -1):
        size = want[axis]
        if size is None or product >= total:
            break
        found.insert(0, axis)
        product *= size
    if product != total:
        return None
    return _before(editor, node.input[0], tuple(found), len(want), deep)


def _through_attention(
    editor: Editor, node: onnx.NodeProto, layout: tuple[int, ...], rank: int, deep: bool
) -> list[Edit] | None:
    """A product of two activations passes on a factor of its columns, and of heads that both have."""
    shape, values = editor.shape(node.output[0]), editor.shape(node.input[1])
    if shape is None or values is None or len(values) != rank or len(shape) != rank or layout[-1] != rank - 1:
        return None
    if any(a == rank - 2 or shape[a] is None or shape[a] != values[a] for a in layout):
        return None
    return _before(editor, node.input[1], layout, rank, deep)


def _perm(node: onnx.NodeProto, rank: int) -> list[int]:
    given = attributes(node).get("perm")
    return [int(a) for a in given] if isinstance(given, list) else list(reversed(range(rank)))
