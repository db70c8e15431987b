"""From raw samples to percentiles and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Any

import numpy as np

from deploykit.specs import Array

# Samples that a percentile needs, after MLPerf LoadGen's early stopping (confidence 0.99); below: not available.
MIN_SAMPLES = {50.0: 11, 90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6636}
_RESAMPLES = 10_000
_SMALLEST_FLOOR = 0.01
# 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom; beyond, an expansion is good enough.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


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
    return None if samples.size < MIN_SAMPLES[q] else nearest_rank(samples, q)


def nearest_rank(samples: Array, q: float) -> float:
    """The value that q per cent of the samples do not exceed, however few there are."""
    rank = max(1, math.ceil(q / 100 * samples.size))
    return float(np.partition(samples, rank - 1)[rank - 1])


def log_ratios(reference: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]]) -> list[float]:
    """Logarithm of how many times faster the candidate was, one a round.

    Where both were measured in blocks that took turns, a round's ratio is the median over the turns of the ratio of
    their medians: what slows the machine for a second slows both sides of a turn. Elsewhere it is the ratio of the
    medians of all samples. Of a throughput, and of a rate that met its objective, the higher is the faster.

    Args:
        reference: Rounds, as the report keeps them.
        candidate: Of the same rounds.
    """
    return [_log_ratio(a, b) for a, b in zip(reference, candidate, strict=True)]


def _log_ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    if "rate_per_s" in a:
        return math.log(b["rate_per_s"] / a["rate_per_s"])
    x, y = _paces(a), _paces(b)
    if len(x) == len(y):
        return float(np.median(np.log(x) - np.log(y)))
    return float(np.log(pace_of(a)) - np.log(pace_of(b)))


def _paces(found: Mapping[str, Any]) -> Array:
    """Nanoseconds of a request in each block: the median, or, where throughput counts, wall time over requests."""
    sizes = found.get("block_sizes") or [len(found["samples_ns"])]
    if found.get("paced_by") == "wall":
        walls = found.get("block_wall_ns") or [found["wall_ns"]]
        return np.asarray([wall / size for wall, size in zip(walls, sizes, strict=True)])
    ends = np.cumsum(sizes)[:-1]
    return np.asarray([np.median(block) for block in np.split(np.asarray(found["samples_ns"], np.int64), ends)])


def pace_of(found: Mapping[str, Any]) -> float:
    """Nanoseconds of a request over a whole round."""
    if found.get("paced_by") == "wall":
        return float(found["wall_ns"] / len(found["samples_ns"]))
    return float(np.median(np.asarray(found["samples_ns"], np.int64)))


def busy_ns(ends_ns: Sequence[int], lanes: int) -> float:
    """How long all lanes would have been at work with what they did in a block of requests.

    A block ends with its last answer. Until then some lanes have nothing to do any more, and for how long depends on
    the requests in flight: in a block of few requests, a lane that stands idle looks like a slow one.

    Args:
        ends_ns: How long each sender of requests was at work.
        lanes: Requests that run side by side; where more are in flight, the others wait.
    """
    busy, before = 0.0, 0
    for gone, end in enumerate(sorted(ends_ns)):
        lanes_used = min(lanes, len(ends_ns) - gone)
        busy += (end - before) * lanes_used / min(lanes, len(ends_ns))
        before = end
    return busy


def interval(logs: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Mean of logarithms with its 95 % interval.

    The percentile bootstrap of few values is too narrow. Its quantiles are therefore those at which it would be right
    for normal values (T. Hesterberg, "What Teachers Should Know about the Bootstrap", 2015, section 4.3), and it is
    never narrower than Student's interval.

    Args:
        logs: One a round.
        seed: Of the resampling.

    Returns:
        Mean, lower and upper end.
    """
    values = np.asarray(logs, np.float64)
    count, mean = values.size, float(values.mean())
    if count < 2:
        return mean, -math.inf, math.inf
    quantile = student_975(count - 1)
    tail = NormalDist().cdf(-quantile * math.sqrt(count / (count - 1)))
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, count, (_RESAMPLES, count))].mean(1)
    low, high = np.quantile(means, [tail, 1 - tail])
    half = quantile * float(values.std(ddof=1)) / math.sqrt(count)
    return mean, min(float(low), mean - half), max(float(high), mean + half)


def student_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution, good to 0.001.

    Args:
        freedom: Degrees of freedom, 1 or more.
    """
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    # Cornish and Fisher's expansion in 1/freedom; Abramowitz and Stegun, 26.7.5.
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def bounded_exp(value: float) -> float:
    """exp, as far as a float goes."""
    return math.exp(min(value, 700.0))


def floor_of(logs: Sequence[float]) -> float:
    """The noise floor: how far a model strays from itself; at least 1 %.

    How far it strays from round to round is in every interval already, so here it is the mean alone.

    Args:
        logs: See `log_ratios`, of the reference against itself.
    """
    return max(_SMALLEST_FLOOR, math.exp(abs(float(np.mean(logs)))) - 1)


def decide(logs: Sequence[float], floor: float, seed: int) -> Comparison:
    """Decide between two candidates: the 95 % interval has to lie outside the noise floor.

    Args:
        logs: See `log_ratios`.
        floor: See `floor_of`.
        seed: Of the bootstrap.
    """
    mean, low, high = interval(logs, seed)
    edge = math.log1p(floor)
    outcome = Outcome.FASTER if low > edge else Outcome.SLOWER if high < -edge else Outcome.TIE
    return Comparison(outcome, math.exp(mean), bounded_exp(low), bounded_exp(high))


def drift_of(rounds: Sequence[Mapping[str, Any]]) -> float:
    """How much slower the second half of a round's requests was than the first: the median over rounds of the ratio."""
    halves = []
    for found in rounds:
        samples = np.asarray(found["samples_ns"], np.int64)
        if samples.size >= 2:
            halves.append(np.median(samples[samples.size // 2 :]) / np.median(samples[: samples.size // 2]))
    return float(np.median(halves)) if halves else 1.0
