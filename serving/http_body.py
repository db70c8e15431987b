"""Bodies of HTTP requests: counted while they arrive, within a time, inflated within limits."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from deploykit.serving.requests import Busy, Disconnected, InvalidRequest, Slow, TooLarge
from deploykit.serving.v2_types import Limits, shown

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_STEP = 2**20
_ALIGN = 64
# zlib's window bits: 31 is gzip, 15 is zlib, which HTTP calls deflate.
_ENCODINGS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}


class Room:
    """How many bytes all bodies may take that are there at once.

    Args:
        limit: Bytes; a body that is the only one may take more.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    def share(self) -> Share:
        """What one request takes of it; nothing yet."""
        return Share(self)

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Room for one body, to be told of each part that arrives, before it is kept.

        Yields:
            Takes the size of a part; it raises `Busy` where there is no room.
        """
        share = Share(self)
        try:
            yield share.take
        finally:
            share.end()

    def add(self, size: int) -> None:
        """Count bytes that are there, or, where it is negative, that are not there any more."""
        self._held += size

    def has(self, size: int, own: int) -> bool:
        """Whether there is room for more bytes, for a request that has some."""
        return self._held <= own or self._held + size <= self._limit


class Share:
    """What one request takes of a room.

    Args:
        room: Of all.
    """

    __slots__ = ("_own", "_room")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._own = 0

    def take(self, size: int) -> None:
        """Count bytes that are to be kept.

        Raises:
            Busy: There is no room for them.
        """
        if not self._room.has(size, self._own):
            raise Busy("the bodies of other requests take all the room there is", hint="send it again later")
        self.add(size)

    def add(self, size: int) -> None:
        """Count bytes whether there is room for them or not; a negative size gives some back."""
        self._own += size
        self._room.add(size)

    def end(self) -> None:
        """Give all of it back."""
        self._room.add(-self._own)
        self._own = 0


def _any_size(size: int) -> None:
    """Room without an end."""


def whole_number(name: str, value: bytes) -> int:
    """The value of a header that counts bytes.

    Raises:
        InvalidRequest: It holds anything but digits.
    """
    if not value.isdigit() or len(value) > 19:
        raise InvalidRequest(f"{name} is {shown(value.decode('latin-1'))}", expected="digits")
    return int(value)


async def read_body(
    headers: dict[bytes, bytes],
    receive: Receive,
    limits: Limits,
    header_length: int = 0,
    take: Callable[[int], None] = _any_size,
) -> memoryview:
    """All of a body, inflated.

    Args:
        headers: Of the request, names in lower case.
        receive: ASGI's.
        limits: Of the model.
        header_length: Where binary data begin, so that they can be laid where arrays like to lie.
        take: Of `Room.hold`.

    Raises:
        Busy: There is no room.
        TooLarge: It is over a limit, as sent or as inflated.
        InvalidRequest: Its encoding is unknown, or is not what it says.
        Slow: It did not arrive in time.
        Disconnected: It did not arrive at all.
    """
    encoding = headers.get(b"content-encoding", b"identity").strip().lower() or b"identity"
    if encoding != b"identity" and encoding not in _ENCODINGS:
        raise InvalidRequest(
            f"Content-Encoding is {shown(encoding.decode('latin-1'))}", expected="gzip, deflate or identity"
        )
    declared = headers.get(b"content-length")
    size = None if declared is None else whole_number("Content-Length", declared)
    if size is not None and size > limits.body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_s):
            if encoding != b"identity":
                return await _inflated(receive, _ENCODINGS[encoding], limits, take)
            if size is None:
                return await _counted(receive, limits, take)
            return await _placed(receive, size, header_length, take)
    except TimeoutError:
        raise Slow("the body did not arrive in time") from None


def _too_large(limits: Limits) -> TooLarge:
    return TooLarge("the body is too large", expected=f"at most {limits.body_bytes} bytes for this model")


async def _chunks(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Disconnected("the body ended too early")
    return message.get("body", b""), bool(message.get("more_body", False))


async def _placed(receive: Receive, size: int, header_length: int, take: Callable[[int], None]) -> memoryview:
    """A body of known size, each part copied once, to its place."""
    chunk, more = await _chunks(receive)
    take(len(chunk))
    if not more:
        return memoryview(chunk)
    start = -header_length % _ALIGN
    # Memory that is not written is not used: a length that lies costs nothing.
    place = np.empty(size + 2 * _ALIGN, np.uint8)
    start += -place.ctypes.data % _ALIGN
    view = place.data[start : start + size]
    at = 0
    while True:
        end = at + len(chunk)
        if end > size:
            raise InvalidRequest("the body is longer than its Content-Length")
        view[at:end] = chunk
        at = end
        if not more:
            return view[:at]
        chunk, more = await _chunks(receive)
        take(len(chunk))


async def _counted(receive: Receive, limits: Limits, take: Callable[[int], None]) -> memoryview:
    """A chunked body."""
    parts: list[bytes] = []
    total = 0
    more = True
    while more:
        chunk, more = await _chunks(receive)
        total += len(chunk)
        if total > limits.body_bytes:
            raise _too_large(limits)
        take(len(chunk))
        parts.append(chunk)
    return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


async def _inflated(receive: Receive, window: int, limits: Limits, take: Callable[[int], None]) -> memoryview:
    inflater = zlib.decompressobj(window)
    out = bytearray()
    sent = 0
    more = True
    while more:
        chunk, more = await _chunks(receive)
        sent += len(chunk)
        if sent > limits.body_bytes:
            raise _too_large(limits)
        while chunk:
            try:
                part = inflater.decompress(chunk, _STEP)
            except zlib.error:
                raise InvalidRequest("the body is not compressed as Content-Encoding says") from None
            take(len(part))
            out += part
            if len(out) > limits.body_bytes:
                raise _too_large(limits)
            if len(out) > _STEP and len(out) > sent * limits.inflate_ratio:
                raise TooLarge(
                    "the body inflates too much", expected=f"at most {limits.inflate_ratio} times", hint="send it plain"
                )
            if inflater.eof and (inflater.unused_data or inflater.unconsumed_tail):
                raise InvalidRequest("bytes follow the end of the compressed body")
            chunk = inflater.unconsumed_tail
            # Other requests go on between the steps.
            await asyncio.sleep(0)
    if not inflater.eof:
        raise InvalidRequest("the compressed body ends too early")
    return memoryview(out)
