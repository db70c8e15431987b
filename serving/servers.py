"""Ports: the protocol over HTTP and over gRPC, and the administration's, each a server that can drain."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from deploykit.errors import DeploykitError
from deploykit.extras import require
from deploykit.serving.front import known_name
from deploykit.serving.requests import NotReady
from deploykit.serving.tls import Certificates, GrpcCertificates

if TYPE_CHECKING:
    from deploykit.serving.requests import Engine, InferRequest, InferResult, RequestError
    from deploykit.serving.tracing import Traces
    from deploykit.serving.triton_api import Statistics
    from deploykit.serving.v2_types import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BACKLOG = 2048
_PAUSE_S = 0.02
# How long a connection that a client has begun to make may take until it is made.
_HANDSHAKE_S = 0.2
# Linux's option, and a filter of packets in the language of `bpf(4)`: the byte of a TCP header that has the flags; a
# packet with SYN among them, which begins a connection, is dropped, and any other passes.
_SO_ATTACH_FILTER = 26
_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))


@dataclass(frozen=True, slots=True)
class Places:
    """Where a server listens, and whom it lets in.

    Attributes:
        host: Address of all ports.
        http_port: Of the protocol over HTTP; 0 for any that is free.
        grpc_port: Of the protocol over gRPC; None for none.
        admin_port: Of metrics and repository control; None for none.
        tokens: Clients have to bear one of them, if there are any.
        cert: File of the server's certificate chain; None for no TLS.
        key: File of its private key.
        client_ca: File of the certificates that clients' have to be signed with.
        repository_api: Whether models may be loaded and unloaded over the admin port.
        linger_s: Seconds between being ready no more and accepting no more; then as many again until connections that
            say nothing are closed.
        poll_s: Seconds between looks for new versions.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int | None = 8081
    admin_port: int | None = None
    tokens: tuple[str, ...] = ()
    cert: str | None = None
    key: str | None = None
    client_ca: str | None = None
    repository_api: bool = False
    linger_s: float = 1.0
    poll_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Bound:
    """The ports that a server really has; None for what it does not have."""

    http: int
    grpc: int | None
    admin: int | None


