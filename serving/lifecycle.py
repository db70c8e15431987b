"""A server from its start to its end: bind, load, warm up, be ready; drain, end.

SIGTERM and SIGINT: ready no more; for a moment everything is still answered, each connection for the last time, so that
clients and balancers turn away; then nothing new is accepted, what was accepted is answered, and the process ends. The
second such signal ends it at once. SIGHUP has it read its certificates again and look for newer versions of its models.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from deploykit.errors import DeploykitError
from deploykit.extras import available, require
from deploykit.serving.admin_app import admin_app
from deploykit.serving.engine import ServingEngine
from deploykit.serving.http_app import http_app
from deploykit.serving.loaded import Options, Source
from deploykit.serving.memory import keep_freed_memory, set_what_stays_aside
from deploykit.serving.requests import RequestError
from deploykit.serving.servers import Bound, GrpcServer, HttpServer, Places, listen
from deploykit.serving.tls import read_certificates
from deploykit.serving.tracing import Traces
from deploykit.serving.triton_api import Statistics
from deploykit.serving.v2_types import Limits

log = logging.getLogger("deploykit.serving")

INTERRUPTED = 130
# How long a collector of traces may keep the end waiting.
_FLUSH_S = 5.0


def run(
    sources: Sequence[Source],
    options: Options,
    places: Places,
    on_ready: Callable[[Bound], None],
    traces: Traces | None = None,
) -> int:
    """Serve until a signal ends it.

    Args:
        sources: What is served.
        options: How.
        places: Where, and for whom.
        on_ready: Called once all models answer.
        traces: Where spans of inferences go; they are sent, and ended, at the end.

    Returns:
        The exit code: 0 where every accepted request was answered.

    Raises:
        DeploykitError: It cannot start.
    """

    async def all_of_it() -> int:
        return await _Life(sources, options, places, on_ready, traces).live()

    keep_freed_memory()
    _allow_descriptors()
    if available("uvloop"):
        found: int = require("uvloop").run(all_of_it())
        return found
    return asyncio.run(all_of_it())


def _allow_descriptors() -> None:
    """Have as many connections and workers as the system allows; the usual 1024 descriptors are soon taken."""
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ImportError, OSError, ValueError):  # another system, or one that says no
        log.debug("the limit of open files stays as it is")


class _Life:
    """One server."""

    def __init__(
        self,
        sources: Sequence[Source],
        options: Options,
        places: Places,
        on_ready: Callable[[Bound], None],
        traces: Traces | None,
    ) -> None:
        self._options = options
        self._places = places
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._engine = ServingEngine(sources, options)
        self._certificates = read_certificates(places.cert, places.key, places.client_ca)
        self._traces = traces
        self._statistics = Statistics()
        self._http: list[HttpServer] = []
        self._grpc: GrpcServer | None = None
        self._renewing = asyncio.Lock()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def live(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._ended)
        self._loop.add_signal_handler(signal.SIGHUP, self._rescan)
        servers = self._http
        try:
            places, limits = self._places, Limits()
            main = http_app(
                self._engine, limits=limits, tokens=places.tokens, refused=self._refused, traces=self._traces,
                statistics=self._statistics,
            )  # fmt: skip
            servers.append(HttpServer(main, limits, places.host, places.http_port, self._certificates))
            if places.admin_port is not None:
                admin = admin_app(self._engine, limits, places.tokens, repository=places.repository_api)
                servers.append(HttpServer(admin, limits, places.host, places.admin_port, self._certificates))
            for server in servers:
                await server.start()
            return await self._serve(servers, limits)
        finally:
            for server in servers:
                server.abandon()
            if self._grpc is not None:
                await self._grpc.stop(0.0, 0.0)
            for task in self._tasks:
                task.cancel()
            await self._engine.stop()
            if self._traces is not None:
                await self._traces.close(_FLUSH_S)
            gc.unfreeze()  # where somebody's program has called us, it goes on

    async def _serve(self, servers: list[HttpServer], limits: Limits) -> int:
        port = self._places.grpc_port
        # gRPC can only take a port for good once the models are there: see now whether it can be had.
        held = listen(self._places.host, port) if port else None
        try:
            starting = self._loop.create_task(self._engine.start())
            stopped = self._loop.create_task(self._stop.wait())
            await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return 0
            await starting
        finally:  # also where a model cannot be loaded: somebody's program that has called us goes on
            if held is not None:
                held.close()
        if port is not None:
            self._grpc = GrpcServer(
                self._engine, limits, self._places, port, self._refused, certificates=self._certificates,
                traces=self._traces, statistics=self._statistics,
            )  # fmt: skip
            await self._grpc.start()
        set_what_stays_aside()
        admin = servers[1].port if len(servers) > 1 else None
        self._on_ready(Bound(servers[0].port, self._grpc.port if self._grpc else None, admin))
        self._keep(self._engine.repository.watch(self._places.poll_s))
        await stopped
        await self._drain(servers)
        return 0

    async def _drain(self, servers: list[HttpServer]) -> None:
        log.info("ending: ready no more")
        self._engine.begin_to_stop()
        for server in servers:
            server.draining.on = True
        await asyncio.sleep(self._places.linger_s)
        log.info("ending: accepting no more")
        ends = [servers[0].stop(self._places.linger_s)]
        if self._grpc is not None:
            ends.append(self._grpc.stop(self._places.linger_s, self._options.timeout_s))
        await asyncio.gather(*ends)
        await self._engine.drain()
        for server in servers[1:]:
            await server.stop()
        log.info("ended: all that was accepted is answered")

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refused(self, model: str, error: RequestError) -> None:
        """A request was refused before it came to the engine."""
        self._engine.metrics.ended(model, error.outcome, 0.0)

    def _ended(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            return
        log.warning("ended at once, by a second signal")
        self._engine.kill()
        logging.shutdown()
        os._exit(INTERRUPTED)

    def _rescan(self) -> None:
        log.info("looking for newer versions")
        self._keep(self._renew())
        self._keep(self._engine.repository.rescan())

    async def _renew(self) -> None:
        """Use the certificates that the files hold now; those that cannot be used are logged."""
        places = self._places
        async with self._renewing:
            at = self._certificates
            if at is None:
                return
            try:
                found = await asyncio.to_thread(read_certificates, places.cert, places.key, places.client_ca)
            except DeploykitError as exc:
                log.error("the certificates stay as they are: %s", exc)
                return
            if found is None or found.same(at):
                return
            self._certificates = found
            for server in self._http:
                await server.renew(found)
            if self._grpc is not None:
                self._grpc.renew(found)
            log.info("new connections get the new certificates")
