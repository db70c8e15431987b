"""Messages of gRPC as they come: within a time, and not more at once than there is room for.

gRPC hands a message over when all of it is there, and says nothing before: neither how large it is going to be nor how
much has come. A method that takes one message reads it before anybody is asked. Here methods take a stream, the same on
the wire, and read its only message themselves. Until then a call costs what its connection's window holds.

A message that takes its time counts as the largest that it can become. What came at once, and every answer until its
client has it, counts as what it is.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from deploykit.extras import require
from deploykit.serving.http_body import Room, Share
from deploykit.serving.requests import Busy, DeadlineExceeded, InvalidRequest, RequestError
from deploykit.serving.v2_types import Limits

# How long gRPC may take to cancel a call whose message it has given up, as when it is too large.
_GIVEN_UP_S = 0.1


class Inbox:
    """Reads the message of each call of a server.

    Args:
        limits: Of requests.
        most: Bytes of the largest message that gRPC takes.
    """

    def __init__(self, limits: Limits, most: int) -> None:
        self._limits = limits
        self._most = most
        self._room = Room(limits.held_bytes)
        self._end = require("grpc.aio", extra="serve").EOF

    def share(self, context: Any) -> Share:
        """What a call takes of the room, which it gives back when its client has the answer, or is gone."""
        share = self._room.share()
        context.add_done_callback(lambda context: share.end())
        return share

    async def read(self, context: Any, share: Share) -> bytes:
        """The message of a call.

        Args:
            context: gRPC's.
            share: Of the call; the message is taken from it.

        Raises:
            Busy: There is no room for it.
            DeadlineExceeded: It did not arrive in time.
            InvalidRequest: There is none.
        """
        data = await self._in_time(context, share)
        if data is self._end:
            # Where the client went away, or has sent more than it may, gRPC ends the call itself: here, then.
            await asyncio.sleep(_GIVEN_UP_S)
            raise InvalidRequest("the call has no message")
        share.take(len(data))
        return cast("bytes", data)

    async def _in_time(self, context: Any, share: Share) -> Any:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        failures: list[RequestError] = []
        timer: asyncio.TimerHandle
        reserved = 0

        def stop(error: RequestError) -> None:
            failures.append(error)
            task.cancel()

        def late() -> None:
            nonlocal timer, reserved
            try:
                share.take(self._most)
            except Busy as exc:
                stop(exc)
                return
            reserved = self._most
            left = max(0.0, self._limits.body_s - self._limits.prompt_s)
            timer = loop.call_later(left, stop, DeadlineExceeded("the message did not arrive in time"))

        timer = loop.call_later(min(self._limits.prompt_s, self._limits.body_s), late)
        try:
            return await context.read()
        except asyncio.CancelledError:
            if not failures or task.uncancel() > 0:
                raise
            raise failures[0] from None
        finally:
            timer.cancel()
            share.add(-reserved)
