"""Which heads, neurons and channels of a transformer a narrower one keeps: those with the largest weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploykit.errors import OptimizationError
from deploykit.extras import require

# Axes that run over the heads; the others of the hidden size run over the channels that layers hand on.
_INTO_HEADS = re.compile(r"\.(query|key|value|q_proj|k_proj|v_proj|q_lin|k_lin|v_lin)\.(weight|bias)$")
_OUT_OF_HEADS = re.compile(r"(attention\.output\.dense|attn\.out_proj|attention\.out_proj|out_lin|o_proj)\.weight$")


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of a teacher and of its narrower student.

    Attributes:
        hidden: Channels that layers hand on, before and after; None where the weights are not taken over.
        ffn: Neurons inside of a feed-forward network, before and after.
        head: Size of one head, the same in both.
        changes: What changes in the config.
    """

    hidden: tuple[int, int] | None
    ffn: tuple[int, int] | None
    head: int
    changes: dict[str, Any]


def narrow(
    made: Mapping[str, Any],
    ours: Mapping[str, Any],
    sources: Mapping[str, str],
    theirs: Mapping[str, Any],
    widths: Widths,
    hint: str,
) -> dict[str, Any]:
    """Cut the teacher's tensors to the student's shapes.

    Heads and neurons are chosen layer by layer, the channels that all layers share once; each by the sum of the squares
    of the weights that lead to it and from it.

    Args:
        made: Tensors by the student's names, in the teacher's shapes.
        ours: The student's tensors, whose shapes count.
        sources: The teacher's name of each.
        theirs: The teacher's tensors.
        widths: Sizes before and after.
        hint: What to do where that is not known for a model.

    Raises:
        OptimizationError: An axis has a size that is none of those.
    """
    axes = {name: _axes(name, made[name].shape, ours[name].shape, widths, hint) for name in made}
    if widths.hidden is not None and widths.hidden[0] != widths.hidden[1]:
        _check_heads(axes, hint)
    # Channels are chosen by all of the teacher's layers, heads and neurons by the layer that was taken.
    power: dict[tuple[str, str], Any] = {}
    for name, found in axes.items():
        for axis, kind in found.items():
            key = kind, "" if kind == "channel" else _layer(name)
            values = theirs[sources[name]].detach().double().square()
            others = [a for a in range(values.ndim) if a != axis]
            score = values.sum(others) if others else values
            power[key] = power[key] + score if key in power else score
    kept = {key: _strongest(score, key[0], widths) for key, score in power.items()}
    cut = {}
    for name, tensor in made.items():
        for axis, kind in axes[name].items():
            tensor = tensor.index_select(axis, kept[kind, "" if kind == "channel" else _layer(name)])
        cut[name] = tensor.contiguous()
    return cut


def _axes(name: str, old: Any, new: Any, widths: Widths, hint: str) -> dict[int, str]:
    """The axes that are shorter in the student, each as "head", "neuron" or "channel"."""
    found = {}
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        if before == after:
            continue
        if (before, after) == widths.hidden:
            pattern = _INTO_HEADS if axis == 0 else _OUT_OF_HEADS
            found[axis] = "head" if pattern.search(name) else "channel"
        elif (before, after) == widths.ffn:
            found[axis] = "neuron"
        else:
            raise OptimizationError(
                f"{name} has {before} rows on axis {axis} where the student has {after}, which is neither the hidden "
                "nor the feed-forward size: it is not known which belong together",
                hint=f"leave width and ffn out, or {hint}",
            )
    return found


def _check_heads(axes: Mapping[str, Mapping[int, str]], hint: str) -> None:
    """See that the weights of attention were recognised: heads that are cut in two would be nonsense.

    Raises:
        OptimizationError: They were not.
    """
    into = [n for n, found in axes.items() if found.get(0) == "head" and n.endswith("weight")]
    out = [n for n, found in axes.items() if found.get(1) == "head"]
    if not into or len(into) != 3 * len(out):
        raise OptimizationError(
            f"{len(into)} weights lead into heads and {len(out)} out of them, by their names",
            expected="query, key, value and an output for every layer",
            hint=f"leave width out, or {hint}",
        )


def _layer(name: str) -> str:
    """The layer that a tensor belongs to: its name up to the last number."""
    match = re.match(r".*\.\d+\.", name)
    return match[0] if match else ""


def _strongest(score: Any, kind: str, widths: Widths) -> Any:
    """Indices that are kept, ascending; whole heads."""
    torch = require("torch", extra="train")
    if kind == "neuron":
        assert widths.ffn is not None
        return score.topk(widths.ffn[1]).indices.sort().values
    assert widths.hidden is not None
    if kind == "channel":
        return score.topk(widths.hidden[1]).indices.sort().values
    heads = score.reshape(-1, widths.head).sum(1)
    best = heads.topk(widths.hidden[1] // widths.head).indices.sort().values
    return (best[:, None] * widths.head + torch.arange(widths.head)).reshape(-1)
