"""The Open Inference Protocol, version 2, over HTTP.

    GET  /v2/health/live, /v2/health/ready                              open, with or without tokens
    GET  /v2                                                            the server
    GET  /v2/models/NAME[/versions/V], .../ready                        a model
    POST /v2/models/NAME[/versions/V]/infer                             tensors, JSON or binary
    GET  /v2/models/NAME[/versions/V]/config, .../stats                 a model as Triton tells of it
    GET  /v2/models/stats                                               all of them
    POST /v2/repository/index, /v2/repository/models/NAME/load|unload   where the app was made with it
    GET  /v2/openapi.json                                               all this, for machines

A refusal is a JSON object {"error": "one line"}. Answers are not compressed, whatever a client accepts.

Everything is done on the event loop but the reading and writing of long JSON, for which there are a few threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from deploykit.extras import require
from deploykit.serving.front import (
    Tokens,
    error_text,
    infer_counted,
    known_name,
    model_metadata,
    refuse_load_parameters,
    server_metadata,
)
from deploykit.serving.http_body import Room, read_body, whole_number
from deploykit.serving.openapi import document
from deploykit.serving.requests import (
    Disconnected,
    Engine,
    InferResult,
    InvalidRequest,
    Refused,
    RequestError,
    Slow,
)
from deploykit.serving.tracing import RequestSpan, Traces
from deploykit.serving.triton_api import Statistics, model_config
from deploykit.serving.v2_json import json_values, parse_object, parse_request, read_parameters, write_response
from deploykit.serving.v2_types import Limits, shown

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_LOG = logging.getLogger("deploykit.serving")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_Found = TypeVar("_Found")

OPEN = frozenset({"/v2/health/live", "/v2/health/ready"})
# A request that takes longer is cancelled when its client goes away; watching for that costs a task.
_WATCH_S = 0.002
# Below this, one write is cheaper than several.
_JOIN_BYTES = 32 * 1024
# JSON from this length on, as it is read and about as it is written, is for a thread; so many at once.
_LONG_BYTES = 64 * 1024
_LONG_VALUES = 8 * 1024
_THREADS = 2
_SMALL = Limits(body_bytes=64 * 1024)


def http_app(
    engine: Engine,
    *,
    limits: Limits | None = None,
    tokens: Sequence[str] = (),
    repository: bool = False,
    refused: Callable[[str, RequestError], None] | None = None,
    traces: Traces | None = None,
    statistics: Statistics | None = None,
) -> Starlette:
    """An ASGI app over an engine. Serve it with `http_server.uvicorn_settings`, which guard the headers' arrival too.

    Args:
        engine: What answers.
        limits: What a request may cost.
        tokens: Bearer tokens; every route but the health routes needs one of them. None: no route does.
        repository: Whether models can be listed, loaded and unloaded.
        refused: Told the model and the error of every inference that did not reach the engine.
        traces: Where spans of inferences go.
        statistics: Counts inferences, with those of other ports.

    Raises:
        MissingDependencyError: The extra "serve" is not installed.
    """
    require("starlette", extra="serve")
    require("orjson", extra="serve")
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    limits = limits or Limits()
    statistics = statistics or Statistics()
    infer = _Infer(engine, limits, refused, traces, statistics)
    routes = _Routes(engine, repository, document(repository=repository, secured=bool(tokens)), statistics)
    model = "/v2/models/{name}"
    version = model + "/versions/{version}"
    app = Starlette(
        routes=[
            Route(model + "/infer", infer, methods=["POST"]),
            Route(version + "/infer", infer, methods=["POST"]),
            Route("/v2/health/live", routes.live),
            Route("/v2/health/ready", routes.ready),
            Route("/v2", routes.server),
            Route("/v2/models/stats", routes.stats),
            Route(model, routes.model),
            Route(version, routes.model),
            Route(model + "/ready", routes.model_ready),
            Route(version + "/ready", routes.model_ready),
            Route(model + "/config", routes.config),
            Route(version + "/config", routes.config),
            Route(model + "/stats", routes.stats),
            Route(version + "/stats", routes.stats),
            Route("/v2/repository/index", routes.index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", routes.load, methods=["POST"]),
            Route("/v2/repository/models/{name}/unload", routes.unload, methods=["POST"]),
            Route("/v2/openapi.json", routes.openapi),
        ],
        middleware=[Middleware(_Guard, tokens=Tokens(tokens))],
        exception_handlers={
            RequestError: _on_request_error,
            HTTPException: _on_http_exception,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Guard:
    """Lets through who brings a token, and keeps faults of ours from clients."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], tokens: Tokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._tokens and scope["type"] == "http" and scope["path"] not in OPEN:
            headers = dict(scope["headers"])
            if not self._tokens.accept(headers.get(b"authorization")):
                refusal = _error(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
                await refusal(scope, receive, send)
                return
        try:
            await self._app(scope, receive, send)
        except Exception:  # noqa: BLE001 - a bug of ours is logged, and the client is told no more than that
            _LOG.exception("%s failed", scope.get("path"))
            # Where the answer has begun this raises, and the server closes the connection.
            await _error(500, "internal error")(scope, receive, send)


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": text}, status, headers)


# Handlers are coroutines: for a function, starlette would send every refusal through a pool of up to 40 threads, each
# with a stack and a heap of its own, at the very time when there are most of them.


async def _on_request_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestError)
    # Of a body that has not come, the rest could be taken for the next request.
    headers = {"Connection": "close"} if isinstance(exc, (Slow, Disconnected)) else None
    return _error(exc.http_status, error_text(exc), headers)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    from starlette.exceptions import HTTPException

    assert isinstance(exc, HTTPException)
    texts = {404: "no such route; GET /v2/openapi.json lists them", 405: "the route has other methods"}
    return _error(exc.status_code, texts.get(exc.status_code, exc.detail), dict(exc.headers or {}))


