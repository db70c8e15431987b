"""The structure of a pruned module as numbers, so that a new one of the same class can be given it, and its weights."""

from __future__ import annotations

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
    # A tensor that stands in several places is among the weights once.
    slots = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    unknown = [name for name in changed if name not in parts] + [name for name in weights if name not in slots]
    if unknown:
        raise OptimizationError(
            f"{type(module).__name__} has no {unknown[0]!r}", expected="a module of the class that was pruned"
        )
    present = {id(slots[name]) for name in weights}
    missing = sorted(name for name in module.state_dict() if name in slots and id(slots[name]) not in present)
    if missing:
        raise OptimizationError(
            f"the weights lack {missing[0]!r}", expected="the weights of the module that was pruned"
        )
    for name, values in changed.items():
        for key, value in values.items():
            setattr(parts[name], key, tuple(value) if isinstance(value, list) else value)
    given: dict[int, Any] = {}
    for name, tensor in weights.items():
        old, holder = slots[name], name.rpartition(".")[0]
        if old is not None and old.shape != tensor.shape and holder not in changed:
            raise OptimizationError(
                f"{name} has the shape {list(old.shape)}, and had {list(tensor.shape)} when the module was pruned",
                expected="the module as it was built then",
            )
        new = tensor.clone()
        if isinstance(old, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=bool(old.requires_grad))
        # The old one is kept, so that no other tensor comes to lie at its place.
        given[id(old)] = (old, new)
    for part in parts.values():
        for own in (part._parameters, part._buffers):
            own.update({leaf: given[id(old)][1] for leaf, old in own.items() if id(old) in given and old is not None})


def _is_size(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, tuple) and bool(value) and all(isinstance(v, int) for v in value))
