"""What a search hands over: the document, the artifacts of the front, and the recipe of the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import deploykit
from deploykit.artifact import Artifact, StepRecord, sha256_of
from deploykit.benchmarks.environment import environment
from deploykit.errors import SearchError
from deploykit.recipe import Recipe, dump
from deploykit.runtimes.settings import RuntimeSettings
from deploykit.search.choice import badness, overlap, pareto, preference, ranked, why_on_front
from deploykit.search.crew import NOT_FINISHED, NOT_TRIED
from deploykit.search.engine import Search
from deploykit.search.fleet import describe
from deploykit.search.output import Sealed
from deploykit.search.state import Place, Seat, Variant
from deploykit.search.tasks import has_goal
from deploykit.search.timing import Timing
from deploykit.search.variants import steps_to
from deploykit.search.wish import Wish

_MEASURED = ("screen", "tune", "decide")
_BETTER = {"size": "smaller", "cost": "cheaper"}
# What `preference` looks at, in its order.
_PREFERRED = (
    "its floating point", "its float32", "being the exported model", "its size", "its accuracy", "the order of names",
)  # fmt: skip
# Of those that tie, what seems slower than the best by more than this share is not preferred to it.
_CLOSE = 0.05


class Scene(Protocol):
    """What was measured on one type of machine: a `Search`, or a `Station` of its fleet."""

    wish: Wish
    variants: dict[str, Variant]
    seats: list[Seat]
    timing: Timing
    cores: int

    @property
    def reference(self) -> Place:
        """What all others are compared with."""


class Outcome:
    """The result of a search, ready to be written.

    Args:
        search: What was measured.
        state: "done" or "interrupted".

    Attributes:
        winner: The seat that is kept.
        tied: Seats that cannot be told from it.
        front: Seats of the Pareto front, the winner first.

    Raises:
        SearchError: Nothing keeps what was asked for.
    """

    def __init__(self, search: Scene, state: str) -> None:
        self.search = search
        self.state = state
        self._explain_unmade()
        order = ranked(search.seats, search.variants, search.wish.objective, search.cores)
        if not order:
            raise SearchError(
                f"nothing keeps what was asked for: {_closest(search)}", hint="ask for less, or give more time"
            )
        self.tied = self._tied(order)
        # Of one file on several devices the faster.
        by_size = search.wish.objective == "size"
        self.winner = min(
            self._close(self.tied[0]),
            key=lambda s: (-(s.ratio or 0.0) if by_size else 0.0, *preference(s, search.variants)),
        )
        right = [s for s in search.seats if s.ratio is not None and _is_right(s)]
        right.sort(key=lambda s: (s is not self.winner, s.dropped is not None, preference(s, search.variants)))
        found = pareto(right, search.variants)
        self.front = [self.winner, *(s for s in found if s is not self.winner)]
        for seat in self.front:
            seat.status = "front"
        for seat in self.tied:
            seat.status = "tie"
        self.winner.status = "winner"
        for seat in search.seats:
            if seat.status == "open":
                self._explain(seat)

    def _explain_unmade(self) -> None:
        """Say of what an interrupt came before that it did."""
        for variant in self.search.variants.values():
            if variant.dropped is None and all(s.place.model != variant.name for s in self.search.seats):
                variant.drop("make", f"not tried: the search was {self.state}")

    def _explain(self, seat: Seat) -> None:
        """Say why a seat that was right to the end is not kept."""
        winner, measure = self.winner, self.search.wish.objective
        if seat.missed and seat.quality is not None:
            seat.drop("judge", f"too inaccurate: {seat.quality['summary']}")
        elif seat.ratio is None:
            seat.drop("screen", "not measured")
        elif seat.reference:
            better = _BETTER.get(measure, "faster")
            seat.drop("decide" if seat.decision is not None else "screen", f"the winner is {better}")
        elif measure == "size":
            seat.drop("decide", "larger than the winner")
        else:
            phase = "decide" if seat.decision is not None else "screen"
            worse = "dearer" if measure == "cost" else "slower"
            if seat.decision is None and winner.decision is not None:
                worse += " in the screening than what was measured to the end"
                seat.drop(phase, f"{worse}: {seat.ratio:.2f}x the reference there")
                return
            seat.drop(phase, f"{worse}: {seat.ratio:.2f}x the reference, the winner {winner.ratio or 1.0:.2f}x")

    def _tied(self, order: Sequence[Seat]) -> list[Seat]:
        """The best, with all that the last measurement could not tell from it."""
        search = self.search
        best = order[0]
        if best.ratio is None:  # nothing was measured
            return [best]
        if search.wish.objective == "size":
            return [s for s in order if self._badness(s) <= self._badness(best) * 1.0001]
        cost, verdict = search.wish.objective == "cost", search.timing.verdict
        near = [s for s in order if s is best or (overlap(s, best) and (not cost or _as_many_cores(s, best)))]
        if verdict is None or cost:
            return near
        tied = [s for s in order if s.decision is not None and s.best_place.label in verdict["candidates"]]
        # Where the verdict is about one that a limit excludes, the intervals have to do.
        return tied if tied and len(tied) == len(verdict["candidates"]) else near

    def _close(self, best: Seat) -> list[Seat]:
        """Of those that tie, which may be kept for their accuracy or size.

        Wide intervals are no proof that two are the same: what seems clearly slower is kept for nothing. But where it
        is not even certain that anything is faster than the exported model, that may stay.
        """
        most = self._badness(best) * (1 + _CLOSE)
        return [s for s in self.tied if s is best or s.reference or self._badness(s) <= most]

    def _badness(self, seat: Seat) -> float:
        return badness(seat, self.search.variants[seat.place.model], self.search.wish.objective, self.search.cores)

    @property
    def reference(self) -> str:
        """The exported model with the runtime's defaults, on the first device that runs it."""
        return self.search.reference.label

    @property
    def headline(self) -> str:
        """One sentence: what won, by how much, at which accuracy and size."""
        winner, search = self.winner, self.search
        size = search.variants[winner.place.model].facts.get("size_bytes", 0) / 1e6
        parts = [f"{size:.2f} MB"]
        if winner.quality is not None:
            parts.append(str(winner.quality["summary"]))
        said = f"{'kept' if self._kept else 'winner'}: {winner.best_place.label}"
        found = winner.decision or winner.screening
        if winner.ratio is None:
            said += ", the exported model as it is: nothing was measured"
        elif self._kept:
            better = _BETTER.get(search.wish.objective, "faster")
            how = "as it is" if winner.best_place == search.reference else "with other settings"
            sure = "surely " * (len(self.tied) > 1)
            said += f", the exported model {how}: nothing that is right was {sure}{better}{self._unreached()}"
        elif found is not None and found.get("ratio") is not None:
            faster = f"{found['ratio']:.2f}x [{found['low']:.2f}, {found['high']:.2f}] as fast as {self.reference}"
            tuned = ", before its settings were searched" if winner.best_place.tuned else ""
            said += f", {faster}" if winner.decision is not None else f", {faster} (screened only{tuned})"
        others = [s.best_place.label for s in self.tied if s is not winner]
        if others:
            said += f"; tie with {', '.join(others)}"
            said += "" if self._kept else f", and {self._why_of_tied()}"
        return f"{said}; {', '.join(parts)}"

    @property
    def _kept(self) -> bool:
        """Whether the winner is what was there before, and nothing was found that is better."""
        winner = self.winner
        as_it_is = winner.best_place == self.search.reference or (winner.reference and winner.decision is None)
        return winner.ratio is None or as_it_is

    def _why_of_tied(self) -> str:
        """Why the winner was chosen of those that tie."""
        objective, winner, best = self.search.wish.objective, self.winner, self.tied[0]
        if objective == "size":
            return "the fastest of this size"
        if winner is best:
            return f"the {'cheapest' if objective == 'cost' else 'fastest'} of them"
        mine, its = (preference(s, self.search.variants) for s in (winner, best))
        first = next(number for number, pair in enumerate(zip(mine, its, strict=True)) if pair[0] != pair[1])
        return f"chosen for {_PREFERRED[first]}"

    def _unreached(self) -> str:
        """How many more there were; nothing is claimed of them."""
        dropped = [v.dropped for v in self.search.variants.values()] + [s.dropped for s in self.search.seats]
        late = sum(str((d or {}).get("reason", "")).startswith((NOT_TRIED, NOT_FINISHED)) for d in dropped)
        return f", but the budget did not reach {late} candidate{'s' * (late > 1)}" if late else ""

    def document(self, search: Search, machines: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """For `optimize.json`.

        Args:
            search: The search that this is the result of.
            machines: See `machine_rows`.
        """
        return {
            "deploykit": deploykit.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "state": self.state,
            "spent_s": round(search.spent_s(), 1),
            "environment": environment(),
            "headline": self.headline,
            "winner_seat": self.winner.best_place.label,
            "tied": [s.best_place.label for s in self.tied] if len(self.tied) > 1 else [],
            "reference": self.reference,
            "front": [self._front_entry(seat) for seat in self.front],
            "tried": [_tried(v, search) for v in search.variants.values()],
            "phases": [asdict(p) for p in search.phases],
            "trials": search.timing.trials,
            "failures": search.failures,
            "notes": list(dict.fromkeys(search.told.notes)),
            **({"machines": list(machines)} if machines else {}),
        }

    def _front_entry(self, seat: Seat) -> dict[str, Any]:
        found = seat.decision or seat.screening or {}
        variants = self.search.variants
        return {
            "name": self.name_of(seat),
            "path": f"front/{self.name_of(seat)}",
            "seat": seat.best_place.label,
            "device": seat.place.device,
            "settings": self.settings_of(seat).as_dict(),
            "size_bytes": variants[seat.place.model].facts.get("size_bytes"),
            "ratio": found.get("ratio"), "low": found.get("low"), "high": found.get("high"),
            "decided": seat.decision is not None,
            "quality": seat.quality,
            "why": why_on_front(seat, self.front, variants) if seat.ratio is not None else "not measured",
        }  # fmt: skip

    def name_of(self, seat: Seat) -> str:
        """The artifact's directory: the variant, with the device where it is on the front more than once."""
        mine = seat.place.model
        if sum(s.place.model == mine for s in self.front) == 1:
            return mine
        native = "-native" if seat.place.config.precision == "native" else ""
        return f"{mine}-{seat.place.device.replace(':', '-')}{native}"

    def settings_of(self, seat: Seat) -> RuntimeSettings:
        """How to open it."""
        path = self.search.variants[seat.place.model].path
        assert path is not None
        return seat.best_place.settings_for(sha256_of(Artifact.open(path).model_path), self.search.timing.machine)

    def sealed(self, seat: Seat) -> Sealed:
        """An artifact of the front, as it is to be written."""
        return sealed_of(seat, self.search, self.settings_of(seat), self.name_of(seat))

    def recipe(self, search: Search) -> str | None:
        """The winner's steps as TOML, with all paths absolute; checked to be a recipe.

        Returns:
            None where the winner is what was given: no step makes it.
        """
        tables = recipe_of(self.winner.place.model, search)
        if not tables:
            return None
        Recipe.from_tables(tables, Path.cwd())
        return f"# The winner of a search, without the search: deploykit run recipe.toml -o OUT\n\n{dump(tables)}"


def fleet_outcomes(search: Search) -> dict[str, Outcome | str]:
    """What came of the other types of machines, by a name for each; the reason where nothing did."""
    found: dict[str, Outcome | str] = {}
    for station in search.fleet:
        if not station.done:
            found[station.node.kind] = "interrupted before it was measured"
            continue
        try:
            found[station.node.kind] = station.failure or Outcome(station, "done")
        except SearchError as exc:
            found[station.node.kind] = str(exc)
    return found


def machine_rows(search: Search, mine: Outcome, others: Mapping[str, Outcome | str]) -> list[dict[str, Any]]:
    """The best per type of machine; empty where there is one only."""
    if not others:
        return []
    machines = {s.node.kind: s.node.machine for s in search.fleet}
    rows = [_machine_row("", search.timing.machine, mine)]
    return rows + [_machine_row(kind, machines[kind], outcome) for kind, outcome in others.items()]


def _machine_row(kind: str, machine: Mapping[str, Any], outcome: Outcome | str) -> dict[str, Any]:
    row: dict[str, Any] = {"label": describe(machine), "machine": dict(machine)}
    if isinstance(outcome, str):
        return row | {"winner": None, "headline": outcome}
    name = outcome.name_of(outcome.winner)
    return row | {
        "winner": outcome.winner.best_place.label, "headline": outcome.headline,
        "path": f"front/{place_name(kind, name)}", "settings": outcome.settings_of(outcome.winner).as_dict(),
    }  # fmt: skip


def fleet_front(others: Mapping[str, Outcome | str]) -> list[Sealed]:
    """The artifacts of the best of other types of machines, as they are to be written."""
    found = []
    for kind, outcome in others.items():
        if isinstance(outcome, Outcome):
            sealed = outcome.sealed(outcome.winner)
            found.append(replace(sealed, name=place_name(kind, sealed.name)))
    return found


def place_name(kind: str, name: str) -> str:
    """The directory of an artifact that is the best of another type of machine."""
    return f"{name}-on-{kind}" if kind else name


def sealed_of(seat: Seat, search: Scene, settings: RuntimeSettings, name: str) -> Sealed:
    """A seat's artifact with what the search found out about it."""
    path = search.variants[seat.place.model].path
    assert path is not None
    made, wish = Artifact.open(path), search.wish
    record = StepRecord(
        step="optimize",
        params={
            "objective": wish.objective, "target": wish.goal.describe() or None,
            "limits": wish.limits.describe() or None, "budget_s": wish.budget_s, "seat": seat.best_place.label,
        },
        tools={"deploykit": deploykit.__version__}, parent=made.digest, seconds=0.0,
    )  # fmt: skip
    evidence: dict[str, list[dict[str, Any]]] = {}
    if seat.quality is not None:
        certified = wish.goal.asked and bool(seat.quality["met"])
        evidence["accuracy"] = [{"device": seat.place.device, "certified": certified, **seat.quality}]
    if seat.placement is not None:
        evidence["placement"] = [dict(seat.placement)]
    found = seat.decision or seat.screening
    if found is not None:
        against = search.reference.label
        kind = "decision" if seat.decision is not None else "screening"
        evidence["benchmark"] = [
            {"kind": kind, "device": seat.place.device, "against": against, "settings": settings.as_dict(), **found}
        ]
    return Sealed(name, made, settings, record, evidence)


def recipe_of(name: str, search: Search) -> dict[str, dict[str, Any]]:
    """Tables of the steps that lead to a variant."""
    tables: dict[str, dict[str, Any]] = {}
    for variant in steps_to(name, list(search.variants.values())):
        if variant.table is None:
            continue
        table = {k: v for k, v in variant.table.items() if k not in ("merge_only", "check_rows")}
        if variant.parent is not None:
            parent = search.variants[variant.parent]
            table["model"] = parent.name if parent.table is not None else str(Path(str(parent.path)).absolute())
        else:
            table["source"] = _absolute(search.wish.source)
        if "gate_seconds" not in table and variant.path is not None and table["step"] == "quantize-static":
            # Another measurement may choose other layers.
            table |= {"gate_seconds": 0.0, "exclude": [*table.get("exclude", []), *_slow_layers(variant.path)]}
        if search.wish.data is not None:
            table["data"] = _absolute(search.wish.data)
        if has_goal(table) and search.wish.eval_data is not None:
            table["eval_data"] = _absolute(search.wish.eval_data)
        tables[variant.name] = {k: v for k, v in table.items() if v not in (None, [], {})}
    return tables


def _slow_layers(path: Path) -> list[str]:
    """Layers that stayed in float because they were slower in integers."""
    found = Artifact.open(path).manifest.lineage[-1].params.get("float_because_slower")
    return [str(name) for name in found] if isinstance(found, list) else []


def _absolute(source: str) -> str:
    """The same from anywhere: a path, or `file.py:function` and `directory:signature`; a module's name stays."""
    file, colon, name = source.rpartition(":")
    if Path(source).exists():
        return str(Path(source).absolute())
    return f"{Path(file).absolute()}:{name}" if colon and Path(file).exists() else source


def _tried(variant: Variant, search: Search) -> dict[str, Any]:
    seats = {s.place.label: _seat_entry(s) for s in search.seats if s.place.model == variant.name}
    kept = any(s["status"] in ("winner", "tie", "front") for s in seats.values())
    return {
        "name": variant.name, "about": variant.about, "parent": variant.parent,
        "steps": [dict(v.table) for v in steps_to(variant.name, list(search.variants.values())) if v.table is not None],
        "status": "kept" if kept else "dropped", "dropped": variant.dropped,
        "size_bytes": variant.facts.get("size_bytes"), "nodes": variant.facts.get("nodes"),
        "seconds": variant.seconds, "cached": variant.cached, "seats": seats,
    }  # fmt: skip


def _seat_entry(seat: Seat) -> dict[str, Any]:
    tuned = seat.tuned
    return {
        "label": seat.place.label, "device": seat.place.device, "precision": seat.place.config.precision,
        "status": seat.status, "dropped": seat.dropped if seat.status == "dropped" else None,
        "quality": seat.quality, "placement": seat.placement, "screening": seat.screening,
        "tuned": {"label": tuned.config.label, **tuned.config.as_dict()} if tuned is not None else None,
        "decision": seat.decision,
    }  # fmt: skip


def _is_right(seat: Seat) -> bool:
    """Whether it keeps what was asked for; being slower is no fault."""
    if seat.missed:
        return False
    dropped = seat.dropped
    return dropped is None or (dropped["phase"] in _MEASURED and dropped["reason"].startswith("slower"))


def _as_many_cores(one: Seat, other: Seat) -> bool:
    return one.best_place.cores == other.best_place.cores


def _closest(search: Scene) -> str:
    """Why the most promising seats were dropped."""
    dropped = [s for s in search.seats if s.dropped is not None]
    limits = [s for s in dropped if s.dropped and s.dropped["phase"] == "limits"]
    shown = sorted(limits or dropped, key=lambda s: -(s.ratio or 0.0))[:3]
    missed = [s for s in search.seats if s.missed and s.dropped is None]
    parts = [f"{s.place.label}: {s.dropped['reason']}" for s in shown if s.dropped]
    parts += [f"{s.place.label}: the target is missed" for s in missed[:1]]
    return "; ".join(parts) or "nothing was made"
