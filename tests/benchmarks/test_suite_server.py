"""The command behind the figures of serving: a short part of it always, all of its events with `-m slow`."""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).parents[2] / "benchmarks" / "suite"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(SUITE))
    return importlib.import_module


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SUITE / "server.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_latency_and_overload_in_short(tmp_path: Path) -> None:
    short = ("--turns", 1, "--calls", 2, "--minutes", 0.03, "--queue", 4, "--clients", 4)
    done = run("latency", "overload", *short, "--json", tmp_path / "out.json")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    figures = found["latency"]["figures"]
    assert {"bare session", "HTTP, tritonclient", "gRPC, tritonclient", "gRPC alone"} <= set(figures)
    assert all(figure["p50_ms"] > 0 for figure in figures.values())
    assert found["overload"]["met"]["every request is answered, or refused with 429 or 503"]
    assert found["overload"]["met"]["no process died"]
    assert found["overload"]["statuses"]["200"] > 0


@pytest.mark.slow
def test_faults_lose_nothing(tmp_path: Path) -> None:
    done = run("faults", "--clients", 8, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_part_is_refused() -> None:
    assert run("lateness").returncode == 2


class Scripted:
    """A server that answers each request of one connection with the next of the given bytes, and closes it at last."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        link, _ = self._socket.accept()
        self._socket.close()
        with link:
            for answer in self._answers:
                assert link.recv(100) == b"request"
                link.sendall(answer)

    def end(self) -> None:
        self._thread.join()


def answer(status: str, body: bytes, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n%s\r\n%s" % (status.encode(), len(body), more, body)


def test_clients_tell_answers_from_what_is_lost(suite: Callable[[str], Any]) -> None:
    clients = suite("server_clients")
    server = Scripted(answer("200 OK", b"good"), answer("503 No", b"died"), answer("200 OK", b"cut off")[:-3])
    load = clients.Load(server.port, b"request")
    load.closed(1, 60)
    server.end()
    assert [(told.status, told.body) for told in load.answers] == [(200, b"good"), (503, b"died")]
    assert len(load.broken) == 1


def test_clients_of_a_server_that_is_gone_are_not_let_in(suite: Callable[[str], Any]) -> None:
    clients = suite("server_clients")
    server = Scripted(answer("200 OK", b"good", b"Connection: close\r\n"))
    load = clients.Load(server.port, b"request").closed(1, 60)
    server.end()
    assert (len(load.answers), load.broken, load.refused) == (1, [], 1)


def test_the_bound_of_a_queue_counts_answers(suite: Callable[[str], Any]) -> None:
    told = suite("server_clients").Told
    accepted = [told(0.0, end, 200, b"") for end in (1.0, 2.0, 4.0, 8.0)]
    assert suite("server").bounds(accepted, 2) == [4.0] * 4
    assert suite("server").bounds([*accepted, told(3.0, 6.0, 200, b"")], 1) == [2.0] * 4 + [5.0]


@pytest.mark.parametrize(
    ("status", "text", "met"),
    [(503, b"the process that computed the request died", True), (500, b"internal error", False)],
)
def test_a_fault_that_loses_something_is_told(suite: Callable[[str], Any], status: int, text: bytes, met: bool) -> None:
    server, clients = suite("server_faults"), suite("server_clients")
    load = clients.Load(0, b"")
    load.answers += [clients.Told(at, 0.1, 200, b"") for at in (0.5, 1.5, 2.5, 3.5, 4.5)]
    load.answers.append(clients.Told(3.2, 0.1, status, text))
    marks = {name: float(at) for at, name in enumerate(server.EVENTS, 1)}
    found = server.judge(load, [], marks, 0.0, 0)
    assert all(found["met"].values()) is met
    load.broken.append((4.2, "closed after 0 bytes of the answer"))
    assert not server.judge(load, [], marks, 0.0, 0)["met"]["SIGTERM: nothing accepted is lost"]


def test_a_client_of_grpc_is_told_once_that_the_server_ends(suite: Callable[[str], Any]) -> None:
    faults, clients = suite("server_faults"), suite("server_clients")
    marks = {name: float(at) for at, name in enumerate(faults.EVENTS, 1)}

    def lost(*codes: tuple[float, str, str]) -> bool:
        client = object.__new__(clients.GrpcClient)
        client.codes = list(codes)
        met: dict[str, bool] = faults.judge(clients.Load(0, b""), [client], marks, 0.0, 0)["met"]
        return not met["SIGTERM: nothing accepted is lost"]

    ending = (4.2, "UNAVAILABLE", "the server is ending; ask another one")
    assert not lost((4.1, "OK", ""), ending, (4.3, "CANCELLED", "CANCELLED"))
    assert lost((4.1, "CANCELLED", "CANCELLED"), ending)
    assert lost((4.1, "UNAVAILABLE", "Socket closed"))
