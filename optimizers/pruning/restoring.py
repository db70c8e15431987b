"""The structure of a pruned module as numbers, so that a new one of the same class can be given it, and its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deploykit.errors import OptimizationError
from deploykit.extras import require


def attributes_of(module: Any) -> dict[str, dict[str, Any]]:
    """The whole numbers, and tuples of them, that each part of a module holds, by its name."""
    return {
        name: {key: value for key, value in vars(part).items() if _is_size(value)}
        for name, part in module.named_modules()
    }


def changed_attributes(before: Mapping[str, Mapping[str, Any]], module: Any) -> dict[str, dict[str, Any]]:
    """What of `attributes_of` is different now; JSON-ready.

    Args:
        before: What they were.
        module: The module now.
    """
    found = {}
    for name, values in attributes_of(module).items():
        changed = {key: value for key, value in values.items() if before.get(name, {}).get(key) != value}
        if changed:
            found[name] = changed
    return found


def restore_structure(module: Any, changed: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Any]) -> None:
    """Give a module the structure and the weights of one that was pruned, in place.

    Args:
        module: As it was built before the pruning.
        changed: Of `changed_attributes`.
        weights: Tensors by name.

    Raises:
        OptimizationError: It is another module.
    """
    torch = require("torch", extra="prune")
    parts = dict(module.named_modules())
    unknown = [name for name in changed if name not in parts]
    unknown += [name for name in weights if name.rpartition(".")[0] not in parts]
    if unknown:
        raise OptimizationError(
            f"{type(module).__name__} has no {unknown[0]!r}", expected="a module of the class that was pruned"
        )
    for name, values in changed.items():
        for key, value in values.items():
            setattr(parts[name], key, tuple(value) if isinstance(value, list) else value)
    for name, tensor in weights.items():
        holder, _, leaf = name.rpartition(".")
        part = parts[holder]
        if leaf in part._parameters:
            old = part._parameters[leaf]
            part._parameters[leaf] = torch.nn.Parameter(
                tensor.clone(), requires_grad=old is None or bool(old.requires_grad)
            )
        elif leaf in part._buffers:
            part._buffers[leaf] = tensor.clone()
    own = set(module.state_dict())
    missing = sorted(own - set(weights))
    if missing and math.isfinite(len(missing)) and not _tied(module, missing, weights):
        raise OptimizationError(
            f"the weights lack {missing[0]!r}", expected="the weights of the module that was pruned"
        )


def _tied(module: Any, missing: list[str], weights: Mapping[str, Any]) -> bool:
    """Whether what is missing is the same tensor as something that is there, under another name."""
    state = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    present = {id(state[name]) for name in weights if name in state}
    return all(name in state and id(state[name]) in present for name in missing)


def _is_size(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, tuple) and bool(value) and all(isinstance(v, int) for v in value))
