"""The tuner: which settings of a runtime suit a model on this machine.

A staged search: the settings that matter most first, each stage from the best of the one before, and within a stage
successive halving (Jamieson and Talwalkar, 2016): all settings run a little, the worse half is dropped, the others run
on. The settings of a stage are loaded side by side and take turns, so that what slows the machine for a moment slows
all of them; they are ranked by the mean logarithm of their pace against the others' of the same turn.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from deploykit.machine import Machine

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
_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Config:
    """How to run a model.

    Attributes:
        threads: Threads in one request.
        sessions: Copies of the model.
        concurrency: Requests in flight.
        batch: Samples in one request.
        precision: "fp32" or "native".
        optimize: How far the runtime may rewrite the graph, see `open_session`.
        settings: The runtime's own, by their own names, sorted.
    """

    threads: int
    sessions: int = 1
    concurrency: int = 1
    batch: int = 1
    precision: str = "fp32"
    optimize: bool | str = True
    settings: tuple[tuple[str, Any], ...] = ()

    def having(self, **settings: Any) -> Config:
        """With more of the runtime's own settings; None takes one away."""
        merged = {k: v for k, v in {**dict(self.settings), **settings}.items() if v is not None}
        return replace(self, settings=tuple(sorted(merged.items())))

    @property
    def in_flight(self) -> int:
        """Samples on their way at a time."""
        return self.batch * self.concurrency

    @property
    def lanes(self) -> int:
        """Requests that run side by side, as far as the settings say; the others in flight wait."""
        streams = dict(self.settings).get("NUM_STREAMS", 1)
        return self.sessions * (int(streams) if str(streams).isdecimal() else 1)

    @property
    def label(self) -> str:
        """For a person."""
        parts = [f"{self.threads} threads"]
        if self.sessions > 1:
            parts.append(f"{self.sessions} sessions")
        if self.concurrency > 1:
            parts.append(f"{self.concurrency} in flight")
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        if self.precision != "fp32":
            parts.append(self.precision)
        if self.optimize is not True:
            parts.append(f"optimize {self.optimize}")
        return ", ".join([*parts, *(f"{k.removeprefix('session.')}={v}" for k, v in self.settings)])

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return {
            "threads": self.threads, "sessions": self.sessions, "concurrency": self.concurrency, "batch": self.batch,
            "precision": self.precision, "optimize": self.optimize, "settings": dict(self.settings),
        }  # fmt: skip


Variation = Callable[[Config], Config]


@dataclass(frozen=True, slots=True)
class Stage:
    """Settings that are searched together.

    Attributes:
        name: For reports.
        choices: One list a setting: what each of its values does to a configuration.
        risky: Whether outputs may change, so that they have to be compared before one is chosen.
    """

    name: str
    choices: tuple[tuple[Variation, ...], ...]
    risky: bool = False

    def around(self, base: Config) -> list[Config]:
        """The base first, then every combination that is another."""
        found = [base]
        for combination in itertools.product(*self.choices):
            made = base
            for vary in combination:
                made = vary(made)
            found.append(made)
        return list(dict.fromkeys(found))


