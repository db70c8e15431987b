"""Worker processes, as the front sees them: started, told, answered by, and lost.

A worker is a fresh process (`worker.py`) with one session. It has lanes, which are requests that it runs side by side;
a lane has slots, so that what comes next can lie ready while the lane still computes; until it begins, it can be taken
back (`claims.py`). Tensors go through the slots' arenas, and a line of JSON each way says where they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deploykit
from deploykit.errors import WorkerError, first_line
from deploykit.extras import require
from deploykit.serving.arenas import Arena, ArenaFull, Joined, read, write
from deploykit.serving.claims import Offers
from deploykit.serving.requests import Failed, InvalidRequest, RequestError, TooLarge, WorkerLost
from deploykit.specs import Array

log = logging.getLogger("deploykit.serving")

# Slots a lane: one runs, and one lies ready.
DEPTH = 2
_END_S = 5.0
_LINE_BYTES = 2**18

Done = Callable[["Answer | RequestError"], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model gave.

    Attributes:
        outputs: By name; they look at memory that the next answer overwrites, so that they have to be copied now.
        compute_s: Seconds that it ran.
    """

    outputs: Mapping[str, Array]
    compute_s: float


@dataclass(slots=True)
class _Slot:
    given: Arena
    taken: Arena
    offers: Offers
    done: Done | None = None
    offer: int = 0


class Lane:
    """One request after another in a worker.

    Args:
        limit: Most bytes of an arena.
        on_answer: Called after each answer, when its slot is free again.
        on_end: Called once, when the other end is gone.
    """

    def __init__(self, limit: int, on_answer: Callable[[], None], on_end: Callable[[], None]) -> None:
        self._slots = [_Slot(Arena.create(limit), Arena.create(limit), Offers()) for _ in range(DEPTH)]
        self._offered = 0
        self._socket, self._theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._free = deque(range(DEPTH))
        self._order: deque[int] = deque()
        self._rest = b""
        self._unsent = bytearray()
        self._on_answer = on_answer
        self._on_end = on_end
        self._orjson = require("orjson", extra="serve")
        self._loop = asyncio.get_running_loop()
        self._opened = False
        self.ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()

    @property
    def in_flight(self) -> int:
        """Requests that it has and has not answered."""
        return len(self._order)

    @property
    def spare(self) -> bool:
        """Whether it can be given one more."""
        return self._opened and bool(self._free)

    def descriptors(self) -> tuple[int, list[tuple[int, int, int]]]:
        """Of the other end, for the worker."""
        slots = [(s.given.descriptor, s.taken.descriptor, s.offers.descriptor) for s in self._slots]
        return self._theirs.fileno(), slots

    def warm(self, given: int, taken: int) -> None:
        """Have the memory there for requests of so many bytes in and out, before there is one."""
        for slot in self._slots:
            slot.given.warm(given)
            slot.taken.warm(taken)

    def begin(self) -> None:
        """The worker has its end by now."""
        self._theirs.close()
        self._loop.add_reader(self._socket.fileno(), self._readable)
        self._opened = True

    def tell(self, told: Mapping[str, Any]) -> None:
        """Send a line."""
        waits = bool(self._unsent)
        self._unsent += self._orjson.dumps(told) + b"\n"
        if not waits and not self._send_on():  # thousands of tensors: the worker reads on
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _send_on(self) -> bool:
        """Send what is left, as far as it goes; whether that is all."""
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return False
        except ConnectionError:  # that it is gone, the reader says
            self._unsent.clear()
        return True

    def _writable(self) -> None:
        if self._send_on():
            self._loop.remove_writer(self._socket.fileno())

    def send(self, tensors: Sequence[Joined], done: Done) -> int:
        """Have the worker run the model.

        Args:
            tensors: Its inputs; they are copied now.
            done: Called once, with the answer or with the reason why there is none.

        Returns:
            What `withdraw` knows it by.

        Raises:
            TooLarge: The tensors do not fit the arena.
            Failed: There is no memory for them.
        """
        slot = self._slots[self._free[0]]
        try:
            placed, total = write(slot.given, tensors)
        except ArenaFull as exc:
            raise TooLarge(str(exc)) from exc
        except (OSError, MemoryError) as exc:
            raise Failed(f"there is no memory for the request's tensors: {first_line(exc)}") from exc
        number = self._free.popleft()
        self._offered += 1
        slot.done, slot.offer = done, self._offered
        self._order.append(number)
        slot.offers.make(slot.offer)
        self.tell({"slot": number, "offer": slot.offer, "tensors": placed, "total": total})
        return slot.offer

    def withdraw(self, offer: int) -> bool:
        """Take back what was sent, if the worker has not begun it; whether that was so, and `done` is not called then.

        Args:
            offer: What `send` returned.
        """
        number = next((n for n in self._order if self._slots[n].offer == offer), None)
        if number is None or not self._slots[number].offers.take_back():
            return False
        slot = self._slots[number]
        slot.done = None
        self._order.remove(number)
        slot.given.trim()
        self._free.append(number)
        return True

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_LINE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._on_end()
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            for line in lines:
                self._told(self._orjson.loads(line))
        except Exception:
            # Whoever waits for what cannot be read would wait in vain, and so would all behind it.
            log.exception("a worker said something that cannot be understood, and is ended")
            self.close()
            self._on_end()

    def _told(self, told: dict[str, Any]) -> None:
        if "slot" not in told:
            if not self.ready.done():
                self.ready.set_result(told)
            return
        number = told["slot"]
        slot = self._slots[number]
        answer = _answer(slot, told)
        done, slot.done = slot.done, None
        self._order.remove(number)
        if done is not None:
            done(answer)
        slot.given.trim()
        slot.taken.trim()
        self._free.append(number)
        self._on_answer()

    def close(self) -> None:
        """Give up the socket, which ends the worker, and tell who still waits."""
        if self._opened:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
        self._opened = False
        self._unsent.clear()
        self._socket.close()
        self._theirs.close()
        if not self.ready.done():
            self.ready.cancel()
        waiting = [self._slots[n] for n in self._order]
        self._order.clear()
        for slot in waiting:
            done, slot.done = slot.done, None
            if done is not None:
                done(WorkerLost("the process that computed the request died", hint="send it again"))
        for slot in self._slots:
            slot.given.close()
            slot.taken.close()
            slot.offers.close()


