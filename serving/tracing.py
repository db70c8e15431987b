"""OpenTelemetry spans of inferences: the request as a server's span, and in it how long it waited and was computed.

    POST /v2/models/{name}/infer | inference.GRPCInferenceService/ModelInfer
    ├── queue       from its acceptance to the moment when a worker was given it
    └── compute     as long as the model ran; for all of the batch that it was part of

The parent is what the client says in the W3C header `traceparent`, which is metadata in gRPC. Attributes follow the
semantic conventions of HTTP and RPC, beside which there are `deploykit.model.name`, `deploykit.model.version`,
`deploykit.batch.size` and `deploykit.outcome`, the word that the metrics count the request under. Sampling, batches of
the exporter and the resource are what the standard's environment variables say.

Spans are sent by a thread of the SDK, which drops what it has no room for. Nothing here may make a request fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import deploykit
from deploykit.errors import DeploykitError, MissingDependencyError
from deploykit.extras import require
from deploykit.serving.grpc_messages import SERVICE
from deploykit.serving.requests import InferResult, RequestError

log = logging.getLogger("deploykit.serving")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PATH = "/v1/traces"
_PAUSE_S = 0.02
# Of gRPC's codes, those that are the server's fault.
_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


def open_traces(endpoint: str | None = None, ratio: float | None = None) -> Traces | None:
    """Traces that are sent by OTLP over HTTP; None where nobody wants any.

    Args:
        endpoint: Address of a collector, to which /v1/traces is added; by default what OTEL_EXPORTER_OTLP_ENDPOINT or
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT says.
        ratio: Share of the requests without a parent that are traced; by default what OTEL_TRACES_SAMPLER says.

    Raises:
        DeploykitError: The address is none, or the environment asks for what there is not.
        MissingDependencyError: The extra "otel" is not installed, and `endpoint` or `ratio` was given.
    """
    if endpoint is None and ratio is not None and not any(os.environ.get(name) for name in _ENDPOINTS):
        raise DeploykitError("there is nowhere to send traces to", hint="add --otlp-endpoint, such as http://host:4318")
    if not _is_wanted(endpoint):
        return None
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DeploykitError(
                f"{endpoint!r} is no address of a collector", expected="OTLP over HTTP, such as http://host:4318"
            )
        endpoint = endpoint.rstrip("/")
        endpoint = endpoint if endpoint.endswith(_PATH) else endpoint + _PATH
    try:
        return Traces(_provider(endpoint, ratio))
    except MissingDependencyError as exc:
        if endpoint is not None or ratio is not None:
            raise
        # Platforms set the variables for all that they run.
        log.warning("the environment asks for traces, and there are none: %s", exc)
        return None
    except ValueError as exc:
        raise DeploykitError(f"the environment's OTEL variables cannot be used ({exc})") from exc


def _is_wanted(endpoint: str | None) -> bool:
    said = os.environ.get
    if said("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if endpoint is not None:
        return True
    if not any(said(name) for name in _ENDPOINTS) or said("OTEL_TRACES_EXPORTER", "otlp").strip().lower() != "otlp":
        return False
    protocol = next((found for name in _PROTOCOLS if (found := said(name))), "http/protobuf")
    if protocol != "http/protobuf":
        log.warning(
            "the environment asks for traces by OTLP as %s, and there is http/protobuf: none are sent", protocol
        )
        return False
    return True


def _provider(endpoint: str | None, ratio: float | None) -> Any:
    trace = require("opentelemetry.sdk.trace", extra="otel")
    export = require("opentelemetry.sdk.trace.export", extra="otel")
    sampling = require("opentelemetry.sdk.trace.sampling", extra="otel")
    resources = require("opentelemetry.sdk.resources", extra="otel")
    otlp = require("opentelemetry.exporter.otlp.proto.http.trace_exporter", extra="otel")
    own = {"service.name": "deploykit", "service.version": deploykit.__version__}
    said = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if os.environ.get("OTEL_SERVICE_NAME") or "service.name" in said:
        del own["service.name"]  # what is given here would win
    provider = trace.TracerProvider(
        sampler=None if ratio is None else sampling.ParentBased(sampling.TraceIdRatioBased(ratio)),
        resource=resources.Resource.create(own),
        shutdown_on_exit=False,  # a collector that hangs must not keep the process
    )
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Traces:
    """Spans of requests.

    Args:
        provider: The SDK's, with the processors that send or keep spans; it is ended with `close`.
    """

    def __init__(self, provider: Any) -> None:
        api = require("opentelemetry.trace", extra="otel")
        context = require("opentelemetry.trace.propagation.tracecontext", extra="otel")
        self._provider = provider
        self._tracer = provider.get_tracer("deploykit.serving", deploykit.__version__)
        self._parents = context.TraceContextTextMapPropagator()
        self._server = api.SpanKind.SERVER
        self._nothing = api.INVALID_SPAN
        self._error = api.StatusCode.ERROR
        self._inside = api.set_span_in_context

    def request(self, scope: Mapping[str, Any]) -> RequestSpan:
        """The span of an inference over HTTP, to be used as a context.

        Args:
            scope: ASGI's, with what the router has found.
        """
        inner = "/versions/{version}" if "version" in scope["path_params"] else ""
        route = f"/v2/models/{{name}}{inner}/infer"
        attributes = {
            "http.request.method": scope["method"],
            "http.route": route,
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
            "network.protocol.version": scope["http_version"],
        }
        span = self._nothing
        with contextlib.suppress(Exception):
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            for side in ("server", "client"):
                if scope.get(side):
                    attributes |= _address(side, *scope[side])
            if "user-agent" in headers:
                attributes["user_agent.original"] = headers["user-agent"]
            span = self._start(f"{scope['method']} {route}", headers, attributes)
        return RequestSpan(self, span, _end_http)

    def call(self, context: Any) -> RequestSpan:
        """The span of an inference over gRPC, to be used as a context.

        Args:
            context: gRPC's.
        """
        method = f"{SERVICE}/ModelInfer"
        attributes: dict[str, Any] = {"rpc.system.name": "grpc", "rpc.method": method}
        span = self._nothing
        with contextlib.suppress(Exception):
            said = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
            kind, _, rest = unquote(context.peer()).partition(":")
            if kind in ("ipv4", "ipv6"):
                host, _, port = rest.rpartition(":")
                attributes |= _address("client", host.strip("[]"), int(port))
            span = self._start(method, said, attributes)
        return RequestSpan(self, span, _end_call)

    def _start(self, name: str, said: dict[str, str], attributes: dict[str, Any]) -> Any:
        return self._tracer.start_span(name, self._parents.extract(said), self._server, attributes)

    def add_inner(self, span: Any, began_ns: int, result: InferResult) -> None:
        """Put what an answer says of its time below a request's span."""
        context = self._inside(span)
        sent_ns = began_ns + round(result.queue_s * 1e9)
        self._tracer.start_span("queue", context, start_time=began_ns).end(sent_ns)
        compute = self._tracer.start_span(
            "compute", context, start_time=sent_ns, attributes={"deploykit.batch.size": max(1, result.batch)}
        )
        compute.end(sent_ns + round(result.compute_s * 1e9))

    def fail(self, span: Any, text: str) -> None:
        """Mark a span as failed."""
        span.set_status(self._error, text)

    async def close(self, wait_s: float) -> None:
        """Send what is there, and end; a collector that does not answer is given up.

        Args:
            wait_s: Most seconds that it may take.
        """
        # The SDK bounds its own wait by half a minute, and asyncio's threads are waited for at exit.
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        end = time.monotonic() + wait_s
        while thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(_PAUSE_S)
        if thread.is_alive():
            log.warning("the collector does not answer: the last traces are lost")


