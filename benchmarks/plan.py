"""What to measure, and how."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from deploykit.errors import BenchmarkError

MIN_ROUNDS = 3
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
    """

    name: str
    path: str
    device: str
    sha256: str
    size_bytes: int
    precision: str | None = None

    @property
    def label(self) -> str:
        """Name and device."""
        return f"{self.name} on {self.device}"


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure; see `deploykit.benchmark` for the meaning of each.

    Attributes:
        rounds: Every candidate once a round, in shuffled order.
        seconds: Timed seconds a candidate and round.
        warmup_s: Warm-up before them, and at least 10 runs.
        threads: Threads in one request; None for all allowed cores.
        batch: Samples in one request.
        precision: "fp32" or "native".
        max_drop: Accuracy that a winner may lose against the reference.
        min_cosine: Cosine below which outputs count as wrong.
        seed: Of the order and the bootstrap.
        inputs: Where the inputs come from.
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

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)
