"""What is for operators only, on a port of its own: metrics, and where it is allowed, control of the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploykit.serving.engine import ServingEngine
from deploykit.serving.front import Tokens
from deploykit.serving.http_app import http_app
from deploykit.serving.servers import App, Receive, Scope, Send
from deploykit.serving.v2_types import Limits


def admin_app(engine: ServingEngine, limits: Limits, tokens: Sequence[str], *, repository: bool) -> App:
    """An ASGI application.

        GET  /metrics                                                        for Prometheus
        GET  /v2/health/live, /v2/health/ready                               open, with or without tokens
        POST /v2/repository/index, /v2/repository/models/NAME/load|unload    where `repository` says so

    Args:
        engine: What is shown and controlled.
        limits: Of a request.
        tokens: One of them is needed, if there are any.
        repository: Whether models can be listed, loaded and unloaded.
    """
    protocol = http_app(engine, limits=limits, tokens=tokens, repository=repository)
    guard = Tokens(tokens)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.startswith(("/v2/repository/", "/v2/health/")):
            await protocol(scope, receive, send)
        elif path != "/metrics":
            await _say(send, 404, b'{"error": "no such route: this port is for /metrics and /v2/repository"}')
        elif scope["method"] not in ("GET", "HEAD"):
            await _say(send, 405, b'{"error": "the route has other methods"}')
        elif not guard.accept(dict(scope["headers"]).get(b"authorization")):
            await _say(send, 401, b'{"error": "a bearer token is needed"}', (b"www-authenticate", b"Bearer"))
        else:
            text, kind = engine.metrics.text()
            await _say(send, 200, text, kind=kind.encode())

    return app


async def _say(
    send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes], kind: bytes = b"application/json"
) -> None:
    start: dict[str, Any] = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
