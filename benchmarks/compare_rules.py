"""Conditions on how two reports differ: `latency>5%`, `accuracy<-0.5pt`, `size>1MB`, `verdict<0`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deploykit.errors import BenchmarkError


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a candidate.

    Attributes:
        name: As in a condition.
        unit: Of its values, and of a condition without a unit.
        higher: Whether more is better.
        title: For tables.
    """

    name: str
    unit: str
    higher: bool
    title: str


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        m.name: m
        for m in (
            Metric("latency", "ms", False, "median ms"),
            Metric("p90", "ms", False, "p90 ms"),
            Metric("p99", "ms", False, "p99 ms"),
            Metric("throughput", "per s", True, "per s"),
            Metric("rate", "per s", True, "rate/s"),
            Metric("size", "MB", False, "size MB"),
            Metric("memory", "MB", False, "mem MB"),
            Metric("load", "ms", False, "load ms"),
            Metric("accuracy", "", True, "accuracy"),
            Metric("f1", "", True, "F1"),
            Metric("verdict", "", True, "verdict"),
        )
    }
)
_SYNTAX = re.compile(
    r"\s*([A-Za-z][A-Za-z0-9_]*)\s*(<=|>=|<|>)\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z%]*)\s*"
)
_EXPECTED = "METRIC, one of < <= > >=, and a number with %, pt, ms or MB, like latency>5% or accuracy<-0.5pt"


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition under which a comparison fails; about the change from the old report to the new one.

    Attributes:
        metric: Which figure.
        op: "<", "<=", ">" or ">=".
        limit: In `unit`.
        unit: "%" of the old value, "pt" for hundredths of an accuracy, else the metric's own.
        text: As it was written.
    """

    metric: Metric
    op: str
    limit: float
    unit: str
    text: str

    @property
    def welcomes(self) -> bool:
        """Whether it fails where the metric gets better, which is rarely meant."""
        return (self.op in (">", ">=")) == self.metric.higher

    def applies(self, low: float, high: float) -> bool:
        """Whether every change from ``low`` to ``high``, in `unit`, meets the condition."""
        if self.op == ">":
            return low > self.limit
        if self.op == ">=":
            return low >= self.limit
        return high < self.limit if self.op == "<" else high <= self.limit


def parse_rule(text: str) -> Rule:
    """Read a condition.

    Args:
        text: `METRIC OP NUMBER[%|pt|ms|MB]`.

    Raises:
        BenchmarkError: It cannot be read, or the metric is unknown or has no such unit.
    """
    found = _SYNTAX.fullmatch(text)
    if found is None:
        raise BenchmarkError(f"cannot read the condition {text!r}", expected=_EXPECTED)
    name, op, number, unit = found.groups()
    metric = METRICS.get(name.lower())
    if metric is None:
        raise BenchmarkError(f"the condition {text!r} has the metric {name!r}", expected=f"one of {', '.join(METRICS)}")
    limit = float(number)
    if not math.isfinite(limit):
        raise BenchmarkError(f"the condition {text!r} has no finite number", expected=_EXPECTED)
    return Rule(metric, op, limit, _unit(metric, unit, text), text.strip())


def _unit(metric: Metric, written: str, text: str) -> str:
    known = {"": metric.unit, metric.unit.lower(): metric.unit}
    if metric.name != "verdict":
        known["%"] = "%"
    if metric.name in ("accuracy", "f1"):
        known["pt"] = "pt"
    found = known.get(written.lower())
    if found is None:
        units = ", ".join(u for u in dict.fromkeys(known.values()) if u and " " not in u) or "a number alone"
        raise BenchmarkError(f"the condition {text!r} measures {metric.name} in {written!r}", expected=units)
    return found
