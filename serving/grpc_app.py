"""The Open Inference Protocol, version 2, over gRPC: `inference.GRPCInferenceService`, and gRPC's own health check.

Answers hold their tensors as raw contents, as Triton's do, whichever way the request's came. A request's deadline is
the engine's, and a request that its client cancels is cancelled there. Calls and what their messages take are bounded
(`grpc_inbox.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import numpy as np

from deploykit.extras import require
from deploykit.serving.front import (
    Tokens,
    error_text,
    infer_counted,
    known_name,
    model_metadata,
    refuse_load_parameters,
    server_metadata,
)
from deploykit.serving.grpc_inbox import Inbox
from deploykit.serving.grpc_messages import HEALTH, RAW_INPUTS, RAW_OUTPUTS, SERVICE, join_raw, messages, split_raw
from deploykit.serving.requests import (
    Engine,
    InferRequest,
    InferResult,
    InvalidRequest,
    Parameter,
    Refused,
    RequestError,
    TooLarge,
)
from deploykit.serving.tracing import RequestSpan, Traces
from deploykit.serving.triton_api import Statistics, model_config
from deploykit.serving.v2_binary import read_tensor, write_tensor
from deploykit.serving.v2_json import refuse_extensions, refuse_sequences, take_deadline
from deploykit.serving.v2_types import (
    Limits,
    check_datatype,
    check_shape,
    datatype_of,
    dtype_of,
    narrow,
    numpy_dtype,
    shown,
)
from deploykit.specs import Array

_LOG = logging.getLogger("deploykit.serving")

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
_OPEN = frozenset({"ServerLive", "ServerReady", "Check"})
_HEAD_BYTES = 64 * 1024
_SERVING, _NOT_SERVING, _UNKNOWN = 1, 2, 3

Read = Callable[[], Awaitable[bytes]]
Answer = Callable[[Read, Any], Awaitable[bytes]]


def grpc_server(
    engine: Engine,
    *,
    limits: Limits | None = None,
    tokens: Sequence[str] = (),
    repository: bool = False,
    refused: Callable[[str, RequestError], None] | None = None,
    traces: Traces | None = None,
    statistics: Statistics | None = None,
) -> Any:
    """A `grpc.aio.Server` over an engine; the caller adds its ports, starts and stops it. Call it on the event loop.

    A message may be as large as the largest request of the models that are there now, or the limit where that is more.

    Args:
        engine: What answers.
        limits: What a request may cost.
        tokens: Bearer tokens; every method but the health checks needs one of them. None: no method does.
        repository: Whether models can be listed, loaded and unloaded.
        refused: Told the model and the error of every inference that did not reach the engine.
        traces: Where spans of inferences go.
        statistics: Counts inferences, with those of other ports.

    Raises:
        MissingDependencyError: The extra "serve" is not installed.
    """
    aio = require("grpc.aio", extra="serve")
    limits = limits or Limits()
    most = limits.body_bytes
    for name in engine.names():
        try:
            found = [engine.info(name, version) for version in engine.info(name).versions]
        except RequestError:
            continue
        most = max(most, *(limits.of(info.inputs, info.outputs, info.max_batch).body_bytes for info in found))
    server = aio.server(
        options=[
            ("grpc.max_receive_message_length", most + _HEAD_BYTES),
            ("grpc.max_send_message_length", -1),
            # Two servers on one port would share its requests without a word.
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ],
        maximum_concurrent_rpcs=limits.calls,
    )
    service = _Service(engine, limits, repository, refused, traces, statistics or Statistics())
    server.add_generic_rpc_handlers(_handlers(service, Tokens(tokens), Inbox(limits, most + _HEAD_BYTES)))
    return server


def _handlers(service: _Service, tokens: Tokens, inbox: Inbox) -> tuple[Any, ...]:
    grpc = require("grpc", extra="serve")
    inference = {
        name: _method(name, _on_data(getattr(service, method)), tokens, inbox)
        for name, method in {
            "ServerLive": "live",
            "ServerReady": "ready",
            "ModelReady": "model_ready",
            "ServerMetadata": "server",
            "ModelMetadata": "model",
            "ModelConfig": "config",
            "ModelStatistics": "statistics",
            "RepositoryIndex": "index",
            "RepositoryModelLoad": "load",
            "RepositoryModelUnload": "unload",
        }.items()
    }
    inference["ModelInfer"] = _method("ModelInfer", service.infer, tokens, inbox)
    health = {"Check": _method("Check", _on_data(service.check), tokens, inbox)}
    return (
        grpc.method_handlers_generic_handler(SERVICE, inference),
        grpc.method_handlers_generic_handler(HEALTH, health),
    )


def _on_data(method: Callable[[bytes], Awaitable[bytes]]) -> Answer:
    """A method that wants nothing but its message."""

    async def answer(read: Read, context: Any) -> bytes:
        return await method(await read())

    return answer


def _method(name: str, answer: Answer, tokens: Tokens, inbox: Inbox) -> Any:
    """A method that reads bytes and answers some; its errors become status codes."""
    grpc = require("grpc", extra="serve")
    secured = name not in _OPEN

    async def call(messages: Any, context: Any) -> bytes:
        if secured and not tokens.accept(_authorization(context)):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed")
        share = inbox.share(context)
        try:
            answered = await answer(lambda: inbox.read(context, share), context)
            share.add(len(answered))
            return answered
        except RequestError as exc:
            code, text = grpc.StatusCode[exc.grpc_code], error_text(exc)
        except Exception:  # noqa: BLE001 - a bug of ours is logged, and the client is told no more than that
            _LOG.exception("%s failed", name)
            code, text = grpc.StatusCode.INTERNAL, "internal error"
        await context.abort(code, text)
        raise AssertionError("abort raises")

    return grpc.stream_unary_rpc_method_handler(call)


def _authorization(context: Any) -> bytes | None:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return value if isinstance(value, bytes) else cast("str", value).encode()
    return None


def _parse(name: str, data: bytes) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return messages()[name].FromString(data)
    except DecodeError:
        raise InvalidRequest("the message is not what the protocol says") from None


class _Service:
    """The methods, on bytes."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        repository: bool,
        refused: Callable[[str, RequestError], None] | None,
        traces: Traces | None,
        statistics: Statistics,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._repository = repository
        self._refused = refused
        self._traces = traces
        self._statistics = statistics
        self._made = messages()

    def _answer(self, kind: str, /, **fields: Any) -> bytes:
        return cast("bytes", self._made[kind](**fields).SerializeToString())

    async def live(self, data: bytes) -> bytes:
        return self._answer("ServerLiveResponse", live=self._engine.live())

    async def ready(self, data: bytes) -> bytes:
        return self._answer("ServerReadyResponse", ready=self._engine.ready())

    async def check(self, data: bytes) -> bytes:
        asked = _parse("HealthCheckRequest", data).service
        if asked not in ("", SERVICE):
            return self._answer("HealthCheckResponse", status=_UNKNOWN)
        return self._answer("HealthCheckResponse", status=_SERVING if self._engine.ready() else _NOT_SERVING)

    async def server(self, data: bytes) -> bytes:
        return self._answer("ServerMetadataResponse", **server_metadata(repository=self._repository))

    async def model(self, data: bytes) -> bytes:
        asked = _parse("ModelMetadataRequest", data)
        told = model_metadata(self._engine, asked.name, asked.version or None)
        parameter = self._made["InferParameter"]
        told["parameters"] = {
            name: parameter(string_param=value) if isinstance(value, str) else parameter(int64_param=value)
            for name, value in told["parameters"].items()
        }
        return self._answer("ModelMetadataResponse", **told)

    async def config(self, data: bytes) -> bytes:
        asked = _parse("ModelConfigRequest", data)
        info = self._engine.info(asked.name, asked.version or None)
        return self._answer("ModelConfigResponse", config=model_config(info, enums=True))

    async def statistics(self, data: bytes) -> bytes:
        asked = _parse("ModelStatisticsRequest", data)
        found = self._statistics.shown(self._engine, asked.name or None, asked.version or None)
        return self._answer("ModelStatisticsResponse", model_stats=found)

    async def model_ready(self, data: bytes) -> bytes:
        asked = _parse("ModelReadyRequest", data)
        return self._answer("ModelReadyResponse", ready=self._engine.model_ready(asked.name, asked.version or None))

    async def index(self, data: bytes) -> bytes:
        self._check_repository()
        only_ready = _parse("RepositoryIndexRequest", data).ready
        entries = [entry for entry in self._engine.index() if entry.get("state") == "READY" or not only_ready]
        return self._answer("RepositoryIndexResponse", models=entries)

    async def load(self, data: bytes) -> bytes:
        self._check_repository()
        asked = _parse("RepositoryModelLoadRequest", data)
        refuse_load_parameters(_parameters(asked.parameters, self._limits))
        await self._engine.load(asked.model_name)
        return self._answer("RepositoryModelLoadResponse")

    async def unload(self, data: bytes) -> bytes:
        self._check_repository()
        asked = _parse("RepositoryModelUnloadRequest", data)
        refuse_load_parameters(_parameters(asked.parameters, self._limits))
        await self._engine.unload(asked.model_name)
        return self._answer("RepositoryModelUnloadResponse")

    def _check_repository(self) -> None:
        if not self._repository:
            raise Refused("this server was not started with the repository methods")

    async def infer(self, read: Read, context: Any) -> bytes:
        if self._traces is None:
            return await self._infer(read, context, None)
        with self._traces.call(context) as span:
            return await self._infer(read, context, span)

    async def _infer(self, read: Read, context: Any, span: RequestSpan | None) -> bytes:
        name = ""
        try:
            data = await read()
            rest, raw = split_raw(data, RAW_INPUTS)
            asked = _parse("ModelInferRequest", rest)
            name, version = asked.model_name, asked.model_version or None
            info = self._engine.info(name, version)
            if span is not None:
                span.found(name, version)
            limits = self._limits.of(info.inputs, info.outputs, info.max_batch)
            if len(data) > limits.body_bytes + _HEAD_BYTES:
                raise TooLarge("the message is too large", expected=f"at most {limits.body_bytes} bytes for this model")
            request = _request(asked, raw, limits, context.time_remaining())
        except RequestError as exc:
            if self._refused is not None:
                self._refused(known_name(self._engine, name), exc)
            raise
        began_ns = time.time_ns()
        result = await infer_counted(self._engine, request, self._statistics)
        if span is not None:
            span.answered(began_ns, result)
        return _response(result)


