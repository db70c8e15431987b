"""Which engine's model is kept, where more than one quantized the same parent.

What works beats what does not; among those that work, the faster one in the geometric mean over the devices is kept,
and within the noise of such quick measurements the one with the smaller error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from deploykit.comparing import compare_outputs, outputs_of
from deploykit.deriving import Work, memory_short
from deploykit.errors import DeploykitError
from deploykit.gating import SMALLEST_MS, Gate, quick_ms, quick_times
from deploykit.goals import Goal, Score
from deploykit.models import benchmark_feeds
from deploykit.runtimes import Device

if TYPE_CHECKING:
    from deploykit.specs import Array, Feeds

# Ratios of quick measurements closer to 1 than this say nothing.
_TIE = 0.03


@dataclass(frozen=True, slots=True)
class Entry:
    """One engine's model.

    Attributes:
        engine: Its name.
        score: How it did; None where it failed.
        refused: Why it is no result at all: the engine failed, the target is missed, the outputs are too far away.
        ms: Milliseconds of one request by device.
        slower: Devices in which it is slower than its parent, or does not run.
    """

    engine: str
    score: Score | None = None
    refused: str = ""
    ms: Mapping[str, float] = field(default_factory=dict)
    slower: tuple[str, ...] = ()


def judge_entry(engine: str, score: Score, goal: Goal, too_far: str) -> Entry:
    """An entry that was made and judged, not timed yet.

    Args:
        engine: Its name.
        score: How it did.
        goal: What was asked for.
        too_far: Why its outputs are too far from the parent's; empty where they are not.
    """
    refused = score.collapsed or ("" if score.met else f"the target ({goal.describe()}) is missed") or too_far
    return Entry(engine, score, refused)


def choose(entries: Sequence[Entry], goal: Goal) -> tuple[int, list[str]]:
    """The number of the entry to keep, and for each why it is not kept; empty for the one that is.

    Args:
        entries: One at least has a score.
        goal: What was asked for, for words.
    """
    best = next(i for i, entry in enumerate(entries) if entry.score is not None)
    for number, entry in enumerate(entries):
        if number != best and entry.score is not None and _lost(entry, entries[best], goal) == "":
            best = number
    return best, ["" if i == best else _lost(entry, entries[best], goal) for i, entry in enumerate(entries)]


def _lost(entry: Entry, other: Entry, goal: Goal) -> str:
    """Why an entry loses against another; empty where it wins."""
    if entry.score is None or other.score is None:
        return entry.refused if entry.score is None else ""
    if bool(entry.refused) != bool(other.refused):
        return entry.refused
    if not entry.refused and bool(entry.slower) != bool(other.slower):
        return f"slower than the parent in {', '.join(entry.slower)}" if entry.slower else ""
    ratio = 1.0 if entry.refused else _speed(entry, other)
    if abs(ratio - 1) <= _TIE:
        if entry.score.sqnr_db > other.score.sqnr_db:
            return ""
        how = entry.refused or (f"as fast within {_TIE:.0%}" if entry.ms and other.ms else "not timed")
        return f"{how}, and no closer to the parent ({entry.score.describe(goal)})"
    return "" if ratio > 1 else f"slower than {other.engine}: {ratio:.2f}x over {', '.join(_common(entry, other))}"


def _common(entry: Entry, other: Entry) -> list[str]:
    return [device for device in entry.ms if device in other.ms]


def _speed(entry: Entry, other: Entry) -> float:
    """How many times as fast an entry is, in the geometric mean over the devices that both ran in."""
    ratios = [other.ms[d] / entry.ms[d] for d in _common(entry, other)]
    return geometric_mean(ratios) if ratios else 1.0


def timed(entries: Sequence[Entry], places: Sequence[Path | None], work: Work, gate: Gate) -> list[Entry]:
    """The entries with the times of their files; those that are refused are not timed.

    Nothing is timed where the gate times nothing, nor in a device in which the parent is too quick to be timed.
    """
    found = {i: place for i, place in enumerate(places) if place is not None and not entries[i].refused}
    ms: dict[int, dict[str, float]] = {i: {} for i in found}
    slower: dict[int, list[str]] = {i: [] for i in found}
    feeds, _, _ = benchmark_feeds(work.parent, work.data, 1, work.dims)
    for device in gate.devices if gate.seconds > 0 and len(found) > 1 else ():
        if any(memory_short(device, work.parent, place) for place in found.values()):
            continue
        if _too_quick(work.parent.path, device, feeds):
            continue
        parent, *times = quick_times([work.parent.path, *found.values()], device, feeds)
        for number, time in zip(found, times, strict=True):
            if time is not None:
                ms[number][str(device)] = time
            if time is None or (parent is not None and time > (1 + _TIE) * parent):
                slower[number].append(str(device))
    return [
        Entry(e.engine, e.score, e.refused, ms[i], tuple(slower[i])) if i in found else e
        for i, e in enumerate(entries)
    ]  # fmt: skip


def _too_quick(parent: Path, device: Device, feeds: Sequence[Feeds]) -> bool:
    with suppress(DeploykitError):  # what does not run in floating point may run in integers
        return quick_ms(parent, device, feeds) < SMALLEST_MS
    return False


class Distance:
    """Holds the parent's outputs of the comparison that decides at the end, so that both engines can be held to it."""

    def __init__(self, work: Work, min_cosine: float) -> None:
        self._work = work
        self._min_cosine = min_cosine
        self._expected: list[dict[str, Array]] | None = None

    def too_far(self, place: Path) -> str:
        """Why a model would be refused; empty where it would not."""
        work = self._work
        try:
            if self._expected is None:
                self._expected = outputs_of(work.parent.path, work.device, work.feeds)
            result = compare_outputs(
                self._expected, outputs_of(place, work.device, work.feeds), work.feeds, self._min_cosine
            )
        except DeploykitError as exc:
            return exc.what
        return str(result.reason) if result.verdict == "failed" else ""


def record(entry: Entry, why: str) -> dict[str, Any]:
    """For the lineage: what was tried, and why it was not kept."""
    score = entry.score
    numbers = {} if score is None else {
        "sqnr_db": round(score.sqnr_db, 2) if abs(score.sqnr_db) < float("inf") else None,
        "agreement": None if score.agreement is None else round(score.agreement, 4),
        "value": None if score.value is None else round(score.value, 4),
    }  # fmt: skip
    return {
        "engine": entry.engine,
        "score": {key: value for key, value in numbers.items() if value is not None} or None,
        "ms": {device: round(time, 4) for device, time in entry.ms.items()},
        "kept": not why,
        **({"why": why} if why else {}),
    }