def stages_for(
    device: str,
    objective: str,
    machine: Machine,
    *,
    native: bool,
    batches: bool,
    cores: int | None = None,
    concurrency: int | None = None,
) -> list[Stage]:
    """What is worth searching on a device, the largest lever first.

    Args:
        device: Its name.
        objective: "latency" or "throughput".
        machine: Cores allowed and instruction sets.
        native: Whether another precision than fp32 is accepted.
        batches: Whether the model takes batches of any size.
        cores: The most threads that may be used; None for all cores allowed.
        concurrency: Requests in flight; None to find out.
    """
    runtime, _, target = device.partition(":")
    stages: list[Stage] = []
    cores = cores or machine.cores_allowed
    if target == "cpu" and objective == "throughput":
        # In ONNX Runtime a request works in its sender's thread as well: more of them would take more cores.
        queue = runtime != "ort" or cores >= machine.cores_allowed
        stages.append(Stage("parallelism", (tuple(_parallel(runtime, cores, concurrency, queue=queue)),)))
    elif target == "cpu":
        stages.append(Stage("threads", (tuple(_threads(n) for n in thread_counts(cores)),)))
    if objective == "throughput" and batches:
        stages.append(Stage("batch", (tuple(_batch(n) for n in _BATCHES),)))
    if native and runtime == "openvino":
        stages.append(Stage("precision", ((_precision("fp32"), _precision("native")),), risky=True))
    if runtime == "ort" and target == "cpu":
        stages += [
            Stage(
                "scheduling",
                (
                    (
                        _setting("session.intra_op.allow_spinning", None),
                        _setting("session.intra_op.allow_spinning", "0"),
                    ),
                    (_setting("session.dynamic_block_base", None), _setting("session.dynamic_block_base", "4")),
                ),
            ),
            Stage("graph", ((_optimize(True), _optimize("extended")),)),
            Stage("denormals", ((_same, _setting("session.set_denormal_as_zero", "1")),), risky=True),
        ]
    if runtime == "openvino" and target == "cpu":
        stages.append(Stage("scheduling", ((_same, _setting("ENABLE_CPU_PINNING", True)),)))
    return stages


def thread_counts(cores: int) -> list[int]:
    """1, 2, half and all of the cores allowed."""
    return sorted({1, min(2, cores), max(1, cores // 2), cores})


def _parallel(runtime: str, cores: int, concurrency: int | None, *, queue: bool) -> Iterator[Variation]:
    """Sessions (or streams) times threads within the cores, with as many requests in flight, and twice as many."""
    for lanes in thread_counts(cores):
        for count in (concurrency,) if concurrency else (lanes, 2 * lanes) if queue else (lanes,):
            if lanes <= count:
                yield _lanes(runtime, lanes, max(1, cores // lanes), count)


def _lanes(runtime: str, lanes: int, threads: int, concurrency: int) -> Variation:
    def vary(base: Config) -> Config:
        made = replace(base, threads=threads, concurrency=concurrency)
        if runtime == "openvino":
            return made.having(NUM_STREAMS=lanes if lanes > 1 else None)
        return replace(made, sessions=lanes)

    return vary


def _threads(count: int) -> Variation:
    return lambda base: replace(base, threads=count)


def _batch(count: int) -> Variation:
    return lambda base: replace(base, batch=count)


def _precision(name: str) -> Variation:
    return lambda base: replace(base, precision=name)


def _optimize(level: bool | str) -> Variation:
    return lambda base: replace(base, optimize=level)


def _setting(name: str, value: Any) -> Variation:
    return lambda base: base.having(**{name: value})


def _same(base: Config) -> Config:
    return base


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
    """

    chosen: Config
    trials: list[Score]
    spent_s: float


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
    best, trials = base, []
    try:
        for number, stage in enumerate(stages):
            left = deadline - clock()
            if left <= 2 * _TURN_S:
                break
            share = left / (len(stages) - number)
            scores, best = _run_stage(stage, best, arena, clock() + share, clock, told)
            trials += scores
    finally:
        arena.drop([best])
    return Tuning(best, trials, clock() - began)


def _run_stage(
    stage: Stage,
    base: Config,
    arena: Arena,
    deadline: float,
    clock: Callable[[], float],
    told: Callable[[str, int, int], None],
) -> tuple[list[Score], Config]:
    scores = {c: Score(c, stage.name, [], []) for c in stage.around(base)}
    told(stage.name, len(scores), len(scores))
    _load(scores, base, arena, deadline, clock)
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


def _load(scores: dict[Config, Score], base: Config, arena: Arena, deadline: float, clock: Callable[[], float]) -> None:
    """Load the base, then as many others as the time allows; the first choices of a stage come first."""
    for config, why in arena.load([base]).items():
        scores[config].status = why
    others = [config for config in scores if config != base]
    # The base may have been there already, and says nothing; how long one takes, the first of the others tells.
    began = clock()
    for config, why in arena.load(others[:1]).items():
        scores[config].status = why
    each = max(clock() - began, 1e-3)
    count = max(1, int(_LOADING * (deadline - clock()) / each))
    for config, why in arena.load(others[1 : 1 + count]).items():
        scores[config].status = why
    for config in others[1 + count :]:
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
