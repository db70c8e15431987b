"""From raw samples to percentiles and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from deploykit.specs import Array

# Samples that a percentile needs, after MLPerf LoadGen's early stopping (confidence 0.99); below: not available.
MIN_SAMPLES = {50.0: 11, 90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6636}
_RESAMPLES = 10_000
_SMALLEST_FLOOR = 0.01


class Outcome(StrEnum):
    """Which of two candidates is faster."""

    FASTER = "faster"
    SLOWER = "slower"
    TIE = "tie"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate against another.

    Attributes:
        outcome: Of the candidate; "tie" unless the interval lies outside the noise.
        ratio: How many times faster the candidate is, geometric mean over rounds.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    outcome: Outcome
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.outcome is Outcome.TIE:
            return f"tie {self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.outcome} {self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}]"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return {
            "verdict": str(self.outcome),
            "ratio": round(self.ratio, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
        }


def percentile(samples: Array, q: float) -> float | None:
    """Nearest-rank percentile, no interpolation.

    Args:
        samples: Any order.
        q: One of `MIN_SAMPLES`.

    Returns:
        None where there are too few samples for this percentile.
    """
    if samples.size < MIN_SAMPLES[q]:
        return None
    rank = math.ceil(q / 100 * samples.size)
    return float(np.partition(samples, rank - 1)[rank - 1])


def bootstrap_ratio(slow: Sequence[float], fast: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Geometric mean of the paired ratios slow/fast, with its 95 % percentile-bootstrap interval over the pairs.

    Args:
        slow: One median latency a round.
        fast: The other's, of the same rounds.
        seed: Of the resampling.

    Returns:
        Ratio, lower and upper end.
    """
    logs = np.log(np.asarray(slow, np.float64) / np.asarray(fast, np.float64))
    rng = np.random.default_rng(seed)
    means = logs[rng.integers(0, logs.size, (_RESAMPLES, logs.size))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))


def noise_floor(a: Sequence[float], b: Sequence[float], seed: int) -> float:
    """How far the interval of a model against itself strays from 1; at least 1 %.

    Args:
        a: Median latencies of the reference, one a round.
        b: Median latencies of the same model, measured as another candidate.
        seed: Of the bootstrap.
    """
    _, low, high = bootstrap_ratio(a, b, seed)
    return max(_SMALLEST_FLOOR, high - 1, 1 / low - 1)


def compare_rounds(reference: Sequence[float], candidate: Sequence[float], floor: float, seed: int) -> Comparison:
    """Decide between two candidates measured in the same rounds.

    Args:
        reference: Median latencies, one a round.
        candidate: The candidate's, of the same rounds.
        floor: Noise floor; the interval has to lie outside of it.
        seed: Of the bootstrap.
    """
    ratio, low, high = bootstrap_ratio(reference, candidate, seed)
    outcome = Outcome.FASTER if low > 1 + floor else Outcome.SLOWER if high < 1 / (1 + floor) else Outcome.TIE
    return Comparison(outcome, ratio, low, high)
