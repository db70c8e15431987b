"""The part `faults` of `server.py`: what is lost while a server is changed, hurt and ended."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from server_clients import GrpcClient, Load, infer_request
from server_process import SLOTS, Server, layers

import deploykit

EVENTS = ("new version", "SIGHUP", "kill -9 of a worker", "SIGTERM")
NOT_ACCEPTED = "UNAVAILABLE, not accepted"
AGAIN = "failed, asked again after it was not accepted"


def faults(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is lost by a new version, SIGHUP, kill -9 of a worker, and SIGTERM, while clients ask."""
    deploykit.export(layers(folder / "layers.onnx", depth=4), folder / "made")
    shutil.copytree(folder / "made", folder / "net" / "1")
    # Before anybody asks: what is made here would keep the clients from asking.
    deploykit.export(layers(folder / "other.onnx", depth=3), folder / "next")
    x = np.random.default_rng(0).standard_normal((1, 1024)).astype(np.float32)
    request = infer_request("net", {"x": x})
    marks: dict[str, float] = {}
    with Server(folder / "net", "--threads", "1", "--instances", "2", log=folder / "faults.log") as server:
        over_grpc = [GrpcClient(server.grpc, x) for _ in range(2)]
        load = Load(server.http, request)

        def events() -> Iterator[None]:
            yield from idle(load, 50)
            marks["new version"] = time.perf_counter()
            shutil.copytree(folder / "made", folder / "copy")
            (folder / "copy").rename(folder / "net" / "2")
            while b'"model_version":"2"' not in load.answers[-1].body:
                yield
            yield from idle(load, 50)
            marks["SIGHUP"] = time.perf_counter()
            before = server.workers()
            (folder / "net" / "2").rename(folder / "old")
            (folder / "next").rename(folder / "net" / "2")
            server.process.send_signal(signal.SIGHUP)
            while len(now := server.workers()) != 2 or set(now) & set(before):
                yield
            yield from idle(load, 50)
            marks["kill -9 of a worker"] = time.perf_counter()
            victim = now[0]
            os.kill(victim, signal.SIGKILL)
            while len(now := server.workers()) != 2 or victim in now or server.metrics()["deploykit_workers"] != 2:
                yield
            yield from idle(load, 50)
            marks["SIGTERM"] = time.perf_counter()
            server.process.send_signal(signal.SIGTERM)
            while True:
                yield

        steps = events()
        started = time.perf_counter()
        load.closed(options.clients, options.patience, tick=lambda now: next(steps))
        if "SIGTERM" not in marks:  # an event did not come: that is what is told, below
            server.process.terminate()
        ended = server.process.wait(options.patience)
        for client in over_grpc:
            client.end()
    return judge(load, over_grpc, {name: at - started for name, at in marks.items()}, started, ended)


def idle(load: Load, count: int) -> Iterator[None]:
    """Wait for some answers."""
    wanted = len(load.answers) + count
    while len(load.answers) < wanted:
        yield


def judge(
    load: Load, over_grpc: list[GrpcClient], marks: dict[str, float], started: float, code: int
) -> dict[str, Any]:
    """Print what was told after each event, and say whether anything is lost."""
    names = ["", *marks]
    begins = np.array([0.0, *marks.values()])

    def phase(at: float) -> str:
        return names[int(np.searchsorted(begins, at, "right")) - 1]

    found: dict[str, dict[str, int]] = {name: {} for name in names}

    def count(at: float, what: str) -> None:
        here = found[phase(at)]
        here[what] = here.get(what, 0) + 1

    for told in load.answers:
        clean = told.status == 503 and b"died" in told.body
        count(told.due_s + told.took_s, "HTTP 503, its worker died" if clean else f"HTTP {told.status}")
    for at, _ in load.broken:
        count(at, "HTTP LOST")
    for client in over_grpc:
        refused = False
        for at, status, text in client.codes:
            what = _told(status, text)
            if refused and "LOST" in what:
                # gRPC cancels what it has read and not handed over when the port closes; this client had been told.
                what = AGAIN
            refused = refused or what == NOT_ACCEPTED
            count(at - started, f"gRPC {what}")
    for name, counts in found.items():
        print(f"{name or 'before':20} {', '.join(f'{what}: {n}' for what, n in sorted(counts.items()))}")
    print(f"exit code {code}; {load.refused} HTTP clients were not let in any more")
    harmless = {"HTTP 200", "gRPC OK"}
    allowed = {
        "kill -9 of a worker": harmless | {"HTTP 503, its worker died", "gRPC UNAVAILABLE, its worker died"},
        "SIGTERM": harmless | {f"gRPC {NOT_ACCEPTED}", f"gRPC {AGAIN}"},
    }
    met = {f"{name}: nothing accepted is lost": set(found[name]) <= allowed.get(name, harmless) for name in names[1:]}
    died = sum(n for what, n in found["kill -9 of a worker"].items() if "its worker died" in what)
    met[f"only those in flight on the killed worker, {SLOTS} at most, are told that it died"] = died <= SLOTS
    met["all events came, and the server ended with 0"] = len(marks) == len(EVENTS) and code == 0
    return {"found": found, "code": code, "met": met}


def _told(status: str, text: str) -> str:
    if status == "UNAVAILABLE" and "died" in text:
        return "UNAVAILABLE, its worker died"
    if status == "UNAVAILABLE" and any(word in text for word in ("GOAWAY", "refused", "is ending", "being stopped")):
        return NOT_ACCEPTED
    return status if status == "OK" else f"{status}, LOST: {text[:200]}"
