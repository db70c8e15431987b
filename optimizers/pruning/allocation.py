"""How many channels each group keeps, so that a share of all is gone and as little as possible is lost. Numpy only."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deploykit.specs import Array


@dataclass(frozen=True, slots=True)
class Prospect:
    """A group of channels, as far as the choice minds it.

    Attributes:
        name: Of the group.
        units: How many units there are now; a unit is what can only go as a whole: a channel, one channel of every
            block of a grouped convolution, or an attention head.
        original: How many there were before any pruning.
        width: Channels in a unit.
        step: Units are kept in multiples of this.
        losses: What the loss of each unit costs, shape [units], float64, larger than or equal to 0.
        saving: Multiply-accumulates that one unit saves.
        least: How many have to stay whatever is asked for.
    """

    name: str
    units: int
    original: int
    width: int
    step: int
    losses: Array
    saving: float
    least: int = 1


def sizes_of(prospect: Prospect, max_ratio: float) -> list[int]:
    """The numbers of units that may be kept, from all downwards.

    Args:
        prospect: The group.
        max_ratio: The most that it may lose of its original units.
    """
    least = -(-int(np.ceil((1 - max_ratio) * prospect.original - 1e-9)) // prospect.step) * prospect.step
    first = (prospect.units - 1) // prospect.step * prospect.step
    last = max(least, prospect.step, -(-prospect.least // prospect.step) * prospect.step)
    return [prospect.units, *range(first, last - 1, -prospect.step)]


def highest_ratio(prospects: Sequence[Prospect], max_ratio: float) -> float:
    """The largest share of all original channels that can be taken out."""
    total = sum(p.original * p.width for p in prospects)
    kept = sum(sizes_of(p, max_ratio)[-1] * p.width for p in prospects)
    return 1 - kept / total if total else 0.0


def allocate(prospects: Sequence[Prospect], ratio: float, max_ratio: float, *, uniform: bool = False) -> dict[str, int]:
    """How many units each group keeps.

    The cheapest piece of all groups goes first, a piece being the least important units down to the next multiple, and
    its price what its loss costs for each multiply-accumulate that it saves. What goes for a ratio therefore goes for
    every larger one too, so that the latency falls with the ratio.

    Args:
        prospects: The groups.
        ratio: Share of all original channels that is gone afterwards.
        max_ratio: The most that one group may lose.
        uniform: Take the same share of each group instead.

    Returns:
        Units to keep, by group.
    """
    sizes = {p.name: sizes_of(p, max_ratio) for p in prospects}
    if uniform:
        return {
            p.name: min(sizes[p.name], key=lambda n, p=p: (abs(n - p.original * (1 - ratio)), -n))  # type: ignore[misc]
            for p in prospects
        }
    kept = {p.name: p.units for p in prospects}
    ordered = {p.name: np.sort(p.losses) for p in prospects}
    by_name = {p.name: p for p in prospects}
    wanted = ratio * sum(p.original * p.width for p in prospects)
    gone = float(sum((p.original - p.units) * p.width for p in prospects))
    waiting: list[tuple[float, str, int]] = []
    for p in prospects:
        _offer(waiting, p, sizes[p.name], ordered[p.name], 1)
    while waiting and gone < wanted:
        _, name, place = heapq.heappop(waiting)
        piece = (sizes[name][place - 1] - sizes[name][place]) * by_name[name].width
        if gone + piece - wanted > wanted - gone:
            break
        kept[name] = sizes[name][place]
        gone += piece
        _offer(waiting, by_name[name], sizes[name], ordered[name], place + 1)
    return kept


def _offer(waiting: list[tuple[float, str, int]], p: Prospect, sizes: Sequence[int], losses: Array, place: int) -> None:
    """Put a group's next piece among those that wait, with its price."""
    if place >= len(sizes):
        return
    first, last = p.units - sizes[place - 1], p.units - sizes[place]
    price = float(losses[first:last].sum()) / ((last - first) * max(p.saving, 1e-12))
    heapq.heappush(waiting, (price, p.name, place))


def least_important(losses: Mapping[str, Array], kept: Mapping[str, int]) -> dict[str, list[int]]:
    """The units that go, by group; those groups are left out that lose none.

    Args:
        losses: What the loss of each unit costs, by group.
        kept: How many stay.
    """
    found = {name: np.argsort(losses[name], kind="stable")[: len(losses[name]) - kept[name]] for name in kept}
    return {name: sorted(int(i) for i in units) for name, units in found.items() if len(units)}