class _Infer:
    """The route that matters."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        refused: Callable[[str, RequestError], None] | None,
        traces: Traces | None,
        statistics: Statistics,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._refused = refused
        self._traces = traces
        self._statistics = statistics
        self._room = Room(limits.held_bytes)
        self._threads = ThreadPoolExecutor(_THREADS, "deploykit-json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._room.hold() as take:
            if self._traces is None:
                await self._answer(scope, receive, send, take, None)
                return
            with self._traces.request(scope) as span:
                await self._answer(scope, receive, send, take, span)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, take: Callable[[int], None], span: RequestSpan | None
    ) -> None:
        name = scope["path_params"]["name"]
        version = scope["path_params"].get("version")
        try:
            info = self._engine.info(name, version)
            if span is not None:
                span.found(name, version)
            limits = self._limits.of(info.inputs, info.outputs, info.max_batch)
            headers = dict(scope["headers"])
            said = headers.get(b"inference-header-content-length")
            length = None if said is None else whole_number("Inference-Header-Content-Length", said)
            if length is not None and length > limits.body_bytes:
                raise _header_too_long(length)
            body = await read_body(headers, receive, limits, length or 0, take)
            if length is not None and length > len(body):
                raise _header_too_long(length)
            parse = partial(parse_request, body, length, model=name, version=version, limits=limits)
            request, wanted = await self._run(parse, (len(body) if length is None else length) > _LONG_BYTES)
        except RequestError as exc:
            if self._refused is not None:
                self._refused(known_name(self._engine, name), exc)
            raise
        began_ns = time.time_ns()
        result = await _while_connected(infer_counted(self._engine, request, self._statistics), receive)
        if result is None:
            if span is not None:
                span.left()
            return
        if span is not None:
            span.answered(began_ns, result)
        head, tensors = await self._run(
            partial(write_response, result, wanted), json_values(result, wanted) > _LONG_VALUES
        )
        await _send_tensors(send, head, tensors)

    async def _run(self, work: Callable[[], _Found], is_long: bool) -> _Found:
        """Do something here, or where it is long, in a thread."""
        if not is_long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _header_too_long(length: int) -> InvalidRequest:
    return InvalidRequest(
        f"Inference-Header-Content-Length is {length}", expected="the length of the JSON in front of the binary data"
    )


async def _while_connected(answer: Coroutine[Any, Any, InferResult], receive: Receive) -> InferResult | None:
    """The answer, or None where the client went away; then the request is cancelled."""
    task = asyncio.current_task()
    assert task is not None
    watcher: list[asyncio.Task[None]] = []
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(_WATCH_S, lambda: watcher.append(asyncio.ensure_future(watch())))
    try:
        return await answer
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        return None
    finally:
        timer.cancel()
        for watching in watcher:
            watching.cancel()


async def _send_tensors(send: Send, head: bytes, tensors: list[memoryview]) -> None:
    """An answer; large tensors are written from where they lie."""
    size = len(head) + sum(map(len, tensors))
    headers = [(b"content-length", b"%d" % size)]
    if tensors:
        headers += [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", b"%d" % len(head)),
        ]
    else:
        headers.append((b"content-type", b"application/json"))
    parts: list[bytes | memoryview] = [head, *tensors]
    if size <= _JOIN_BYTES:
        parts = [b"".join(parts)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": parts[-1], "more_body": False})


class _Routes:
    """Everything but inference."""

    def __init__(self, engine: Engine, repository: bool, openapi: dict[str, Any], statistics: Statistics) -> None:
        self._engine = engine
        self._repository = repository
        self._openapi = openapi
        self._statistics = statistics

    async def live(self, request: Request) -> Response:
        live = self._engine.live()
        return _json({"live": live}, 200 if live else 503)

    async def ready(self, request: Request) -> Response:
        ready = self._engine.ready()
        return _json({"ready": ready}, 200 if ready else 503)

    async def server(self, request: Request) -> Response:
        return _json(server_metadata(repository=self._repository))

    async def model(self, request: Request) -> Response:
        return _json(model_metadata(self._engine, *_model(request)))

    async def model_ready(self, request: Request) -> Response:
        name, version = _model(request)
        ready = self._engine.model_ready(name, version)
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    async def config(self, request: Request) -> Response:
        return _json(model_config(self._engine.info(*_model(request))))

    async def stats(self, request: Request) -> Response:
        name, version = request.path_params.get("name"), request.path_params.get("version")
        return _json({"model_stats": self._statistics.shown(self._engine, name, version)})

    async def openapi(self, request: Request) -> Response:
        return _json(self._openapi)

    async def index(self, request: Request) -> Response:
        said = await self._repository_request(request)
        only_ready = said.get("ready", False)
        if not isinstance(only_ready, bool):
            raise InvalidRequest(f"ready is {shown(only_ready)}", expected="true or false")
        index = [entry for entry in self._engine.index() if entry.get("state") == "READY" or not only_ready]
        return _json(index)

    async def load(self, request: Request) -> Response:
        said = await self._repository_request(request)
        refuse_load_parameters(read_parameters("the request", said.get("parameters"), _SMALL))
        await self._engine.load(request.path_params["name"])
        return _json({})

    async def unload(self, request: Request) -> Response:
        said = await self._repository_request(request)
        refuse_load_parameters(read_parameters("the request", said.get("parameters"), _SMALL))
        await self._engine.unload(request.path_params["name"])
        return _json({})

    async def _repository_request(self, request: Request) -> dict[str, Any]:
        if not self._repository:
            raise Refused("this server was not started with the repository routes")
        body = await read_body(dict(request.scope["headers"]), request.receive, _SMALL)
        return parse_object(body, _SMALL) if len(body) else {}


def _model(request: Request) -> tuple[str, str | None]:
    return request.path_params["name"], request.path_params.get("version")


def _json(value: Any, status: int = 200) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status)
