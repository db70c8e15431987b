"""Spans of inferences, by OpenTelemetry's own SDK."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from deploykit.errors import DeploykitError, MissingDependencyError
from deploykit.serving.grpc_messages import SERVICE, messages
from deploykit.serving.tracing import Traces, open_traces
from deploykit.serving.v2_types import Limits

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
X = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}).encode()
RPC = f"{SERVICE}/ModelInfer"


@pytest.fixture
def spans():
    """An exporter that keeps the spans, and traces that it gets."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    exporter.traces = Traces(provider)
    return exporter


@pytest.fixture
def engine(fake_engine):
    """As the others, but one that tells of its time."""

    class Timed(fake_engine):
        async def infer(self, request):
            return replace(await super().infer(request), queue_s=0.25, compute_s=0.5, batch=4)

    return Timed()


def ask(served, model="nan", body=X, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def call(served, model="nan", **metadata):
    x = {"name": "x", "datatype": "FP32", "shape": [1]}
    data = messages()["ModelInferRequest"](
        model_name=model, inputs=[x], raw_input_contents=[np.zeros(1, np.float32).tobytes()]
    ).SerializeToString()
    with grpc.insecure_channel(served.grpc_address) as channel:
        try:
            channel.unary_unary(f"/{RPC}")(data, timeout=60, metadata=tuple(metadata.items()))
        except grpc.RpcError as exc:
            return exc.code().name
    return "OK"


def finished(spans, count):
    for _ in range(500):
        if len(spans.get_finished_spans()) >= count:
            break
        time.sleep(0.02)
    found = {}
    for span in spans.get_finished_spans():
        found.setdefault(span.name, span)
    assert len(spans.get_finished_spans()) == count
    return found


def check_family(found, name):
    request, queue, compute = found[name], found["queue"], found["compute"]
    assert request.kind is SpanKind.SERVER and request.status.status_code is StatusCode.UNSET
    for span in (request, queue, compute):
        assert span.context.trace_id == int(TRACE, 16)
    assert request.parent.span_id == int(PARENT, 16) and request.parent.is_remote
    assert queue.parent.span_id == compute.parent.span_id == request.context.span_id
    assert queue.start_time >= request.start_time
    assert queue.end_time - queue.start_time == 250_000_000 and compute.start_time == queue.end_time
    assert compute.end_time - compute.start_time == 500_000_000
    said = request.attributes
    assert (said["deploykit.model.name"], said["deploykit.model.version"]) == ("nan", "2")
    assert said["deploykit.batch.size"] == compute.attributes["deploykit.batch.size"] == 4
    assert said["deploykit.outcome"] == "ok" and "error.type" not in said
    return said


def test_http(running, engine, spans):
    with running(engine, None, traces=spans.traces) as served:
        assert ask(served, traceparent=TRACEPARENT, tracestate="a=b", **{"User-Agent": "tests"}) == 200
        said = check_family(finished(spans, 3), "POST /v2/models/{name}/infer")
        assert said["http.response.status_code"] == 200 and said["http.request.method"] == "POST"
        assert said["http.route"] == "/v2/models/{name}/infer" and said["url.path"] == "/v2/models/nan/infer"
        assert (said["url.scheme"], said["network.protocol.version"]) == ("http", "1.1")
        assert (said["client.address"], said["server.port"]) == ("127.0.0.1", served.port)
        assert said["user_agent.original"] == "tests"
        spans.clear()
        assert ask(served, "nan/versions/1") == 200
        found = finished(spans, 3)["POST /v2/models/{name}/versions/{version}/infer"]
        assert found.parent is None and found.attributes["deploykit.model.version"] == "1"


def test_grpc(running, engine, spans):
    with running(engine, None, traces=spans.traces) as served:
        assert call(served, traceparent=TRACEPARENT) == "OK"
        said = check_family(finished(spans, 3), RPC)
        assert (said["rpc.system.name"], said["rpc.method"]) == ("grpc", RPC)
        assert said["rpc.response.status_code"] == "OK" and said["client.address"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("model", "status", "code", "outcome"),
    [
        ("nothing", 404, "NOT_FOUND", "unknown"), ("mean", 400, "INVALID_ARGUMENT", "invalid"),
        ("busy", 429, "RESOURCE_EXHAUSTED", "busy"), ("lost", 503, "UNAVAILABLE", "worker_lost"),
        ("bug", 500, "INTERNAL", "failed"),
    ],
)  # fmt: skip
def test_refusals_are_errors_where_they_are_the_servers_fault(running, engine, spans, model, status, code, outcome):
    with running(engine, None, traces=spans.traces) as served:
        assert (ask(served, model), call(served, model)) == (status, code)
        found = finished(spans, 2)
    http_span, rpc_span = found["POST /v2/models/{name}/infer"], found[RPC]
    assert http_span.attributes["http.response.status_code"] == status
    assert rpc_span.attributes["rpc.response.status_code"] == code
    for span in (http_span, rpc_span):
        assert span.attributes["deploykit.outcome"] == outcome and span.attributes["error.type"]
        assert span.status.status_code is (StatusCode.ERROR if status >= 500 else StatusCode.UNSET)
        assert ("deploykit.model.name" in span.attributes) == (model != "nothing")


def test_a_client_that_goes_away_and_a_body_that_does_not_come(running, engine, spans):
    with running(engine, Limits(body_s=0.3), traces=spans.traces) as served:
        head = b"POST /v2/models/%b/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
            sock.sendall(head % (b"slow", len(X)) + X)
            assert engine.waiting.wait(10)
        found = finished(spans, 1)["POST /v2/models/{name}/infer"]
        assert found.attributes["deploykit.outcome"] == "cancelled"
        assert "http.response.status_code" not in found.attributes and "error.type" not in found.attributes
        spans.clear()
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
            sock.sendall(head % (b"nan", len(X)))
            assert b"408" in sock.recv(100)
        assert finished(spans, 1)["POST /v2/models/{name}/infer"].attributes["http.response.status_code"] == 408


def test_what_is_not_sampled_is_not_kept(running, engine, spans):
    with running(engine, None, traces=spans.traces) as served:
        assert ask(served, traceparent=TRACEPARENT[:-1] + "0") == 200
        assert call(served, traceparent=TRACEPARENT[:-1] + "0") == "OK"
        # What is no context begins a trace of its own.
        for wrong in ("", "00-0-0-01", TRACEPARENT + "x", "\u00ff" * 600):
            assert ask(served, traceparent=wrong.encode("latin-1")) == 200
        found = finished(spans, 12)
        assert found["POST /v2/models/{name}/infer"].parent is None
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with running(engine, None, traces=Traces(provider)) as served:
        assert ask(served) == 200 and call(served) == "OK"
        assert not exporter.get_finished_spans()
        assert ask(served, traceparent=TRACEPARENT) == 200
        finished(exporter, 3)


class Broken(SpanExporter):
    def export(self, spans):
        raise OSError("the collector is gone")

    def shutdown(self):
        raise OSError("the collector is gone")


class Faulty:
    """A provider whose every part raises."""

    def get_tracer(self, *args):
        return self

    def start_span(self, *args, **kwargs):
        raise RuntimeError("a fault of the SDK")


def test_no_fault_of_an_exporter_or_of_the_sdk_reaches_a_request(running, engine):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Broken()))
    for traces in (Traces(provider), Traces(Faulty())):
        with running(engine, None, traces=traces) as served:
            assert ask(served) == 200 and call(served) == "OK"
            assert ask(served, "busy") == 429 and call(served, "lost") == "UNAVAILABLE"


