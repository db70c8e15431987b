"""How the figures of one candidate changed between two reports, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from deploykit.benchmarks.compare_rules import METRICS, Rule
from deploykit.benchmarks.intervals import ratio_of_medians, ratio_of_percentiles
from deploykit.benchmarks.page_drawing import short
from deploykit.benchmarks.report import verdict_of
from deploykit.benchmarks.wording import timed
from deploykit.specs import Array

_SEED = 0
_RANKS = {"slower": -1.0, "tie": 0.0, "faster": 1.0}
_KEYS = {
    "latency": "median_ms", "p90": "p90_ms", "p99": "p99_ms", "throughput": "throughput_per_s",
    "rate": "highest_rate_per_s", "load": "load_ms",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """A figure, then and now.

    Attributes:
        metric: Its name.
        old: In the metric's unit.
        new: The same.
        low: Lower end of new/old, noise included; the ratio itself where nothing is uncertain.
        high: Upper end.
        exact: Whether the figure has no uncertainty: a size, or an accuracy on the same data.
    """

    metric: str
    old: float
    new: float
    low: float
    high: float
    exact: bool

    @property
    def ratio(self) -> float:
        """new/old; infinite from 0 to anything else."""
        return _ratio(self.old, self.new)

    def in_unit(self, unit: str) -> tuple[float, float, float]:
        """The change and the ends of its interval: in per cent, points, or the metric's own unit."""
        if unit == "%":
            found = tuple(100 * (r - 1) for r in (self.ratio, self.low, self.high))
        else:
            factor = 100.0 if unit == "pt" else 1.0
            change = factor * (self.new - self.old)
            ends = (self.old * (r - 1) * factor for r in (self.low, self.high))
            found = (change, change, change) if self.exact else (change, *ends)
        return found[0], found[1], found[2]

    def shown(self, unit: str | None = None) -> str:
        """For a person: the change, with its interval where it has one."""
        own = METRICS[self.metric]
        if self.metric == "verdict":
            words = {rank: name for name, rank in _RANKS.items()}
            return words[self.old] if self.old == self.new else f"{words[self.old]} -> {words[self.new]}"
        unit = unit or ("pt" if own.name in ("accuracy", "f1") else "%")
        change, low, high = self.in_unit(unit)
        gap = "" if unit == "%" else " "
        if self.exact:
            return "=" if self.new == self.old else f"{change:+.3g}{gap}{unit}"
        sign = _percent if unit == "%" else _signed
        return f"{sign(change)}{gap}{unit} [{sign(low)}, {sign(high)}]"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; infinite ends become None."""
        return {
            "metric": self.metric, "unit": METRICS[self.metric].unit, "old": self.old, "new": self.new,
            "ratio": _finite(self.ratio), "low": _finite(self.low), "high": _finite(self.high), "exact": self.exact,
        }  # fmt: skip


def _percent(value: float) -> str:
    if not math.isfinite(value) or abs(value) >= 1e6:
        return "-inf" if value < 0 else "+inf"
    # No -0.0.
    return f"{round(value, 1) + 0.0:+.1f}" if abs(value) < 100 else f"{value:+.0f}"


def _signed(value: float) -> str:
    return f"{value + 0.0:+.3g}"


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) and value < 1e12 else None


def _ratio(old: float, new: float) -> float:
    return new / old if old else (1.0 if new == old else math.inf)


def value_of(candidate: Mapping[str, Any], metric: str) -> float | None:
    """A figure in its metric's unit; None where the report does not hold it."""
    if metric == "size":
        return float(candidate["size_bytes"]) / 1e6
    if metric in ("accuracy", "f1"):
        scores = candidate["accuracy"]
        return None if scores is None else float(scores[metric])
    if not timed(candidate):
        return None
    if metric == "memory":
        peak = candidate.get("peak_memory_bytes")
        return float(peak) / 1e6 if peak else None
    if metric == "verdict":
        compared = verdict_of(candidate)
        return _RANKS[compared["verdict"]] if compared else None
    found = candidate.get(_KEYS[metric])
    return None if found is None else float(found)


