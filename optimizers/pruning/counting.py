"""What a module costs: parameters, and the multiply-accumulates of its convolutions and linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deploykit.extras import require


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or a linear layer.

    Attributes:
        inputs: Input channels or features.
        outputs: Output channels or features.
        groups: Of a convolution; 1 for a linear layer.
        macs: Multiply-accumulates of the example, over all calls.
    """

    inputs: int
    outputs: int
    groups: int
    macs: int


def count_parameters(module: Any) -> int:
    """Elements of all parameters; one that stands at two places counts once."""
    return sum(p.numel() for p in module.parameters())


def layer_kinds() -> Any:
    """The classes of layers that are counted and pruned."""
    torch = require("torch", extra="prune")
    return torch.nn.modules.conv._ConvNd, torch.nn.Linear


def count_layers(
    module: Any, example: Mapping[str, Any], feed: Callable[[Any, Mapping[str, Any]], Any]
) -> dict[str, Layer]:
    """Run the module once and count.

    Args:
        module: In evaluation mode.
        example: Inputs by name.
        feed: Calls the module with them.

    Returns:
        The layers that ran, by name.
    """
    torch = require("torch", extra="prune")
    names = {part: name for name, part in module.named_modules()}
    macs: dict[str, int] = {}

    def note(part: Any, _: Any, output: Any) -> None:
        each = part.in_features if isinstance(part, torch.nn.Linear) else _kernel(part)
        cells = output.numel() if not getattr(part, "transposed", False) else output.numel() // part.out_channels
        macs[names[part]] = macs.get(names[part], 0) + cells * each

    found = [part for part in names if isinstance(part, layer_kinds())]
    hooks = [part.register_forward_hook(note) for part in found]
    try:
        with torch.no_grad():
            feed(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        names[part]: Layer(*_channels(part), getattr(part, "groups", 1), macs[names[part]])
        for part in found
        if names[part] in macs
    }


def _channels(part: Any) -> tuple[int, int]:
    if hasattr(part, "in_features"):
        return part.in_features, part.out_features
    return part.in_channels, part.out_channels


def _kernel(part: Any) -> int:
    """Multiply-accumulates of one output element, or of one place of a transposed convolution's output."""
    cells = math.prod(part.kernel_size)
    if part.transposed:
        # Each input element meets the kernel once for every output channel of its group; strides share them out.
        return int(part.in_channels // part.groups * part.out_channels * cells // math.prod(part.stride))
    return int(part.in_channels // part.groups * cells)