def _answer(slot: _Slot, told: dict[str, Any]) -> Answer | RequestError:
    if "error" in told:
        kind = {"invalid": InvalidRequest, "too_large": TooLarge}.get(told["error"], Failed)
        return kind(told["what"], expected=told.get("expected"), hint=told.get("hint"))
    try:
        return Answer(read(slot.taken, told["tensors"], told["total"]), told["compute_ns"] / 1e9)
    except ArenaFull as exc:
        return Failed(f"the answer cannot be read: {exc}")


class Worker:
    """A process that holds a model.

    Args:
        job: What it loads.
        lanes: How many requests it runs side by side.
        limit: Most bytes of an arena.
        load_s: Seconds that it may take to load the model and to warm up.
        on_answer: Called whenever a slot is free again.
        on_end: Called once, after it ended, however that came about.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        lanes: int,
        limit: int,
        load_s: float,
        on_answer: Callable[[], None],
        on_end: Callable[[Worker], None],
    ) -> None:
        self._load_s = load_s
        self._job = {**job, "arena_bytes": limit}
        self._on_end = on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        self.lanes: list[Lane] = []
        try:
            for _ in range(lanes):
                self.lanes.append(Lane(limit, on_answer, self._end))
        except OSError as exc:
            self.close()
            raise WorkerError(f"no memory can be shared with a process ({exc.strerror or exc})") from exc

    @property
    def pid(self) -> int:
        """Of the process; 0 before it is started."""
        return self._process.pid if self._process else 0

    async def start(self) -> dict[str, Any]:
        """Start the process and wait until it has loaded the model and is warm.

        Returns:
            What it says of the model.

        Raises:
            WorkerError: It cannot load the model, or died of it.
        """
        told = [lane.descriptors() for lane in self.lanes]
        # The child has to find this very copy of DeployKit, also in a bare checkout and from another directory.
        home = str(Path(deploykit.__file__).resolve().parent.parent)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
        # -P: what lies in the directory that the server was started in is none of its modules.
        # A session of its own: what a terminal or a supervisor sends to the group is the front's to decide about.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deploykit.serving.worker", json.dumps(told)],
                stdin=subprocess.DEVNULL, env=env, start_new_session=True,
                pass_fds=[fd for control, slots in told for fd in (control, *(fd for slot in slots for fd in slot))],
            )  # fmt: skip
        except OSError as exc:
            self.close()
            raise WorkerError(f"no process can be started ({exc.strerror or exc})") from exc
        for lane in self.lanes:
            lane.begin()
        self.lanes[0].tell(self._job)
        try:
            async with asyncio.timeout(self._load_s):
                found = await asyncio.shield(self.lanes[0].ready)
        except TimeoutError:
            await self._end_at_once()
            raise WorkerError(
                f"{self._job['path']} was not loaded and warm within {self._load_s:g} s",
                hint="give it more time: --load-timeout",
            ) from None
        except asyncio.CancelledError:
            if not self._ended:  # it is we who are cancelled
                await self._end_at_once()
                raise
            raise await self._died() from None
        if "failed" in found:
            self.close()
            await self.wait()
            raise WorkerError(found["failed"])
        if self._ended:  # between what it said and now: whoever is told of its end waits for us
            raise await self._died()
        ready: dict[str, Any] = found["ready"]
        for lane in self.lanes:
            lane.warm(*ready["bytes"])
        return ready

    async def _end_at_once(self) -> None:
        """Nobody waits for what it loads: end it, so that neither a process nor a descriptor is left."""
        self.kill()
        self.close()
        await self.wait()

    async def _died(self) -> WorkerError:
        code = await self.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return WorkerError(f"the process that loads {self._job['path']} ended with {how}")

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self.kill()  # it may have closed a socket and live on
        for lane in self.lanes:
            lane.close()
        self._on_end(self)

    def kill(self) -> None:
        """End the process now; those who wait for it are told so when its sockets close."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.kill()

    def close(self) -> None:
        """Let it end: nobody waits for it any more."""
        self._ended = True
        for lane in self.lanes:
            lane.close()

    async def wait(self) -> int:
        """Wait until the process is gone, and see to it that it goes; its exit code."""
        if self._process is None:
            return 0
        try:
            return await asyncio.to_thread(self._process.wait, _END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return await asyncio.to_thread(self._process.wait)
