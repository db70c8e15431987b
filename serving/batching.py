"""Which waiting requests run next, and together: a queue without a clock, a loop or a process of its own.

Requests are joined along the first dimension, where all else about their inputs is the same. A group is due when it has
as many rows as are run at once, or when its oldest request has waited as long as it may; the group whose head is oldest
goes first. What leaves the queue without having run leaves no trace in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deploykit.serving.arenas import Joined, size_of
from deploykit.serving.requests import Busy, InferRequest
from deploykit.specs import Array, Signature

BATCH_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Policy:
    """How requests are queued and joined.

    Attributes:
        max_batch: Most rows that are run at once; 1 joins nothing.
        max_delay_s: Seconds that a request may wait for others, where it could run.
        limit: Most requests that wait.
        max_bytes: Most bytes of the inputs that are run at once.
        limit_bytes: Most bytes of the inputs that wait; one request may always wait.
    """

    max_batch: int = 1
    max_delay_s: float = 0.0
    limit: int = 128
    max_bytes: int = BATCH_BYTES
    limit_bytes: int = 2**30


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue.

    Attributes:
        request: What was asked.
        arrived: When, by the caller's clock.
        rows: Size of its first dimension; 0 where it is not to be joined.
        size: Size of its first dimension, joined or not; 1 where its inputs do not share one.
        key: Equal for requests that may be joined.
        nbytes: Of its inputs.
        future: Of whoever waits for it; this module leaves it alone, and `flight` too.
        flight: What it was given to a lane with; None where it was not.
        queued: Whether it is in the queue.
    """

    request: InferRequest
    arrived: float
    rows: int = 0
    size: int = 1
    key: Hashable = None
    nbytes: int = 0
    future: Any = None
    flight: Any = None
    queued: bool = field(default=False)

    @classmethod
    def of(cls, request: InferRequest, arrived: float, *, joins: bool) -> Waiting:
        """A request, with what decides whom it may be joined with."""
        found = cls(request, arrived, nbytes=size_of(request.inputs))
        firsts = {a.shape[:1] for a in request.inputs.values()}
        if len(firsts) == 1 and () not in firsts:
            (found.size,) = firsts.pop()
            if joins and found.size:
                found.rows = found.size
                found.key = tuple(sorted((n, a.dtype.kind, a.shape[1:]) for n, a in request.inputs.items()))
        return found


@dataclass(slots=True)
class _Group:
    entries: deque[Waiting] = field(default_factory=deque)
    rows: int = 0


class Batcher:
    """The queue of one model.

    Args:
        policy: How requests are queued and joined.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._groups: dict[Hashable, _Group] = {}
        self._count = 0
        self._nbytes = 0

    def __len__(self) -> int:
        return self._count

    def add(self, entry: Waiting, *, again: bool = False) -> None:
        """Put a request into the queue.

        Args:
            entry: The request.
            again: It was accepted before, and now has to run by itself.

        Raises:
            Busy: As many wait as may wait.
        """
        if not again and self._count and self._is_full(entry):
            raise Busy(f"{self._count} requests wait for {entry.request.model!r}", hint="send it again later")
        if again:
            entry.rows = 0
        group = self._group_of(entry)
        group.entries.append(entry)
        self._came(group, entry)

    def restore(self, entry: Waiting) -> None:
        """Put a request back that was taken and has not run, before all others of its kind; it is never refused."""
        group = self._group_of(entry)
        group.entries.appendleft(entry)
        self._came(group, entry)

    def _group_of(self, entry: Waiting) -> _Group:
        joins = entry.rows > 0 and self.policy.max_batch > 1
        return self._groups.setdefault(entry.key if joins else None, _Group())

    def _came(self, group: _Group, entry: Waiting) -> None:
        group.rows += entry.rows
        entry.queued = True
        self._count += 1
        self._nbytes += entry.nbytes

    def discard(self, entry: Waiting) -> bool:
        """Take a request out; whether it was there."""
        if not entry.queued:
            return False
        for key, group in self._groups.items():
            if entry in group.entries:
                group.entries.remove(entry)
                self._left(key, group, entry)
                return True
        raise AssertionError("a request says that it is queued and is in no group")

    def take(self, now: float, *, full: bool = False) -> tuple[Waiting, ...]:
        """What runs next; empty where nothing is due.

        Args:
            now: By the clock of `Waiting.arrived`.
            full: Only where there are as many rows as are run at once.
        """
        due = [item for item in self._groups.items() if self._is_due(item[0], item[1], now, full=full)]
        if not due:
            return ()
        key, group = min(due, key=lambda item: item[1].entries[0].arrived)
        taken = [group.entries[0]]
        if key is not None:
            rows, nbytes = taken[0].rows, taken[0].nbytes
            for entry in list(group.entries)[1 : self.policy.max_batch]:
                rows, nbytes = rows + entry.rows, nbytes + entry.nbytes
                if rows > self.policy.max_batch or nbytes > self.policy.max_bytes:
                    break
                taken.append(entry)
        for entry in taken:
            group.entries.popleft()
            self._left(key, group, entry)
        return tuple(taken)

    def next_due(self, now: float) -> float | None:
        """When something is due that is not now; None where nothing waits, or something is due already."""
        times = [group.entries[0].arrived + self.policy.max_delay_s for group in self._groups.values()]
        if not times or any(self._is_due(key, group, now, full=False) for key, group in self._groups.items()):
            return None
        return min(times)

    def clear(self) -> tuple[Waiting, ...]:
        """Take all out."""
        found = tuple(entry for group in self._groups.values() for entry in group.entries)
        for entry in found:
            entry.queued = False
        self._groups.clear()
        self._count = self._nbytes = 0
        return found

    def _is_full(self, entry: Waiting) -> bool:
        return self._count >= self.policy.limit or self._nbytes + entry.nbytes > self.policy.limit_bytes

    def _is_due(self, key: Hashable, group: _Group, now: float, *, full: bool) -> bool:
        if key is None or group.rows >= self.policy.max_batch:
            return True
        return not full and now >= group.entries[0].arrived + self.policy.max_delay_s

    def _left(self, key: Hashable, group: _Group, entry: Waiting) -> None:
        entry.queued = False
        group.rows -= entry.rows
        self._count -= 1
        self._nbytes -= entry.nbytes
        if not group.entries:
            del self._groups[key]


def join(signature: Signature, batch: tuple[Waiting, ...]) -> list[Joined]:
    """The inputs of several requests as those of one, in the model's order."""
    return [Joined(s.name, s.dtype, tuple(w.request.inputs[s.name] for w in batch)) for s in signature.inputs]


def split(outputs: Mapping[str, Array], batch: tuple[Waiting, ...]) -> list[dict[str, Array]] | None:
    """Each request's own outputs, copied; None where the outputs do not have the rows of the inputs."""
    if len(batch) == 1:
        return [{name: array.copy() for name, array in outputs.items() if _wanted(batch[0], name)}]
    rows = sum(entry.rows for entry in batch)
    if any(array.ndim == 0 or array.shape[0] != rows for array in outputs.values()):
        return None
    found, begin = [], 0
    for entry in batch:
        end = begin + entry.rows
        found.append({name: array[begin:end].copy() for name, array in outputs.items() if _wanted(entry, name)})
        begin = end
    return found


def _wanted(entry: Waiting, name: str) -> bool:
    return entry.request.outputs is None or name in entry.request.outputs