def _request(asked: Any, raw: list[memoryview], limits: Limits, remaining: float | None) -> InferRequest:
    parameters = _parameters(asked.parameters, limits)
    deadline = take_deadline(parameters)
    if remaining is not None:
        ends = time.monotonic() + remaining
        deadline = ends if deadline is None else min(deadline, ends)
    refuse_sequences(parameters)
    # Of HTTP; here every answer is binary.
    parameters.pop("binary_data_output", None)
    outputs = [output.name for output in asked.outputs]
    if len(outputs) > limits.tensors or len(set(outputs)) < len(outputs):
        raise InvalidRequest("an output is there twice, or there are too many", expected=f"at most {limits.tensors}")
    for output in asked.outputs:
        refuse_extensions(output.name, _parameters(output.parameters, limits))
    return InferRequest(
        model=asked.model_name,
        inputs=_inputs(asked.inputs, raw, limits),
        version=asked.model_version or None,
        id=asked.id,
        outputs=tuple(outputs) or None,
        deadline=deadline,
        parameters=parameters,
    )


def _parameters(said: Any, limits: Limits) -> dict[str, Parameter]:
    if len(said) > limits.parameters:
        raise InvalidRequest(f"{len(said)} parameters", expected=f"at most {limits.parameters}")
    found: dict[str, Parameter] = {}
    for name, value in said.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"parameter {shown(name)} has no value")
        found[name] = getattr(value, choice)
    return found


