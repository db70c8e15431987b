"""One version of a model while it is served: its queue, its workers, and who waits for what."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from deploykit.errors import DeploykitError, first_line
from deploykit.serving.arenas import Joined
from deploykit.serving.batching import BATCH_BYTES, Batcher, Policy, Waiting, join, split
from deploykit.serving.checks import check_inputs, check_outputs
from deploykit.serving.loaded import Loaded, Options, signature_of
from deploykit.serving.metrics import Metrics
from deploykit.serving.requests import (
    DeadlineExceeded,
    Failed,
    InferRequest,
    InferResult,
    ModelInfo,
    NotReady,
    RequestError,
)
from deploykit.serving.v2_types import datatype_of
from deploykit.serving.workers import Answer, Done, Worker
from deploykit.specs import Signature

log = logging.getLogger("deploykit.serving")

# A worker that lived as long is replaced at once, another after a pause that doubles.
_STEADY_S = 10.0
_FIRST_PAUSE_S = 0.25
_LAST_PAUSE_S = 30.0


class LaneLike(Protocol):
    """What runs one request after another; `workers.Lane` is one."""

    @property
    def in_flight(self) -> int: ...
    @property
    def spare(self) -> bool: ...
    def send(self, tensors: Sequence[Joined], done: Done) -> None: ...


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
    job = {**loaded.job(), "max_batch": loaded.max_batch, "memory_bytes": options.memory_bytes}
    return Worker(job, loaded.lanes, options.arena_bytes, options.load_s, on_answer, on_end)


class Served:
    """A version of a model.

    Args:
        loaded: What is served.
        options: How.
        metrics: What is counted.
        hire: Makes a worker.

    Attributes:
        signature: Inputs and outputs; empty until it is ready.
        fault: Why no worker answers; empty where that is not so, or not known yet.
    """

    def __init__(self, loaded: Loaded, options: Options, metrics: Metrics, hire: Hire = hire) -> None:
        self.loaded = loaded
        self.signature = loaded.signature or Signature((), ())
        self.fault = ""
        self._options = options
        self._hire = hire
        self._metrics = metrics.of(loaded.name, loaded.version)
        self._workers: dict[WorkerLike, float] = {}
        self._hired: weakref.WeakSet[WorkerLike] = weakref.WeakSet()
        self._batcher = Batcher(Policy())
        self._joins = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._accepted = 0
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._failures = 0
        self._starting: set[asyncio.Task[None]] = set()
        self._stopping = False

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a worker answers."""
        return bool(self._workers) and not self._stopping

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._batcher)

    @property
    def running(self) -> int:
        """Requests that workers have."""
        return self._running

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers that answer."""
        return tuple(worker.pid for worker in self._workers)

    def info(self) -> ModelInfo:
        """What a client may know of it."""
        loaded = self.loaded
        return ModelInfo(
            loaded.name, (loaded.version,), loaded.platform, self.signature.inputs, self.signature.outputs,
            self._batcher.policy.max_batch if self._joins else 0,
        )  # fmt: skip

    # --- workers ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all workers, and wait until each is warm.

        Raises:
            DeploykitError: One cannot load the model; all are ended again.
        """
        tasks = [self._loop.create_task(self._hire_one()) for _ in range(self.loaded.settings.sessions)]
        try:
            found = await asyncio.gather(*tasks)
            self._adopt(found[0])
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.stop()
            raise

    def _adopt(self, ready: dict[str, Any]) -> None:
        """Take over what a worker says of the model."""
        if self.loaded.signature is None:
            self.signature = signature_of(ready["signature"])
        for spec in self.signature:
            datatype_of(spec.dtype)  # no protocol could name it in an answer
        self._joins = bool(ready["batched"]) and self.loaded.max_batch > 1
        options = self._options
        self._batcher.policy = Policy(
            self.loaded.max_batch if self._joins else 1, options.max_delay_s, options.queue,
            min(options.arena_bytes, BATCH_BYTES),
        )  # fmt: skip
        where = f"{self.loaded.name} version {self.loaded.version}"
        log.info("%s is ready (%.1f s to load, %.1f s to warm up)", where, ready["load_s"], ready["warm_s"])
        for note in ready["notes"]:
            log.warning("%s: %s", where, note)

    async def _hire_one(self) -> dict[str, Any]:
        worker = self._hire(self.loaded, self._options, self._pump, self._lost)
        self._hired.add(worker)
        found = await worker.start()
        if self._stopping:
            worker.close()
            await worker.wait()
            raise NotReady(f"{self.loaded.name} is being stopped")
        self._workers[worker] = self._loop.time()
        self.fault = ""
        self._pump()
        return found

    def _lost(self, worker: WorkerLike) -> None:
        """A worker ended; those who waited for it know. Start another."""
        since = self._workers.pop(worker, None)
        if since is None or self._stopping:  # it never was ready: whoever starts it knows
            return
        log.warning("%s: worker %d died; another one is started", self.loaded.name, worker.pid)
        self._metrics.restarts += 1
        if self._loop.time() - since >= _STEADY_S:
            self._failures = 0
        self._replace(worker)

    def _replace(self, gone: WorkerLike | None) -> None:
        task = self._loop.create_task(self._start_again(gone))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _start_again(self, gone: WorkerLike | None) -> None:
        if gone is not None:
            await gone.wait()
        while not self._stopping:
            if self._failures:
                await asyncio.sleep(min(_LAST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures - 1, 16)))
            self._failures += 1
            try:
                await self._hire_one()
                return
            except Exception as exc:  # whatever it is, the model would never answer again
                known = isinstance(exc, DeploykitError)
                log.error("%s: no worker can be started: %s", self.loaded.name, exc, exc_info=not known)
                if not self._workers:
                    self.fault = str(exc)
                    self._give_up(NotReady(f"{self.loaded.name} cannot be run at the moment"))

    def _give_up(self, error: RequestError) -> None:
        for entry in self._batcher.clear():
            _fail(entry, error)

    # --- requests -----------------------------------------------------------------------------------------------------

    async def infer(self, request: InferRequest) -> InferResult:
        """Answer a request; cancelled, it does not run if it has not begun to.

        Raises:
            RequestError: It is not answered.
        """
        self._check(request)
        now = time.monotonic()
        entry = Waiting.of(request, now, joins=self._joins)
        entry.future = self._loop.create_future()
        end = now + self._options.timeout_s
        if request.deadline is not None:
            end = min(end, request.deadline)
        if end <= now:
            raise DeadlineExceeded("the request came after its deadline")
        self._batcher.add(entry)
        self._accepted += 1
        self._idle.clear()
        timer = self._loop.call_later(end - now, self._expire, entry)
        try:
            self._pump()
            found: InferResult = await entry.future
            return found
        finally:
            timer.cancel()
            self._batcher.discard(entry)
            self._accepted -= 1
            self._rest()

    def _check(self, request: InferRequest) -> None:
        if self._stopping:
            raise NotReady(f"{self.loaded.name} is being stopped")
        if self.fault:
            raise NotReady(f"{self.loaded.name} cannot be run at the moment")
        check_inputs(self.signature, request.inputs)
        check_outputs(self.signature, request.outputs)

    def _expire(self, entry: Waiting) -> None:
        where = "ran"
        if self._batcher.discard(entry):
            where = "waited"
            self._metrics.queue.observe(time.monotonic() - entry.arrived)  # the longest waits are not to be left out
        _fail(entry, DeadlineExceeded(f"the request's time ran out while it {where}"))

    def _pump(self) -> None:
        """Give the lanes what is due."""
        while len(self._batcher):
            now = time.monotonic()
            lane, full = self._lane()
            if lane is None:
                return
            batch = self._batcher.take(now, full=full)
            if not batch:
                if not full:
                    self._wake(self._batcher.next_due(now), now)
                return
            self._run(lane, batch, now)

    def _lane(self) -> tuple[LaneLike | None, bool]:
        """A lane with nothing to do, or else one with room for what is to come next, for whole batches only."""
        spare = [lane for worker in self._workers for lane in worker.lanes if lane.spare]
        if not spare:
            return None, False
        lane = min(spare, key=lambda lane: lane.in_flight)
        return lane, lane.in_flight > 0

    def _wake(self, when: float | None, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when is not None:
            self._timer = self._loop.call_later(max(0.0, when - now), self._pump)

    def _run(self, lane: LaneLike, batch: tuple[Waiting, ...], now: float) -> None:
        guard: list[asyncio.TimerHandle] = []

        def done(found: Answer | RequestError) -> None:
            guard[0].cancel()
            self._running -= len(batch)
            if isinstance(found, RequestError):
                self._refused(batch, found)
                return
            try:
                self._answered(batch, found, now)
            except Exception as exc:  # memory, most likely: those who wait have to be told
                log.exception("%s: an answer cannot be passed on", self.loaded.name)
                for entry in batch:
                    _fail(entry, Failed(f"the answer cannot be passed on: {first_line(exc)}"))

        try:
            lane.send(join(self.signature, batch), done)
        except RequestError as exc:
            self._refused(batch, exc)
            return
        self._running += len(batch)
        # Nobody waits longer for any of them, and what runs before them takes no longer either.
        guard.append(self._loop.call_later(2 * self._options.timeout_s, self._hung, lane))

    def _hung(self, lane: LaneLike) -> None:
        for worker in self._workers:
            if lane in worker.lanes:
                log.error("%s: worker %d has not answered in time and is ended", self.loaded.name, worker.pid)
                worker.kill()

    def _answered(self, batch: tuple[Waiting, ...], answer: Answer, sent: float) -> None:
        found = split(answer.outputs, batch)
        if found is None:
            log.error("%s: requests are joined no more: the outputs do not have their rows", self.loaded.name)
            self._joins = False
            self._batcher.policy = replace(self._batcher.policy, max_batch=1)
            self._refused(batch, NotReady("the model does not keep rows apart"))
            return
        self._metrics.ran(sum(entry.rows or 1 for entry in batch), answer.compute_s)
        rows = sum(entry.rows for entry in batch) if self._joins else 0
        for entry, outputs in zip(batch, found, strict=True):
            self._metrics.queue.observe(sent - entry.arrived)
            if entry.future.done():
                continue
            request, loaded = entry.request, self.loaded
            entry.future.set_result(
                InferResult(
                    loaded.name, loaded.version, outputs, request.id, sent - entry.arrived, answer.compute_s, rows
                )
            )

    def _refused(self, batch: tuple[Waiting, ...], error: RequestError) -> None:
        """Tell who asked; of a batch, each runs once more by itself, so that one cannot spoil the others."""
        if len(batch) == 1 or error.outcome == "worker_lost":
            for entry in batch:
                _fail(entry, error)
            return
        for entry in batch:
            if not entry.future.done():
                self._batcher.add(entry, again=True)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _rest(self) -> None:
        if not self._accepted:
            self._idle.set()

    async def drain(self) -> None:
        """Wait until every accepted request is answered; what a worker still computes for nobody does not count."""
        await self._idle.wait()

    def kill(self) -> None:
        """End the workers without waiting for anything."""
        self._stopping = True
        for worker in self._hired:
            worker.kill()

    async def stop(self) -> None:
        """End the workers; what still waits is refused."""
        self._stopping = True
        self._wake(None, 0.0)
        for task in tuple(self._starting):
            task.cancel()
        self._give_up(NotReady(f"{self.loaded.name} is being stopped"))
        workers = tuple(self._workers)
        for worker in workers:
            worker.close()
        self._workers.clear()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._starting, return_exceptions=True)
        await asyncio.gather(*(worker.wait() for worker in workers))


def _fail(entry: Waiting, error: RequestError) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
