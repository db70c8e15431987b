"""From the queue to the lanes of workers, and from their answers to who waits.

What waits goes to the lane that has least to do. Where all lanes compute, what comes next lies ready in one of them, so
that it costs no pause; where a lane runs out of work meanwhile, what lies ready in another one is taken back and goes
there, and so is what nobody waits for any more. Only what a worker has begun runs to its end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from deploykit.errors import first_line
from deploykit.serving.arenas import Joined
from deploykit.serving.batching import Batcher, Policy, Waiting, join, split
from deploykit.serving.loaded import Loaded, Options
from deploykit.serving.metrics import ModelMetrics
from deploykit.serving.requests import Failed, InferResult, NotReady, RequestError
from deploykit.serving.workers import Answer, Done, Worker
from deploykit.specs import Signature

log = logging.getLogger("deploykit.serving")


class LaneLike(Protocol):
    """What runs one request after another; `workers.Lane` is one."""

    @property
    def in_flight(self) -> int: ...
    @property
    def spare(self) -> bool: ...
    def send(self, tensors: Sequence[Joined], done: Done) -> int: ...
    def withdraw(self, offer: int) -> bool: ...


class WorkerLike(Protocol):
    """What holds a model; `workers.Worker` is one."""

    @property
    def lanes(self) -> Sequence[LaneLike]: ...
    @property
    def pid(self) -> int: ...
    async def start(self) -> dict[str, Any]: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...
    async def wait(self) -> int: ...


Hire = Callable[[Loaded, Options, Callable[[], None], Callable[[Any], None]], WorkerLike]


def hire(loaded: Loaded, options: Options, on_answer: Callable[[], None], on_end: Callable[[Any], None]) -> WorkerLike:
    """A worker process."""
    job = {
        **loaded.job(), "max_batch": loaded.max_batch, "memory_bytes": options.memory_bytes,
        "force_batching": options.force_batching,
    }  # fmt: skip
    return Worker(job, loaded.lanes, options.arena_bytes, options.load_s, on_answer, on_end)


@dataclass(slots=True, eq=False)
class _Flight:
    """Requests that a lane was given together.

    Attributes:
        lane: Which.
        batch: The requests.
        sent: When, by `time.monotonic`.
        offer: What the lane knows them by.
        guard: Ends the worker, if it never answers.
    """

    lane: LaneLike
    batch: tuple[Waiting, ...]
    sent: float
    offer: int = 0
    guard: asyncio.TimerHandle | None = None


class Dispatcher:
    """The queue of one version of a model, and what its workers have of it.

    Args:
        loaded: The model.
        options: How it is served.
        metrics: What is counted.
        workers: Those that answer, as they come and go.

    Attributes:
        signature: Inputs and outputs.
        batcher: What waits.
        joins: Whether requests are joined.
        rowed: Whether the first dimension of its inputs counts rows, joined or not.
        running: Requests that workers have.
    """

    def __init__(
        self, loaded: Loaded, options: Options, metrics: ModelMetrics, workers: Collection[WorkerLike]
    ) -> None:
        self.signature = loaded.signature or Signature((), ())
        self.batcher = Batcher(Policy())
        self.joins = False
        self.rowed = False
        self.running = 0
        self._loaded = loaded
        self._timeout_s = options.timeout_s
        self._metrics = metrics
        self._workers = workers
        self._flights: dict[_Flight, None] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    # --- to the lanes -------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Give the lanes what is due."""
        while (lane := self._lane()) is not None:
            idle = not lane.in_flight
            if idle:
                self._recall()
            if not len(self.batcher):
                return
            now = time.monotonic()
            batch = self.batcher.take(now, full=not idle)  # what only lies ready is whole batches
            if not batch:
                if idle:
                    self._wake(self.batcher.next_due(now), now)
                return
            self._run(lane, batch, now)

    def _lane(self) -> LaneLike | None:
        """The lane with least to do, of the worker with least to do; None where all have all that they can have."""
        best: tuple[int, int] | None = None
        found = None
        for worker in self._workers:
            lanes = worker.lanes
            load = sum(lane.in_flight for lane in lanes)
            for lane in lanes:
                if lane.spare and (best is None or (lane.in_flight, load) < best):
                    best, found = (lane.in_flight, load), lane
        return found

    def _wake(self, when: float | None, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when is not None:
            self._timer = self._loop.call_later(max(0.0, when - now), self.pump)

    def _run(self, lane: LaneLike, batch: tuple[Waiting, ...], now: float) -> None:
        flight = _Flight(lane, batch, now)
        try:
            flight.offer = lane.send(join(self.signature, batch), partial(self._done, flight))
        except RequestError as exc:
            self._refused(batch, exc)
            return
        except Exception as exc:  # those who wait have to be told, and whoever else is in the middle of a call goes on
            log.exception("%s: a request cannot be handed on", self._loaded.name)
            self._refused(batch, Failed(f"the request cannot be handed on: {first_line(exc)}"))
            return
        self._flights[flight] = None
        self.running += len(batch)
        for entry in batch:
            entry.flight = flight
        # Nobody waits longer for any of them, and what runs before them takes no longer either.
        flight.guard = self._loop.call_later(2 * self._timeout_s, self._hung, lane)

    def _landed(self, flight: _Flight) -> None:
        """A lane has it no more."""
        if flight.guard is not None:
            flight.guard.cancel()
        del self._flights[flight]
        self.running -= len(flight.batch)
        for entry in flight.batch:
            entry.flight = None

    def _hung(self, lane: LaneLike) -> None:
        for worker in self._workers:
            if lane in worker.lanes:
                log.error("%s: worker %d has not answered in time and is ended", self._loaded.name, worker.pid)
                worker.kill()

    # --- and back -----------------------------------------------------------------------------------------------------

    def leave(self, entry: Waiting) -> bool:
        """Nobody waits for a request any more: it does not run, if it has not begun to; whether that is so."""
        if self.batcher.discard(entry):
            return True
        if entry.flight is None or not self._take_back(entry.flight, entry):
            return False
        self.pump()
        return True

    def _recall(self) -> None:
        """A lane has nothing to do: take back what has lain ready behind another request for longest."""
        for flight in tuple(self._flights):
            if flight.lane.in_flight > 1 and self._take_back(flight):
                return

    def _take_back(self, flight: _Flight, without: Waiting | None = None) -> bool:
        """Have wait again what a lane has not begun, but for what nobody waits for; whether it had not begun."""
        if not flight.lane.withdraw(flight.offer):
            return False
        self._landed(flight)
        for entry in reversed(flight.batch):
            if entry is not without and not entry.future.done():
                self.batcher.restore(entry)
        return True

    def clear(self, error: RequestError) -> None:
        """Refuse all that waits."""
        self._wake(None, 0.0)
        for entry in self.batcher.clear():
            fail(entry, error)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _done(self, flight: _Flight, found: Answer | RequestError) -> None:
        self._landed(flight)
        batch = flight.batch
        if isinstance(found, RequestError):
            self._refused(batch, found)
            return
        try:
            self._answered(batch, found, flight.sent)
        except Exception as exc:  # memory, most likely: those who wait have to be told
            log.exception("%s: an answer cannot be passed on", self._loaded.name)
            for entry in batch:
                fail(entry, Failed(f"the answer cannot be passed on: {first_line(exc)}"))

    def _answered(self, batch: tuple[Waiting, ...], answer: Answer, sent: float) -> None:
        loaded = self._loaded
        found = split(answer.outputs, batch)
        if found is None:
            log.error("%s: requests are joined no more: the outputs do not have their rows", loaded.name)
            self.joins = False
            self.batcher.policy = replace(self.batcher.policy, max_batch=1)
            self._refused(batch, NotReady("the model does not keep rows apart"))
            return
        rows = sum(entry.size for entry in batch) if self.rowed else 1
        self._metrics.ran(rows, answer.compute_s)
        for entry, outputs in zip(batch, found, strict=True):
            self._metrics.queue.observe(sent - entry.arrived)
            if entry.future.done():
                continue
            entry.future.set_result(
                InferResult(
                    loaded.name, loaded.version, outputs, entry.request.id, sent - entry.arrived, answer.compute_s,
                    rows if self.joins else 0,
                )
            )  # fmt: skip

    def _refused(self, batch: tuple[Waiting, ...], error: RequestError) -> None:
        """Tell who asked; of a batch, each runs once more by itself, so that one cannot spoil the others."""
        if len(batch) == 1 or error.outcome == "worker_lost":
            for entry in batch:
                fail(entry, error)
            return
        for entry in batch:
            if not entry.future.done():
                self.batcher.add(entry, again=True)


def fail(entry: Waiting, error: RequestError) -> None:
    """Tell whoever waits for a request, if somebody does."""
    if not entry.future.done():
        entry.future.set_exception(error)
