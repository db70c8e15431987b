"""What the protocols talk to: models, answers, readiness and metrics behind one object."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from deploykit.errors import DeploykitError
from deploykit.serving.dispatch import Hire, hire
from deploykit.serving.loaded import Options, Source
from deploykit.serving.repository import Repository
from deploykit.serving.requests import DeadlineExceeded, InferRequest, InferResult, ModelInfo, NotReady, RequestError


class ServingEngine:
    """The `Engine` of `requests.py`: worker processes, with queues in front. For one event loop.

    Args:
        sources: What is served.
        options: How.
        hire: Makes a worker.

    Raises:
        DeploykitError: Two models have one name.
    """

    def __init__(self, sources: Sequence[Source], options: Options | None = None, *, hire: Hire = hire) -> None:
        self.repository = Repository(sources, options or Options(), hire)
        self.metrics = self.repository.metrics
        self._started = False
        self._stopping = False

    # --- its life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load all models and wait until they are warm.

        Raises:
            DeploykitError: One cannot be loaded; the others are ended again.
        """
        try:
            await self.repository.start()
        except BaseException:
            await self.repository.stop()
            raise
        self._started = True

    def begin_to_stop(self) -> None:
        """Be ready no more, so that nobody sends more; what comes is still answered."""
        self._stopping = True

    async def drain(self) -> None:
        """Wait until every accepted request is answered."""
        if self._stopping:
            self.repository.load_no_more()
        await self.repository.drain()

    async def stop(self) -> None:
        """End all workers."""
        self._stopping = True
        await self.repository.stop()

    def kill(self) -> None:
        """End all workers without waiting for anything."""
        self.repository.kill()

    # --- the contract -------------------------------------------------------------------------------------------------

    def live(self) -> bool:
        """Whether the process works: it does, or it would not say so."""
        return True

    def ready(self) -> bool:
        """Whether every model answers and the server is not stopping."""
        return self._started and not self._stopping and self.repository.ready()

    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.repository.names()

    def info(self, name: str, version: str | None = None) -> ModelInfo:
        """What a client may know of a model.

        Raises:
            UnknownModel: There is none.
            NotReady: It is not loaded.
        """
        return self.repository.get(name, version).info(self.repository.versions(name))

    def model_ready(self, name: str, version: str | None = None) -> bool:
        """Whether a model answers.

        Raises:
            UnknownModel: There is none.
        """
        try:
            return self.repository.get(name, version).ready and not self._stopping
        except NotReady:
            return False

    async def infer(self, request: InferRequest) -> InferResult:
        """Answer a request. Cancelled, a request that still waits never runs.

        Raises:
            RequestError: It is not answered; the class says why.
        """
        started, outcome = time.monotonic(), "failed"
        try:
            # Which version answers is decided here, and the request is in its queue before anything else happens.
            found = await self.repository.get(request.model, request.version).infer(request)
            outcome = "ok"
            return found
        except RequestError as exc:
            outcome = exc.outcome
            raise
        except asyncio.CancelledError:
            late = request.deadline is not None and time.monotonic() >= request.deadline
            outcome = DeadlineExceeded.outcome if late else "cancelled"
            raise
        finally:
            known = request.model if request.model in self.repository else ""
            self.metrics.ended(known, outcome, time.monotonic() - started)

    async def load(self, name: str) -> None:
        """Load a model, or its newest version; the old one answers until the new one does.

        Raises:
            UnknownModel: There is none.
            RequestError: It cannot be loaded.
        """
        try:
            await self.repository.refresh(name)
        except RequestError:
            raise
        except DeploykitError as exc:
            raise NotReady(f"{name} cannot be loaded: {exc}") from exc

    async def unload(self, name: str) -> None:
        """Answer no more requests to a model, once the accepted ones are answered.

        Raises:
            UnknownModel: There is none.
        """
        await self.repository.unload(name)

    def index(self) -> list[dict[str, str]]:
        """Every model and version: `name`, `version`, `state` and `reason`."""
        return self.repository.index()
