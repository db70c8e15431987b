"""One version of a model while it is served: its queue, its workers, and who waits for what."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from typing import Any

from deploykit.errors import DeploykitError
from deploykit.serving.batching import BATCH_BYTES, Policy, Waiting
from deploykit.serving.checks import check_inputs, check_outputs
from deploykit.serving.dispatch import Dispatcher, Hire, WorkerLike, fail, hire
from deploykit.serving.loaded import Loaded, Options, batch_symbol, signature_of
from deploykit.serving.metrics import Metrics
from deploykit.serving.requests import DeadlineExceeded, InferRequest, InferResult, ModelInfo, NotReady
from deploykit.serving.v2_types import datatype_of
from deploykit.specs import Signature

log = logging.getLogger("deploykit.serving")

# A worker that lived as long is replaced at once, another after a pause that doubles.
_STEADY_S = 10.0
_FIRST_PAUSE_S = 0.25
_LAST_PAUSE_S = 30.0


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
        self._dispatch = Dispatcher(loaded, options, self._metrics, self._workers.keys())
        self._remark = ""
        self._loop = asyncio.get_running_loop()
        self._accepted = 0
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
        return len(self._dispatch.batcher)

    @property
    def running(self) -> int:
        """Requests that workers have."""
        return self._dispatch.running

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers that answer."""
        return tuple(worker.pid for worker in self._workers)

    def info(self, versions: tuple[str, ...] = ()) -> ModelInfo:
        """What a client may know of it.

        Args:
            versions: Of the model, those that answer; by default this one alone.
        """
        loaded = self.loaded
        dispatch = self._dispatch
        return ModelInfo(
            loaded.name, versions or (loaded.version,), loaded.platform, self.signature.inputs, self.signature.outputs,
            dispatch.batcher.policy.max_batch if dispatch.joins else 0, self._remark,
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
        self._remark = str(ready.get("batching", ""))
        options, dispatch = self._options, self._dispatch
        dispatch.signature = self.signature
        dispatch.rowed = batch_symbol(self.signature) is not None
        dispatch.joins = bool(ready["batched"]) and self.loaded.max_batch > 1
        dispatch.batcher.policy = Policy(
            self.loaded.max_batch if dispatch.joins else 1, options.max_delay_s, options.queue,
            min(options.arena_bytes, BATCH_BYTES),
        )  # fmt: skip
        where = f"{self.loaded.name} version {self.loaded.version}"
        log.info("%s is ready (%.1f s to load, %.1f s to warm up)", where, ready["load_s"], ready["warm_s"])
        for note in ready["notes"]:
            log.warning("%s: %s", where, note)

    async def _hire_one(self) -> dict[str, Any]:
        self._check_stopping()
        worker = self._hire(self.loaded, self._options, self._dispatch.pump, self._lost)
        self._hired.add(worker)
        found = await worker.start()
        if self._stopping:
            worker.close()
            await worker.wait()
            raise NotReady(f"{self.loaded.name} is being stopped")
        self._workers[worker] = self._loop.time()
        self.fault = ""
        self._dispatch.pump()
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
                    self._dispatch.clear(NotReady(f"{self.loaded.name} cannot be run at the moment"))

    # --- requests -----------------------------------------------------------------------------------------------------

    async def infer(self, request: InferRequest) -> InferResult:
        """Answer a request; cancelled, it does not run if it has not begun to.

        Raises:
            RequestError: It is not answered.
        """
        self._check(request)
        now = time.monotonic()
        entry = Waiting.of(request, now, joins=self._dispatch.joins)
        entry.future = self._loop.create_future()
        end = now + self._options.timeout_s
        if request.deadline is not None:
            end = min(end, request.deadline)
        if end <= now:
            raise DeadlineExceeded("the request came after its deadline")
        self._dispatch.batcher.add(entry)
        self._accepted += 1
        self._idle.clear()
        timer = self._loop.call_later(end - now, self._expire, entry)
        try:
            self._dispatch.pump()
            found: InferResult = await entry.future
            return found
        finally:
            timer.cancel()
            self._leave(entry)
            self._accepted -= 1
            self._rest()
            # An error holds this frame, and the future of the entry holds the error: without this, the tensors of
            # whatever failed would stay until the garbage collector comes by.
            del entry, request

    def _check_stopping(self) -> None:
        if self._stopping:
            raise NotReady(f"{self.loaded.name} is being stopped")

    def _check(self, request: InferRequest) -> None:
        self._check_stopping()
        if self.fault:
            raise NotReady(f"{self.loaded.name} cannot be run at the moment")
        check_inputs(self.signature, request.inputs)
        check_outputs(self.signature, request.outputs)

    def _leave(self, entry: Waiting) -> bool:
        """Nobody waits for a request any more; whether it never ran."""
        left = self._dispatch.leave(entry)
        if left:
            self._metrics.queue.observe(time.monotonic() - entry.arrived)  # the longest waits are not to be left out
        return left

    def _expire(self, entry: Waiting) -> None:
        where = "waited" if self._leave(entry) else "ran"
        fail(entry, DeadlineExceeded(f"the request's time ran out while it {where}"))

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
        for task in tuple(self._starting):
            task.cancel()
        self._dispatch.clear(NotReady(f"{self.loaded.name} is being stopped"))
        workers = tuple(self._workers)
        for worker in workers:
            worker.close()
        self._workers.clear()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._starting, return_exceptions=True)
        await asyncio.gather(*(worker.wait() for worker in workers))
