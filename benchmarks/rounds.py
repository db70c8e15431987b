"""Rounds: every candidate once, in shuffled order, each in a fresh process.

Where memory allows, the processes of a round live side by side and take turns of a quarter of a second, so that what
slows the machine for a second slows all of them. Only one works at a time; the others wait for their parent's word.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from deploykit.benchmarks.plan import Entry, Settings
from deploykit.benchmarks.process import ChildError, Process
from deploykit.benchmarks.rates import RateSearch, Trial
from deploykit.errors import BenchmarkError
from deploykit.machine import free_memory

_TURN_S, _TURNS = 0.25, 4
# A turn holds some requests of a slow model too.
_TURN_REQUESTS = 5
_MEMORY_SHARE = 0.6
# A round begins at the rate that the first process found, and looks around it.
_STEP, _SPREAD = 1.1, 0.06


def together(entries: Sequence[Entry]) -> bool:
    """Whether the processes of a round may live side by side: on CPUs, within a share of the free memory."""
    if not all(e.candidate.device.lower().rpartition(":")[2].startswith("cpu") for e in entries):
        return False
    peaks = [e.probe.get("peak_memory_bytes") for e in entries]
    free = free_memory()
    if free is None or None in peaks:
        return False
    return bool(sum(peak for peak in peaks if peak) < _MEMORY_SHARE * free)


def run_round(
    entries: Sequence[Entry],
    number: int,
    folder: Path,
    settings: Settings,
    began: float,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Measure every entry once.

    Args:
        entries: Those that take part.
        number: Of the round; with the seed it decides the order.
        folder: Where the inputs are.
        settings: How.
        began: `time.monotonic` at the beginning of the measurement.
        advance: Told how many are done.

    Returns:
        One result an entry, in the order given.

    Raises:
        BenchmarkError: A process failed.
    """
    rng = random.Random(f"{settings.seed}/{number}")
    order = list(range(len(entries)))
    rng.shuffle(order)
    groups = [order] if together(entries) else [[place] for place in order]
    found: dict[int, dict[str, Any]] = {}
    for group in groups:
        for place, result in _run_group(entries, group, rng, folder, settings, began).items():
            found[place] = result | {"position": order.index(place), "round": number}
        advance(len(found))
    return [found[place] for place in range(len(entries))]


def _run_group(
    entries: Sequence[Entry], group: list[int], rng: random.Random, folder: Path, settings: Settings, began: float
) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        live: dict[int, Process] = {}
        for place in group:
            entry = entries[place]
            with _named(entry):
                child = Process(entry.candidate, settings, folder, entry.concurrency)
                live[place] = stack.enter_context(child)
                warm = child.ask("warm", seconds=settings.warmup_s, within_s=settings.warmup_s)
            found[place] = {
                "load_ms": child.loaded["load_ms"], "first_ms": child.loaded["first_ms"],
                "warmup_runs": warm["warmup_runs"], "request_ns": warm["request_ns"],
                "concurrency": entry.concurrency, "paced_by": "wall" if settings.scenario == "offline" else "median",
                "started_s": round(time.monotonic() - began, 3),
            }  # fmt: skip
        if settings.scenario == "server":
            _search_rates(entries, live, found, rng, settings)
        else:
            _take_turns(entries, live, found, rng, settings)
        for place, child in live.items():
            with _named(entries[place]):
                found[place] |= child.end()
    return found


def _take_turns(
    entries: Sequence[Entry],
    live: dict[int, Process],
    found: dict[int, dict[str, Any]],
    rng: random.Random,
    settings: Settings,
) -> None:
    slowest_s = max(found[place]["request_ns"] for place in live) / 1e9
    turn_s = max(min(_TURN_S, settings.seconds / _TURNS), _TURN_REQUESTS * slowest_s)
    turns = max(1, round(settings.seconds / turn_s))
    for place in live:
        found[place] |= {"samples_ns": [], "wall_ns": 0, "block_sizes": [], "block_wall_ns": []}
    order = list(live)
    for _ in range(turns):
        rng.shuffle(order)
        for place in order:
            with _named(entries[place]):
                block = live[place].ask("time", seconds=settings.seconds / turns, within_s=settings.seconds)
            kept = found[place]
            kept["samples_ns"] += block["samples_ns"]
            kept["wall_ns"] += block["wall_ns"]
            kept["block_sizes"].append(len(block["samples_ns"]))
            kept["block_wall_ns"].append(block["wall_ns"])


def _search_rates(
    entries: Sequence[Entry],
    live: dict[int, Process],
    found: dict[int, dict[str, Any]],
    rng: random.Random,
    settings: Settings,
) -> None:
    """Each its own search for the highest rate, one trial a turn."""
    # Each begins somewhere else: from one rate all searches would end on the same few, and be told apart by a step.
    searches = {
        place: RateSearch(
            entries[place].probe["rate_per_s"] * math.exp(rng.uniform(-_SPREAD, _SPREAD)), growth=_STEP,
            limit=entries[place].probe["capacity_per_s"],
        )
        for place in live
    }  # fmt: skip
    trials: dict[int, list[tuple[Trial, list[int]]]] = {place: [] for place in live}
    order = list(live)
    while True:
        rng.shuffle(order)
        going = [place for place in order if not searches[place].done]
        if not going:
            break
        for place in going:
            with _named(entries[place]):
                trial, samples = try_rate(live[place], searches[place].rate_per_s, settings, rng.getrandbits(32))
            searches[place].learn(trial)
            trials[place].append((trial, samples))
    for place, search in searches.items():
        best = search.best
        # Where no rate met the objective, the samples are those of the lowest.
        shown = best or min((t for t, _ in trials[place]), key=lambda t: t.rate_per_s)
        samples = next(s for t, s in trials[place] if t is shown)
        found[place] |= {
            "samples_ns": samples, "wall_ns": shown.wall_ns, "rate_per_s": shown.rate_per_s, "met": best is not None,
            "trials": [t.as_dict() for t, _ in trials[place]],
        }  # fmt: skip


def try_rate(child: Process, rate_per_s: float, settings: Settings, seed: int) -> tuple[Trial, list[int]]:
    """Send requests at a rate, and judge their p99.

    Returns:
        What came of it, and the latencies in nanoseconds.

    Raises:
        ChildError: The process failed.
    """
    assert settings.slo_p99_ms is not None
    queries = Trial.queries_for(rate_per_s, settings.seconds)
    told = child.ask(
        "serve", rate_per_s=rate_per_s, queries=queries, seed=seed, within_s=10 * queries / rate_per_s,
        objective_ns=int(settings.slo_p99_ms * 1e6),
    )  # fmt: skip
    return Trial.judge(rate_per_s, told, settings.slo_p99_ms), told["samples_ns"]


@contextmanager
def _named(entry: Entry) -> Iterator[None]:
    """Turns a child's failure into an error that names the candidate."""
    try:
        yield
    except ChildError as exc:
        raise BenchmarkError(
            f"{entry.candidate.label} ran once and failed while it was measured: {exc}",
            hint="measure the others without it",
        ) from exc
