"""How uvicorn has to be set for `http_app`: fast, and with the limits that it lacks itself.

uvicorn waits forever for the rest of a request's headers, takes any number of them, and reads on without end what
follows a refusal. Here a connection that is late, or that sends more than a limit, is closed.
"""

from __future__ import annotations

from typing import Any

from deploykit.extras import require
from deploykit.serving.v2_types import Limits

_REQUEST_TIMEOUT = (408, b"the headers did not arrive in time")
_HEADERS_TOO_LARGE = (431, b"the headers are too large")
# What a client may still send of a request that was answered before its end.
_LINGER_BYTES = 256 * 2**20

# What may wait for the app before no more is read.
_HIGH_WATER_BYTES = 256 * 1024


def uvicorn_settings(limits: Limits | None = None) -> dict[str, Any]:
    """Arguments for `uvicorn.Config`, beside the app and the address.

    Raises:
        MissingDependencyError: The extra "serve" is not installed.
    """
    limits = limits or Limits()
    return {
        "http": guarded_protocol(limits),
        "loop": "uvloop",
        "ws": "none",
        "lifespan": "off",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": 75,
    }


def guarded_protocol(limits: Limits) -> type[Any]:
    """uvicorn's protocol on httptools, with limits on the time and size of headers and on what follows an answer.

    Raises:
        MissingDependencyError: The extra "serve" is not installed.
    """
    base = require("uvicorn.protocols.http.httptools_impl", extra="serve")

    class Guarded(base.HttpToolsProtocol):  # type: ignore[name-defined,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._timer: Any = None
            self._in_head = False
            self._head_bytes = 0
            self._lingering = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head:
                self._head_bytes += len(data)
                if self._head_bytes > limits.head_bytes:
                    self._refuse(*_HEADERS_TOO_LARGE)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if not self._in_head:
                self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self.cycle.response_complete:
                self._lingering += len(body)
                if self._lingering > _LINGER_BYTES:
                    self.transport.close()
                return
            cycle = self.cycle
            # uvicorn copies every part into a bytearray and out of it again; bytes it passes on as they are.
            cycle.body = cycle.body + body if cycle.body else body
            if len(cycle.body) > _HIGH_WATER_BYTES:
                self.flow.pause_reading()
            cycle.message_event.set()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, msg.encode())

        def _begin_head(self) -> None:
            self._in_head = True
            self._head_bytes = 0
            self._timer = self.loop.call_later(limits.head_s, self._refuse, *_REQUEST_TIMEOUT)

        def _end_head(self) -> None:
            self._in_head = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self, status: int, text: bytes) -> None:
            self._end_head()
            if self.transport.is_closing():
                return
            body = b'{"error": "%s"}' % text
            head = base.STATUS_LINE[status] + b"content-type: application/json\r\nconnection: close\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            self.transport.close()

    return Guarded
