"""How long a process warms up, by a clock of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deploykit.benchmarks import worker


@pytest.mark.parametrize(
    ("request_s", "seconds", "runs"),
    [(0.001, 0.2, 200), (0.1, 0.2, 10), (0.4, 0.2, 4), (3.0, 0.2, 3), (0.4, 4.0, 10)],
)
def test_ten_requests_or_three_where_they_take_long(
    monkeypatch: pytest.MonkeyPatch, request_s: float, seconds: float, runs: int
) -> None:
    now = [0]

    def loop(calls: Any, feeds: Any, left_s: float, start: int) -> Any:
        count = max(1, round(left_s / request_s))
        now[0] += round(count * request_s * 1e9)
        return SimpleNamespace(samples_ns=[round(request_s * 1e9)] * count)

    monkeypatch.setattr(worker, "concurrent_loop", loop)
    monkeypatch.setattr(worker.time, "perf_counter_ns", lambda: now[0])
    found = worker._warm(SimpleNamespace(calls=[None]), [], {"seconds": seconds})  # type: ignore[arg-type]
    assert found["warmup_runs"] == pytest.approx(runs, rel=0.1)
    assert found["request_ns"] == round(request_s * 1e9)


@pytest.mark.parametrize(("lanes", "request_s", "least"), [(4, 0.001, 12), (4, 2.0, 12), (8, 0.4, 24), (2, 0.1, 10)])
def test_every_lane_runs_three_requests(
    monkeypatch: pytest.MonkeyPatch, lanes: int, request_s: float, least: int
) -> None:
    """Each is a copy of the model, or has buffers of its own: what another one ran has warmed up none of it."""
    now = [0]

    def loop(calls: Any, feeds: Any, left_s: float, start: int) -> Any:
        each = max(1, round(left_s / request_s))
        now[0] += round(each * request_s * 1e9)
        return SimpleNamespace(samples_ns=[round(request_s * 1e9)] * each * len(calls))

    monkeypatch.setattr(worker, "concurrent_loop", loop)
    monkeypatch.setattr(worker.time, "perf_counter_ns", lambda: now[0])
    found = worker._warm(SimpleNamespace(calls=[None] * lanes), [], {"seconds": 0.0})  # type: ignore[arg-type]
    assert found["warmup_runs"] == least
