"""What a user asks a search for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deploykit.errors import SearchError
from deploykit.goals import Goal

OBJECTIVES = ("latency", "throughput", "size", "cost")
_LEAST_BUDGET_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What no result may exceed; None where there is no limit.

    Attributes:
        max_latency_ms: Median of one request.
        max_memory_mb: Peak resident memory of a process that serves it, in 10^6 bytes.
        max_size_mb: Model and weights, in 10^6 bytes.
    """

    max_latency_ms: float | None = None
    max_memory_mb: float | None = None
    max_size_mb: float | None = None

    def broken(
        self,
        *,
        latency_ms: float | None = None,
        memory_bytes: float | None = None,
        size_bytes: float | None = None,
    ) -> str:
        """Which limit these figures break, in words; empty where none is, or nothing is known."""
        if self.max_size_mb is not None and size_bytes is not None and size_bytes > self.max_size_mb * 1e6:
            return f"{size_bytes / 1e6:.2f} MB, more than {self.max_size_mb:g}"
        if self.max_memory_mb is not None and memory_bytes is not None and memory_bytes > self.max_memory_mb * 1e6:
            return f"{memory_bytes / 1e6:.0f} MB of memory, more than {self.max_memory_mb:g}"
        if self.max_latency_ms is not None and latency_ms is not None and latency_ms > self.max_latency_ms:
            return f"{latency_ms:.3g} ms, more than {self.max_latency_ms:g}"
        return ""

    def describe(self) -> str:
        """In words; empty where there is no limit."""
        units = {"max_latency_ms": "ms", "max_memory_mb": "MB of memory", "max_size_mb": "MB"}
        return ", ".join(f"at most {v:g} {units[k]}" for k, v in asdict(self).items() if v is not None)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be found, out of what, and within which time.

    Attributes:
        source: What `deploykit.export` takes, or an artifact; of a live module, its description.
        model: The artifact to start from, where `source` is exported already.
        data: Calibration data; None leaves out what needs them.
        eval_data: Real inputs that accuracy is judged on; `data` by default.
        goal: What has to be kept.
        objective: "latency": one request in flight; "throughput": samples a second; "size"; or "cost": the time of a
            core that a sample takes.
        limits: What no result may exceed.
        devices: Device names.
        batch: Samples in a request; None to find out how many are best for the objectives throughput and cost, where
            the model takes any number, and else 1.
        dims: Sizes of dynamic dimensions where inputs are made up.
        contract: Runtimes that have to be able to run the result.
        schemes: Names of `schemes.SCHEMES`; empty for the usual ones.
        export: What else `[export]` of a recipe takes.
        native: Whether a runtime may compute in less than float32 where the target is kept (bfloat16 in OpenVINO).
        tune: Whether the runtimes' settings are searched too.
        min_cosine: A candidate whose outputs are further from the exported model's is wrong.
        shards: Parts that calibration is spread over; None for as many as there are machines.
        budget_s: Seconds for all of it.
        seed: Of orders and bootstraps.
    """

    source: str
    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    goal: Goal = field(default_factory=Goal)
    objective: str = "latency"
    limits: Limits = field(default_factory=Limits)
    devices: tuple[str, ...] = ()
    batch: int | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    contract: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    export: Mapping[str, Any] = field(default_factory=dict)
    native: bool = True
    tune: bool = True
    min_cosine: float = 0.95
    shards: int | None = None
    budget_s: float = 600.0
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be searched for.

        Raises:
            SearchError: Something is out of range.
        """
        if self.objective not in OBJECTIVES:
            raise SearchError(f"unknown objective {self.objective!r}", expected=", ".join(OBJECTIVES))
        if not (math.isfinite(self.budget_s) and self.budget_s >= _LEAST_BUDGET_S):
            raise SearchError(f"a budget of {self.budget_s:g} s", expected=f"{_LEAST_BUDGET_S:g} s or more")
        if self.limits.max_latency_ms is not None and self.objective in ("throughput", "cost"):
            raise SearchError(
                f"a latency is not measured where {self.objective} is the objective",
                expected="--max-latency-ms with --objective latency or size",
            )
        if self.shards is not None and self.shards < 1:
            raise SearchError(f"{self.shards} shards", expected="1 or more")
        if self.batch is not None and self.batch < 1:
            raise SearchError(f"batch {self.batch}", expected="1 or more")
        for name, value in asdict(self.limits).items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SearchError(f"{name} is {value:g}", expected="a positive number")

    @property
    def samples(self) -> int:
        """In a request, before anything was found out."""
        return self.batch or 1

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        goal = asdict(self.goal)
        found = asdict(self) | {"goal": {k: v for k, v in goal.items()}, "dims": dict(self.dims)}
        return found | ({"batch": self.samples} if self.objective in ("latency", "size") else {})