# --- the SDK that is opened ------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    return monkeypatch


def close(traces, wait_s=10.0):
    asyncio.run(traces.close(wait_s))


@pytest.mark.parametrize(
    "said",
    [
        {}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h", "OTEL_SDK_DISABLED": "True"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
    ids=str,
)  # fmt: skip
def test_nobody_wants_traces(environment, said):
    for name, value in said.items():
        environment.setenv(name, value)
    assert open_traces() is None


def test_what_is_no_collector(environment):
    for endpoint in ("collector", "collector:4318", "grpc://collector:4317", "http://"):
        with pytest.raises(DeploykitError, match="is no address of a collector"):
            open_traces(endpoint)
    with pytest.raises(DeploykitError, match="nowhere to send traces to"):
        open_traces(ratio=0.5)
    environment.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")  # less than a batch
    with pytest.raises(DeploykitError, match="OTEL variables cannot be used"):
        open_traces("http://127.0.0.1:1")


def test_without_the_extra(environment, caplog):
    environment.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingDependencyError, match="otel"):
        open_traces("http://127.0.0.1:1")
    # Platforms set the variables for all that they run: that is no reason not to start.
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with caplog.at_level(logging.WARNING):
        assert open_traces() is None
    assert "there are none" in caplog.text


def test_off_imports_nothing_of_it():
    code = (
        "import sys; from deploykit.serving import lifecycle, tracing; assert tracing.open_traces() is None; "
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_collector_that_hangs_does_not_keep_the_end(caplog):
    hanging = threading.Event()

    class Provider(Faulty):
        def shutdown(self):
            hanging.wait(60)

    with caplog.at_level(logging.WARNING):
        close(Traces(Provider()), 0.1)
    hanging.set()
    assert "the last traces are lost" in caplog.text


def test_spans_are_sent_at_the_end_if_not_before(running, engine, environment, collector):
    environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    environment.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=tests")
    traces = open_traces(collector.url)
    with running(engine, None, traces=traces) as served:
        assert ask(served, traceparent=TRACEPARENT) == 200
    assert not collector.got
    close(traces)
    assert {path for path, _ in collector.got} == {"/v1/traces"}
    assert sorted(span.name for _, span in collector.spans()) == ["POST /v2/models/{name}/infer", "compute", "queue"]
    resource = {a.key: a.value.string_value for a in collector.spans()[0][0].attributes}
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("deploykit", "tests")


def test_the_environment_says_where_and_how_many(running, engine, environment, collector):
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    environment.setenv("OTEL_SERVICE_NAME", "mine")
    environment.setenv("OTEL_TRACES_SAMPLER", "always_off")
    none, half = open_traces(), open_traces(collector.url + "/v1/traces", ratio=1.0)
    for traces in (none, half):
        with running(engine, None, traces=traces) as served:
            assert ask(served) == 200
        close(traces)
    assert len(collector.spans()) == 3
    assert any(a.key == "service.name" and a.value.string_value == "mine" for a in collector.spans()[0][0].attributes)
