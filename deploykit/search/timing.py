"""The timed part of a search: screen all that is right, tune the best, and measure the very best well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deploykit.benchmarks.budget import BLOCK, Cost, takes
from deploykit.benchmarks.tuner_space import Config
from deploykit.errors import BenchmarkError, SearchError
from deploykit.progress import Progress
from deploykit.search.choice import ranked
from deploykit.search.crew import NOT_TRIED, Crew
from deploykit.search.jobs import Done
from deploykit.search.machines import Node, machine_of
from deploykit.search.state import Place, Seat, Variant, side_by_side, timed_by_wall, timed_sets
from deploykit.search.tasks import Tasks
from deploykit.search.wish import Wish

_KEPT, _TUNED, _DECIDED = 4, 3, 3
_ROUNDS, _MOST_SECONDS, _LEAST_SECONDS = 10, 2.0, 0.25
_LEAST_ROUNDS = 5
_LOAD_S, _STEPS, _MOST_WARM_S = 0.2, 20, 0.5
# Of a slow model: fewer rounds and requests than these tell nothing.
_LAST_ROUNDS, _LAST_BLOCK = 3, 3
# Of the time after the screening, where tuning takes all of its share; and what screening takes of it otherwise.
_DECISIONS_SHARE, _LENT = 0.66, 0.4
_LEAST_TUNING_S = 2.0
GRACE_S = 5.0


class Timing:
    """What is measured of the seats of a search.

    Args:
        wish: What is asked for.
        variants: Of the search, by name.
        seats: Of the search; filled while it goes on.
        tasks: Makes the jobs.
        crew: Has them done.
        told: Told what could not be measured.
        clock: Seconds.
        began: When the search did.
        node: The machine that measures; this one by default.

    Attributes:
        machine: `machine_of` where it is measured.
        cores: Allowed there.
        open_batch: Whether the samples in a request are to be found out.
        batch: Samples in a request, as far as that is known.
        trials: Of the tuner.
        report: The document of the last measurement; None where the budget did not reach it.
        verdict: What that measurement says; see `benchmarks.Report.winner`.
    """

    def __init__(
        self,
        wish: Wish,
        variants: Mapping[str, Variant],
        seats: list[Seat],
        tasks: Tasks,
        crew: Crew,
        told: Progress,
        clock: Callable[[], float],
        began: float,
        node: Node | None = None,
    ) -> None:
        self.wish = wish
        self.machine = node.machine if node is not None else machine_of()
        self.cores = int(self.machine.get("cores_allowed") or 1)
        self.open_batch = False
        self.batch = wish.samples
        self.trials: list[dict[str, Any]] = []
        self.report: dict[str, Any] | None = None
        self.verdict: dict[str, Any] | None = None
        self._variants = variants
        self._seats = seats
        self._tasks = tasks
        self._crew = crew
        self._told = told
        self._clock = clock
        self._began = began
        self._reference: Place | None = None

    @property
    def reference(self) -> Place:
        """The exported model with the runtime's defaults, on the first device that runs it.

        Raises:
            SearchError: None does.
        """
        if self._reference is not None:
            return self._reference
        exported = [s for s in self._seats if s.exported]
        for seat in exported:
            # Too large to win is not too large to compare with.
            if seat.dropped is None or seat.dropped["phase"] == "limits":
                self._reference, seat.reference = seat.place, True
                return seat.place
        why = "; ".join(f"{s.place.device}: {s.dropped['reason']}" for s in exported if s.dropped)
        raise SearchError(f"the exported model runs on none of {', '.join(self.wish.devices)}: {why}")

    def order(self) -> list[Seat]:
        """Those that may win, the best first."""
        return ranked(self._seats, self._variants, self.wish.objective, self.cores)

    def screen(self, seats: Sequence[Seat], until: float) -> None:
        """Time all in turns; the slower ones are not measured any further.

        Raises:
            SearchError: The exported model runs on no device.
        """
        reference = self.reference
        entries: list[tuple[Seat, Place]] = []
        # Where the time does not reach all, it is other graphs of the same numbers that gain least.
        for seat in sorted(seats, key=lambda s: not s.lossy):
            if seat.place != reference:
                entries.append((seat, seat.place))
            if timed_by_wall(self.wish.objective) and self.cores > 1 and seat.place.device.endswith(":cpu"):
                entries.append((seat, side_by_side(seat.place, self.cores)))
        keep = len(entries) if self.wish.objective == "size" else max(_KEPT, math.ceil(len(entries) / 4))
        effort = {"budget_s": max(1.0, until - self._clock())}
        job = self._tasks.timed("screen", [reference, *(p for _, p in entries)], effort, keep=keep)
        (outcome,) = self._crew.do([job], self._end())
        first = self._seat_at(reference)
        if isinstance(outcome, BenchmarkError) and first.screening is None:
            # It was exported, and does not run there: the reference is the next device's.
            first.reference, self._reference = False, None
            first.drop("screen", str(outcome))
            self.screen([s for s in seats if s is not first], until)
            return
        if not isinstance(outcome, Done):
            self._told.note(f"nothing was screened: {outcome}")
            return
        found = outcome.value["found"]
        if first.screening is None:
            itself = {k: found[0].get(k) for k in ("pace_ms", "peak_memory_bytes", "load_s")}
            first.screening = {"status": "ok", "ratio": 1.0, "low": 1.0, "high": 1.0, "turns": 0, **itself}
        for (seat, place), entry in zip(entries, found[1:], strict=True):
            self._keep_better(seat, place, entry)
        for seat in {id(s): s for s in (first, *(s for s, _ in entries))}.values():
            self._after_screening(seat)

    def longer(self, until: float) -> float:
        """Until when to screen: where no last measurement can follow, most of its time is the screening's."""
        left = self._began + self.wish.budget_s - until
        if plan(_DECISIONS_SHARE * left, [UNKNOWN, UNKNOWN], timed_by_wall(self.wish.objective))[1]:
            return until
        return until + max(0.0, _LENT * left)

    def _end(self) -> float:
        """When the budget ends; a job that is asked for stops by itself before, this is for one that hangs."""
        return max(self._began + 1.05 * self.wish.budget_s, self._clock() + GRACE_S)

    def _keep_better(self, seat: Seat, place: Place, entry: dict[str, Any]) -> None:
        """Of several ways to run a seat, the fastest that works counts."""
        if seat.screening is None or _worth(seat.screening) < _worth(entry):
            seat.screening = entry
            seat.tuned = place if place != seat.place else None

    def _after_screening(self, seat: Seat) -> None:
        entry = seat.screening or {}
        status = str(entry.get("status", NOT_TRIED))
        if status != "ok":
            seat.drop("screen", status)
            return
        pace = None if timed_by_wall(self.wish.objective) else entry.get("pace_ms")
        latency = pace * self.batch if pace is not None else None
        self._hold_to_limits(seat, latency, entry.get("peak_memory_bytes"))

    def _hold_to_limits(self, seat: Seat, latency_ms: float | None, memory_bytes: float | None) -> None:
        broken = self.wish.limits.broken(latency_ms=latency_ms, memory_bytes=memory_bytes)
        if not broken and memory_bytes is None and self.wish.limits.max_memory_mb is not None:
            broken = f"what memory it takes is not known here, and {self.wish.limits.describe()} was asked for"
        if broken:
            seat.drop("limits", broken)

    def tune(self, until: float) -> None:
        """Search the settings of the best seats.

        Where the samples in a request are to be found out, the best seat tells; all others take as many, so that they
        can be compared.
        """
        if self.wish.objective == "size":
            return
        objective = "throughput" if timed_by_wall(self.wish.objective) else "latency"
        chosen = [s for s in self.order() if s.ratio is not None][:_TUNED]
        by_wall = timed_by_wall(self.wish.objective)
        for number, seat in enumerate(chosen):
            share = (until - self._clock()) / (len(chosen) - number)
            if share < max(_LEAST_TUNING_S, self._cost(seat).tuning_s()):
                self._told.note(f"the settings of {seat.place.label} were {NOT_TRIED}")
                continue
            first = self.open_batch and by_wall and number == 0
            job = self._tasks.timed(
                "tune", [self._filled(seat.best_place)], {"budget_s": share}, batch=self.batch, objective=objective,
                batches=first,
            )  # fmt: skip
            (outcome,) = self._crew.do([job], self._end())
            if not isinstance(outcome, Done):
                self._told.note(f"{seat.place.label} was not tuned: {outcome}")
                continue
            for trial in outcome.value["trials"]:
                self.trials.append({**trial, "device": seat.place.device, "model": seat.place.model})
            config = _config(outcome.value["chosen"])
            if first:
                self._take_batch(config.batch, outcome.value["trials"])
            if config != seat.best_place.config:
                seat.tuned = Place(seat.place.model, seat.place.device, config, tuned=True)

    def _take_batch(self, batch: int, trials: Sequence[Mapping[str, Any]]) -> None:
        """From here on requests hold so many samples; said with what that gains."""
        self.batch = batch
        rates = {t["batch"]: t["throughput_per_s"] for t in trials if t["stage"] == "batch" and t["throughput_per_s"]}
        if len(rates) < 2 or 1 not in rates:
            self._told.note(f"batch {batch}: the budget left no time for others")
            return
        found = ", ".join(f"{n} {rate / rates[1]:.2f}x" for n, rate in sorted(rates.items()) if n != 1)
        how = "chosen" if batch != self.wish.samples else "kept: no other was worth it"
        self._told.note(f"batch {batch} {how}; samples a second against batch 1: {found}")

    def _filled(self, place: Place) -> Place:
        """With as many samples in a request as were found best."""
        return replace(place, config=replace(place.config, batch=self.batch))

    def decide(self, until: float) -> None:
        """Measure the best well, in fresh processes, beside the exported model."""
        reference = self.reference
        finalists = [s for s in self.order() if s.ratio is not None and s.best_place != reference][:_DECIDED]
        if not finalists:
            return
        costs = [self._cost(seat) for seat in (self._seat_at(reference), *finalists)]
        count, rounds, seconds = plan(
            until - self._clock(), costs, timed_by_wall(self.wish.objective), timed_sets(self.batch)
        )
        if rounds == 0:
            self._told.note("the budget did not reach a last measurement: the order is that of the screening")
            return
        places = [self._filled(p) for p in (reference, *(s.best_place for s in finalists[:count]))]
        effort = {
            "rounds": rounds, "seconds": seconds, "warmup_s": min(_MOST_WARM_S, seconds),
            "budget_s": until - self._clock(),
        }  # fmt: skip
        (outcome,) = self._crew.do([self._tasks.timed("decide", places, effort, batch=self.batch)], self._end())
        if not isinstance(outcome, Done):
            self._told.note(f"the last measurement failed, and the order is that of the screening: {outcome}")
            return
        self.report = outcome.value["report"]
        self.verdict = self.report["winner"]
        self._take_verdicts([self._seat_at(reference), *finalists[:count]], places)

    def _cost(self, seat: Seat) -> Cost:
        found = seat.screening or {}
        pace_ms, load_s = found.get("pace_ms"), found.get("load_s")
        lanes = seat.best_place.config.concurrency if timed_by_wall(self.wish.objective) else 1
        return Cost(load_s if load_s is not None else _LOAD_S, (pace_ms or 0.0) / 1e3 * self.batch, lanes)

    def _seat_at(self, place: Place) -> Seat:
        return next(s for s in self._seats if s.place == place)

    def _take_verdicts(self, seats: Sequence[Seat], places: Sequence[Place]) -> None:
        assert self.report is not None
        for number, (seat, place, entry) in enumerate(zip(seats, places, self.report["candidates"], strict=True)):
            if "median_ms" not in entry:
                if seat.decision is None:  # else the exported model with settings that do not work
                    seat.drop("decide", entry["status"])
                elif seat.tuned == place:
                    seat.tuned = None
                continue
            itself = {"verdict": "reference", "ratio": 1.0, "low": 1.0, "high": 1.0}
            against: dict[str, Any] = entry["against_reference"] if number else itself
            if seat.decision is not None and against["ratio"] < 1:
                continue  # the exported model with settings that did not help
            kept = ("median_ms", "p90_ms", "p99_ms", "throughput_per_s", "peak_memory_bytes")
            seat.decision = {**against, **{k: entry[k] for k in kept}}
            # What was measured is what is handed over.
            seat.tuned = place if place != seat.place else None
        for seat in seats:
            if seat.decision is None:
                continue
            latency = None if timed_by_wall(self.wish.objective) else seat.decision["median_ms"]
            self._hold_to_limits(seat, latency, seat.decision["peak_memory_bytes"])