def _inputs(said: Any, raw: list[memoryview], limits: Limits) -> dict[str, Array]:
    if len(said) > limits.tensors:
        raise InvalidRequest(f"{len(said)} inputs", expected=f"at most {limits.tensors}")
    if raw and len(raw) != len(said):
        raise InvalidRequest(f"{len(raw)} raw_input_contents for {len(said)} inputs")
    found: dict[str, Array] = {}
    for index, item in enumerate(said):
        name = item.name
        if name in found or not name:
            raise InvalidRequest(f"input {shown(name)} is there twice" if name else f"input {index} has no name")
        refuse_extensions(name, _parameters(item.parameters, limits))
        datatype = check_datatype(name, item.datatype)
        shape, count = check_shape(name, tuple(item.shape), limits, datatype)
        if raw:
            if item.HasField("contents") and item.contents.ByteSize():
                raise InvalidRequest(f"{shown(name)} has contents beside raw_input_contents")
            found[name] = read_tensor(name, datatype, shape, count, raw[index])
        else:
            found[name] = _typed(name, datatype, shape, count, item.contents)
    return found


def _typed(name: str, datatype: str, shape: tuple[int, ...], count: int, contents: Any) -> Array:
    """An input in the field of its type."""
    field = _CONTENTS.get(datatype)
    if field is None:
        raise InvalidRequest(f"{shown(name)} is {datatype}", expected="raw_input_contents for that")
    for other, _ in contents.ListFields():
        if other.name != field:
            raise InvalidRequest(f"{shown(name)} is {datatype} and has {other.name}", expected=field)
    values = getattr(contents, field)
    if len(values) != count:
        raise InvalidRequest(f"{shown(name)} has {len(values)} values", expected=f"{count} for shape {list(shape)}")
    if datatype == "BYTES":
        strings = np.empty(count, object)
        for index, value in enumerate(values):
            try:
                strings[index] = value.decode()
            except UnicodeDecodeError:
                raise InvalidRequest(
                    f"string {index} of {shown(name)} is not UTF-8", hint="send bytes as a tensor of UINT8"
                ) from None
        return strings.reshape(shape)
    if numpy_dtype(datatype).kind in "iu":
        return narrow(name, datatype, values).reshape(shape)
    return np.array(values, numpy_dtype(datatype)).reshape(shape)


def _response(result: InferResult) -> bytes:
    made = messages()
    answer = made["ModelInferResponse"](model_name=result.model, model_version=result.version, id=result.id)
    raw = []
    for name, array in result.outputs.items():
        answer.outputs.add(name=name, datatype=datatype_of(dtype_of(array)), shape=array.shape)
        raw.append(write_tensor(array))
    return join_raw(answer.SerializeToString(), RAW_OUTPUTS, raw)
