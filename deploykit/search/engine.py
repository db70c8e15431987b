"""The search itself: make variants, judge them, have them timed (see `timing`), and mend what is worth it.

Each phase has a share of the time that is left when it begins; what is not done by then is left out, and says so. All
work is done by jobs, so that what was done once is not done again, and so that it may be done elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, stamp_of
from deploykit.contract import refuse, violations
from deploykit.errors import ContractError
from deploykit.gating import SMALLEST_MS
from deploykit.modelfile import read_model
from deploykit.models import load_model
from deploykit.progress import Progress
from deploykit.search.crew import Crew
from deploykit.search.fitting import check_batch, check_fit
from deploykit.search.fleet import Station, stations_of, stop
from deploykit.search.graphs import facts_of
from deploykit.search.jobs import Done, Executor
from deploykit.search.judging import Judging, drop_missed
from deploykit.search.machines import Node, machine_of
from deploykit.search.sharing import calibrate_in_parts, shares
from deploykit.search.state import Event, Phase, Place, Seat, Variant, first_place
from deploykit.search.tasks import Tasks
from deploykit.search.timing import GRACE_S, Timing
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
from deploykit.targets import parse_targets

# Of the time that is left when a phase begins, what it may take.
SHARES = {"graphs": 0.2, "make": 0.3, "judge": 0.2, "screen": 0.25, "mend": 0.2, "tune": 0.3, "decide": 0.95}
# A variant that misses the target is mended where it is this much faster than the best that keeps it.
_WORTH = 1.03
_MENDED = 2


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
        began: When the budget began to run; now by default.

    Attributes:
        variants: By name, in the order in which they were made.
        seats: What was, or would have been, measured.
        phases: How long each took.
        failures: Of jobs that failed for another reason than what they were given.
        timing: What was measured.
        fleet: What was measured on other types of machines.
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
        began: float | None = None,
    ) -> None:
        self.wish = wish
        self.told = told
        self.variants: dict[str, Variant] = {}
        self.seats: list[Seat] = []
        self.phases: list[Phase] = []
        self._crew = Crew(executor, scratch, told, clock)
        self._executor = executor
        self._scratch = scratch
        self._run = run
        homes = stations_of(executor)
        self._home: Node | None = homes[0] if homes else None
        self._others = homes[1:]
        self._tasks = Tasks(wish, self.variants, run, node=self._home)
        self._judging = Judging(wish, self._tasks, self._crew, told, clock)
        self.fleet: list[Station] = []
        self._on_event = on_event
        self._on_best = on_best
        self._clock = clock
        self._began = clock() if began is None else began
        self._best: Place | None = None
        self._breach = ""
        self.timing = Timing(
            wish, self.variants, self.seats, self._tasks, self._crew, told, clock, self._began, node=self._home
        )
        self.cores = self.timing.cores

    # --- the way through -----------------------------------------------------------------------------------------

    def go(self) -> None:
        """Search until the budget is spent, or nothing is left to find out.

        Raises:
            DataError: The data do not fit the model.
            DeploykitError: There is nothing to search: the source cannot be exported, or nothing runs.
        """
        with self._phase("export"):
            first = self._export()
            assert first.path is not None
            signature = Artifact.open(first.path).signature
            check_fit(signature, self.wish.data, self.wish.eval_data)
            self.timing.open_batch = check_batch(signature, self.wish.batch)
        spent = self.spent_s()
        if spent > self.wish.budget_s / 2:
            self.told.note(f"the export took {spent:.0f} s of {self.wish.budget_s:g} s: a larger --budget finds more")
        self._seat(first)
        self._note_best()
        with self._phase("graphs") as until:
            base = self._graphs(first, until)
        with self._phase("make") as until:
            self._make(base, until)
        self._send_out()
        with self._phase("judge") as until:
            self._judge(self.seats, until)
        with self._phase("screen") as until:
            self.timing.screen([s for s in self.seats if s.status == "open"], self.timing.longer(until))
        self._note_best()
        with self._phase("mend") as until:
            self._mend(until)
        self._note_best()
        if self.wish.tune:
            with self._phase("tune") as until:
                self.timing.tune(until)
            self._note_best()
        with self._phase("decide") as until:
            self.timing.decide(until)
            stop(self.fleet)
        self._event("done", "the search is done")

    def _send_out(self) -> None:
        """Have all that was made measured on the other types of machines, beside what goes on here."""
        made = [v for v in self.variants.values() if v.path is not None and v.dropped is None]
        for node in self._others:
            cores = int(node.machine.get("cores_allowed") or 1)
            seats = [seat for variant in made for seat in self._seats_of(variant, cores, node.machine)]
            self.fleet.append(
                Station(
                    node, self.wish, self.variants, seats, self._executor, self._scratch, self._run, self._clock,
                    self._began,
                )
            )  # fmt: skip
            self.fleet[-1].timing.open_batch = self.timing.open_batch
            self.fleet[-1].start()

    def spent_s(self) -> float:
        """Seconds since the search began."""
        return self._clock() - self._began

    @property
    def reference(self) -> Place:
        """What all others are compared with; see `Timing.reference`."""
        return self.timing.reference

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
        best = self._best.label if self._best else None
        self._on_event(Event(kind, text, round(self.spent_s(), 2), self.wish.budget_s, best))

    def _note_best(self) -> None:
        best = next(iter(self.timing.order()), None)
        if best is None or best.best_place == self._best:
            return
        self._best = best.best_place
        self._event("best", best.best_place.label)
        self._on_best(best)

    # --- models --------------------------------------------------------------------------------------------------

    def _export(self) -> Variant:
        first = first_variant(self.wish)
        self.variants[first.name] = first
        if first.path is not None:
            given = Artifact.open(first.path)
            first.facts = facts_of(given)
            self._breach = _breach(given, self.wish.contract)
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
        parts = self.wish.shards or len(self._executor.machines())
        if parts > 1 and self.wish.data is not None and any(shares(v) for v in schemes):
            self._calibrate(base, [v for v in schemes if shares(v)], parts, until)
        # The likely winners first; other graphs of the same numbers rarely gain as much.
        order = [*schemes[:3], *fused, *schemes[3:], *([other] if other else [])]
        self._make_all(order, until)
        for variant in order:
            if variant.dropped is None:
                self._seat(variant)

    def _calibrate(self, base: Variant, schemes: Sequence[Variant], parts: int, until: float) -> None:
        """Look at the calibration data in parts, once for all schemes that take what was seen."""
        assert self.wish.data is not None
        device = next((d for d in self.wish.devices if d.endswith(":cpu")), self.wish.devices[0])
        state = calibrate_in_parts(base, self.wish.data, parts, self._crew, self._scratch(), device, self.told, until)
        for variant in schemes:
            variant.state = state

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
        if (barred := self._barred(variant)) and variant is not next(iter(self.variants.values())):
            variant.drop("limits", barred)

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

    def _barred(self, variant: Variant) -> str:
        """Why it cannot win, however fast it is; empty where it can."""
        breach = self._breach if variant is next(iter(self.variants.values())) else ""
        return breach or self.wish.limits.broken(size_bytes=variant.facts["size_bytes"])

    def _seat(self, variant: Variant) -> None:
        self.seats.extend(self._seats_of(variant, self.cores, self._machine))

    def _seats_of(self, variant: Variant, cores: int, machine: Mapping[str, Any]) -> list[Seat]:
        """Where a variant may run on a machine."""
        exported = variant is next(iter(self.variants.values()))
        bf16 = self.wish.native and "bf16" in (machine.get("flags") or ())
        found = []
        for device in self.wish.devices:
            native = bf16 and device == "openvino:cpu" and not variant.quantized
            for precision in ["fp32"] + ["native"] * native:
                place = first_place(variant.name, device, cores, self.wish.samples, precision)
                plain = precision == "fp32"
                seat = Seat(place, exported=exported and plain, lossy=variant.lossy or not plain)
                found.append(seat)
                if barred := self._barred(variant):  # the exported model, which stays to be compared with
                    seat.drop("limits", barred)
        return found

    @property
    def _machine(self) -> Mapping[str, Any]:
        return self._home.machine if self._home is not None else machine_of()

    # --- accuracy ------------------------------------------------------------------------------------------------

    def _judge(self, seats: Sequence[Seat], until: float) -> None:
        """Judge seats on real data, and say what that certifies."""
        if self.phases and self.phases[-1].name == "judge":
            if self._tasks.judged_on is None:
                self.told.note("no accuracy is certified: give real inputs with --data or --eval")
            elif not self.wish.goal.asked:
                self.told.note(
                    "no accuracy is certified: no target was given; what is kept is only compared with the exported "
                    "model, see SQNR and agreement. Ask with --max-drop, --min-agreement or --min-sqnr"
                )
        self._judging.judge(seats, until)

    # --- what could be better ------------------------------------------------------------------------------------

    def _mend(self, until: float) -> None:
        """Make what promises more than the best: schemes that missed the target, and layers given back to float."""
        order = self.timing.order()
        best = max((self._promise(s) for s in order), default=0.0)
        wanted: dict[str, Variant] = {}
        missed = sorted((s for s in self.seats if s.missed and s.status == "open"), key=lambda s: -self._promise(s))
        for seat in missed:
            variant = self.variants[seat.place.model]
            if variant.parent is not None and variant.lossy and self._promise(seat) > best * _WORTH:
                new = mended(self.wish, variant)
                wanted.setdefault(new.name, new)
        drop_missed(self.seats)
        leader = self.variants[order[0].place.model] if order and self.wish.objective != "size" else None
        if leader is not None and self._has_slow_layers(leader, order[0]):
            new = timed(leader)
            wanted.setdefault(new.name, new)
        for variant in list(wanted.values())[:_MENDED]:
            self._add(variant, until)

    def _promise(self, seat: Seat) -> float:
        """How good it were if it kept the target; the more, the better."""
        if self.wish.objective == "size":
            return 1e9 / max(1, self.variants[seat.place.model].facts.get("size_bytes") or 1)
        return seat.ratio or 0.0

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
        drop_missed(fresh)
        if any(s.open for s in fresh):
            self.timing.screen([s for s in fresh if s.open], max(until, self._clock() + GRACE_S))

    def _has_slow_layers(self, leader: Variant, seat: Seat) -> bool:
        """Whether it is worth looking for layers that int8 slows down: the model is large enough to see them."""
        pace_ms = (seat.screening or {}).get("pace_ms") or 0.0
        static = leader.table is not None and leader.table.get("step") == "quantize-static"
        return static and seat.place.device.startswith("ort:") and pace_ms * self.wish.samples >= SMALLEST_MS

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


def _breach(given: Artifact, contract: Sequence[str]) -> str:
    """Why a model that was given, and is not rewritten, breaks the contract; empty where it does not."""
    targets = parse_targets(contract)
    if not targets or given.model_path.suffix != ".onnx":
        return ""
    try:
        refuse(violations(read_model(given.model_path, weights=False), targets), "the model as it was given")
    except ContractError as exc:
        return exc.what
    return ""
