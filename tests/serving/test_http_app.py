"""HTTP beside the tensors: health, tokens, times, sizes, clients that go away, faults of ours."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploykit.serving.v2_types import Limits

X = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}).encode()


def ask(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
        return response.status, json.loads(data) if data else None, dict(response.getheaders())
    finally:
        connection.close()


def test_health_is_json_and_follows_the_engine(running, fake_engine):
    engine = fake_engine()
    with running(engine, None) as served:
        assert ask(served.port, "GET", "/v2/health/live")[:2] == (200, {"live": True})
        assert ask(served.port, "GET", "/v2/health/ready")[:2] == (200, {"ready": True})
        engine.is_ready = False
        assert ask(served.port, "GET", "/v2/health/ready")[:2] == (503, {"ready": False})
        engine.alive = False
        assert ask(served.port, "GET", "/v2/health/live")[:2] == (503, {"live": False})
        assert ask(served.port, "GET", "/v2/models/mean/ready")[:2] == (200, {"name": "mean", "ready": True})
        assert ask(served.port, "GET", "/v2/models/loading/ready")[:2] == (503, {"name": "loading", "ready": False})
        assert ask(served.port, "GET", "/v2/models/mean/versions/1/ready")[0] == 200
        assert ask(served.port, "GET", "/v2/models/mean/versions/9/ready")[0] == 404
        assert ask(served.port, "GET", "/v2/models/nothing/ready")[0] == 404
        assert ask(served.port, "GET", "/v2/models/nothing")[0] == 404


def test_metadata_say_whether_requests_are_joined(served):
    told = {name: ask(served.port, "GET", f"/v2/models/{name}")[1]["parameters"] for name in ("identity", "dynamic")}
    assert told == {"identity": {"max_batch_size": 8}, "dynamic": {"max_batch_size": 0, "batching": "not joined"}}


def test_refusals_are_written_where_they_are_made(served):
    def threads():
        return {thread.ident for thread in threading.enumerate() if "AnyIO" in thread.name}

    before = threads()
    for path, body in (("models/busy", X), ("models/nothing", X), ("models/mean", b"{}!"), ("nowhere", X)):
        assert ask(served.port, "POST", f"/v2/{path}/infer", body)[0] in (400, 404, 429)
    assert ask(served.port, "GET", "/v2/models/nothing")[0] == 404
    assert not threads() - before


def test_the_repository_is_off_unless_asked_for(running, fake_engine):
    engine = fake_engine()
    with running(engine, None) as served:
        for path in ("index", "models/mean/load", "models/mean/unload"):
            status, answer, _ = ask(served.port, "POST", f"/v2/repository/{path}", b"{}")
            assert status == 403 and "not started with" in answer["error"]
        assert "model_repository" not in ask(served.port, "GET", "/v2")[1]["extensions"]
    assert engine.loaded == engine.unloaded == []


def test_the_repository(served):
    status, index, _ = ask(served.port, "POST", "/v2/repository/index")
    assert status == 200 and {"name": "loading", "version": "2", "state": "UNAVAILABLE", "reason": ""} in index
    ready = ask(served.port, "POST", "/v2/repository/index", b'{"ready": true}')[1]
    assert 0 < len(ready) < len(index) and {entry["state"] for entry in ready} == {"READY"}
    for body in (b"[]", b"{", b'{"ready": 1}'):
        assert ask(served.port, "POST", "/v2/repository/index", body)[0] == 400
    for body in (
        b"[]",
        b'{"parameters": []}',
        b'{"parameters": {"config": "{}"}}',
        b'{"parameters": {"file:1/a": "YQ=="}}',
    ):
        assert ask(served.port, "POST", "/v2/repository/models/mean/load", body)[0] == 400
    assert ask(served.port, "POST", "/v2/repository/models/mean/load", b'{"a": "' + b"a" * 10**6 + b'"}')[0] == 413
    assert ask(served.port, "POST", "/v2/repository/models/nothing/load")[0] == 404


def test_tokens(running, fake_engine):
    with running(fake_engine(), None, tokens=("one", "zwei\u00fc"), repository=True) as served:
        routes = [
            ("GET", "/v2"),
            ("GET", "/v2/models/mean"),
            ("GET", "/v2/models/mean/ready"),
            ("POST", "/v2/models/nan/infer"),
            ("POST", "/v2/repository/index"),
            ("GET", "/v2/openapi.json"),
            ("GET", "/nothing"),
        ]
        refused = [{}, {"Authorization": ""}]
        refused += [
            {"Authorization": value.encode()}
            for value in (
                "one",
                "Basic one",
                "Bearer",
                "Bearer ",
                "Bearer on",
                "Bearer onee",
                "Bearer two",
                "Bearer one two",
            )
        ]
        for method, path in routes:
            for headers in refused:
                status, answer, given = ask(served.port, method, path, X if method == "POST" else None, headers)
                assert status == 401 and answer == {"error": "a bearer token is needed"}
                assert given["www-authenticate"] == "Bearer"
        for token in ("one", "zwei\u00fc"):
            for scheme in ("Bearer", "bearer"):
                headers = {"Authorization": f"{scheme} {token}".encode()}
                assert ask(served.port, "POST", "/v2/models/nan/infer", X, headers)[0] == 200
                assert ask(served.port, "GET", "/v2", headers=headers)[0] == 200
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert ask(served.port, "GET", path)[0] == 200


def test_a_fault_of_ours_is_logged_and_not_told(served, caplog):
    with caplog.at_level(logging.ERROR):
        status, answer, _ = ask(served.port, "POST", "/v2/models/bug/infer", X)
    assert (status, answer) == (500, {"error": "internal error"})
    assert "secret of the bug" in caplog.text and "Traceback" in caplog.text


def test_what_did_not_reach_the_engine_is_told(served):
    served.engine.refused.clear()
    for model in ("nan", "nothing", "busy"):
        ask(served.port, "POST", f"/v2/models/{model}/infer", b"{}" if model == "nan" else X)
    assert ask(served.port, "POST", "/v2/models/unloaded/infer", X)[0] == 503
    told = [("nan", "InvalidRequest"), ("", "UnknownModel"), ("unloaded", "NotReady")]
    assert served.engine.refused == told


def test_methods_that_a_route_has_not_are_named(served):
    status, answer, headers = ask(served.port, "DELETE", "/v2/models/mean")
    assert status == 405 and "GET" in headers["allow"] and answer["error"]


# Bodies.


def chunked(port, parts, path="/v2/models/nan/infer", headers=b""):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(b"POST " + path.encode() + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + headers + b"\r\n")
        try:
            for part in parts:
                sock.sendall(b"%x\r\n%s\r\n" % (len(part), part))
            sock.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        response = http.client.HTTPResponse(sock)
        response.begin()
        return response.status, json.loads(response.read())


def test_chunks_are_a_body(served):
    assert chunked(served.port, [X[i : i + 1] for i in range(len(X))])[0] == 200
    packed = gzip.compress(X)
    parts = [packed[i : i + 3] for i in range(0, len(packed), 3)]
    assert chunked(served.port, parts, headers=b"Content-Encoding: gzip\r\n")[0] == 200


def test_chunks_are_counted_while_they_come(running, fake_engine):
    with running(fake_engine(), Limits(body_bytes=10_000)) as served:
        status, answer = chunked(served.port, [b" " * 1000] * 100_000)
        # What stands around the tensors has its own 64 KiB.
        assert status == 413 and "at most 65540 bytes" in answer["error"]
        assert chunked(served.port, [X])[0] == 200


def test_the_limit_is_that_of_the_models_shapes(running, fake_engine):
    with running(fake_engine(), Limits(body_bytes=1000)) as served:
        array = np.ones((1, 3, 224, 224), np.float32)
        item = {"name": "x", "datatype": "FP32", "shape": [1, 3, 224, 224], "parameters": {"binary_data_size": 602112}}
        head = json.dumps({"inputs": [item]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        status, answer, _ = ask(served.port, "POST", "/v2/models/mean/infer", head + array.tobytes(), headers)
        assert status == 200 and answer["outputs"][0]["data"] == [1, 1, 1]
        assert ask(served.port, "POST", "/v2/models/nan/infer", X + b" " * 80_000)[0] == 413


def test_a_body_that_lies_about_its_length_takes_no_memory(served):
    socks = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(50)]
    try:
        for sock in socks:
            sock.sendall(b"POST /v2/models/nan/infer HTTP/1.1\r\nContent-Length: 60000000\r\n\r\n{")
        before = _resident()
        assert ask(served.port, "POST", "/v2/models/nan/infer", X)[0] == 200
        assert _resident() - before < 500 * 2**20, "50 bodies of 60 MB would be 3 GB"
    finally:
        for sock in socks:
            sock.close()


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_bomb_is_not_inflated(running, fake_engine):
    bomb = gzip.compress(bytes(2**30 // 8))
    with running(fake_engine(), replace(Limits(), inflate_ratio=10**6, body_bytes=2**20)) as served:
        status, answer, _ = ask(served.port, "POST", "/v2/models/nan/infer", bomb, {"Content-Encoding": "gzip"})
        assert status == 413 and "too large" in answer["error"]
    with running(fake_engine(), None) as served:
        status, answer, _ = ask(served.port, "POST", "/v2/models/nan/infer", bomb, {"Content-Encoding": "gzip"})
        assert status == 413 and "inflates too much" in answer["error"]


# Times.


@pytest.fixture(scope="module")
def impatient(running, fake_engine):
    with running(fake_engine(), Limits(body_s=0.5, head_s=0.5)) as served:
        yield served


def rest(sock):
    """The next answer, and not a byte of what follows it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += received(sock, 1)
    line, _, fields = head.partition(b"\r\n")
    headers = http.client.parse_headers(io.BytesIO(fields))
    body = received(sock, int(headers["content-length"]))
    return int(line.split()[1]), json.loads(body), headers.get("connection")