def _worth(entry: Mapping[str, Any]) -> tuple[bool, float]:
    """What works before what does not, then the faster."""
    return entry.get("status") == "ok", entry.get("ratio") or 0.0


def _config(found: Mapping[str, Any]) -> Config:
    config = Config(**found)
    return replace(config, settings=tuple(sorted(dict(found["settings"]).items())))


UNKNOWN = Cost(_LOAD_S, 0.0)


def plan(left_s: float, costs: Sequence[Cost], by_wall: bool = False, sets: int = 16) -> tuple[int, int, float]:
    """How many finalists, rounds, and seconds a round fit into a time: fewer rounds first, then fewer finalists, and
    before there is no measurement at all, one of the best alone in the fewest rounds that give an interval.

    Args:
        left_s: Seconds.
        costs: Of the reference, and of the finalists, the best first.
        by_wall: Whether throughput counts.
        sets: Of inputs, which every model runs once.

    Returns:
        No rounds where not even the fewest fit.
    """

    def need(chosen: Sequence[Cost], rounds: int, seconds: float) -> float:
        return takes(chosen, rounds, seconds, min(_MOST_WARM_S, seconds), by_wall=by_wall, sets=sets)

    tries = [(count, _LEAST_ROUNDS, BLOCK) for count in range(len(costs) - 1, 0, -1)]
    if tries:
        tries.append((1, _LAST_ROUNDS, _LAST_BLOCK))
    for count, least, block in tries:
        chosen = costs[: count + 1]
        shortest = max(block * c.request_s for c in chosen)
        for rounds in range(_ROUNDS, least - 1, -1):
            low = max(shortest, _LEAST_SECONDS if rounds <= _LEAST_ROUNDS else 0.5)
            high = max(_MOST_SECONDS, low)
            if need(chosen, rounds, low) > left_s:
                continue
            if need(chosen, rounds, high) <= left_s:
                return count, rounds, high
            for _ in range(_STEPS):  # what fits, and what does not, come together
                middle = (low + high) / 2
                low, high = (low, middle) if need(chosen, rounds, middle) > left_s else (middle, high)
            return count, rounds, low
    return 0, 0, 0.0
