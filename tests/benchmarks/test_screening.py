"""Screening: who is sent home, and who is not. Processes are played, so that speeds and failures are known."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.benchmarks import screening
from deploykit.benchmarks.plan import Candidate, Settings
from deploykit.benchmarks.process import ChildError
from deploykit.benchmarks.screening import screen
from deploykit.errors import BenchmarkError

FEEDS = [{"x": np.arange(4, dtype=np.float32)}]


class Stage:
    """What the processes share: a clock, speeds by name, and who is alive."""

    def __init__(self, speeds: dict[str, float]) -> None:
        self.now = 0.0
        self.speeds = speeds
        self.alive: set[str] = set()
        self.loading: set[str] = set()
        self.most_alive = 0
        self.asked: list[tuple[str, str]] = []
        self.noise = 0.0
        self.outputs: dict[str, float] = {}
        self.breaks: dict[str, str] = {}
        self.load_s = 1.0
        self.draw = random.Random(0)

    def clock(self) -> float:
        return self.now


def played(stage: Stage) -> type:
    class Process:
        def __init__(self, candidate: Candidate, settings: Settings, folder: Path, concurrency: int = 1, **_: Any):
            self.name = candidate.name
            stage.alive.add(self.name)
            stage.loading.add(self.name)
            stage.most_alive = max(stage.most_alive, len(stage.alive))

        def ready(self) -> None:
            stage.now += stage.load_s
            stage.loading.discard(self.name)
            if stage.breaks.get(self.name) == "load":
                raise ChildError("no such operator")
            self.loaded = {"load_ms": 700.0, "first_ms": 300.0}

        def ask(self, do: str, *, within_s: float = 0.0, **told: Any) -> dict[str, Any]:
            stage.asked.append((self.name, do))
            if stage.breaks.get(self.name) == do:
                raise ChildError("it died")
            if do == "outputs":
                scale = stage.outputs.get(self.name, 1.0)
                np.savez(told["outputs"], **{"0/y": scale * np.array([1.0, -2.0, 3.0, 0.5], np.float32)})
                return {"peak_memory_bytes": 10**7}
            pace = 1e6 / stage.speeds[self.name] * (1 + stage.noise * stage.draw.uniform(-1, 1))
            if do == "warm":
                return {"request_ns": pace, "peak_memory_bytes": 10**7, "warmup_runs": 10}
            assert not stage.loading  # nothing else works beside what is timed
            stage.now += told["seconds"]
            count = max(1, int(told["seconds"] * 1e9 / pace))
            return {"samples_ns": [int(pace)] * count, "wall_ns": int(pace * count)}

        def kill(self) -> None:
            stage.alive.discard(self.name)
            stage.loading.discard(self.name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc: object) -> None:
            self.kill()

    return Process


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(stage: Stage, budget_s: float = 60.0, keep: int = 4, **settings: Any) -> dict[str, Any]:
        monkeypatch.setattr(screening, "Process", played(stage))
        candidates = [Candidate(name, "m.onnx", "ort:cpu", "", 1) for name in stage.speeds]
        found = screen(candidates, FEEDS, Settings(**settings), budget_s, keep=keep, clock=stage.clock)
        assert not stage.alive  # nothing is left running
        return {entry.candidate.name: entry for entry in found}

    return run


def test_the_slow_go_home_early_and_the_fast_are_timed_to_the_end(go: Any) -> None:
    stage = Stage({"reference": 1.0, **{f"slow{i}": 0.5 for i in range(8)}, "a": 2.0, "b": 1.9, "c": 1.5})
    stage.noise = 0.02
    found = go(stage, keep=3)
    assert {n for n, e in found.items() if e.status == "ok"} == {"reference", "a", "b", "c"}
    assert found["slow0"].status.startswith("slower: 0.50x the reference")
    assert len(found["slow0"].gains) < len(found["a"].gains)
    figures = found["a"].as_dict()
    assert figures["load_s"] == 1.0
    assert figures["low"] < 2.0 < figures["high"] and figures["ratio"] == pytest.approx(2.0, rel=0.03)
    assert figures["pace_ms"] == pytest.approx(0.5, rel=0.03)


def test_whoever_cannot_be_told_from_the_best_stays(go: Any) -> None:
    stage = Stage({"reference": 1.0, **{f"same{i}": 1.3 for i in range(8)}})
    stage.noise = 0.3
    found = go(stage, keep=2)
    assert sum(e.status == "ok" for e in found.values()) > 5


def test_wrong_outputs_and_failures_are_out_and_say_why(go: Any) -> None:
    stage = Stage({"reference": 1.0, "wrong": 9.0, "unloadable": 9.0, "mortal": 9.0, "fine": 1.2})
    stage.outputs["wrong"] = -1.0
    stage.breaks = {"unloadable": "load", "mortal": "time"}
    found = go(stage)
    assert found["wrong"].status.startswith("wrong outputs")
    assert ("wrong", "time") not in stage.asked  # what is wrong is not timed
    assert found["unloadable"].status == "failed: no such operator"
    assert found["mortal"].status == "failed: it died"
    assert found["fine"].status == "ok"


def test_a_reference_that_fails_is_an_error(go: Any) -> None:
    stage = Stage({"reference": 1.0, "a": 2.0})
    stage.breaks = {"reference": "load"}
    with pytest.raises(BenchmarkError, match="the reference reference on ort:cpu does not run"):
        go(stage)
    assert not stage.alive


def test_the_budget_ends_it_and_what_was_not_reached_says_so(go: Any) -> None:
    stage = Stage({"reference": 1.0, **{f"m{i}": 1.0 + i / 10 for i in range(12)}})
    found = go(stage, budget_s=8.0)
    assert stage.now < 8.0 * 1.4
    late = [e.status for e in found.values() if e.status.startswith("not tried")]
    assert late and len(late) < 12


@pytest.mark.parametrize(("load_s", "pace"), [(6.0, 1.0), (1.0, 0.0005), (11.0, 1.0)])
def test_the_budget_is_kept_also_where_all_are_slow(go: Any, load_s: float, pace: float) -> None:
    """Of milliseconds a request, or of seconds; nothing is loaded that could not take two turns."""
    stage = Stage({"reference": pace, **{f"m{i}": pace * (1 + i / 10) for i in range(6)}})
    stage.load_s = load_s
    found = go(stage, budget_s=30.0)
    assert stage.now < 30.0 * 1.1
    assert any(e.status == "ok" and e.gains for n, e in found.items() if n != "reference")
    assert any(e.status.startswith("not tried") for e in found.values())


def test_groups_are_screened_one_after_the_other_where_memory_is_short(go: Any, monkeypatch: Any) -> None:
    stage = Stage({"reference": 1.0, **{f"m{i}": 1.0 + i / 10 for i in range(9)}})
    monkeypatch.setattr(screening, "free_memory", lambda: 10**9 if len(stage.alive) < 4 else 10**6)
    found = go(stage, budget_s=300.0, keep=2)
    assert stage.most_alive <= 5
    assert all(e.gains for e in found.values())
    assert found["m8"].status == "ok"


def test_throughput_counts_wall_time_and_samples(go: Any) -> None:
    stage = Stage({"reference": 1.0, "a": 2.0})
    found = go(stage, scenario="offline", batch=4)
    assert found["a"].as_dict()["pace_ms"] == pytest.approx(0.125, rel=0.01)
