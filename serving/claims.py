"""Whose is a request that lies ready in a worker's slot: the worker's, which would run it, or the front's again?

Both sides may want it at the same moment, in two processes. An offer is a few bytes in a pipe that both can read: the
kernel gives them to one reader, without a lock that somebody could die with.
"""

from __future__ import annotations

import contextlib
import os

_BYTES = 8


class Offers:
    """The front's side of one slot, which offers one request at a time.

    Attributes:
        descriptor: What the worker reads; this object closes it.
    """

    def __init__(self) -> None:
        self.descriptor, self._write = os.pipe()
        for end in (self.descriptor, self._write):
            os.set_blocking(end, False)

    def make(self, number: int) -> None:
        """Offer a request, before the worker is told of it.

        Args:
            number: Of the request, 1 or more; no number comes twice.
        """
        os.write(self._write, number.to_bytes(_BYTES, "little"))

    def take_back(self) -> bool:
        """Take the request back; whether the worker has not begun it."""
        try:
            return bool(os.read(self.descriptor, _BYTES))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Offer nothing any more."""
        for end in (self.descriptor, self._write):
            if end >= 0:
                with contextlib.suppress(OSError):
                    os.close(end)
        self.descriptor = self._write = -1

    def __del__(self) -> None:
        self.close()


class Claims:
    """The worker's side of one slot.

    Args:
        descriptor: What `Offers.descriptor` is in this process.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = 0

    def take(self, number: int) -> bool:
        """Begin a request; whether it is still offered.

        The worker may be told of a request that was taken back, when the slot offers the next one already: what it
        then takes is kept for when it is told of that one.
        """
        if self._held != number:
            try:
                self._held = int.from_bytes(os.read(self._descriptor, _BYTES), "little")
            except BlockingIOError:
                return False
        return self._held == number
