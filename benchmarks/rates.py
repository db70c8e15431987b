"""Which rate of requests a server can take: the highest whose 99th percentile meets an objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.benchmarks.statistics import MIN_SAMPLES, percentile

_GROWTH, _LARGEST = 1.5, 3.0
# The search ends when what met the objective and what did not are this close.
_RESOLUTION = 1.03
# Where two models are the same, their rates may differ by as much.
RATE_FLOOR = _RESOLUTION**2 - 1
_MOST_TRIALS = 10


@dataclass(frozen=True, slots=True)
class Trial:
    """One open-loop run.

    Attributes:
        rate_per_s: Intended rate of requests.
        achieved_per_s: Answers in a second.
        queries: Requests that were answered.
        p50_ms: Median latency from the intended start; None where too few were answered.
        p99_ms: 99th percentile.
        met: Whether every request was sent and the 99th percentile meets the objective.
        wall_ns: From the beginning to the last answer.
    """

    rate_per_s: float
    achieved_per_s: float
    queries: int
    p50_ms: float | None
    p99_ms: float | None
    met: bool
    wall_ns: int

    @staticmethod
    def queries_for(rate_per_s: float, seconds: float) -> int:
        """Requests that a trial needs: those of its seconds, and as many as a 99th percentile takes."""
        return max(MIN_SAMPLES[99.0], int(rate_per_s * seconds))

    @classmethod
    def judge(cls, rate_per_s: float, told: dict[str, Any], objective_ms: float) -> Trial:
        """From what the worker measured.

        A queue that grows without end may still be within a lax objective when the trial is over: the last answer must
        not come later than a twentieth of the trial after the last request was due, or the time of twenty requests.
        """
        samples = np.asarray(told["samples_ns"], np.int64)
        p50, p99 = (None if (q := percentile(samples, p)) is None else q / 1e6 for p in (50.0, 99.0))
        complete = told["queries"] == told["asked"]
        backlog = told["wall_ns"] - told["last_ns"]
        keeps_up = backlog <= max(told["last_ns"] / 20, 20 * told["request_ns"])
        return cls(
            rate_per_s, samples.size / (told["wall_ns"] / 1e9), int(samples.size), p50, p99,
            complete and keeps_up and p99 is not None and p99 <= objective_ms, int(told["wall_ns"]),
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return {
            "rate_per_s": round(self.rate_per_s, 3), "achieved_per_s": round(self.achieved_per_s, 3),
            "queries": self.queries, "p50_ms": self.p50_ms, "p99_ms": self.p99_ms, "met": self.met,
        }  # fmt: skip


class RateSearch:
    """Search by steps up or down, then by bisection, on a logarithmic scale.

    Args:
        start: The first rate to try.
        growth: Factor of a step; it grows with every step in the same direction.
        limit: No higher rate is tried: what a closed loop reaches cannot be exceeded for long.

    Attributes:
        rate_per_s: What to try next.
        best: The trial at the highest rate that met the objective; None before there was one.
    """

    def __init__(self, start: float, growth: float = _GROWTH, limit: float = math.inf) -> None:
        self.rate_per_s = min(start, limit)
        self.best: Trial | None = None
        self._worst: float | None = None
        self._trials = 0
        self._growth = growth
        self._limit = limit

    def learn(self, trial: Trial) -> None:
        """Take note of a trial at `rate_per_s`."""
        self._trials += 1
        if trial.met:
            if self.best is None or trial.rate_per_s > self.best.rate_per_s:
                self.best = trial
        elif self._worst is None or trial.rate_per_s < self._worst:
            self._worst = trial.rate_per_s
        if self.best is None:
            self._step(1 / self._growth, trial.rate_per_s)
        elif self._worst is None:
            self._step(self._growth, self.best.rate_per_s)
        elif self._worst <= self.best.rate_per_s:
            # A rate above met it that a lower one did not: noise. What is known to be met counts.
            self._worst = None
            self.rate_per_s = self.best.rate_per_s * _RESOLUTION
        else:
            self.rate_per_s = float(np.sqrt(self.best.rate_per_s * self._worst))
        self.rate_per_s = min(self.rate_per_s, self._limit)

    def _step(self, factor: float, rate_per_s: float) -> None:
        self.rate_per_s = rate_per_s * factor
        self._growth = min(_LARGEST, self._growth**1.5)

    @property
    def done(self) -> bool:
        """Whether the rate is known well enough, or there is none."""
        if self._trials >= _MOST_TRIALS:
            return True
        if self.best is not None and self.best.rate_per_s >= self._limit:
            return True
        return self.best is not None and self._worst is not None and self._worst < self.best.rate_per_s * _RESOLUTION**2
