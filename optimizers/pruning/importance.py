"""What the loss of channels costs: by their weights, by the gradient of the loss, and by what the outputs mind.

Sources: P. Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), equation 8, for the
first-order Taylor expansion, here of the weights that read a channel, so that it is the change of the loss when the
channel is silenced; H. Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), for magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deploykit.optimizers.pruning.counting import Layer
from deploykit.optimizers.pruning.subject import Group, Member, Subject, untouched
from deploykit.optimizers.pruning.surgery import silence, unsilence
from deploykit.specs import Array

# Yields a module's loss on one batch after another, with its graph.
Losses = Callable[[Any], Iterable[Any]]
# How much of a group is silenced to see what the outputs mind.
_SILENCED = 0.5


def magnitudes(subject: Subject, groups: Mapping[str, Group]) -> dict[str, Array]:
    """The squared norm of each unit's weights: the mean over the members, each scaled to a mean of 1.

    Returns:
        Arrays of shape [units], float64, by group.
    """
    parts = dict(subject.module.named_modules())
    found: dict[str, Array] = {}
    for name, group in groups.items():
        total = np.zeros(group.channels)
        for member in group.members:
            part = parts[member.name]
            values = np.zeros(group.channels)
            np.add.at(values, list(member.roots), _norms(part, member))
            total += values / (values.mean() or 1.0)
        found[name] = _by_unit(group, total / len(group.members))
    return found


def taylor(subject: Subject, groups: Mapping[str, Group], losses: Losses) -> dict[str, Array]:
    """The mean over batches of the squared change of the loss, to first order, when a unit is silenced.

    Args:
        subject: The module; its gradients are used and cleared.
        groups: Its groups.
        losses: Labelled batches.

    Returns:
        Arrays of shape [units], float64, by group.
    """
    module = subject.module
    parts = dict(module.named_modules())
    found = {name: np.zeros(group.units) for name, group in groups.items()}
    batches = 0
    try:
        with untouched(module):
            for p in module.parameters():
                p.requires_grad_(p.is_floating_point())
            for loss in losses(module):
                module.zero_grad(set_to_none=True)
                loss.backward()
                batches += 1
                for name, group in groups.items():
                    change = np.zeros(group.channels)
                    for member in group.readers:
                        np.add.at(change, list(member.roots), _first_order(parts[member.name], member))
                    found[name] += np.square(_by_unit(group, change))
    finally:
        module.zero_grad(set_to_none=True)
    return {name: values / max(batches, 1) for name, values in found.items()}


def sensitivities(
    subject: Subject, groups: Mapping[str, Group], order: Mapping[str, Array], batches: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """What the outputs mind: their squared relative change when the less important half of a group is silenced.

    Args:
        subject: The module, which is as it was afterwards.
        groups: Its groups.
        order: Importance of the units, by group.
        batches: Inputs by name; none for what the subject is compared on.
    """
    feeds = list(batches) or None
    expected = subject.outputs(feeds)
    power = _power(expected) or 1.0
    found = {}
    for name, group in groups.items():
        before = silence(subject, groups, {name: half_of(order[name])})
        try:
            error = _power([want - have for want, have in zip(expected, subject.outputs(feeds), strict=True)])
        finally:
            unsilence(subject, before)
        found[name] = error / power if group.units > 1 else 0.0
    return found


def half_of(values: Array) -> list[int]:
    """The units of the smallest values: half of them, at least one."""
    count = max(1, int(len(values) * _SILENCED))
    return sorted(int(i) for i in np.argsort(values, kind="stable")[:count])


def losses_of(values: Array, sensitivity: float | None) -> Array:
    """What the loss of each unit costs, on a scale that all groups share.

    Args:
        values: Importance of the units of one group, shape [units].
        sensitivity: What silencing the less important half does to the outputs; None to go by the values alone,
            scaled to a mean of 1.

    Returns:
        float64, shape [units]; the units that were silenced share the sensitivity by their importance, and the others
        go on by the same measure.
    """
    values = np.maximum(np.asarray(values, np.float64), 0)
    tiny = values.max(initial=0.0) * 1e-9 + 1e-30
    values = values + tiny
    if sensitivity is None:
        return np.asarray(values / values.mean())
    return np.asarray(values * (sensitivity / values[half_of(values)].sum()))


def savings(group: Group, layers: Mapping[str, Layer]) -> float:
    """Multiply-accumulates that one unit of a group saves."""
    saved = 0.0
    for member in group.members:
        layer = layers.get(member.name)
        if layer is not None:
            whole = layer.inputs if member.reads else layer.outputs
            saved += layer.macs * len(member.channels) / max(whole, 1)
    return saved / group.units


def _by_unit(group: Group, values: Array) -> Array:
    return np.array([values[group.channels_of([unit])].sum() for unit in range(group.units)])


def _norms(part: Any, member: Member) -> Array:
    """Squared norms of what belongs to each of a member's channels, shape [channels]."""
    weight = part.weight.detach().square()
    return _per_channel(part, weight, member)


def _first_order(part: Any, member: Member) -> Array:
    """The sum of weight times gradient over what reads each of a member's channels; 0 where no gradient came."""
    if part.weight.grad is None:
        return np.zeros(len(member.channels))
    return _per_channel(part, part.weight.detach() * part.weight.grad, member)


def _per_channel(part: Any, values: Any, member: Member) -> Array:
    """Sums over all that belongs to one channel; values are shaped like the layer's weight."""
    transposed = bool(getattr(part, "transposed", False))
    groups = getattr(part, "groups", 1)
    flat = values.double().flatten(2) if values.ndim > 2 else values.double().unsqueeze(2)
    flat = flat.sum(2)
    # The first axis counts the outputs, of a transposed layer the inputs; the second the channels of one group.
    first = member.reads == transposed
    sums = flat.sum(1) if first else flat.reshape(groups, -1, flat.shape[1]).sum(1).reshape(-1)
    return np.asarray(sums[list(member.channels)].cpu().numpy(), np.float64)


def _power(outputs: Sequence[Any]) -> float:
    """The sum of squares; masked scores, which are infinite, tell nothing."""
    return sum(float(t.double().nan_to_num(0, 0, 0).square().sum()) for t in outputs)
