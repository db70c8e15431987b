"""What `server.py` measures with: a server as a process, and clients that cost little beside it."""

from __future__ import annotations

import heapq
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import deploykit

_KINDS = {"float32": "FP32", "int64": "INT64"}
_READ_BYTES = 2**20
_POLL_S = 0.05


def infer_request(name: str, inputs: Mapping[str, np.ndarray]) -> bytes:
    """A request with binary tensors, as it goes over the wire; all outputs are wanted as binary data too."""
    head = json.dumps(
        {
            "inputs": [
                {"name": n, "shape": a.shape, "datatype": _KINDS[a.dtype.name],
                 "parameters": {"binary_data_size": a.nbytes}}
                for n, a in inputs.items()
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()  # fmt: skip
    body = head + b"".join(a.tobytes() for a in inputs.values())
    lines = [
        f"POST /v2/models/{name}/infer HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}",
        f"Inference-Header-Content-Length: {len(head)}", "Content-Type: application/octet-stream", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + body


class Server:
    """`deploykit serve` in a process of its own, on ports that are free.

    Args:
        args: Models and options.
        log: Where it writes what it says.
    """

    def __init__(self, *args: str | Path, log: Path) -> None:
        home = str(Path(deploykit.__file__).resolve().parent.parent)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
        self.log = log
        ports = ["--http-port", "0", "--grpc-port", "0", "--admin-port", "0"]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploykit", "serve", *map(str, args), *ports],
                stdout=subprocess.PIPE, stderr=stream, env=env, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready: "):
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        self.http, self.grpc, self.admin = (int(port) for port in re.findall(r":(\d+)", line))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                for pid in [*self.workers(), self.process.pid]:
                    os.kill(pid, signal.SIGKILL)
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def pids(self) -> list[int]:
        """The process and its children."""
        try:
            files = list(Path(f"/proc/{self.process.pid}/task").glob("*/children"))
            return [self.process.pid, *(int(pid) for file in files for pid in file.read_text().split())]
        except OSError:
            return []

    def workers(self) -> list[int]:
        """The processes that hold models."""
        return [p for p in self.pids() if b"deploykit.serving.worker" in _read(f"/proc/{p}/cmdline")]

    def memory(self) -> int:
        """Bytes that the process and its children have, what they share counted once."""
        total = 0
        for pid in self.pids():
            found = re.search(rb"^Pss: +(\d+) kB", _read(f"/proc/{pid}/smaps_rollup"), re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
        return total

    def metrics(self) -> dict[str, float]:
        """Sums over labels of what the admin port tells."""
        with socket.create_connection(("127.0.0.1", self.admin)) as link:
            link.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            text = b"".join(iter(lambda: link.recv(_READ_BYTES), b"")).decode()
        found: dict[str, float] = {}
        for name, value in re.findall(r"^(\w+)(?:\{[^}]*\})? ([\d.e+-]+)\r?$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


class Echo:
    """A process that reads so many bytes and writes so many, for ever: what the way alone costs.

    Args:
        taken: Bytes of a request; over gRPC it may have any number.
        given: Bytes of an answer.
        grpc: Over gRPC, which answers the protocol's method for inference with them; else over a plain connection.
    """

    _GRPC = """
import asyncio, sys
import grpc, grpc.aio, uvloop
given = bytes(int(sys.argv[2]))
async def answer(data, context):
    return given
async def main():
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    method = {"ModelInfer": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", method),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
from deploykit.serving.memory import keep_freed_memory
keep_freed_memory()
uvloop.run(main())
"""

    _CODE = """
import socket, sys
taken, given = int(sys.argv[1]), bytes(int(sys.argv[2]))
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    link, _ = server.accept()
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
room = bytearray(taken)
while True:
    at = 0
    while at < taken:
        got = link.recv_into(memoryview(room)[at:])
        if not got:
            sys.exit()
        at += got
    link.sendall(given)
"""

    def __init__(self, taken: int, given: int, *, grpc: bool = False) -> None:
        code = self._GRPC if grpc else self._CODE
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(taken), str(given)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._given = given

    def link(self) -> Callable[[bytes], None]:
        """What sends and waits for the answer, on a connection of its own."""
        link = _connect(self.port)
        room = memoryview(bytearray(self._given))

        def ask(request: bytes) -> None:
            link.sendall(request)
            at = 0
            while at < self._given:
                at += link.recv_into(room[at:])

        return ask

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _connect(port: int) -> socket.socket:
    link = socket.create_connection(("127.0.0.1", port))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


class RawHttp:
    """One connection, and no more work for a request than the system calls.

    Args:
        port: Of a server.
        nbytes: Room for an answer, more than it has.
    """

    def __init__(self, port: int, nbytes: int = 2**21) -> None:
        self._link = _connect(port)
        self._room = memoryview(bytearray(nbytes))

    def ask(self, request: bytes) -> memoryview:
        """The body of an answer, which is good until the next one."""
        self._link.sendall(request)
        have, end, size = 0, -1, 0
        while end < 0 or have < end + size:
            got = self._link.recv_into(self._room[have:])
            if not got:
                raise ConnectionError("the server closed the connection")
            have += got
            if end < 0:
                head = bytes(self._room[: min(have, 4096)])
                if (end := head.find(b"\r\n\r\n") + 4) < 4:
                    end = -1
                    continue
                size = _length(head[:end])
                if not head.startswith(b"HTTP/1.1 200"):
                    raise ConnectionError(head[:end].decode())
        return self._room[end : end + size]

    def close(self) -> None:
        """End the connection."""
        self._link.close()


def _length(head: bytes) -> int:
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True)
class Told:
    """One answer: when it was due, from the start of the load, how long it took from then, and what it was."""

    due_s: float
    took_s: float
    status: int
    body: bytes


@dataclass
class Load:
    """Connections that one thread looks after, and what they were told.

    Attributes:
        port: Of a server.
        request: What all of them send.
        keep: How many bytes of a body are kept.
        answers: What came.
        broken: When, and why, a request that had been sent got no answer.
        refused: How often a connection could not be made any more.
        late_s: How long after it was due each request of an open loop was sent.
    """

    port: int
    request: bytes
    keep: int = 200
    answers: list[Told] = field(default_factory=list)
    broken: list[tuple[float, str]] = field(default_factory=list)
    refused: int = 0
    late_s: list[float] = field(default_factory=list)

    def closed(self, clients: int, seconds: float, *, tick: Callable[[float], object] = lambda now: None) -> Load:
        """So many clients, each of which sends its next request when it has its answer.

        Args:
            clients: How many.
            seconds: For how long; what was sent is waited for.
            tick: Called often, with the seconds since the start; True ends it.
        """
        self._begin(seconds)
        for _ in range(clients):
            self._open(0.0)
        ended = False
        while self._busy:
            ended = ended or self._now() >= seconds
            self._poll(_POLL_S, again=not ended)
            ended = bool(tick(self._now())) or ended
        return self._over()

    def open(self, times: Sequence[float], *, tick: Callable[[float], object] = lambda now: None) -> Load:
        """Requests at given seconds after the start, whatever the server does; each on a connection that is free."""
        self._begin(times[-1] if len(times) else 0.0)
        due = list(times)
        heapq.heapify(due)
        while due or self._busy:
            while due and due[0] <= self._now():
                at = heapq.heappop(due)
                self.late_s.append(self._now() - at)
                self._open(at)
            self._poll(min(_POLL_S, max(0.0, due[0] - self._now())) if due else _POLL_S, again=False)
            tick(self._now())
        return self._over()

    def count(self, status: int) -> int:
        """How many answers had it."""
        return sum(told.status == status for told in self.answers)

    def _begin(self, seconds: float) -> None:
        self._poller = select.epoll()
        self._busy: dict[int, _Link] = {}
        self._idle: list[_Link] = []
        self._seconds = seconds
        self._start = time.perf_counter()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _over(self) -> Load:
        for link in self._idle:
            link.socket.close()
        self._poller.close()
        return self

    def _open(self, due: float) -> None:
        if self._idle:
            self._send(self._idle.pop(), due)
            return
        try:
            made = _connect(self.port)
        except OSError:
            self.refused += 1
            return
        made.setblocking(False)
        self._poller.register(made.fileno(), select.EPOLLIN)
        self._send(_Link(made), due)

    def _send(self, link: _Link, due: float) -> None:
        link.due, link.have, link.left = due, bytearray(), memoryview(self.request)
        self._busy[link.socket.fileno()] = link
        self._push(link)

    def _push(self, link: _Link) -> None:
        try:
            while link.left:
                link.left = link.left[link.socket.send(link.left) :]
        except BlockingIOError:
            self._poller.modify(link.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)
            return
        except OSError as exc:
            self._lose(link, repr(exc))
            return
        self._poller.modify(link.socket.fileno(), select.EPOLLIN)

    def _poll(self, seconds: float, *, again: bool) -> None:
        for number, event in self._poller.poll(seconds):
            link = self._busy.get(number)
            if link is None:
                self._drop(number)
                continue
            if event & select.EPOLLOUT:
                self._push(link)
            if event & ~select.EPOLLOUT and number in self._busy:
                self._take(link, again=again)

    def _take(self, link: _Link, *, again: bool) -> None:
        try:
            data = link.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self._lose(link, repr(exc))
            return
        if not data:
            self._lose(link, f"closed after {len(link.have)} bytes of the answer")
            return
        link.have += data
        end = link.have.find(b"\r\n\r\n") + 4
        if end < 4 or len(link.have) < end + _length(bytes(link.have[:end])):
            return
        head = bytes(link.have[:end])
        now = self._now()
        self.answers.append(Told(link.due, now - link.due, int(head[9:12]), bytes(link.have[end : end + self.keep])))
        del self._busy[link.socket.fileno()]
        if b"connection: close" in head.lower():
            self._poller.unregister(link.socket.fileno())
            link.socket.close()
        else:
            self._idle.append(link)
        if again:
            self._open(now)

    def _drop(self, number: int) -> None:
        """A connection that said nothing was closed."""
        for link in self._idle:
            if link.socket.fileno() == number:
                self._poller.unregister(number)
                self._idle.remove(link)
                link.socket.close()
                return

    def _lose(self, link: _Link, why: str) -> None:
        self.broken.append((self._now(), why))
        del self._busy[link.socket.fileno()]
        self._poller.unregister(link.socket.fileno())
        link.socket.close()


@dataclass(eq=False)
class _Link:
    socket: socket.socket
    due: float = 0.0
    have: bytearray = field(default_factory=bytearray)
    left: memoryview = field(default_factory=lambda: memoryview(b""))


def spread(values: Sequence[float] | np.ndarray, scale: float = 1.0) -> dict[str, float]:
    """Quantiles, as they are printed."""
    found = np.asarray(values, float) * scale
    return {f"p{q:g}": float(np.percentile(found, q)) for q in (10, 50, 90, 99)} if found.size else {}


def machine() -> dict[str, Any]:
    """What the figures are of: the machine, and how busy it is with other things."""
    from deploykit.machine import inspect_machine

    found = inspect_machine()
    return {"cpu": found.cpu, "cores": found.cores_allowed, "load": round(os.getloadavg()[0], 2)}
