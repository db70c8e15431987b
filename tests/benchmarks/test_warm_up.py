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
