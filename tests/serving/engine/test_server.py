"""`deploykit serve` as a process: both protocols, signals, the admin port and tokens."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from http.client import BadStatusLine, HTTPConnection, RemoteDisconnected
from pathlib import Path

import numpy as np
import pytest

import deploykit

X = np.arange(8, dtype=np.float32).reshape(2, 4)
INFER = json.dumps(
    {"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": X.ravel().tolist()}]}
).encode()


class Clients:
    """Clients that keep their connections, ask without a pause, and write down what they are told."""

    def __init__(self, port: int, count: int = 4) -> None:
        self.port = port
        self.answers: list[tuple[int, str, float]] = []
        self.broken: list[str] = []
        self.stopped = False
        self.threads = [threading.Thread(target=self.client) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def client(self) -> None:
        connection: HTTPConnection | None = None
        while not self.stopped:
            if connection is None:
                connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    return  # the server accepts nothing more: nothing was accepted
            try:
                connection.request("POST", "/v2/models/net/infer", INFER)
                answer = connection.getresponse()
                found = json.loads(answer.read())
            except (OSError, BadStatusLine, RemoteDisconnected) as exc:
                self.broken.append(repr(exc))
                return
            value = found["outputs"][0]["data"][1] if answer.status == 200 else -1.0
            self.answers.append((answer.status, found.get("model_version", ""), value))
            if answer.will_close:
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def some(self, count: int = 50) -> None:
        wanted = len(self.answers) + count
        while len(self.answers) < wanted and not self.broken:
            time.sleep(0.005)

    def end(self) -> None:
        self.stopped = True
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def test_both_protocols_answer_and_the_admin_port_is_apart(models, server, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    models.artifact(tmp_path / "many" / "7", models.scaled, 5.0)
    at = server(tmp_path / "net", tmp_path / "many", "--threads", "1", "--repository-api")
    assert at.ask("GET", "/v2/health/ready") == (200, b'{"ready":true}')
    status, found = at.infer("net", {"x": X})
    assert status == 200 and found["version"] == "1"
    np.testing.assert_array_equal(found["y"], 3 * X)
    assert at.infer("many", {"x": X})[1]["version"] == "7"
    assert at.infer("net", {"z": X})[0] == 400
    assert at.infer("nothing", {"x": X})[0] == 404
    status, text = at.ask("GET", "/metrics", port=at.admin)
    assert status == 200
    for line in (
        b'deploykit_requests_total{model="net",outcome="ok"} 1.0',
        b'deploykit_requests_total{model="net",outcome="invalid"}',
        b'deploykit_queue_seconds_count{model="net",version="1"} 1.0',
        b'deploykit_batch_rows_count{model="many",version="7"}',
        b"deploykit_compute_seconds_bucket",
        b'deploykit_queue_depth{model="net",version="1"} 0.0',
    ):
        assert line in text, text.decode()
    for path in ("/metrics", "/v2/repository/index"):
        assert at.ask("GET" if path == "/metrics" else "POST", path)[0] in (403, 404)
    for path in ("/v2/models/net/infer", "/v2", "/"):
        assert at.ask("POST", path, INFER, port=at.admin)[0] == 404
    index = json.loads(at.ask("POST", "/v2/repository/index", port=at.admin)[1])
    assert [(e["name"], e["version"], e["state"]) for e in index] == [("net", "1", "READY"), ("many", "7", "READY")]
    assert at.ask("POST", "/v2/repository/models/net/unload", port=at.admin)[0] == 200
    assert at.infer("net", {"x": X})[0] == 503
    text = at.ask("GET", "/metrics", port=at.admin)[1]
    assert b'deploykit_requests_total{model="net",outcome="not_ready"} 1.0' in text, text.decode()
    assert at.ask("POST", "/v2/repository/models/net/load", port=at.admin)[0] == 200
    assert at.infer("net", {"x": X})[0] == 200
    at.signal(signal.SIGTERM)
    assert at.wait() == 0


def test_grpc_answers(models, server, tmp_path):
    import grpc

    models.artifact(tmp_path / "net", models.scaled, 3.0)
    at = server(tmp_path / "net", "--threads", "1")
    with grpc.insecure_channel(f"127.0.0.1:{at.grpc}") as channel:
        ready = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
        assert ready(b"", timeout=60) == b"\x08\x01"  # field 1: true


def test_sigterm_answers_all_that_was_accepted(models, server, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    at = server(tmp_path / "net", "--threads", "1")
    workers = at.workers()
    assert len(workers) == 1
    clients = Clients(at.http)
    clients.some(100)
    at.signal(signal.SIGTERM)
    code = at.wait()
    clients.end()
    assert code == 0, at.messages()
    assert not clients.broken
    assert {status for status, *_ in clients.answers} == {200}
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "all that was accepted is answered" in at.messages()


def test_spans_of_both_protocols_are_sent_before_the_end(models, server, tmp_path, collector, monkeypatch):
    import grpc

    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    at = server(tmp_path / "net", "--threads", "1", "--otlp-endpoint", collector.url, "--trace-ratio", "1")
    assert at.infer("net", {"x": X})[0] == 200
    with grpc.insecure_channel(f"127.0.0.1:{at.grpc}") as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"", timeout=60)
    stats = json.loads(at.ask("GET", "/v2/models/net/stats")[1])["model_stats"]
    assert [(s["name"], s["version"], s["inference_count"]) for s in stats] == [("net", "1", 1)]
    assert not collector.got
    at.signal(signal.SIGTERM)
    assert at.wait() == 0
    assert sorted(span.name for _, span in collector.spans()) == [
        "POST /v2/models/{name}/infer", "compute", "inference.GRPCInferenceService/ModelInfer", "queue",
    ]  # fmt: skip


def test_sigterm_tells_grpc_clients_to_go_elsewhere_and_breaks_nothing(models, server, tmp_path):
    from tritonclient import grpc as client
    from tritonclient.utils import InferenceServerException

    models.artifact(tmp_path / "net", models.scaled, 3.0)
    at = server(tmp_path / "net", "--threads", "1")
    answered, refused = [], []

    def ask() -> None:
        tensor = client.InferInput("x", [2, 4], "FP32").set_data_from_numpy(X)
        with client.InferenceServerClient(f"127.0.0.1:{at.grpc}") as connection:
            try:
                while True:
                    answered.append(float(connection.infer("net", [tensor]).as_numpy("y")[0, 1]))
            except InferenceServerException as exc:
                refused.append(exc.status())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(answered) < 100:
        time.sleep(0.005)
    at.signal(signal.SIGTERM)
    assert at.wait() == 0
    for thread in threads:
        thread.join(60)
    assert set(answered) == {3.0}
    assert refused == ["StatusCode.UNAVAILABLE"] * 8


def turning(turns: int) -> bytes:
    inputs = [
        {"name": "x", "shape": [64, 64], "datatype": "FP32", "data": [0.0] * 4096},
        {"name": "turns", "shape": [], "datatype": "INT64", "data": [turns]},
    ]
    return json.dumps({"inputs": inputs}).encode()


def test_sigterm_waits_for_what_computes_and_a_second_signal_does_not(models, server, tmp_path):
    models.turning(tmp_path / "net.onnx")
    at = server(tmp_path / "net.onnx", "--threads", "1")
    workers = at.workers()
    connection = HTTPConnection("127.0.0.1", at.http, timeout=60)
    connection.request("POST", "/v2/models/net/infer", turning(10**9))
    while b'deploykit_in_flight{model="net",version="1"} 1.0' not in at.ask("GET", "/metrics", port=at.admin)[1]:
        time.sleep(0.01)
    at.signal(signal.SIGTERM)
    while "accepting no more" not in at.messages():
        assert at.process.poll() is None
        time.sleep(0.01)
    assert at.process.poll() is None
    at.signal(signal.SIGINT)
    assert at.wait() == 130
    with pytest.raises((OSError, RemoteDisconnected)):
        connection.getresponse()
    for pid in workers:
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)


def test_kill_9_of_the_server_leaves_no_worker_that_computes_on(models, server, tmp_path):
    models.turning(tmp_path / "net.onnx")
    at = server(tmp_path / "net.onnx", "--threads", "1")
    (pid,) = at.workers()
    connection = HTTPConnection("127.0.0.1", at.http, timeout=60)
    connection.request("POST", "/v2/models/net/infer", turning(10**9))
    while b'deploykit_in_flight{model="net",version="1"} 1.0' not in at.ask("GET", "/metrics", port=at.admin)[1]:
        time.sleep(0.01)
    at.signal(signal.SIGKILL)
    at.wait()
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    connection.close()


def test_kill_9_of_a_worker_is_a_503_for_those_in_flight_and_nothing_for_others(models, server, tmp_path):
    models.turning(tmp_path / "net.onnx")
    at = server(tmp_path / "net.onnx", "--threads", "1")
    found = []
    slow = threading.Thread(target=lambda: found.append(at.ask("POST", "/v2/models/net/infer", turning(10**9))))
    slow.start()
    while b'deploykit_in_flight{model="net",version="1"} 1.0' not in at.ask("GET", "/metrics", port=at.admin)[1]:
        time.sleep(0.01)
    (pid,) = at.workers()
    os.kill(pid, signal.SIGKILL)
    slow.join(60)
    assert found[0][0] == 503 and b"died" in found[0][1]
    assert at.ask("POST", "/v2/models/net/infer", turning(1))[0] == 200
    assert at.workers() != [pid] and at.ask("GET", "/v2/health/ready")[0] == 200
    assert b"deploykit_worker_restarts_total" in at.ask("GET", "/metrics", port=at.admin)[1]


def test_versions_and_sighup_swap_under_load_without_a_failed_request(models, server, tmp_path):
    models.artifact(tmp_path / "net" / "1", models.scaled, 1.0)
    models.artifact(tmp_path / "new", models.scaled, 3.0)
    at = server(tmp_path / "net", "--threads", "1")
    clients = Clients(at.http)
    clients.some()
    models.artifact(tmp_path / "net" / "2", models.scaled, 2.0)
    while clients.answers[-1] != (200, "2", 2.0) and not clients.broken:
        clients.some(1)
    clients.some()
    (tmp_path / "net" / "2").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "net" / "2")
    at.signal(signal.SIGHUP)
    while clients.answers[-1] != (200, "2", 3.0) and not clients.broken:
        clients.some(1)
    clients.some()
    clients.end()
    assert not clients.broken
    assert set(clients.answers) == {(200, "1", 1.0), (200, "2", 2.0), (200, "2", 3.0)}
    while len(at.workers()) > 1:
        time.sleep(0.01)


def test_a_full_queue_is_a_429(models, server, tmp_path):
    models.turning(tmp_path / "net.onnx")
    at = server(tmp_path / "net.onnx", "--threads", "1", "--queue", "1", "--timeout", "20s")
    found = []

    def ask() -> None:
        found.append(at.ask("POST", "/v2/models/net/infer", turning(10**9))[0])

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    while found.count(429) < 2:  # two are with the worker, one waits
        time.sleep(0.01)
    for pid in at.workers():
        os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [429, 429, 503, 503, 504]


def test_tokens_are_asked_for_everywhere_but_for_health(models, server, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    (tmp_path / "tokens").write_text("# of the tests\nsecret-one\n\nsecret-two\n")
    at = server(tmp_path / "net", "--threads", "1", "--token-file", tmp_path / "tokens", "--repository-api")
    asked = [
        ("POST", "/v2/models/net/infer", INFER, at.http), ("GET", "/metrics", b"", at.admin),
        ("POST", "/v2/repository/index", b"", at.admin),
    ]  # fmt: skip
    for method, path, body, port in asked:
        assert at.ask(method, path, body, port=port)[0] == 401
        assert at.ask(method, path, body, port=port, headers={"Authorization": "Bearer no"})[0] == 401
        assert at.ask(method, path, body, port=port, headers={"Authorization": "Bearer secret-two"})[0] == 200
    assert at.ask("GET", "/v2/health/ready")[0] == 200


@pytest.fixture
def unlogged():
    """What the command tells its loggers to write to, is taken from them again."""
    loggers = [logging.getLogger(name) for name in ("deploykit.serving", "uvicorn.error", "opentelemetry")]
    before = [(log, log.level, list(log.handlers)) for log in loggers]
    yield
    for log, level, handlers in before:
        log.setLevel(level)
        log.handlers[:] = handlers


def run(*args: object) -> tuple[int, str]:
    home = str(Path(deploykit.__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", "serve", *map(str, args)],
        capture_output=True, text=True, timeout=120, env=env,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "Missing argument"),
        (["net", "--tls-cert", "x.pem", "--tls-key", "x.key"], 1, "certificates cannot be used"),
        (["net", "--device", "ort:nowhere"], 1, "unknown device"),
        (["net", "--host", "256.0.0.1"], 1, "cannot listen on 256.0.0.1:8080"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(models, tmp_path, monkeypatch, args, code, message):
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    monkeypatch.chdir(tmp_path)
    found, text = run(*args)
    assert found == code and message in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "nothing does not exist"),
        (["net", "--tls-cert", "x.pem"], "TLS needs a certificate and its key"),
        (["net", "--public-key", "mine.pub"], "net.sig does not exist"),
        (["bare.onnx", "--public-key", "mine.pub"], "is a bare model file"),
        (["net", "--otlp-endpoint", "collector:4318"], "is no address of a collector"),
        (["net", "--trace-ratio", "0.5"], "nowhere to send traces to"),
        (["net", "--repository-api"], "add --admin-port"),
        (["net", "--repository-api", "--admin-port", "0", "--host", "0.0.0.0"], "add --token-file or --client-ca"),
        (["net", "--name", "a", "--name", "b"], "2 names for 1 models"),
        (["net", "--token-file", "x"], "cannot read the tokens"),
        (["net", "net"], "two models are called 'net'"),
        (["net", "--tuned", "x.json"], "x.json does not exist"),
    ],
)
def test_what_cannot_start_is_refused(models, cli, unlogged, tmp_path, monkeypatch, args, message):
    """In this process, which goes on: what is refused holds no port, or the next one would not come as far."""
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    models.scaled(tmp_path / "bare.onnx", 3.0)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    done = cli("serve", *args)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(models, server, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    at = server(tmp_path / "net", "--threads", "1")
    assert run(tmp_path / "net", "--http-port", at.http, "--grpc-port", 0)[0] == 1
    assert run(tmp_path / "net", "--http-port", 0, "--grpc-port", at.grpc)[0] == 1