class Draining:
    """An ASGI application whose connections end after their next answer, once `on` is set.

    Args:
        app: The application.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self.on = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def last(message: MutableMapping[str, Any]) -> None:
            if self.on and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, last)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        DeploykitError: The address cannot be had.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as exc:
        raise DeploykitError(
            f"cannot listen on {host}:{port}: {exc.strerror or exc}", hint="choose another --host or port"
        ) from exc
    made.setblocking(False)
    return made


def let_nobody_in(listening: socket.socket) -> None:
    """Have the system begin no more connections at a port that still listens; those that have begun it goes on with.

    A port cannot be closed without that: a connection that is made between the last look at those which wait and the
    end of the port would be reset, with the request that its client has already sent. Here the client's call is not
    heard; it calls again after a second, and is refused, as by a port that nobody listens at. Only Linux can do that.
    """
    if sys.platform != "linux":
        return
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _NO_SYN))
    program = struct.pack("HP", len(_NO_SYN), ctypes.addressof(code))
    with contextlib.suppress(OSError):  # a sandbox that has no filters
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


class HttpServer:
    """An ASGI application on a port.

    Args:
        app: The application.
        limits: Of a request.
        host: Its address.
        port: Its port.
        certificates: For TLS, if there is to be any.
    """

    def __init__(
        self, app: App, limits: Limits, host: str, port: int, certificates: Certificates | None = None
    ) -> None:
        from deploykit.serving.http_server import uvicorn_settings

        uvicorn = require("uvicorn", extra="serve")
        self.draining = Draining(app)
        self._socket = listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(self.draining, log_config=None, backlog=_BACKLOG, **uvicorn_settings(limits))
        config.load()
        config.ssl = None if certificates is None else certificates.context
        self._server = uvicorn.Server(config)
        self._server.capture_signals = contextlib.nullcontext  # signals are for the whole process
        self._task: asyncio.Task[None] | None = None
        self._late: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Accept connections."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise DeploykitError(f"the server on port {self.port} did not start")
            await asyncio.sleep(0.005)

    async def renew(self, certificates: Certificates) -> None:
        """Use other certificates for the connections to come.

        A context that listens is not changed: what clients' certificates are checked with can only be added to there.
        """
        self._server.config.ssl = certificates.context
        if self.draining.on or not self._server.started:
            return
        fresh = self._socket.dup()
        made = await asyncio.get_running_loop().create_server(
            self._protocol, sock=fresh, ssl=certificates.context, backlog=_BACKLOG
        )
        old, self._server.servers, self._socket = self._server.servers, [made], fresh
        for server in old:
            server.close()

    async def stop(self, linger_s: float = 0.0) -> None:
        """Accept nothing more, answer what was accepted, and end.

        Args:
            linger_s: How long a connection may still take to send a request; it is then answered.
        """
        if self._task is None:
            return
        self.draining.on = True
        let_nobody_in(self._socket)
        await asyncio.sleep(_HANDSHAKE_S)
        await self._stop_listening()
        end = asyncio.get_running_loop().time() + linger_s
        while (self._late or self._server.server_state.connections) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_PAUSE_S)
        self._server.should_exit = True
        await self._task

    async def _stop_listening(self) -> None:
        """Close the port without breaking connections that clients have made and nobody has accepted yet.

        The port stays open by another descriptor until those are accepted.
        """
        loop = asyncio.get_running_loop()
        with self._socket.dup() as spare:
            for server in self._server.servers:
                server.close()
            await asyncio.sleep(0)
            while True:
                try:
                    made, _ = spare.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    break
                made.setblocking(False)
                task = loop.create_task(self._take(made))
                self._late.add(task)
                task.add_done_callback(self._late.discard)

    async def _take(self, made: socket.socket) -> None:
        loop, config = asyncio.get_running_loop(), self._server.config
        with contextlib.suppress(OSError):  # it is gone, or does not speak TLS
            await loop.connect_accepted_socket(self._protocol, made, ssl=config.ssl)

    def _protocol(self) -> Any:
        config, state = self._server.config, self._server.server_state
        return config.http_protocol_class(config=config, server_state=state, app_state={})

    def abandon(self) -> None:
        """Give up the port at once."""
        self._server.force_exit = self._server.should_exit = True
        self._socket.close()


class GrpcServer:
    """The protocol over gRPC on a port.

    Args:
        engine: What answers; it has loaded its models, whose sizes decide how large a message may be.
        limits: Of a request.
        places: Address and tokens.
        port: Its port.
        refused: Told of requests that do not reach the engine.
        certificates: For TLS, if there is to be any.
        traces: Where spans of inferences go.
        statistics: Counts inferences.

    Raises:
        DeploykitError: The port cannot be had.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        places: Places,
        port: int,
        refused: Callable[[str, RequestError], None],
        *,
        certificates: Certificates | None = None,
        traces: Traces | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        from deploykit.serving.grpc_app import grpc_server

        self._leaving = _Leaving(engine, refused)
        self._server = grpc_server(
            cast("Engine", self._leaving), limits=limits, tokens=places.tokens, refused=refused, traces=traces,
            statistics=statistics,
        )  # fmt: skip
        host = f"[{places.host}]" if ":" in places.host else places.host
        where = f"{host}:{port}"
        self._certificates = None if certificates is None else GrpcCertificates(certificates)
        try:
            if self._certificates is None:
                self.port = int(self._server.add_insecure_port(where))
            else:
                self.port = int(self._server.add_secure_port(where, self._certificates.credentials))
        except RuntimeError as exc:
            raise DeploykitError(f"cannot listen on {where}", hint="choose another --host or --grpc-port") from exc
        if not self.port:
            raise DeploykitError(f"cannot listen on {where}", hint="choose another --host or --grpc-port")

    async def start(self) -> None:
        """Accept requests."""
        await self._server.start()

    def renew(self, certificates: Certificates) -> None:
        """Use other certificates for the connections to come."""
        if self._certificates is not None:
            self._certificates.renew(certificates)

    async def stop(self, linger_s: float, grace_s: float) -> None:
        """Accept nothing more, and answer what was accepted.

        Args:
            linger_s: How long new requests are told to go elsewhere. When the port is closed, gRPC cancels what it has
                read and not handed over yet, which clients do not take for a reason to ask another server.
            grace_s: How long what was accepted may take then.
        """
        self._leaving.on = True
        await asyncio.sleep(linger_s)
        await self._server.stop(grace_s)


class _Leaving:
    """An engine that refuses new requests, once `on` is set.

    Args:
        engine: Answers everything until then.
        refused: Told of what is refused.
    """

    def __init__(self, engine: Engine, refused: Callable[[str, RequestError], None]) -> None:
        self._engine = engine
        self._refused = refused
        self.on = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def infer(self, request: InferRequest) -> InferResult:
        """As the engine's.

        Raises:
            RequestError: As the engine's, or the server is ending.
        """
        if not self.on:
            return await self._engine.infer(request)
        error = NotReady("the server is ending", hint="ask another one")
        self._refused(known_name(self._engine, request.model), error)
        raise error
