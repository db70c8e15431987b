"""What a tuner searches: how a model may be run, and which settings of a runtime are searched together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from deploykit.machine import Machine

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
