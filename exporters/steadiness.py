"""Do a module's outputs follow from its inputs alone, or from earlier calls too?"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from deploykit.exporters import torch_onnx
from deploykit.specs import Array, Feeds

Outputs = dict[str, Array]


def same(first: Array, second: Array | None) -> bool:
    """Equal, but for sums in another order."""
    if second is None or first.shape != second.shape:
        return False
    if first.dtype.kind not in "fc":
        return bool(np.array_equal(first, second))
    scale = float(np.nanmax(np.abs(first), initial=0.0)) or 1.0
    return bool(np.allclose(first / scale, second / scale, rtol=1e-3, atol=1e-3, equal_nan=True))


def copy_of(module: Any) -> Any:
    """A flat module that never ran, with the same parameters and its own state; None where it cannot be copied."""
    try:
        return copy.deepcopy(module, {id(p): p for p in module.parameters()})
    except Exception:  # noqa: BLE001 - attributes may be anything
        return None


def minds_earlier_calls(module: Any, untouched: Any, feeds: Feeds, outputs: Outputs) -> str:
    """Name of an output that is another one in a module that never ran; empty where there is none.

    What `forward` keeps in plain attributes shows in nothing else: `if self.mean is None: self.mean = x.mean()` gives
    the same outputs for the same inputs, whatever came between.

    Args:
        module: It ran on other inputs before these.
        untouched: Its copy, which never ran.
        feeds: The inputs.
        outputs: What the module made of them.
    """
    if untouched is None:
        return ""
    untouched.autocast = module.autocast
    try:
        alone = torch_onnx.run_module(untouched, feeds)
    except Exception:  # noqa: BLE001 - kernels that the reference has another way around
        return ""
    return next((name for name, array in outputs.items() if not same(array, alone.get(name))), "")
