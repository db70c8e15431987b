"""Small real models as artifacts, workers that are told when to answer, and servers in processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import deploykit
from deploykit.artifact import SETTINGS, Artifact, Evidence, write_golden
from deploykit.runtimes import RuntimeSettings
from deploykit.serving.arenas import Joined
from deploykit.serving.loaded import Loaded, Options
from deploykit.serving.metrics import Metrics
from deploykit.serving.requests import RequestError
from deploykit.serving.served import Served
from deploykit.serving.workers import Answer
from deploykit.specs import Signature, TensorSpec
from deploykit.staging import ArtifactWriter

HOME = Path(deploykit.__file__).resolve().parent.parent
FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def write_model(path: Path, nodes: Sequence[Any], inputs: Any, outputs: Any, constants: Any = ()) -> Path:
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info(*i) for i in inputs], [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(made)
    onnx.save(made, path)
    return path


def scaled(path: Path, factor: float) -> Path:
    """x [batch, 4] -> y = factor * x [batch, 4]."""
    return write_model(
        path, [helper.make_node("Mul", ["x", "f"], ["y"])],
        [("x", FLOAT, ["batch", 4])], [("y", FLOAT, ["batch", 4])], [("f", np.array(factor, np.float32))],
    )  # fmt: skip


def centred(path: Path) -> Path:
    """x [batch, 4] -> y = x - mean of all rows: it looks as if rows could be joined, and they cannot."""
    return write_model(
        path,
        [
            helper.make_node("ReduceMean", ["x"], ["m"], keepdims=1, axes=[0]),
            helper.make_node("Sub", ["x", "m"], ["y"]),
        ],
        [("x", FLOAT, ["batch", 4])], [("y", FLOAT, ["batch", 4])],
    )  # fmt: skip


def rounded(path: Path) -> Path:
    """x [batch, 4] -> y = x in 8 bits, by one scale for all rows, as an exporter writes it that knows no operator."""
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]), helper.make_node("ReduceMax", ["a"], ["m"], keepdims=0),
        helper.make_node("Div", ["m", "steps"], ["s"]), helper.make_node("Div", ["x", "s"], ["d"]),
        helper.make_node("Round", ["d"], ["r"]), helper.make_node("Mul", ["r", "s"], ["y"]),
    ]  # fmt: skip
    return write_model(
        path, nodes, [("x", FLOAT, ["batch", 4])], [("y", FLOAT, ["batch", 4])],
        [("steps", np.array(127, np.float32))],
    )  # fmt: skip


def dynamic(path: Path) -> Path:
    """x [batch, 4] -> y = x @ w, in 8 bits whose scale is found while it runs."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=FLOAT), helper.make_node("Mul", ["f", "s"], ["y"]),
    ]  # fmt: skip
    weights = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    return write_model(path, nodes, [("x", FLOAT, ["batch", 4])], [("y", FLOAT, ["batch", 4])], [("w", weights)])