def change_of(
    old: Mapping[str, Any], new: Mapping[str, Any], metric: str, *, batches: tuple[int, int], noise: float
) -> Change | None:
    """How one figure changed; None where one of the two does not hold it.

    Args:
        old: A candidate of the old report.
        new: Of the new one.
        metric: Its name.
        batches: Samples in a request, then and now.
        noise: By what factor intervals are widened: the product of 1 + noise floor of both reports.
    """
    then, now = value_of(old, metric), value_of(new, metric)
    if then is None or now is None:
        return None
    ratio = _ratio(then, now)
    if metric in ("size", "accuracy", "f1", "verdict"):
        return Change(metric, then, now, ratio, ratio, exact=True)
    if metric == "memory":
        low, high = _range(old["rounds"], new["rounds"], ratio)
        return Change(metric, then, now, low, high, exact=False)
    if metric in ("p90", "p99"):
        samples = [[np.asarray(r["samples_ns"], np.float64) for r in c["rounds"]] for c in (old, new)]
        _, low, high = ratio_of_percentiles(samples[0], samples[1], float(metric[1:]), _SEED)
    else:
        pair = [_by_round(c["rounds"], metric, b) for c, b in zip((old, new), batches, strict=True)]
        if not pair[0] or not pair[1]:
            return Change(metric, then, now, 0.0, math.inf, exact=False)
        _, low, high = ratio_of_medians(pair[0], pair[1], _SEED)
    return Change(metric, then, now, min(low, ratio) / noise, max(high, ratio) * noise, exact=False)


def _range(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], ratio: float) -> tuple[float, float]:
    """A peak is no mean: the least and the most that any two rounds give."""
    then, now = ([r["peak_memory_bytes"] for r in rounds if r.get("peak_memory_bytes")] for rounds in (old, new))
    if not then or not now:
        return ratio, ratio
    return min(min(now) / max(then), ratio), max(max(now) / min(then), ratio)


def _by_round(rounds: Sequence[Mapping[str, Any]], metric: str, batch: int) -> list[float]:
    """The figure of each round; empty where a round does not hold it."""
    if metric == "latency":
        return [_median(r["samples_ns"]) for r in rounds]
    if metric == "throughput":
        # A thinned round says how many samples it had.
        return [r.get("samples", len(r["samples_ns"])) * batch / r["wall_ns"] for r in rounds]
    key = {"load": "load_ms", "rate": "rate_per_s"}[metric]
    found = [float(r.get(key) or 0.0) for r in rounds]
    return found if all(v > 0 for v in found) else []


def _median(samples: Sequence[int] | Array) -> float:
    return float(np.median(np.asarray(samples, np.float64)))


class Check(StrEnum):
    """What became of a condition."""

    FAILED = "FAILED"
    UNPROVEN = "not proven"
    OPEN = "not excluded"
    HELD = "ok"


def judge(rule: Rule, change: Change, *, strict: bool) -> Check:
    """Whether a condition fails.

    Args:
        rule: The condition.
        change: What was measured.
        strict: Whether the measured change alone decides.

    Returns:
        `FAILED`: the whole interval is beyond the limit. `UNPROVEN`: the measured change is, the interval is not.
        `OPEN`: the interval reaches beyond. `HELD`: all of it is within. With ``strict`` only the first and the last.
    """
    point, low, high = change.in_unit(rule.unit)
    beyond = rule.applies(point, point)
    if strict or change.exact:
        return Check.FAILED if beyond else Check.HELD
    if rule.applies(low, high):
        return Check.FAILED
    if beyond:
        return Check.UNPROVEN
    return Check.OPEN if any(rule.applies(end, end) for end in (low, high)) else Check.HELD


def old_and_new(change: Change) -> str:
    """Both values."""
    return f"{short(change.old)} -> {short(change.new)}"
