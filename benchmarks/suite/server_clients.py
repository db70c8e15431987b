"""What `server.py` measures with: clients that cost little beside a server."""

from __future__ import annotations

import heapq
import json
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

_KINDS = {"float32": "FP32", "int64": "INT64"}
READ_BYTES = 2**20
_POLL_S = 0.05
_AT_ONCE = 16


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


def connect(port: int) -> socket.socket:
    """A connection that sends at once what it is given."""
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
        self._link = connect(port)
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


def ready_grpc(port: int, x: np.ndarray) -> Callable[[], bytes]:
    """A call of gRPC with a message that is made once and an answer that stays bytes."""
    import grpc
    from tritonclient.grpc import service_pb2

    asked = service_pb2.ModelInferRequest(model_name="net", raw_input_contents=[x.tobytes()])
    asked.inputs.add(name="x", datatype="FP32", shape=x.shape)
    message = asked.SerializeToString()
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=unlimited)
    method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def ask() -> bytes:
        found: bytes = method(message)
        return found

    return ask


class GrpcClient:
    """Asks without a pause over gRPC, in a thread, until the server is gone; `codes` holds when and what it was told.

    Args:
        port: Of the server.
        x: What it sends.
    """

    def __init__(self, port: int, x: np.ndarray) -> None:
        self.codes: list[tuple[float, str, str]] = []
        self._ask = ready_grpc(port, x)
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import grpc

        while not self._ended:
            try:
                self._ask()
                self.codes.append((time.perf_counter(), "OK", ""))
            except grpc.RpcError as exc:
                self.codes.append((time.perf_counter(), exc.code().name, exc.details()))
                time.sleep(0.01)

    def end(self) -> None:
        """Ask no more."""
        self._ended = True
        self._thread.join()


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
            # Not all at once after a pause: what was answered meanwhile leaves connections free.
            for _ in range(_AT_ONCE):
                if not due or due[0] > self._now():
                    break
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
            made = connect(self.port)
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
            data = link.socket.recv(READ_BYTES)
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
