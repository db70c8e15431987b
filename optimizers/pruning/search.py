"""Which pruning ratio meets a latency: false position inside a bracket (the Illinois variant), for a noisy function.

Source of the method: M. Dowell and P. Jarratt, "A modified regula falsi method for computing the root of an equation",
BIT 11 (1971). The function is the logarithm of latency over target, which for most networks is nearly a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_NARROWEST = 1 / 512
# An estimate this near to an end of the bracket would hardly narrow it.
_EDGE = 0.1
_SHORTEST = 0.02


@dataclass(frozen=True, slots=True)
class Probe:
    """One pruned module that was timed.

    Attributes:
        ratio: Of the pruning.
        ms: Its latency.
    """

    ratio: float
    ms: float


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        ratio: The ratio to use.
        ms: The latency there.
        met: Whether it is at most the target and its tolerance.
        probes: All that was timed, in order.
    """

    ratio: float
    ms: float
    met: bool
    probes: tuple[Probe, ...]


def find_ratio(
    latency: Callable[[float], float],
    target_ms: float,
    *,
    start: Probe,
    highest: float,
    guess: float | None = None,
    tolerance: float = 0.05,
    limit: int = 10,
) -> Found:
    """The smallest ratio whose latency is the target's, or just below where channels come in large steps.

    Args:
        latency: Milliseconds of the module pruned by a ratio; falls with it, give or take noise and steps.
        target_ms: What is asked for.
        start: What is known before anything is tried, such as the module as it is.
        highest: The largest ratio that may be tried.
        guess: Where to look first; by default where a straight line from 1 at ratio 0 to the target would be.
        tolerance: How far above the target counts as met.
        limit: How many probes may be timed.

    Returns:
        The probe nearest to the target among those that meet it; where none does, the fastest.
    """
    near = math.log1p(tolerance) / 2
    probes: list[Probe] = []

    def excess(probe: Probe) -> float:
        return math.log(probe.ms / target_ms)

    def probe_at(ratio: float) -> Probe:
        probes.append(Probe(ratio, latency(ratio)))
        return probes[-1]

    if excess(start) <= 0:
        return Found(start.ratio, start.ms, True, ())
    low, low_value = start, excess(start)
    high: Probe | None = None
    high_value = 0.0
    ratio = guess if guess is not None else 1 - math.sqrt(target_ms / start.ms)
    side = 0
    while len(probes) < limit:
        ratio = min(max(ratio, low.ratio), highest)
        found = probe_at(ratio)
        value = excess(found)
        if abs(value) <= near:
            break
        if value > 0:
            # Illinois: an end that stays a second time counts half, else it would never be left.
            high_value = high_value / 2 if side > 0 else high_value
            low, low_value, side = found, value, 1
            if found.ratio >= highest:
                break
        else:
            low_value = low_value / 2 if side < 0 else low_value
            high, high_value, side = found, value, -1
        if high is None:
            # Along the line through the last two, and a little further, because the bracket has no upper end yet.
            before = start if len(probes) == 1 else probes[-2]
            slope = (excess(before) - value) / max(found.ratio - before.ratio, 1e-9)
            step = value / slope if slope > 0 else highest
            ratio = found.ratio + max(1.1 * step, _SHORTEST)
            continue
        width = high.ratio - low.ratio
        if width < _NARROWEST:
            break
        share = low_value / (low_value - high_value)
        ratio = low.ratio + width * min(max(share, _EDGE), 1 - _EDGE)
    return _best(probes, target_ms, tolerance)


def _best(probes: list[Probe], target_ms: float, tolerance: float) -> Found:
    meeting = [p for p in probes if p.ms <= target_ms * (1 + tolerance)]
    best = min(meeting or probes, key=(lambda p: abs(math.log(p.ms / target_ms))) if meeting else (lambda p: p.ms))
    return Found(best.ratio, best.ms, bool(meeting), tuple(probes))
