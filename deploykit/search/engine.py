"""The search itself: make variants, judge them, screen them, tune the best, and decide.

Each phase has a share of the time that is left when it begins; what is not done by then is left out, and says so. All
work is done by jobs, so that what was done once is not done again, and so that it may be done elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, stamp_of
from deploykit.benchmarks.tuner import Config
from deploykit.errors import SearchError
from deploykit.gating import SMALLEST_MS
from deploykit.machine import inspect_machine
from deploykit.models import load_model
from deploykit.progress import Progress
from deploykit.search.choice import ranked
from deploykit.search.crew import NOT_TRIED, Crew
from deploykit.search.graphs import facts_of
from deploykit.search.jobs import Done, Executor
from deploykit.search.state import Place, Seat, Variant, first_place, side_by_side, timed_by_wall
from deploykit.search.tasks import Tasks
from deploykit.search.variants import (
    SIMPLIFY,
    first_variant,
    fused_variants,
    graph_variants,
    mended,
    other_export,
    scheme_variants,
    timed,
)
from deploykit.search.wish import Wish

# Of the time that is left when a phase begins, what it may take.
SHARES = {"graphs": 0.2, "make": 0.3, "judge": 0.2, "screen": 0.25, "mend": 0.2, "tune": 0.3, "decide": 0.95}
_KEPT, _TUNED, _DECIDED = 4, 3, 3
# A variant that misses the target is mended where it is this much faster than the best that keeps it.
_WORTH = 1.03
_MENDED = 2
_START_S, _ROUNDS, _MOST_SECONDS, _LEAST_SECONDS = 1.6, 10, 2.0, 0.25
_LEAST_ROUNDS = 5
_LEAST_TUNING_S = 2.0
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Event:
    """What a caller is told while the search goes on.

    Attributes:
        kind: "phase", "made", "dropped", "best" or "done".
        text: For people.
        spent_s: Seconds so far.
        budget_s: Seconds allowed.
        best: Label of the best so far; None before there is one.
    """

    kind: str
    text: str
    spent_s: float
    budget_s: float
    best: str | None = None


@dataclass(slots=True)
class Phase:
    """How long a phase took.

    Attributes:
        name: Of the phase.
        began_s: Since the search began.
        seconds: That it took.
        jobs: That it asked for.
        cached: Of those, how many had been done earlier.
    """

    name: str
    began_s: float
    seconds: float = 0.0
    jobs: int = 0
    cached: int = 0


class Search:
    """One search, with all that it knows.

    Args:
        wish: What is asked for.
        executor: Who does the jobs.
        scratch: Gives a new empty directory for the files of a job.
        told: Told about phases and notes.
        run: Names this search; see `Output.run`.
        on_event: Called with every `Event`.
        on_best: Called with the best seat so far, whenever it is another.
        clock: Seconds.

    Attributes:
        variants: By name, in the order in which they were made.
        seats: What was, or would have been, measured.
        phases: How long each took.
        failures: Of jobs that failed for another reason than what they were given.
        trials: Of the tuner.
        report: The document of the last measurement; None where the budget did not reach it.
        verdict: What that measurement says; see `benchmarks.Report.winner`.
    """

    def __init__(
        self,
        wish: Wish,
        executor: Executor,
        scratch: Callable[[], Path],
        told: Progress,
        *,
        run: str = "",
        on_event: Callable[[Event], None] = lambda event: None,
        on_best: Callable[[Seat], None] = lambda seat: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.wish = wish
        self.told = told
        self.variants: dict[str, Variant] = {}
        self.seats: list[Seat] = []
        self.phases: list[Phase] = []
        self.trials: list[dict[str, Any]] = []
        self.report: dict[str, Any] | None = None
        self.verdict: dict[str, Any] | None = None
        self._crew = Crew(executor, scratch, told, clock)
        self._tasks = Tasks(wish, self.variants, run)
        self._on_event = on_event
        self._on_best = on_best
        self._clock = clock
        self._began = clock()
        self._best: Seat | None = None
        self._reference: Place | None = None
        machine = inspect_machine()
        self.cores = machine.cores_allowed
        self._native = [d for d in wish.devices if d == "openvino:cpu" and machine.flags.get("bf16") and wish.native]

    # --- the way through -----------------------------------------------------------------------------------------

    def go(self) -> None:
        """Search until the budget is spent, or nothing is left to find out.

        Raises:
            DeploykitError: There is nothing to search: the source cannot be exported, or nothing runs.
        """
        with self._phase("export"):
            first = self._export()
        self._seat(first)
        self._note_best()
        with self._phase("graphs") as until:
            base = self._graphs(first, until)
        with self._phase("make") as until:
            self._make(base, until)
        with self._phase("judge") as until:
            self._judge(self.seats, until)
        with self._phase("screen") as until:
            self._screen([s for s in self.seats if s.status == "open"], until)
        self._note_best()
        with self._phase("mend") as until:
            self._mend(until)
        self._note_best()
        if self.wish.tune:
            with self._phase("tune") as until:
                self._tune(until)
            self._note_best()
        with self._phase("decide") as until:
            self._decide(until)
        self._event("done", "the search is done")

    def spent_s(self) -> float:
        """Seconds since the search began."""
        return self._clock() - self._began

    @property
    def failures(self) -> list[dict[str, str]]:
        """Jobs that gave no result, with the reason."""
        return self._crew.failures

    @contextmanager
    def _phase(self, name: str) -> Iterator[float]:
        """Note how long it takes; gives the moment that it has to end by."""
        phase = Phase(name, round(self.spent_s(), 2))
        self.phases.append(phase)
        self._event("phase", name)
        began, done, cached = self._clock(), self._crew.done, self._crew.cached
        left = self.wish.budget_s - self.spent_s()
        with self.told.step(f"[{name}]"):
            try:
                yield began + SHARES.get(name, 1.0) * left
            finally:
                phase.seconds = round(self._clock() - began, 2)
                phase.jobs, phase.cached = self._crew.done - done, self._crew.cached - cached

    def _event(self, kind: str, text: str) -> None:
        best = self._best.best_place.label if self._best else None
        self._on_event(Event(kind, text, round(self.spent_s(), 2), self.wish.budget_s, best))

    def _note_best(self) -> None:
        order = ranked(self.seats, self.variants, self.wish.objective, self.cores)
        best = order[0] if order else None
        if best is None or (self._best is not None and best.best_place == self._best.best_place):
            return
        self._best = best
        self._event("best", best.best_place.label)
        self._on_best(best)

    # --- models --------------------------------------------------------------------------------------------------

    def _export(self) -> Variant:
        first = first_variant(self.wish)
        self.variants[first.name] = first
        if first.path is not None:
            first.facts = facts_of(Artifact.open(first.path))
            return first
        (outcome,) = self._crew.do([self._tasks.make(first)], None)
        if isinstance(outcome, BaseException):
            raise outcome
        self._made(first, outcome)
        return first

    def _graphs(self, first: Variant, until: float) -> Variant:
        """Other graphs of the same numbers; gives the one that schemes start from."""
        self._make_all(graph_variants(self.wish, first), until)
        base = self.variants.get(SIMPLIFY, first)
        base = base if base.dropped is None and base.path is not None else first
        if base is not first:
            self._seat(base)
        return base

    def _make(self, base: Variant, until: float) -> None:
        first = next(iter(self.variants.values()))
        assert first.path is not None
        schemes, left = scheme_variants(self.wish, base)
        if base.quantized or load_model(first.path).quantized:
            self.told.note("the model is quantized already: no scheme is tried on it")
            schemes, left = [], {}
        for name, why in left.items():
            self.variants[name] = Variant(name, "", base.name, None, dropped={"phase": "make", "reason": why})
        other = other_export(self.wish, first, Artifact.open(first.path))
        fused = fused_variants(self.wish, base)
        # The likely winners first; other graphs of the same numbers rarely gain as much.
        order = [*schemes[:3], *fused, *schemes[3:], *([other] if other else [])]
        self._make_all(order, until)
        for variant in order:
            if variant.dropped is None:
                self._seat(variant)

    def _make_all(self, wanted: Sequence[Variant], until: float) -> None:
        for variant in wanted:
            self.variants[variant.name] = variant
        outcomes = self._crew.do([self._tasks.make(v) for v in wanted], until)
        for variant, outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, Done):
                self._made(variant, outcome)
                self._drop_twins(variant)
            else:
                variant.drop("make", str(outcome))
                self._event("dropped", f"{variant.name}: {outcome}")

    def _made(self, variant: Variant, done: Done) -> None:
        variant.path = done.folder / done.value["artifact"]
        variant.facts = {k: v for k, v in done.value.items() if k != "artifact"}
        variant.seconds, variant.cached = round(done.seconds, 2), done.cached
        self._event("made", variant.name)
        broken = self.wish.limits.broken(size_bytes=variant.facts["size_bytes"])
        if broken and variant.parent is not None:
            variant.drop("limits", broken)

    def _drop_twins(self, variant: Variant) -> None:
        """A graph that is there already need not be measured again."""
        if variant.quantized or variant.dropped is not None:
            return
        for other in self.variants.values():
            same = other.facts.get("likeness") == variant.facts["likeness"]
            if other is variant or other.path is None or not same:
                continue
            if other.facts.get("size_bytes", 0) <= variant.facts["size_bytes"] * 1.02:
                variant.drop("make", f"the same graph as {other.name}")
                return

    def _seat(self, variant: Variant) -> None:
        for device in self.wish.devices:
            self.seats.append(Seat(first_place(variant.name, device, self.cores, self.wish.batch)))
            if device in self._native and not variant.quantized:
                place = first_place(variant.name, device, self.cores, self.wish.batch, "native")
                self.seats.append(Seat(place))

    # --- accuracy ------------------------------------------------------------------------------------------------

    def _judge(self, seats: Sequence[Seat], until: float) -> None:
        """Judge seats on real data, a device at a time, and see what they run on."""
        if self._tasks.judged_on is None and len(self.phases) and self.phases[-1].name == "judge":
            self.told.note("no accuracy is certified: give real inputs with --data or --eval")
        waiting = {d: [s for s in seats if s.place.device == d and s.status == "open"] for d in self.wish.devices}
        waiting = {device: found for device, found in waiting.items() if found}
        left = max(1.0, until - self._clock())
        # They stop by themselves; the crew's limit is for one that hangs.
        jobs = [self._tasks.judge(device, found, left) for device, found in waiting.items()]
        outcomes = self._crew.do(jobs, max(until, self._clock() + 1.0) + _GRACE_S)
        for (device, found), outcome in zip(waiting.items(), outcomes, strict=True):
            if isinstance(outcome, Done):
                self._take_in(found, outcome.value["found"])
                continue
            self.told.note(f"nothing is judged on {device}: {outcome}")
            for seat in found:
                # What gives the exported model's numbers within rounding needs no judge; where it does not run,
                # screening will tell.
                if self.variants[seat.place.model].quantized or seat.place.config.precision != "fp32":
                    seat.drop("judge", str(outcome))

    def _take_in(self, seats: Sequence[Seat], found: Mapping[str, Mapping[str, Any]]) -> None:
        for seat in seats:
            told = found[f"{seat.place.model}/{seat.place.config.precision}"]
            seat.quality, seat.placement = told.get("quality"), told.get("placement")
            if "error" in told and (told["error"] != NOT_TRIED or self.variants[seat.place.model].quantized):
                seat.drop("judge", told["error"])
            elif seat.quality is not None and not seat.quality["met"]:
                seat.missed = True
                if not self.wish.goal.asked or seat.quality.get("collapsed"):
                    seat.drop("judge", f"wrong: {seat.quality['summary']}")
            if seat.placement is not None and _in_float(seat.placement):
                seat.drop("judge", "nothing of it runs on integers there: as fast as its parent at best")

    # --- time ----------------------------------------------------------------------------------------------------

    @property
    def reference(self) -> Place:
        """The exported model with the runtime's defaults, on the first device that runs it.

        Raises:
            SearchError: None does.
        """
        if self._reference is not None:
            return self._reference
        first = next(iter(self.variants))
        for device in self.wish.devices:
            seat = next(
                s
                for s in self.seats
                if (s.place.model, s.place.device, s.place.config.precision) == (first, device, "fp32")
            )
            if seat.status == "open":
                self._reference, seat.reference = seat.place, True
                return seat.place
        why = "; ".join(str(s.dropped["reason"]) for s in self.seats if s.dropped and s.place.model == first)
        raise SearchError(f"the exported model runs on none of {', '.join(self.wish.devices)}: {why}")

    def _screen(self, seats: Sequence[Seat], until: float) -> None:
        """Time all in turns; the slower ones are not measured any further."""
        reference = self.reference
        entries: list[tuple[Seat, Place]] = []
        for seat in seats:
            if seat.place != reference:
                entries.append((seat, seat.place))
            if timed_by_wall(self.wish.objective) and self.cores > 1 and seat.place.device.endswith(":cpu"):
                entries.append((seat, side_by_side(seat.place, self.cores)))
        first = self._seat_at(reference)
        first.screening = {"status": "ok", "ratio": 1.0, "low": 1.0, "high": 1.0, "turns": 0}
        if not entries:
            return
        keep = len(entries) if self.wish.objective == "size" else max(_KEPT, math.ceil(len(entries) / 4))
        effort = {"budget_s": max(1.0, until - self._clock())}
        job = self._tasks.timed("screen", [reference, *(p for _, p in entries)], effort, keep=keep)
        (outcome,) = self._crew.do([job], self._end())
        if not isinstance(outcome, Done):
            self.told.note(f"nothing was screened: {outcome}")
            return
        found = outcome.value["found"]
        for (seat, place), entry in zip(entries, found[1:], strict=True):
            self._keep_better(seat, place, entry)
        first.screening |= {k: found[0].get(k) for k in ("pace_ms", "peak_memory_bytes")}
        self._after_screening(first)
        for seat in {id(s): s for s, _ in entries}.values():
            self._after_screening(seat)

    def _end(self) -> float:
        """When the budget ends; a job that is asked for stops by itself before, this is for one that hangs."""
        return max(self._began + 1.05 * self.wish.budget_s, self._clock() + _GRACE_S)

    def _keep_better(self, seat: Seat, place: Place, entry: dict[str, Any]) -> None:
        """Of several ways to run a seat, the fastest counts."""
        known = seat.screening
        if known is None or known.get("ratio", 0.0) < entry.get("ratio", 0.0):
            seat.screening = entry
            seat.tuned = place if place != seat.place else None

    def _after_screening(self, seat: Seat) -> None:
        entry = seat.screening or {}
        status = str(entry.get("status", NOT_TRIED))
        if status != "ok":
            seat.drop("screen", status)
            return
        pace = None if timed_by_wall(self.wish.objective) else entry.get("pace_ms")
        latency = pace * self.wish.batch if pace is not None else None
        broken = self.wish.limits.broken(latency_ms=latency, memory_bytes=entry.get("peak_memory_bytes"))
        if broken:
            seat.drop("limits", broken)

    def _order(self) -> list[Seat]:
        return ranked(self.seats, self.variants, self.wish.objective, self.cores)

    def _mend(self, until: float) -> None:
        """Make what promises more than the best: schemes that missed the target, and layers given back to float."""
        order = self._order()
        best = max((s.ratio or 0.0 for s in order), default=0.0)
        wanted: dict[str, Variant] = {}
        missed = sorted((s for s in self.seats if s.missed and s.status == "open"), key=lambda s: -(s.ratio or 0.0))
        for seat in missed:
            variant = self.variants[seat.place.model]
            if variant.parent is not None and variant.quantized and (seat.ratio or 0.0) > best * _WORTH:
                new = mended(self.wish, variant)
                wanted.setdefault(new.name, new)
        self._drop_missed(self.seats)
        leader = self.variants[order[0].place.model] if order else None
        if leader is not None and self._has_slow_layers(leader, order[0]):
            new = timed(leader)
            wanted.setdefault(new.name, new)
        for variant in list(wanted.values())[:_MENDED]:
            self._add(variant, until)

    def _add(self, variant: Variant, until: float) -> None:
        """Make one more, and judge and screen it as the others were."""
        self.variants[variant.name] = variant
        (outcome,) = self._crew.do([self._tasks.make(variant, exclusive=variant.name.endswith("-timed"))], until)
        if not isinstance(outcome, Done):
            variant.drop("make", str(outcome))
            return
        self._made(variant, outcome)
        if variant.dropped is not None or self._same_file(variant):
            return
        before = len(self.seats)
        self._seat(variant)
        fresh = self.seats[before:]
        self._judge(fresh, until)
        self._drop_missed(fresh)
        if any(s.open for s in fresh):
            self._screen([s for s in fresh if s.open], max(until, self._clock() + _GRACE_S))

    def _drop_missed(self, seats: Sequence[Seat]) -> None:
        for seat in seats:
            if seat.missed and seat.quality is not None:
                seat.drop("judge", f"too inaccurate: {seat.quality['summary']}")

    def _has_slow_layers(self, leader: Variant, seat: Seat) -> bool:
        """Whether it is worth looking for layers that int8 slows down: the model is large enough to see them."""
        pace_ms = (seat.screening or {}).get("pace_ms") or 0.0
        static = leader.table is not None and leader.table.get("step") == "quantize-static"
        return static and seat.place.device.startswith("ort:") and pace_ms * self.wish.batch >= SMALLEST_MS

    def _same_file(self, variant: Variant) -> bool:
        """Whether it came out as what it was to improve on."""
        assert variant.path is not None
        mine = stamp_of(Artifact.open(variant.path).model_path)
        for other in self.variants.values():
            if other is variant or other.path is None:
                continue
            if stamp_of(Artifact.open(other.path).model_path) == mine:
                variant.drop("make", f"the same model as {other.name}")
                return True
        return False

    def _tune(self, until: float) -> None:
        """Search the settings of the best seats."""
        if self.wish.objective == "size":
            return
        objective = "throughput" if timed_by_wall(self.wish.objective) else "latency"
        chosen = [s for s in self._order() if s.ratio is not None][:_TUNED]
        for number, seat in enumerate(chosen):
            share = (until - self._clock()) / (len(chosen) - number)
            if share < _LEAST_TUNING_S:
                self.told.note(f"the settings of {seat.place.label} were {NOT_TRIED}")
                continue
            path = self.variants[seat.place.model].path
            assert path is not None
            batches = objective == "throughput" and self.wish.batch == 1 and _takes_batches(path)
            job = self._tasks.timed(
                "tune", [seat.best_place], {"budget_s": share}, objective=objective, batches=batches
            )
            (outcome,) = self._crew.do([job], self._end())
            if not isinstance(outcome, Done):
                self.told.note(f"{seat.place.label} was not tuned: {outcome}")
                continue
            for trial in outcome.value["trials"]:
                self.trials.append({**trial, "device": seat.place.device, "model": seat.place.model})
            config = _config(outcome.value["chosen"])
            if config != seat.best_place.config:
                seat.tuned = Place(seat.place.model, seat.place.device, config, tuned=True)

    def _decide(self, until: float) -> None:
        """Measure the best well, in fresh processes, beside the exported model."""
        reference = self.reference
        finalists = [s for s in self._order() if s.ratio is not None and s.best_place != reference][:_DECIDED]
        if not finalists:
            return
        count, rounds, seconds = _plan(until - self._clock(), len(finalists))
        if rounds == 0:
            self.told.note("the budget did not reach a last measurement: the order is that of the screening")
            return
        finalists = finalists[:count]
        places = [reference, *(s.best_place for s in finalists)]
        effort = {"rounds": rounds, "seconds": seconds, "warmup_s": min(0.5, seconds)}
        (outcome,) = self._crew.do([self._tasks.timed("decide", places, effort)], self._end())
        if not isinstance(outcome, Done):
            self.told.note(f"the last measurement failed, and the order is that of the screening: {outcome}")
            return
        self.report = outcome.value["report"]
        self.verdict = self.report["winner"]
        self._take_verdicts([self._seat_at(reference), *finalists])

    def _seat_at(self, place: Place) -> Seat:
        return next(s for s in self.seats if s.place == place)

    def _take_verdicts(self, seats: Sequence[Seat]) -> None:
        assert self.report is not None
        for number, (seat, entry) in enumerate(zip(seats, self.report["candidates"], strict=True)):
            if "median_ms" not in entry:
                seat.drop("decide", entry["status"])
                continue
            against = (
                entry["against_reference"]
                if number
                else {"verdict": "reference", "ratio": 1.0, "low": 1.0, "high": 1.0}
            )
            kept = ("median_ms", "p90_ms", "p99_ms", "throughput_per_s", "peak_memory_bytes")
            seat.decision = {**against, **{k: entry[k] for k in kept}}
            latency = None if timed_by_wall(self.wish.objective) else entry["median_ms"]
            broken = self.wish.limits.broken(latency_ms=latency, memory_bytes=entry["peak_memory_bytes"])
            if broken:
                seat.drop("limits", broken)


def _in_float(placement: Mapping[str, Any]) -> bool:
    layers = placement.get("layers") or {}
    return bool(layers) and not any(n["int8"] for n in layers.values())


def _takes_batches(path: Path) -> bool:
    firsts = [s.shape[0] for s in Artifact.open(path).signature.inputs if s.shape]
    return bool(firsts) and not any(isinstance(d, int) for d in firsts)


def _config(found: Mapping[str, Any]) -> Config:
    settings = tuple(sorted(dict(found["settings"]).items()))
    return Config(**{**found, "settings": settings})


def _plan(left_s: float, finalists: int) -> tuple[int, int, float]:
    """How many finalists, rounds, and seconds a round fit into a time: fewer rounds first, then fewer finalists.

    Returns:
        No rounds where not even the fewest fit.
    """
    for count in range(finalists, 0, -1):
        runs = count + 2  # the reference runs twice a round
        for rounds in range(_ROUNDS, _LEAST_ROUNDS - 1, -1):
            seconds = left_s / (rounds * runs) - _START_S
            if seconds >= (_LEAST_SECONDS if rounds == _LEAST_ROUNDS else 0.5):
                return count, rounds, min(_MOST_SECONDS, seconds)
    return 0, 0, 0.0
