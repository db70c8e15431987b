"""An engine of numpy functions behind both protocols, on one event loop in a thread."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploykit.serving.requests import (
    Busy,
    DeadlineExceeded,
    InferRequest,
    InferResult,
    InvalidRequest,
    ModelInfo,
    NotReady,
    UnknownModel,
    WorkerLost,
)
from deploykit.serving.v2_types import DATATYPES, dtype_of
from deploykit.specs import TensorSpec


def spec(name: str, dtype: str = "float32", *shape: int | str) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def model(
    name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], max_batch: int = 0, batching: str = ""
) -> ModelInfo:
    return ModelInfo(name, ("1", "2"), "onnxruntime_onnx", inputs, outputs, max_batch, batching)


@dataclass
class FakeEngine:
    """Answers with functions, and remembers what was asked."""

    alive: bool = True
    is_ready: bool = True
    asked: list[InferRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    waiting: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.models: dict[str, ModelInfo] = {}
        self.functions: dict[str, Callable[..., dict[str, Any]]] = {}
        for dtype, datatype in DATATYPES.items():
            tensor = TensorSpec("x", dtype, None)
            self.add(model(f"echo_{datatype}", (tensor,), (TensorSpec("y", dtype, None),)), lambda x: {"y": x})
        self.add(
            model("mean", (spec("x", "float32", 1, 3, 224, 224),), (spec("y", "float32", 1, 3, 1, 1),)),
            lambda x: {"y": x.mean((2, 3), keepdims=True)},
        )
        self.add(
            model("identity", (spec("x", "float32", "n", 3, 224, 224),), (spec("y", "float32", "n", 3, 224, 224),), 8),
            lambda x: {"y": x},
        )
        one = spec("x", "float32", "n")
        self.add(model("dynamic", (one,), (spec("y", "float32", "n"),), batching="not joined"), lambda x: {"y": x})
        pair = (spec("a", "int32", "n", 2), spec("b", "int32", "n", 2))
        self.add(
            model("pair", pair, (spec("sum", "int32", "n", 2), spec("difference", "int32", "n", 2)), 8),
            lambda a, b: {"sum": a + b, "difference": a - b},
        )
        self.add(
            model("nan", (spec("x", "float32", "n"),), (spec("y", "float32", "n"), spec("z", "float64", "n"))),
            lambda x: {"y": np.array([1.5, np.nan], np.float32), "z": np.array([1.5, np.nan])},
        )
        self.add(
            model("infinite", (spec("x", "float32", "n"),), (spec("y", "float32", "n"), spec("z", "float16", "n"))),
            lambda x: {
                "y": np.array([np.nan, np.inf, -np.inf, 0.1], np.float32),
                "z": np.array([np.inf, 2], np.float16),
            },
        )
        self.add(
            model("strided", (spec("x", "float32", "n", "m"),), (spec("y", "float32", "m", "n"), spec("z", "int64"))),
            lambda x: {"y": x.T, "z": np.array(7)},
        )
        for name in ("slow", "bug", "busy", "lost", "loading", "unloaded"):
            self.add(model(name, (spec("x", "float32", "n"),), (spec("y", "float32", "n"),)), lambda x: {"y": x})

    def add(self, info: ModelInfo, function: Callable[..., dict[str, Any]]) -> None:
        self.models[info.name] = info
        self.functions[info.name] = function

    def live(self) -> bool:
        return self.alive

    def ready(self) -> bool:
        return self.is_ready

    def names(self) -> tuple[str, ...]:
        return tuple(self.models)

    def info(self, name: str, version: str | None = None) -> ModelInfo:
        found = self.models.get(name)
        if found is None or version not in (None, *found.versions):
            raise UnknownModel(f"there is no model {name!r}" + (f" of version {version!r}" if version else ""))
        if name == "unloaded":
            raise NotReady("it is not loaded")
        return found

    def model_ready(self, name: str, version: str | None = None) -> bool:
        self.info(name, version)
        return name != "loading"

    async def infer(self, request: InferRequest) -> InferResult:
        info = self.info(request.model, request.version)
        self.asked.append(request)
        if set(request.inputs) != {s.name for s in info.inputs}:
            raise InvalidRequest(f"inputs are {sorted(request.inputs)}")
        for tensor in info.inputs:
            array = request.inputs[tensor.name]
            if dtype_of(array) != tensor.dtype:
                raise InvalidRequest(f"{tensor.name} is {dtype_of(array)}", expected=tensor.dtype)
            fits = tensor.shape is None or (
                len(tensor.shape) == array.ndim
                and all(isinstance(d, str) or d == n for d, n in zip(tensor.shape, array.shape, strict=True))
            )
            if not fits:
                raise InvalidRequest(f"shape of {tensor.name} is {array.shape}", expected=str(tensor))
        if request.model == "slow":
            self.waiting.set()
            left = 60.0 if request.deadline is None else request.deadline - time.monotonic()
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                self.cancelled.append(request.id)
                raise
            self.cancelled.append(request.id)
            raise DeadlineExceeded("the time of the request ran out")
        failures = {
            "busy": Busy("the queue is full"),
            "lost": WorkerLost("the worker died"),
            "loading": NotReady("still loading"),
        }
        if request.model in failures:
            raise failures[request.model]
        if request.model == "bug":
            raise RuntimeError("secret of the bug")
        outputs = self.functions[request.model](**request.inputs)
        names = request.outputs or tuple(outputs)
        strange = set(names) - set(outputs)
        if strange:
            raise InvalidRequest(f"no output {sorted(strange)}")
        chosen = {name: array for name, array in outputs.items() if name in names}
        return InferResult(request.model, request.version or "2", chosen, request.id, 0.0, 0.0, 0)

    async def load(self, name: str) -> None:
        self.info(name)
        self.loaded.append(name)

    async def unload(self, name: str) -> None:
        self.info(name)
        self.unloaded.append(name)

    def index(self) -> list[dict[str, str]]:
        return [
            {"name": name, "version": "2", "state": "UNAVAILABLE" if name == "loading" else "READY", "reason": ""}
            for name in self.models
        ]

    def remember(self, name: str, error: Exception) -> None:
        self.refused.append((name, type(error).__name__))


@contextmanager
def _running(engine: FakeEngine, limits: Any, **options: Any) -> Iterator[SimpleNamespace]:
    import uvicorn

    from deploykit.serving.grpc_app import grpc_server
    from deploykit.serving.http_app import http_app
    from deploykit.serving.http_server import uvicorn_settings

    listener = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()
    found = SimpleNamespace(engine=engine, port=listener.getsockname()[1])
    found.address = f"127.0.0.1:{found.port}"

    async def serve() -> None:
        app = http_app(engine, limits=limits, refused=engine.remember, **options)
        rpc = grpc_server(engine, limits=limits, refused=engine.remember, **options)
        found.grpc_port = rpc.add_insecure_port("127.0.0.1:0")
        found.grpc_address = f"127.0.0.1:{found.grpc_port}"
        await rpc.start()
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **uvicorn_settings(limits)))
        found.server = server
        task = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        started.set()
        await task
        await rpc.stop(0)

    def run() -> None:
        import uvloop

        uvloop.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield found
    finally:
        found.server.should_exit = True
        found.server.force_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def running() -> Callable[..., Any]:
    """`running(engine, limits, tokens=..., ...)`: a context manager, servers with ports; options are those of both."""
    return _running


@pytest.fixture(scope="session")
def fake_engine() -> type[FakeEngine]:
    """A class of engines."""
    return FakeEngine


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    """Both protocols over one engine, with the usual limits and the repository's routes."""
    with _running(FakeEngine(), None, repository=True) as found:
        yield found


class Collector:
    """Takes OTLP over HTTP, and keeps what it was sent."""

    def __init__(self) -> None:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.got: list[tuple[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                data = handler.rfile.read(int(handler.headers["content-length"]))
                self.got.append((handler.path, ExportTraceServiceRequest.FromString(data)))
                handler.send_response(200)
                handler.send_header("content-length", "0")
                handler.end_headers()

            def log_message(handler, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[tuple[Any, Any]]:
        """Each span with the resource that it is of."""
        return [
            (resource.resource, span)
            for _, request in self.got
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector of OpenTelemetry spans, with its address `url`."""
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()
