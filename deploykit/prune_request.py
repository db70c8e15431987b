"""What is asked of a pruning, and what contradicts itself in it, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploykit.benchmarks.metrics import check_metric
from deploykit.errors import DataError, OptimizationError
from deploykit.goals import read_drop
from deploykit.optimizers.pruning import PruneConfig, check_prune_config
from deploykit.optimizers.pruning.sparse import NOTE
from deploykit.optimizers.training import TrainConfig, check_train_config

# How far a speed may be from what is asked for.
TOLERANCE = 0.05

_GOALS = ("--ratio", "--speedup", "--latency-ms")


@dataclass(frozen=True, slots=True)
class SpeedTarget:
    """How fast the result has to be; neither where a ratio is asked for.

    Attributes:
        speedup: Times as fast as the module as it is.
        latency_ms: Milliseconds a request.
    """

    speedup: float | None
    latency_ms: float | None

    @property
    def asked(self) -> bool:
        return self.speedup is not None or self.latency_ms is not None

    def describe(self) -> str:
        return f"{self.speedup:g}x" if self.speedup is not None else f"{self.latency_ms:g} ms"

    def reached(self, record: Mapping[str, Any]) -> bool:
        """Whether a record of the gate is within 5 % of it, or faster."""
        if self.speedup is not None:
            return bool(record["ratio"] >= self.speedup * (1 - TOLERANCE))
        return bool(record["ms"] <= (self.latency_ms or 0.0) * (1 + TOLERANCE))

    def unclear(self, record: Mapping[str, Any]) -> bool:
        """Whether noise may be all that keeps a record from the target: it is inside of the interval."""
        best = {"ratio": record["high"], "ms": record["ms"] * record["ratio"] / record["high"]}
        return not self.reached(record) and self.reached(best)

    def off(self, record: Mapping[str, Any]) -> float:
        """By how much a record is off: 0.03 for 3 % faster than asked for, -0.03 for 3 % slower."""
        if self.speedup is not None:
            return float(record["ratio"]) / self.speedup - 1
        return (self.latency_ms or 0.0) / float(record["ms"]) - 1


def check_request(
    config: PruneConfig,
    target: SpeedTarget,
    data: Any,
    eval_data: Any,
    training: TrainConfig | None,
    metric: str | None,
    max_drop: float | str | None,
    gate_seconds: float,
) -> None:
    """Refuse what contradicts itself, before anything is loaded.

    Raises:
        OptimizationError: It does.
        DataError: A metric is unknown, or has no data.
    """
    check_prune_config(config)
    goals = [config.ratio is not None, target.speedup is not None, target.latency_ms is not None]
    if config.method == "structured" and sum(goals) != 1:
        raise OptimizationError(
            "one goal is needed, and "
            + (" and ".join(n for n, g in zip(_GOALS, goals, strict=True) if g) or "none is given"),
            expected=f"one of {', '.join(_GOALS)}",
        )
    if config.method != "structured" and target.asked:
        raise OptimizationError(
            f"{config.method} cannot be aimed at a latency: {NOTE}", hint="use --method structured for speed"
        )
    if config.method == "magnitude" and config.ratio is None:
        raise OptimizationError("magnitude pruning needs a share of zeros", hint="add --ratio 0.8")
    for name, value, least in (("speed-up", target.speedup, 1.0), ("latency", target.latency_ms, 0.0)):
        if value is not None and not least < value < math.inf:
            raise OptimizationError(f"a {name} of {value:g}", expected=f"more than {least:g}")
    if target.asked and gate_seconds <= 0:
        raise OptimizationError("a speed that is not measured", hint="leave --gate-seconds out")
    if training is not None:
        check_train_config(training)
        if data is None:
            raise OptimizationError("a recovery needs training data", hint="add --data DATA")
    if config.importance == "taylor" and data is None:
        raise OptimizationError(
            "importance by Taylor expansion needs labelled data", hint="give --data, or --importance magnitude"
        )
    if metric is not None:
        check_metric(metric)
    if eval_data is None and (metric is not None or max_drop is not None):
        raise DataError("a metric needs evaluation data", expected="inputs and labels", hint="add --eval DATA")
    if max_drop is not None:
        read_drop(max_drop)
