"""What a measurement takes, reckoned before it begins, so that it fits into the time that there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# A process of a measurement: until it can load a model; requests to see its outputs and its profile.
START_S, _PROFILED = 1.0, 4
# As `worker` warms up: requests in all and in every lane, and how long is long.
_WARMED, _FEWEST_WARM, _WARM_S = 10, 3, 1.5
# As `rounds` cuts a round into turns, with so many requests in each at least.
_TURN_S, _TURNS, BLOCK = 0.25, 4, 5
# As `measurement` looks for the requests in flight: passes, and the seconds of their parts.
_SWEEPS, _SWEPT_S = 2, (0.2, 0.5)
# As `arena` warms up what is tuned, and the turns of `tuner`.
TUNED_WARM_S, _TUNED_TURN_S = 0.1, 0.15


class Cost(NamedTuple):
    """What it takes to have a candidate run.

    Attributes:
        load_s: Seconds to load it and run it once.
        request_s: Seconds that a request takes, of several at a time the share of each.
        lanes: Requests at a time.
        swept: Numbers of requests at a time that are tried before the rounds, by wall time.
    """

    load_s: float
    request_s: float
    lanes: int = 1
    swept: int = 1

    @property
    def alone_s(self) -> float:
        """Seconds from a request to its answer."""
        return self.request_s * self.lanes

    def warm_s(self, seconds: float) -> float:
        """Warming up for so long: at least ten requests and three in every lane, or only these where that takes long;
        see `worker`.
        """
        three = _FEWEST_WARM * self.alone_s
        return max(seconds, min(max(_WARMED * self.request_s, three), max(_WARM_S, three)))

    def once_s(self, seconds: float, warmup_s: float, sets: int, *, by_wall: bool) -> float:
        """Before the rounds: a process for its outputs, and once more loaded for the profile; by wall time also warmed
        up, and its requests in flight swept.
        """
        found = START_S + 2 * self.load_s + (sets + _PROFILED) * self.alone_s
        if by_wall:
            swept = sum(max(min(part, seconds), self.alone_s) for part in _SWEPT_S)
            found += self.warm_s(warmup_s) + _SWEEPS * self.swept * swept
        return found

    def round_s(self, seconds: float, warmup_s: float, slowest_s: float) -> float:
        """In a round: a process, its warming up, and blocks, before each of which it runs once; their last requests
        end late.
        """
        turn = max(min(_TURN_S, seconds / _TURNS), BLOCK * slowest_s)
        blocks = max(1, round(seconds / turn))
        return START_S + self.load_s + self.warm_s(warmup_s) + seconds + 1.5 * blocks * self.alone_s

    def tuning_s(self) -> float:
        """The least that tuning takes: two processes loaded and warmed up, and two turns of each."""
        return 2 * (START_S + self.load_s + self.warm_s(TUNED_WARM_S) + 2 * max(_TUNED_TURN_S, 2 * self.alone_s))


def takes(
    costs: Sequence[Cost], rounds: int, seconds: float, warmup_s: float, *, by_wall: bool = False, sets: int = 32
) -> float:
    """Seconds of a whole measurement.

    Args:
        costs: Of the reference, and of the other candidates.
        rounds: How many.
        seconds: Timed, of a candidate in a round.
        warmup_s: Before that.
        by_wall: Whether throughput counts.
        sets: Of inputs, which every model runs once.
    """
    slowest = max(c.alone_s for c in costs)
    each = sum(c.round_s(seconds, warmup_s, slowest) for c in (costs[0], *costs))  # the reference runs twice
    return sum(c.once_s(seconds, warmup_s, sets, by_wall=by_wall) for c in costs) + rounds * each
