"""What `server.py` measures: `deploykit serve` as a process, small models for it, and the ways to it without it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from server_clients import READ_BYTES, connect

import deploykit

# Requests that a process is given beside those in the queue: one runs, and one lies ready.
SLOTS = 2
SHAPE = (1, 3, 224, 224)


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
        """Bytes that the process and its children have made, what they share counted once.

        Mapped files are left out: a library's pages are divided among all that map it, so that the end of a client, or
        of anything else in Python on the machine, makes a server look larger by a tenth.
        """
        total = 0
        for pid in self.pids():
            found = re.findall(rb"^Pss_(?:Anon|Shmem): +(\d+) kB", _read(f"/proc/{pid}/smaps_rollup"), re.MULTILINE)
            total += sum(map(int, found)) * 1024
        return total

    def metrics(self) -> dict[str, float]:
        """Sums over labels of what the admin port tells."""
        with socket.create_connection(("127.0.0.1", self.admin)) as link:
            link.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            text = b"".join(iter(lambda: link.recv(READ_BYTES), b"")).decode()
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
        link = connect(self.port)
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


def save(path: Path, nodes: list[Any], inputs: Any, outputs: Any, constants: Any = ()) -> Path:
    """A model file."""
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def relu(path: Path) -> Path:
    """x [1, 3, 224, 224] -> y, the next thing to identity that a runtime still computes."""
    value = (TensorProto.FLOAT, SHAPE)
    return save(path, [helper.make_node("Relu", ["x"], ["y"])], [("x", *value)], [("y", *value)])


def layers(path: Path, depth: int = 20, width: int = 1024) -> Path:
    """x [batch, width] -> y, some milliseconds of products."""
    draw = np.random.default_rng(0)
    weights = [draw.standard_normal((width, width)).astype(np.float32) / 32 for _ in range(2)]
    names = ["x", *(f"t{i}" for i in range(depth - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i % 2}"], [names[i + 1]]) for i in range(depth)]
    value = (TensorProto.FLOAT, ["batch", width])
    return save(path, nodes, [("x", *value)], [("y", *value)], [(f"w{i}", w) for i, w in enumerate(weights)])


def machine() -> dict[str, Any]:
    """What the figures are of: the machine, and how busy it is with other things."""
    from deploykit.machine import inspect_machine

    found = inspect_machine()
    return {"cpu": found.cpu, "cores": found.cores_allowed, "load": round(os.getloadavg()[0], 2)}
