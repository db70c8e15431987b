"""The tuner: which settings of a runtime suit a model on this machine.

A staged search: the settings that matter most first, each stage from the best of the one before, and within a stage
successive halving (Jamieson and Talwalkar, 2016): all settings run a little, the worse half is dropped, the others run
on. The settings of a stage are loaded side by side and take turns, so that what slows the machine for a moment slows
all of them; they are ranked by the mean logarithm of their pace against the others' of the same turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deploykit.benchmarks.tuner_space import Config, Stage

OBJECTIVES = ("latency", "throughput")
_TURN_S = 0.15
# Turns before the first half is dropped, and the most in one stage.
_FIRST_TURNS, _MOST_TURNS = 3, 80
# The last few run at least as many turns, and on until it is clear which is best, or the time is over.
_LAST_TURNS = 12
# Of a stage's time, this may go into loading.
_LOADING = 0.5
# A setting has to be this much better than the one before it, or the one before stays; and so against a neighbour that
# keeps fewer samples in flight.
_WORTH = 0.01


class LostError(Exception):
    """A configuration that ran before runs no more; the message says why."""


class Arena(Protocol):
    """Where configurations run."""

    def load(self, configs: Sequence[Config]) -> dict[Config, str]:
        """Load these beside those that are there; gives those that cannot run, with the reason."""
        ...

    def turn(self, config: Config, seconds: float) -> float:
        """Run one for a while; nanoseconds a sample.

        Raises:
            LostError: It runs no more.
        """
        ...

    def drop(self, configs: Sequence[Config]) -> None:
        """Unload these."""
        ...

    def wrong(self, config: Config) -> str:
        """Why its outputs are not those of the first configuration; empty where they are."""
        ...


@dataclass(slots=True)
class Score:
    """What is known of a configuration in one stage.

    Attributes:
        config: Which.
        stage: Name of the stage.
        paces: Nanoseconds a sample, one a turn.
        relative: Logarithm of the pace against the mean of all that ran in the same turn.
        status: "ok", or why it is out.
        kept: Whether it was the best of its stage.
    """

    config: Config
    stage: str
    paces: list[float]
    relative: list[float]
    status: str = "ok"
    kept: bool = False

    @property
    def value(self) -> float:
        """Lower is faster."""
        return float(np.mean(self.relative)) if self.relative else math.inf

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy; without figures where it never ran."""
        pace = float(np.median(self.paces)) if self.paces else None
        return {
            "label": self.config.label, "stage": self.stage, "status": self.status, "kept": self.kept,
            "turns": len(self.paces), **self.config.as_dict(),
            "median_ms": None if pace is None else pace * self.config.batch / 1e6,
            "throughput_per_s": None if pace is None else 1e9 / pace,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tuning:
    """A finished search.

    Attributes:
        chosen: The best configuration.
        trials: All that ran, stage by stage.
        spent_s: Seconds.
        load_s: The longest that loading a configuration took, its process and its warming up included.
    """

    chosen: Config
    trials: list[Score]
    spent_s: float
    load_s: float = 0.0


def search(
    base: Config,
    stages: Sequence[Stage],
    arena: Arena,
    budget_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    told: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> Tuning:
    """Search stage by stage.

    Args:
        base: What runs unless something is better.
        stages: The largest lever first.
        arena: Where configurations run.
        budget_s: Seconds for all of it. A stage that the budget does not reach is left out, and its settings stay.
        clock: Seconds.
        told: Told the stage, how many configurations it has left, and how many it had.
    """
    began = clock()
    deadline = began + budget_s
    best, trials, times = base, [], _Times(clock, deadline)
    try:
        for number, stage in enumerate(stages):
            left = deadline - clock()
            # Another one has to be loaded; one more is what outputs are compared with.
            if left <= 2 * _TURN_S + times.load_s * (1 + stage.risky):
                continue
            times.stage = clock() + left / (len(stages) - number)
            scores, best = _run_stage(stage, best, arena, times, told)
            trials += scores
    finally:
        arena.drop([best])
    return Tuning(best, trials, clock() - began, times.load_s)


@dataclass(slots=True)
class _Times:
    """What is known of the time.

    Attributes:
        clock: Seconds.
        deadline: Of the whole search.
        stage: Of the stage.
        load_s: The longest that loading a configuration took.
    """

    clock: Callable[[], float]
    deadline: float
    stage: float = 0.0
    load_s: float = 0.0


def _run_stage(
    stage: Stage, base: Config, arena: Arena, times: _Times, told: Callable[[str, int, int], None]
) -> tuple[list[Score], Config]:
    clock, deadline = times.clock, times.stage
    scores = {c: Score(c, stage.name, [], []) for c in stage.around(base)}
    told(stage.name, len(scores), len(scores))
    _load(scores, base, arena, times)
    if stage.risky:
        for config in [c for c, s in scores.items() if c != base and s.status == "ok"]:
            why = arena.wrong(config)
            if why:
                scores[config].status = f"wrong outputs: {why}"
                arena.drop([config])
    alive = [c for c, s in scores.items() if s.status == "ok"]
    if len(alive) < 2:
        return list(scores.values()), alive[0] if alive else base
    turns, goal = 0, _FIRST_TURNS
    # Where the time does not even allow the first turns for all of them, they are shorter.
    seconds = max(0.03, min(_TURN_S, (deadline - clock()) / (2 * _FIRST_TURNS * len(alive))))
    while len(alive) > 1 and turns < _MOST_TURNS:
        while turns < goal and len(alive) > 1:
            # Every other turn the other way round: nobody always follows the same neighbour.
            alive = _turn(scores, alive if turns % 2 else alive[::-1], arena, seconds)
            turns += 1
            if clock() > deadline and turns >= 2:
                break
        if clock() > deadline:
            break
        ranked = sorted(alive, key=lambda c: scores[c].value)
        lost = [c for c in ranked[math.ceil(len(ranked) / 2) :] if c != base] if len(ranked) > 2 else []
        if lost:
            arena.drop(lost)
            alive = [c for c in alive if c not in lost]
            told(stage.name, len(alive), len(scores))
            goal = turns * 2
        elif turns >= _LAST_TURNS and _clear([scores[c] for c in ranked]):
            break
        else:
            goal = turns + _FIRST_TURNS
    if not alive:
        return list(scores.values()), base
    best = _choose(scores, alive, base)
    scores[best].kept = True
    arena.drop([c for c in alive if c != best])
    return list(scores.values()), best


def _choose(scores: dict[Config, Score], alive: Sequence[Config], base: Config) -> Config:
    """The fastest that is worth leaving the base for, or what keeps less waiting and is not clearly slower.

    Of several that are about as fast, one happens to rank first. With fewer samples in flight every one is answered
    sooner, so more of them have to show that they gain something over their neighbours too, and not only over the base.
    """
    good = [c for c in sorted(alive, key=lambda c: scores[c].value) if _better(scores[c], scores.get(base))]
    if not good:
        return base
    best = good[0]
    near = [c for c in good if c.in_flight < best.in_flight and not _better(scores[best], scores[c])]
    return min(near, key=lambda c: c.in_flight, default=best)


def _clear(ranked: Sequence[Score]) -> bool:
    """Whether the best leads by three standard errors, or surely by less than is worth anything."""
    count = min(len(s.relative) for s in ranked[:2])
    gains = np.asarray(ranked[1].relative[-count:]) - np.asarray(ranked[0].relative[-count:])
    mean, error = float(gains.mean()), float(gains.std(ddof=1)) / math.sqrt(count)
    return mean > 3 * error or mean + 2 * error < _WORTH


def _better(score: Score, base: Score | None) -> bool:
    """Whether a configuration is worth leaving the base for: by 1 %, and by twice the standard error of the mean."""
    if base is None or not base.relative:
        return True
    gains = np.asarray(base.relative[: len(score.relative)]) - np.asarray(score.relative)
    error = float(gains.std(ddof=1)) / math.sqrt(gains.size) if gains.size > 1 else math.inf
    return float(gains.mean()) > max(_WORTH, 2 * error)


def _load(scores: dict[Config, Score], base: Config, arena: Arena, times: _Times) -> None:
    """Load the base, then as many others as the time allows; the first choices of a stage come first.

    One is loaded as long as all of the search has time for it: of a stage without any, nothing is learnt.
    """
    waiting = [config for config in scores if config != base]

    def load(configs: Sequence[Config]) -> None:
        began = times.clock()
        for config, why in arena.load(configs).items():
            scores[config].status = why
        times.load_s = max(times.load_s, (times.clock() - began) / max(1, len(configs)))

    # The base may have been there already, and says nothing; then how long one takes, the first of the others tells.
    load([base])
    if times.load_s < times.deadline - times.clock():
        load(waiting[:1])
        del waiting[:1]
    each = max(times.load_s, 1e-3)
    least = 1 if 2 * each < times.deadline - times.clock() else 0
    count = max(least, int(_LOADING * (times.stage - times.clock()) / each))
    load(waiting[:count])
    for config in waiting[count:]:
        scores[config].status = "not tried: the budget is too small"


def _turn(scores: dict[Config, Score], order: Sequence[Config], arena: Arena, seconds: float) -> list[Config]:
    """Run each for a while; gives those that still run. A turn in which one is lost does not count."""
    paces: dict[Config, float] = {}
    lost = []
    for config in order:
        try:
            paces[config] = arena.turn(config, seconds)
        except LostError as exc:
            scores[config].status = f"failed: {exc}"
            lost.append(config)
    if lost:
        arena.drop(lost)
        return [config for config in scores if config in paces]
    mean = float(np.mean(np.log(list(paces.values()))))
    for config, pace in paces.items():
        scores[config].paces.append(pace)
        scores[config].relative.append(math.log(pace) - mean)
    return [config for config in scores if config in paces]
