"""Channels taken out of a module, or silenced in it: the two give the same outputs, or the group is no group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.errors import OptimizationError
from deploykit.extras import require
from deploykit.optimizers.pruning.attention import find_attention
from deploykit.optimizers.pruning.subject import Group, Subject, names_of_parts, trace

# Float32 sums in another order; what a wrong channel does is far more.
_TOLERANCE = 1e-3


def take_out(subject: Subject, groups: Mapping[str, Group], chosen: Mapping[str, Sequence[int]]) -> None:
    """Take units out of a module, in place.

    Args:
        subject: The module.
        groups: Its groups.
        chosen: Units by group.

    Raises:
        OptimizationError: They cannot go.
    """
    flags = {name: p.requires_grad for name, p in subject.module.named_parameters()}
    graph = trace(subject)
    known = names_of_parts(subject)
    parts = {name: part for part, name in known.items()}
    attention = find_attention(subject.module)
    for name, units in chosen.items():
        part = parts[name]
        write = graph.get_pruner_of_module(part).prune_out_channels
        found = graph.get_pruning_group(part, write, groups[name].channels_of(units))
        if not graph.check_pruning_group(found):
            raise OptimizationError(f"{name} would lose all of its channels")
        found.prune(record_history=False)
        makers = (parts[m.name] for m in groups[name].members if not m.reads)
        if groups[name].heads:
            next(attention[p] for p in makers if p in attention).lose(len(units))
    for name, p in subject.module.named_parameters():
        p.requires_grad_(flags[name])


def take_out_checked(subject: Subject, groups: Mapping[str, Group], chosen: Mapping[str, Sequence[int]]) -> None:
    """As `take_out`, and then compare with the module as it was, with zeros for the weights that read the channels.

    Raises:
        OptimizationError: The outputs are others.
    """
    twin = subject.copied()
    silence(twin, groups, chosen)
    expected = twin.outputs()
    take_out(subject, groups, chosen)
    if not _same(expected, subject.outputs()):
        raise OptimizationError(
            f"without channels of {', '.join(list(chosen)[:4])} the module gives other outputs than with zeros there",
            hint=f"leave them as they are: --keep {next(iter(chosen))}, or report it",
        )


def silence(subject: Subject, groups: Mapping[str, Group], chosen: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Set the weights to zero that read some units, in place.

    Returns:
        The weights as they were, by the name of their layer; for `unsilence`.
    """
    torch = require("torch", extra="prune")
    parts = {name: part for part, name in names_of_parts(subject).items()}
    before: dict[str, Any] = {}
    with torch.no_grad():
        for name, units in chosen.items():
            gone = set(groups[name].channels_of(units))
            for member in groups[name].readers:
                weight = parts[member.name].weight
                before.setdefault(member.name, weight.detach().clone())
                columns = [c for c, root in zip(member.channels, member.roots, strict=True) if root in gone]
                for index in column_indices(parts[member.name], columns):
                    weight[index] = 0
    return before


def unsilence(subject: Subject, before: Mapping[str, Any]) -> None:
    """Undo `silence`."""
    torch = require("torch", extra="prune")
    parts = {name: part for part, name in names_of_parts(subject).items()}
    with torch.no_grad():
        for name, weight in before.items():
            parts[name].weight.copy_(weight)


def column_indices(layer: Any, channels: Sequence[int]) -> list[Any]:
    """Where the weights stand that read some input channels, as indices of the layer's weight.

    A linear layer's weight is [out, in], a convolution's [out, in / groups, ...], a transposed one's [in, ...].
    """
    if not channels:
        return []
    if getattr(layer, "transposed", False):
        return [list(channels)]
    blocks = getattr(layer, "groups", 1)
    if blocks == 1:
        return [(slice(None), list(channels))]
    inputs, outputs = layer.in_channels // blocks, layer.out_channels // blocks
    return [
        (slice(block * outputs, (block + 1) * outputs), here)
        for block in range(blocks)
        if (here := [c % inputs for c in channels if c // inputs == block])
    ]


def _same(expected: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether outputs agree, as far as sums in another order do; infinite ones, such as masked scores, exactly."""
    if len(expected) != len(found):
        return False
    for want, have in zip(expected, found, strict=True):
        if want.shape != have.shape:
            return False
        finite = want.isfinite() & have.isfinite()
        if not (finite | (want == have)).all() or (want.numel() and not finite.any()):
            return False
        want, have = want[finite], have[finite]
        if want.numel() and not float((want - have).abs().max()) <= _TOLERANCE * float(want.abs().max()) + 1e-6:
            return False
    return True