def received(sock, count):
    found = b""
    while len(found) < count:
        part = sock.recv(count - len(found))
        assert part, "the connection ended within an answer"
        found += part
    return found


@pytest.mark.parametrize(
    "data",
    [b"\r\n", b"P", b"POST /v2/models/nan/infer HTTP/1.1\r\n", b"POST /v2/models/nan/infer HTTP/1.1\r\nContent-Le"],
    ids=["an empty line", "a letter", "a line", "half a header"],
)
def test_headers_that_do_not_come(impatient, data):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as sock:
        sock.sendall(data)
        assert rest(sock) == (408, {"error": "the headers did not arrive in time"}, "close")
        assert sock.recv(1) == b""


def test_a_connection_on_which_nothing_comes_is_closed_without_a_word(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as sock:
        assert sock.recv(1) == b""


def test_headers_that_come_a_byte_at_a_time(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as sock:
        try:
            sock.sendall(b"POST /v2/models/nan/infer HTTP/1.1\r\n")
            for _ in range(600):
                sock.sendall(b"a")
                time.sleep(0.02)
            pytest.fail("the connection stayed open")
        except (BrokenPipeError, ConnectionResetError):
            pass


def test_the_second_request_of_a_connection_is_watched_too(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as sock:
        sock.sendall(b"GET /v2/health/live HTTP/1.1\r\n\r\n")
        assert rest(sock)[0] == 200
        sock.sendall(b"GET /v2/health/li")
        assert rest(sock)[0] == 408


@pytest.mark.parametrize("kind", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("first", [b"", b"5\r\nhello\r\n"], ids=["nothing", "a part"])
def test_a_body_that_does_not_come(impatient, kind, first):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as sock:
        sock.sendall(b"POST /v2/models/nan/infer HTTP/1.1\r\n" + kind + b"\r\n\r\n" + first)
        assert rest(sock) == (408, {"error": "the body did not arrive in time"}, "close")
        assert sock.recv(1) == b""
    assert impatient.engine.refused[-1] == ("nan", "Slow")


def test_many_slow_clients_hinder_nobody(impatient):
    socks = [socket.create_connection(("127.0.0.1", impatient.port), timeout=60) for _ in range(200)]
    for number, sock in enumerate(socks):
        slow = b"POST /v2/models/nan/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{"
        sock.sendall(slow if number % 2 else slow[:20])
    assert ask(impatient.port, "POST", "/v2/models/nan/infer", X)[0] == 200
    for sock in socks:
        assert rest(sock)[0] == 408
        sock.close()


def test_a_request_that_takes_long_is_not_a_slow_body(impatient):
    """The time of a body is over before the engine answers, and nothing happens."""
    done = []
    body = json.dumps({**json.loads(X), "parameters": {"timeout": 1_500_000}}).encode()
    thread = threading.Thread(target=lambda: done.append(ask(impatient.port, "POST", "/v2/models/slow/infer", body)))
    thread.start()
    thread.join(60)
    assert done[0][:2] == (504, {"error": "the time of the request ran out"})


# Clients that go away.


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not come to that in 10 s")


def test_a_client_that_goes_away_cancels_its_request(served):
    served.engine.waiting.clear()
    body = json.dumps({**json.loads(X), "id": "gone"}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(b"POST /v2/models/slow/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert served.engine.waiting.wait(10)
        assert "gone" not in served.engine.cancelled
    until(lambda: "gone" in served.engine.cancelled)
    assert ask(served.port, "POST", "/v2/models/nan/infer", X)[0] == 200


@pytest.mark.parametrize("sent", [b"", b"{", X[:-1]], ids=["nothing", "a byte", "all but one"])
def test_a_client_that_goes_away_in_its_body_asks_nothing(served, sent):
    before, refused = len(served.engine.asked), len(served.engine.refused)
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(b"POST /v2/models/nan/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(X), sent))
        time.sleep(0.05)
    until(lambda: ("nan", "Disconnected") in served.engine.refused[refused:])
    assert ask(served.port, "POST", "/v2/models/mean/infer", X)[0] == 400
    assert {request.model for request in served.engine.asked[before:]} <= {"mean"}


def test_a_request_behind_another_on_one_connection(served):
    one = b"POST /v2/models/nan/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(X), X)
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
        sock.sendall(one * 20)
        file = sock.makefile("rb")
        for _ in range(20):
            assert b"200 OK" in file.readline()
            length = 0
            while (line := file.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert json.loads(file.read(length))["model_name"] == "nan"


def test_a_refusal_does_not_wait_for_the_body(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
        sock.sendall(b"POST /v2/models/nothing/infer HTTP/1.1\r\nContent-Length: 50000000\r\n\r\n")
        assert rest(sock)[0] == 404
        # What comes all the same is dropped, and the connection stays of use.
        for _ in range(50):
            sock.sendall(bytes(1_000_000))
        sock.sendall(b"GET /v2/health/live HTTP/1.1\r\n\r\n")
        assert rest(sock)[0] == 200


HTTP2 = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUPGRADE: websocket\r\n"


@pytest.mark.parametrize("offer", [HTTP2, WEBSOCKET], ids=["HTTP/2", "websocket"])
@pytest.mark.parametrize("apart", [False, True])
def test_an_offer_of_another_protocol_is_not_heard(served, offer, apart):
    head = b"POST /v2/models/nan/infer HTTP/1.1\r\nContent-Length: %d\r\n" % len(X) + offer + b"\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
        for _ in range(2):
            sock.sendall(head if apart else head + X)
            if apart:
                time.sleep(0.05)
                sock.sendall(X)
            status, answer, _ = rest(sock)
            assert status == 200 and answer["model_name"] == "nan"


def test_an_offer_in_pieces_is_refused_and_its_body_is_no_request(impatient):
    inner = b"GET /v2/health/live HTTP/1.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as sock:
        sock.sendall(b"POST /v2/models/nan/infer HTTP/1.1\r\nContent-Length: %d\r\nUpg" % len(inner))
        time.sleep(0.1)
        sock.sendall(b"rade: h2c\r\nConnection: Upgrade\r\n\r\n" + inner)
        status, answer, connection = rest(sock)
        assert status == 400 and connection == "close" and list(answer) == ["error"]
        assert sock.recv(100) == b""


def test_a_body_with_the_words_of_an_offer_stays_as_it_is(served):
    text = "\r\nUpgrade: h2c\r\n" * 3
    body = text.encode()
    array = len(body).to_bytes(4, "little") + body
    item = {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(array)}}
    head = json.dumps({"inputs": [item]}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    status, answer, _ = ask(served.port, "POST", "/v2/models/echo_BYTES/infer", head + array, length)
    assert status == 200 and answer["outputs"][0]["data"] == [text]


def test_a_body_that_waits_to_be_asked_for(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
        sock.sendall(
            b"POST /v2/models/nan/infer HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(X)
        )
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        sock.sendall(X)
        assert rest(sock)[0] == 200
        sock.sendall(b"POST /v2/models/nothing/infer HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n")
        assert rest(sock)[0] == 404


def test_the_start_of_a_further_request_does_not_end_the_one_before(impatient):
    body = json.dumps({**json.loads(X), "parameters": {"timeout": 1_500_000}}).encode()
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as sock:
        sock.sendall(b"POST /v2/models/slow/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n%sGET /v2" % (len(body), body))
        assert rest(sock)[0] == 504
        assert rest(sock)[0] == 408


def test_an_answer_that_is_not_read_is_given_up(running, fake_engine):
    array = np.zeros((40, 3, 224, 224), np.float32)
    item = {
        "name": "x",
        "datatype": "FP32",
        "shape": list(array.shape),
        "parameters": {"binary_data_size": array.nbytes},
    }
    head = json.dumps({"inputs": [item], "parameters": {"binary_data_output": True}}).encode()
    # Time enough for the body, where other work has the cores.
    with (
        running(fake_engine(), Limits(body_s=3)) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock,
    ):
        sock.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nInference-Header-Content-Length: %d\r\n" % len(head))
        sock.sendall(b"Content-Length: %d\r\n\r\n" % (len(head) + array.nbytes) + head + array.tobytes())
        until(lambda: not served.server.server_state.connections)
        received = 0
        with suppress(ConnectionResetError):
            while part := sock.recv(2**20):
                received += len(part)
        assert received < array.nbytes


# Bodies of others.


def test_bodies_take_no_more_room_than_there_is(running, fake_engine):
    with running(fake_engine(), Limits(held_bytes=300_000)) as served:
        large = X + b" " * 200_000
        declared = b"POST /v2/models/nan/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (len(large) + 1)
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
            sock.sendall(declared + large)
            until(lambda: ask(served.port, "POST", "/v2/models/nan/infer", large)[0] == 429)
            status, answer, _ = ask(served.port, "POST", "/v2/models/nan/infer", gzip.compress(large), GZIP)
            assert status == 429 and "take all the room" in answer["error"]
            assert chunked(served.port, [large])[0] == 429
            assert ask(served.port, "POST", "/v2/models/nan/infer", X)[0] == 200
            assert ("nan", "Busy") in served.engine.refused
            sock.sendall(b" ")
            assert rest(sock)[0] == 200
        for _ in range(3):
            assert ask(served.port, "POST", "/v2/models/nan/infer", large + large[len(X) :])[0] == 200


GZIP = {"Content-Encoding": "gzip"}


def test_what_follows_an_answer_has_an_end_too(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as sock:
        sock.sendall(b"POST /v2/models/nothing/infer HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        assert rest(sock)[0] == 404
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(600):
                sock.sendall(b" ")
                time.sleep(0.02)
