"""How uvicorn has to be set for `http_app`: fast, and with the limits that it lacks itself.

uvicorn waits forever for the rest of a request's headers, and for a client to read its answer; it takes any number of
headers, and reads on without end what follows a refusal. Here a connection that is late, or that sends more than a
limit, is told so and closed; one on which nothing was ever sent is closed without a word.

It also takes the body of a request that offers another protocol (Java's client offers HTTP/2 with every first request)
for that protocol, or for the next request. Here the offer is not heard.
"""

from __future__ import annotations

import re
from typing import Any

from deploykit.extras import require
from deploykit.serving.v2_types import Limits

_REQUEST_TIMEOUT = (408, b"the headers did not arrive in time")
_HEADERS_TOO_LARGE = (431, b"the headers are too large")
# What a client may still send of a request that was answered before its end.
_LINGER_BYTES = 256 * 2**20

# What may wait for the app before no more is read.
_HIGH_WATER_BYTES = 256 * 1024

_UPGRADE = re.compile(rb"(\r\n)upgrade(\s*:)", re.IGNORECASE)


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
            self._unread: Any = None
            self._trail: Any = None
            self._in_head = False
            self._awaits_head = True
            self._head_bytes = 0
            self._lingering = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            self._end_unread()
            self._end_trail()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._awaits_head:
                data = _deaf(data)
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
            self._awaits_head = False
            if self.parser.should_upgrade():
                raise ValueError("an offer of another protocol that came in pieces")
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._awaits_head = True
            self._end_trail()
            super().on_message_complete()

        def on_body(self, body: bytes) -> None:
            if self.cycle.response_complete:
                self._lingering += len(body)
                if self._trail is None:
                    self._trail = self.loop.call_later(limits.body_s, self.transport.close)
                if self._lingering > _LINGER_BYTES:
                    self.transport.close()
                return
            cycle = self.cycle
            # uvicorn copies every part into a bytearray and out of it again; bytes it passes on as they are.
            cycle.body = cycle.body + body if cycle.body else body
            if len(cycle.body) > _HIGH_WATER_BYTES:
                self.flow.pause_reading()
            cycle.message_event.set()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._unread is None:
                self._unread = self.loop.call_later(limits.body_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._end_unread()

        def _end_unread(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _end_trail(self) -> None:
            if self._trail is not None:
                self._trail.cancel()
                self._trail = None

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, msg.encode())

        def _begin_head(self) -> None:
            self._in_head = True
            self._head_bytes = 0
            self._timer = self.loop.call_later(limits.head_s, self._late)

        def _late(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                # The start of a further request behind one that is not answered yet; perhaps it is not read on purpose.
                self._timer = self.loop.call_later(limits.head_s, self._late)
            elif not self._head_bytes:
                # Nobody asked for anything: browsers and balancers open connections ahead of need, and would take an
                # answer for that to the request that they send next.
                self._end_head()
                self.transport.close()
            else:
                self._refuse(*_REQUEST_TIMEOUT)

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


def _deaf(data: bytes) -> bytes:
    """The beginning of a request without its offer of another protocol."""
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    if _UPGRADE.search(head) is None:
        return data
    return _UPGRADE.sub(rb"\1ignored\2", head) + data[len(head) :]