def turning(path: Path) -> Path:
    """x [64, 64], turns [] -> y = x rounds of a product, as many as `turns` says: as slow as one likes."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["s", "w"], ["t"]), helper.make_node("Tanh", ["t"], ["u"]),
            helper.make_node("Identity", ["c"], ["d"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []), helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", FLOAT, [64, 64]),
        ],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []), helper.make_tensor_value_info("u", FLOAT, [64, 64])],
    )  # fmt: skip
    return write_model(
        path, [helper.make_node("Loop", ["turns", "", "x"], ["y"], body=body)],
        [("x", FLOAT, [64, 64]), ("turns", INT64, [])], [("y", FLOAT, [64, 64])],
        [("w", np.eye(64, dtype=np.float32))],
    )  # fmt: skip


def specs(*found: tuple[str, str, Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(*f) for f in found)


ROWS = Signature(specs(("x", "float32", ("batch", 4))), specs(("y", "float32", ("batch", 4))))


def artifact(
    output: Path, make: Callable[..., Path], *args: Any, signature: Signature = ROWS, golden: Any = None,
    settings: RuntimeSettings | None = None,
) -> Artifact:  # fmt: skip
    """An artifact of a model, with golden inputs that are run as they are where none are given."""
    with ArtifactWriter(output) as writer:
        make(writer.dir / "model.onnx", *args)
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        write_golden(writer.dir / "golden.npz", golden or [({"x": x}, {"y": x})])
        if settings is not None:
            settings.save(writer.dir / SETTINGS)
        return writer.commit(model="model.onnx", signature=signature, lineage=[], evidence=Evidence())


@pytest.fixture
def models() -> SimpleNamespace:
    """What makes models and artifacts."""
    return SimpleNamespace(
        write=write_model, scaled=scaled, centred=centred, rounded=rounded, dynamic=dynamic, turning=turning,
        artifact=artifact, specs=specs, rows=ROWS, FLOAT=FLOAT, INT64=INT64, STRING=STRING,
    )  # fmt: skip


# --- workers that are told when to answer ----------------------------------------------------------------------------


class FakeLane:
    """What it was sent first has begun; what lies behind that can be taken back."""

    def __init__(self, owner: FakeWorker, depth: int = 2) -> None:
        self.owner, self.depth = owner, depth
        self.sent: list[tuple[list[Joined], Any]] = []
        self.offers: list[int] = []
        self.offered = 0

    @property
    def in_flight(self) -> int:
        return len(self.sent)

    @property
    def spare(self) -> bool:
        return len(self.sent) < self.depth

    def send(self, tensors: list[Joined], done: Any) -> int:
        self.offered += 1
        self.sent.append((tensors, done))
        self.offers.append(self.offered)
        return self.offered

    def withdraw(self, offer: int) -> bool:
        if offer not in self.offers[1:]:
            return False
        at = self.offers.index(offer)
        del self.sent[at], self.offers[at]
        return True

    def values(self) -> list[list[float]]:
        """The first value of each request, of all batches that it has."""
        return [[float(part.flat[0]) for part in tensors[0].parts] for tensors, _ in self.sent]

    def answer(self, found: Any = None) -> list[np.ndarray]:
        """Answer the oldest batch, with its input doubled or with what is given; the parts that it had."""
        tensors, done = self.sent.pop(0)
        self.offers.pop(0)
        parts = [np.array(part) for part in tensors[0].parts]
        whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
        done(found if isinstance(found, RequestError) else Answer({"y": whole * 2 if found is None else found}, 0.5))
        self.owner.on_answer()
        return parts


class FakeWorker:
    """Doubles what it is given, when it is told to."""

    made: list[FakeWorker]

    def __init__(self, on_answer: Any, on_end: Any, batched: bool, failures: list[Exception], lanes: int) -> None:
        self.on_answer, self.on_end, self.batched = on_answer, on_end, batched
        self.failures = failures
        self.lanes = [FakeLane(self) for _ in range(lanes)]
        self.pid = 1
        self.killed = self.closed = False

    async def start(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        remark = "" if self.batched else "requests are not joined: of a reason"
        return {"batched": self.batched, "batching": remark, "notes": [], "load_s": 0.0, "warm_s": 0.0}

    def kill(self) -> None:
        self.killed = True

    def die(self, error: RequestError) -> None:
        lane, sent = self.lanes[0], list(self.lanes[0].sent)
        lane.sent.clear()
        lane.offers.clear()
        lane.depth = 0
        for _, done in sent:
            done(error)
        self.on_end(self)

    def close(self) -> None:
        self.closed = True

    async def wait(self) -> int:
        return 0


@pytest.fixture
def fake() -> Callable[..., Any]:
    """`await fake(max_batch=..., ...)`: a version of a model whose workers are `found.workers`."""

    async def make(
        max_batch: int = 1,
        instances: int = 1,
        batched: bool = True,
        failures: Any = (),
        lanes: int = 1,
        **options: Any,
    ) -> SimpleNamespace:
        workers: list[FakeWorker] = []
        left = list(failures)

        def hire(loaded: Loaded, options: Options, on_answer: Any, on_end: Any) -> FakeWorker:
            workers.append(FakeWorker(on_answer, on_end, batched, left, loaded.lanes))
            return workers[-1]

        settings = RuntimeSettings("ort:cpu", sessions=instances)
        loaded = Loaded("net", "1", Path("net"), "0" * 64, ROWS, settings, max_batch, lanes)
        served = Served(loaded, Options(**options), Metrics(lambda: ()), hire)
        await served.start()
        return SimpleNamespace(served=served, workers=workers, lane=workers[0].lanes[0])

    return make


# --- servers ---------------------------------------------------------------------------------------------------------


class Server:
    """`deploykit serve` in a process of its own."""

    def __init__(self, *args: str, log: Path) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))}
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploykit", "serve", *args, "--http-port", "0", "--grpc-port", "0",
                 "--admin-port", "0"],
                stdout=subprocess.PIPE, stderr=stream, env=env, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: "), self.messages()
        self.http, self.grpc, self.admin = (int(port) for port in re.findall(r":(\d+)", line))

    def messages(self) -> str:
        return self.log.read_text()

    def ask(self, method: str, path: str, body: bytes = b"", *, port: int | None = None, headers: Any = None) -> Any:
        """One request on a connection of its own: status and body."""
        from http.client import HTTPConnection

        connection = HTTPConnection("127.0.0.1", port or self.http, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def infer(self, name: str, inputs: dict[str, np.ndarray]) -> Any:
        """Status, and outputs by name or the error."""
        kinds = {"f": "FP32", "i": "INT64"}
        told = [
            {"name": n, "shape": a.shape, "datatype": kinds[a.dtype.kind], "data": a.ravel().tolist()}
            for n, a in inputs.items()
        ]
        status, body = self.ask("POST", f"/v2/models/{name}/infer", json.dumps({"inputs": told}).encode())
        found = json.loads(body)
        if status != 200:
            return status, found["error"]
        return status, {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in found["outputs"]} | {
            "version": found["model_version"]
        }

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(120)

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        return [p for p in pids if b"deploykit.serving.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`server(ARGUMENT...)`: a server that is ready."""
    made: list[Server] = []

    def start(*args: str | Path) -> Server:
        made.append(Server(*map(str, args), log=tmp_path / f"server{len(made)}.log"))
        return made[-1]

    yield start
    for found in made:
        if found.process.poll() is None:
            found.signal(signal.SIGKILL)
        found.wait()
        assert found.process.stdout is not None
        found.process.stdout.close()
