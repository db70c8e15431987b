"""Attention layers with separate linear layers for queries, keys and values: their channels go by whole heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploykit.extras import require

# Names of the three layers, and of the number of heads, in transformers' models and in those written after them.
_LAYERS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "heads", "nhead")
# What else holds the width of all heads together.
_TOTALS = ("all_head_size", "inner_dim")


@dataclass(frozen=True, slots=True)
class Attention:
    """Where heads are.

    Attributes:
        name: Of the module that holds the layers.
        holder: The module itself.
        attribute: The name of its attribute with the number of heads.
        heads: How many there are.
        width: Channels in a head.
    """

    name: str
    holder: Any
    attribute: str
    heads: int
    width: int

    def lose(self, count: int) -> None:
        """Tell the module that heads are gone."""
        left, total = self.heads - count, self.heads * self.width
        setattr(self.holder, self.attribute, left)
        for name in _TOTALS:
            if getattr(self.holder, name, None) == total:
                setattr(self.holder, name, left * self.width)


def find_attention(module: Any) -> dict[Any, Attention]:
    """Attention layers whose heads can be told apart.

    Returns:
        The attention layer, by each of its linear layers for queries, keys and values. Layers with fewer heads for keys
        and values than for queries are not among them.
    """
    linear = require("torch", extra="prune").nn.Linear
    found: dict[Any, Attention] = {}
    for name, holder in module.named_modules():
        children = dict(holder.named_children())
        trio = next((t for t in _LAYERS if all(isinstance(children.get(n), linear) for n in t)), None)
        attribute = next((a for a in _HEADS if isinstance(getattr(holder, a, None), int)), None)
        if trio is None or attribute is None:
            continue
        layers = [children[n] for n in trio]
        heads, widths = int(getattr(holder, attribute)), {layer.out_features for layer in layers}
        if heads < 1 or len(widths) > 1 or (total := widths.pop()) % heads:
            continue
        found |= dict.fromkeys(layers, Attention(name, holder, attribute, heads, total // heads))
    return found