class RequestSpan:
    """The span of one request, from its first byte to its answer.

    Args:
        traces: Whose span it is.
        span: The SDK's.
        say_end: Says in a span how its request ended, by the error and by whether the client went away; whether that
            is the server's fault.
    """

    def __init__(self, traces: Traces, span: Any, say_end: Callable[[Any, BaseException | None, bool], bool]) -> None:
        self._traces = traces
        self._span = span
        self._say_end = say_end
        self._left = False

    def found(self, model: str, version: str | None) -> None:
        """The model is known; `version` is what was asked for."""
        self._span.set_attribute("deploykit.model.name", model)
        if version is not None:
            self._span.set_attribute("deploykit.model.version", version)

    def answered(self, began_ns: int, result: InferResult) -> None:
        """The engine has answered.

        Args:
            began_ns: When it was asked, since 1970.
            result: What it answered.
        """
        if not self._span.is_recording():
            return
        with contextlib.suppress(Exception):
            self._span.set_attribute("deploykit.model.version", result.version)
            self._span.set_attribute("deploykit.batch.size", max(1, result.batch))
            self._traces.add_inner(self._span, began_ns, result)

    def left(self) -> None:
        """The client went away before it was answered."""
        self._left = True

    def __enter__(self) -> Self:
        """The span has begun."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The request ends, with an answer or an error."""
        with contextlib.suppress(Exception):
            if self._span.is_recording():
                gone = self._left or isinstance(exc, asyncio.CancelledError)
                self._span.set_attribute("deploykit.outcome", "cancelled" if gone else _outcome(exc))
                if exc is not None and not gone:
                    self._span.set_attribute("error.type", type(exc).__name__)
                if self._say_end(self._span, exc, gone):
                    self._traces.fail(self._span, _outcome(exc))
            self._span.end()


def _end_http(span: Any, exc: BaseException | None, gone: bool) -> bool:
    """Say how a request over HTTP ended; whether that is the server's fault."""
    if gone:
        return False
    status = 200 if exc is None else 500
    if isinstance(exc, RequestError):
        status = exc.http_status
    span.set_attribute("http.response.status_code", status)
    return status >= 500


def _end_call(span: Any, exc: BaseException | None, gone: bool) -> bool:
    """Say how a call of gRPC ended; whether that is the server's fault."""
    code = "OK" if exc is None else "INTERNAL"
    if gone:
        code = "CANCELLED"
    elif isinstance(exc, RequestError):
        code = exc.grpc_code
    span.set_attribute("rpc.response.status_code", code)
    return code in _FAULTS


def _address(side: str, host: str, port: int | None) -> dict[str, Any]:
    return {f"{side}.address": host} | ({} if port is None else {f"{side}.port": port})


def _outcome(exc: BaseException | None) -> str:
    if exc is None:
        return "ok"
    return exc.outcome if isinstance(exc, RequestError) else RequestError.outcome
