"""What to measure, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deploykit.errors import BenchmarkError
from deploykit.specs import Array

MIN_ROUNDS = 3
SCENARIOS = ("latency", "offline", "server")
# Rounds and seconds a round. MLPerf Inference asks for 600 s of a scenario.
DURATIONS = {"screening": (3, 3.0), "decision": (10, 10.0), "mlperf": (10, 60.0)}
_SHORTEST_S = 1e-3


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model on one device.

    Attributes:
        name: Short name of the model.
        path: Its file.
        device: Device name.
        sha256: Of the artifact's manifest, or of the file.
        size_bytes: Model and weights.
        precision: "fp32" or "native" for this one; None for what the settings say.
        threads: Threads in one request, for this one; None for what the settings say.
        sessions: Copies of the model, for several requests at a time.
        concurrency: Requests in flight, for this one; None for what the settings say.
        optimize: How far the runtime may rewrite the graph, see `open_session`.
        settings: The runtime's own settings, by their own names.
        tuned: Whether these come out of a settings file.
    """

    name: str
    path: str
    device: str
    sha256: str
    size_bytes: int
    precision: str | None = None
    threads: int | None = None
    sessions: int = 1
    concurrency: int | None = None
    optimize: bool | str = True
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tuned: bool = False

    @property
    def label(self) -> str:
        """Name and device."""
        return f"{self.name} on {self.device}"

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it another candidate; JSON-ready."""
        return {
            "name": self.name, "device": self.device, "sha256": self.sha256, "precision": self.precision,
            "threads": self.threads, "sessions": self.sessions, "concurrency": self.concurrency,
            "optimize": self.optimize, "settings": {k: str(v) for k, v in self.settings.items()},
        }  # fmt: skip


@dataclass(slots=True)
class Entry:
    """A candidate while it is measured.

    Attributes:
        candidate: What.
        probe: What the first process found.
        outputs: Its outputs on the inputs of the benchmark.
        status: "ok", or why it does not enter the measurement.
        parity: Comparison with the reference.
        rounds: One result a round.
        again: Of the new rounds that confirm the best.
    """

    candidate: Candidate
    probe: dict[str, Any] = field(default_factory=dict)
    outputs: list[dict[str, Array]] = field(default_factory=list)
    status: str = "ok"
    parity: dict[str, Any] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    again: list[dict[str, Any]] = field(default_factory=list)

    @property
    def concurrency(self) -> int:
        """Requests in flight."""
        return int(self.probe.get("concurrency", 1))


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure; see `deploykit.benchmark` for the meaning of each.

    Attributes:
        rounds: Every candidate once a round, in shuffled order.
        seconds: Timed seconds a candidate and round.
        warmup_s: Warm-up before them, and at least 10 requests, 3 of them in every lane.
        threads: Threads in one request; None for all allowed cores.
        batch: Samples in one request.
        precision: "fp32" or "native".
        max_drop: Accuracy that a winner may lose against the reference.
        min_cosine: Cosine below which outputs count as wrong.
        seed: Of the order and the bootstrap.
        inputs: Where the inputs come from.
        scenario: "latency": one request in flight; "offline": as many as give the highest throughput; "server":
            requests come when they come, and a rate counts where their p99 meets the objective.
        concurrency: Requests in flight, for "offline" and "server"; None to find out.
        slo_p99_ms: The objective of "server".
        confirm: Whether the best three of several are measured once more, on new rounds.
    """

    rounds: int = 5
    seconds: float = 2.0
    warmup_s: float = 1.0
    threads: int | None = None
    batch: int = 1
    precision: str = "fp32"
    max_drop: float = 0.01
    min_cosine: float = 0.95
    seed: int = 0
    inputs: str = "generated"
    scenario: str = "latency"
    concurrency: int | None = None
    slo_p99_ms: float | None = None
    confirm: bool = False

    def check(self) -> None:
        """Refuse settings that give no result.

        Raises:
            BenchmarkError: One is out of range.
        """
        if self.rounds < MIN_ROUNDS:
            raise BenchmarkError(f"{self.rounds} rounds", expected=f"at least {MIN_ROUNDS}: intervals are over rounds")
        numbers = (self.seconds, self.warmup_s, self.max_drop, self.min_cosine)
        if not all(math.isfinite(n) for n in numbers) or self.seconds < _SHORTEST_S:
            raise BenchmarkError(f"seconds and limits {numbers}", expected="finite numbers, seconds from 0.001")
        if not self.seconds > 0 or self.warmup_s < 0 or self.batch < 1:
            raise BenchmarkError(
                f"seconds {self.seconds}, warm-up {self.warmup_s}, batch {self.batch}", expected="positive numbers"
            )
        self._check_scenario()

    def _check_scenario(self) -> None:
        if self.scenario not in SCENARIOS:
            raise BenchmarkError(f"unknown scenario {self.scenario!r}", expected=" or ".join(SCENARIOS))
        slo = self.slo_p99_ms
        if self.scenario == "server" and slo is None:
            raise BenchmarkError(
                "the scenario server needs an objective", hint="say what p99 is good enough: --slo-p99-ms"
            )
        if slo is not None and (self.scenario != "server" or not math.isfinite(slo) or slo <= 0):
            raise BenchmarkError(
                f"an objective of {slo} ms in the scenario {self.scenario}",
                expected="a positive number of milliseconds, with --scenario server",
            )
        if self.concurrency is not None and (self.scenario == "latency" or self.concurrency < 1):
            raise BenchmarkError(
                f"{self.concurrency} requests in flight in the scenario {self.scenario}",
                expected="1 or more, with --scenario offline or server",
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)
