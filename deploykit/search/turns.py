"""Whose turn it is: which of the waiting jobs may start, and where.

A measurement has a machine for itself. It waits until nothing else runs there, and from the moment that it is the first
in the queue for a machine nothing else starts there, so that no stream of small jobs keeps it waiting for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Waiting(Protocol):
    """What has to be known of a job."""

    @property
    def exclusive(self) -> bool:
        """Whether nothing may run beside it."""

    @property
    def node(self) -> str | None:
        """The only machine that will do; None for any."""


@dataclass(slots=True)
class Place:
    """A machine, and what runs there.

    Attributes:
        name: Of the machine.
        slots: Jobs that may run side by side.
        running: How many do.
        taken: Whether the one that runs has the machine for itself.
    """

    name: str
    slots: int
    running: int = 0
    taken: bool = field(default=False)

    def begin(self, exclusive: bool) -> None:
        """A job starts here."""
        self.running += 1
        self.taken = exclusive

    def end(self) -> None:
        """A job ended here."""
        self.running -= 1
        self.taken = False


def starts(queue: Sequence[Waiting], places: Sequence[Place]) -> Iterator[tuple[int, Place]]:
    """Find what may start now; the places are told.

    Args:
        queue: In the order of their coming.
        places: With what runs there.

    Yields:
        Position in the queue, and the place.
    """
    kept: list[Place] = []  # for measurements that wait until the others there have ended
    for position, job in enumerate(queue):
        if len(kept) == len(places):
            return
        usable = [p for p in places if not any(p is k for k in kept) and job.node in (None, p.name)]
        if not usable:
            continue
        if job.exclusive:
            place = min(usable, key=lambda p: p.running)
            if place.running:
                kept.append(place)
                continue
        else:
            place = max(usable, key=lambda p: 0 if p.taken else p.slots - p.running)
            if place.taken or place.running >= place.slots:
                continue
        place.begin(job.exclusive)
        yield position, place
