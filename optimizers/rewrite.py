"""Rewrites before quantization: what stands between a model and the kernels that would run it fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploykit.optimizers.editor import GraphEditor
from deploykit.optimizers.rewrite_attention import (
    clamp_scores,
    drop_idle_guards,
    drop_idle_masks,
    fold_scales,
    guard_less,
    turn_keys_once,
)
from deploykit.optimizers.rewrite_conv import fold_strides
from deploykit.optimizers.rewrite_elementwise import order_gelu, sum_residuals

if TYPE_CHECKING:
    import onnx

_REWRITES = (
    (fold_strides, "{} strided convolutions over one channel turned into such over several"),
    (turn_keys_once, "{} keys transposed in one step"),
    (drop_idle_masks, "{} attention masks that hide nothing taken away"),
    (drop_idle_guards, "{} guards of a softmax without mask taken away"),
    (guard_less, "{} guards of a softmax moved behind the product with the values"),
    (clamp_scores, "{} softmax with masked scores kept out of the denormal numbers"),
    (fold_scales, "{} constant factors folded into weights"),
    (order_gelu, "{} Gelu in the form that runtimes fuse"),
)
# What hides the bias of a product comes after the algorithms that correct it.
_LAST = ((sum_residuals, "{} residual sums kept apart from their layer normalization"),)


def rewrite(model: onnx.ModelProto, *, last: bool = False) -> list[str]:
    """Apply rewrites in place.

    Args:
        model: With constants as initializers and known shapes.
        last: Those just before Q/DQ pairs are inserted, instead of those at the beginning.

    Returns:
        A note for each kind of rewrite that applied.
    """
    notes = []
    for apply, text in _LAST if last else _REWRITES:
        graph = GraphEditor(model)
        count = apply(graph)
        if count:
            graph.finish()  # what has become idle would stand in the next one's way
            notes.append(text.format(count))
    return notes
