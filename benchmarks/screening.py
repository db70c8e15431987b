"""Screening: many candidates in live processes that take turns, the slower ones sent home early.

Not a verdict, but a choice of whom to measure well: successive halving (Jamieson and Talwalkar, 2016) over turns, in
which every candidate is compared with the reference of the same turn.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.benchmarks.outputs import judge_outputs, read_outputs, write_feeds
from deploykit.benchmarks.plan import Candidate, Settings
from deploykit.benchmarks.process import ChildError, Process
from deploykit.benchmarks.statistics import pace_of, student_975
from deploykit.errors import BenchmarkError
from deploykit.machine import free_memory
from deploykit.progress import Progress
from deploykit.specs import Array, Feeds

_TURN_S, _WARM_S, _SHORTEST_S = 0.2, 0.2, 0.05
_FIRST_TURNS, _MOST_TURNS = 4, 16
# Behind the best by this many standard errors of the difference, beyond doubt.
_BEHIND = 3.0
# Of a group's time, this may go into loading: something has to be known of those that were loaded.
_LOADING = 0.6
# What the first turns may take beyond the time where loading took all of it.
_LATE_S = 2.0
_UNKNOWN = math.log(1000)
_MEMORY_SHARE = 0.6
# A turn holds some requests of a slow model too.
_TURN_REQUESTS = 3


@dataclass(slots=True)
class Screened:
    """What screening found of a candidate.

    Attributes:
        candidate: Which.
        status: "ok", or why it is out: "wrong outputs: ...", "failed: ...", "slower: ...", "not tried: ...".
        parity: Its outputs against the reference's.
        gains: Logarithm of how many times faster than the reference it was, one a turn.
        paces_ns: Nanoseconds a sample, one a turn.
        peak_memory_bytes: Of its process after warming up; None where it is not known.
        load_s: Seconds until its process had answered once; None where it never did.
    """

    candidate: Candidate
    status: str = "ok"
    parity: dict[str, Any] | None = None
    gains: list[float] = field(default_factory=list)
    paces_ns: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    load_s: float | None = None

    @property
    def value(self) -> float:
        """Mean gain; the higher, the faster."""
        return float(np.mean(self.gains)) if self.gains else -math.inf

    @property
    def error(self) -> float:
        """Standard error of `value`."""
        return float(np.std(self.gains, ddof=1)) / math.sqrt(len(self.gains)) if len(self.gains) > 1 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        found: dict[str, Any] = {
            "status": self.status, "outputs": self.parity, "turns": len(self.gains),
            "peak_memory_bytes": self.peak_memory_bytes, "load_s": self.load_s,
        }  # fmt: skip
        if self.gains:
            # One turn says nothing about how much turns differ.
            spread = student_975(len(self.gains) - 1) * self.error if len(self.gains) > 1 else _UNKNOWN
            spread = min(spread, _UNKNOWN)
            found |= {
                "ratio": math.exp(self.value), "low": math.exp(self.value - spread),
                "high": math.exp(self.value + spread), "pace_ms": float(np.median(self.paces_ns)) / 1e6,
            }  # fmt: skip
        return found


def screen(
    candidates: Sequence[Candidate],
    feeds: Sequence[Feeds],
    settings: Settings,
    budget_s: float,
    *,
    keep: int = 4,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Screened]:
    """Find the candidates that are worth measuring well.

    Args:
        candidates: The reference first; it is never sent home. Of more than memory holds, groups are screened one
            after the other, each beside the reference.
        feeds: Inputs to rotate through.
        settings: `batch`, `min_cosine`, `precision`, `threads`; in the scenario "offline" wall time counts.
        budget_s: Seconds for all of it. What they do not reach is "not tried".
        keep: How many stay to the end.
        progress: Told how far it is.
        clock: Seconds.

    Returns:
        One result a candidate, in the order given; those with status "ok" stayed to the end.

    Raises:
        BenchmarkError: The reference does not run.
    """
    told = progress or Progress()
    deadline = clock() + budget_s
    found = [Screened(c) for c in candidates]
    with tempfile.TemporaryDirectory(prefix="deploykit-screen-") as name, ExitStack() as stack:
        ring = _Ring(found, feeds, settings, Path(name), stack, clock)
        ring.start(0)
        if found[0].status != "ok":
            raise BenchmarkError(
                f"the reference {candidates[0].label} does not run: {found[0].status}",
                hint=f"check it: deploykit inspect -m {candidates[0].path}",
            )
        waiting = list(range(1, len(found)))
        for _ in range(0 if waiting else _FIRST_TURNS):  # alone; how long a request takes is asked all the same
            ring.turn([], _TURN_S)
        while waiting:
            left = deadline - clock()
            if left < 2 * _FIRST_TURNS * _SHORTEST_S:
                for number in waiting:
                    found[number].status = "not tried: the budget is too small"
                break
            began, group, loaded = len(waiting), list[int](), clock() + _LOADING * left
            while waiting and (not group or ring.fits()) and clock() < loaded and ring.in_time(group, deadline):
                told.advance(len(found) - len(waiting), len(found), "candidates loaded")
                number = waiting.pop(0)
                if waiting and ring.fits():
                    ring.prefetch(waiting[0])  # loads while this one is compared
                if ring.start(number):
                    group.append(number)
            ring.settle()
            if len(waiting) == began:
                for number in waiting:
                    found[number].status = "not tried: the budget is too small"
                break
            share = (deadline - clock()) * (began - len(waiting)) / began
            _halve(ring, group, keep, clock() + share, told)
            ring.drop(group)
    return found


class _Ring:
    """The live processes."""

    def __init__(
        self,
        found: list[Screened],
        feeds: Sequence[Feeds],
        settings: Settings,
        folder: Path,
        stack: ExitStack,
        clock: Callable[[], float],
    ) -> None:
        self.found = found
        self.clock = clock
        self._feeds = feeds
        self._settings = settings
        self._folder = folder
        self._stack = stack
        self._live: dict[int, Process] = {}
        self._coming: dict[int, Process] = {}
        self._expected: list[dict[str, Array]] = []
        self._request_s: dict[int, float] = {}
        self._longest_s = 0.0  # of what one took to start
        write_feeds(folder / "feeds.npz", feeds)

    def prefetch(self, number: int) -> None:
        """Begin to load a candidate."""
        if number not in self._coming:
            self._coming[number] = self._spawn(number)

    def settle(self) -> None:
        """End what still loads: it would disturb those that take turns."""
        while self._coming:
            self._coming.popitem()[1].kill()

    def _spawn(self, number: int) -> Process:
        candidate = self.found[number].candidate
        child = Process(candidate, self._settings, self._folder, candidate.concurrency or 1, wait=False)
        return self._stack.enter_context(child)

    def in_time(self, group: Sequence[int], deadline: float) -> bool:
        """Whether one more, as slow as the slowest so far, can be loaded and run the two turns that are the least."""
        each = [_TURN_REQUESTS * self._request_s[n] for n in (0, *group)]
        turns = 2 * (sum(max(_SHORTEST_S, s) for s in each) + max(_SHORTEST_S, *each))
        return self.clock() + self._longest_s + turns <= deadline

    def start(self, number: int) -> bool:
        """Load a candidate, compare its outputs, warm it up; whether it may take part."""
        began = self.clock()
        try:
            return self._start(number)
        finally:
            self._longest_s = max(self._longest_s, self.clock() - began)

    def _start(self, number: int) -> bool:
        entry = self.found[number]
        outputs = self._folder / "outputs.npz"
        try:
            child = self._coming.pop(number, None) or self._spawn(number)
            child.ready()
            entry.load_s = round((child.loaded["load_ms"] + child.loaded["first_ms"]) / 1e3, 3)
            child.ask("outputs", outputs=str(outputs))
            if number:
                entry.parity, why = judge_outputs(
                    self._expected, read_outputs(outputs), self._feeds, self._settings.min_cosine
                )
                entry.status = f"wrong outputs: {why}" if why else "ok"
            else:
                self._expected = read_outputs(outputs)
            if entry.status != "ok":
                child.kill()
                return False
            warm = child.ask("warm", seconds=_WARM_S, within_s=_WARM_S)
        except ChildError as exc:
            entry.status = f"failed: {exc}"
            return False
        entry.peak_memory_bytes = warm["peak_memory_bytes"]
        self._request_s[number] = warm["request_ns"] / 1e9
        self._live[number] = child
        return True

    def fits(self) -> bool:
        """Whether one more as large as the largest has room."""
        free, largest = free_memory(), max((self.found[n].peak_memory_bytes or 0) for n in self._live)
        return free is None or largest < _MEMORY_SHARE * free

    def turn(self, numbers: Sequence[int], seconds: float) -> None:
        """Run the reference and these for a while each; one that fails is out."""
        paces = {}
        for number in [0, *numbers]:
            length = max(seconds, _TURN_REQUESTS * self._request_s[number])
            try:
                block = self._live[number].ask("time", seconds=length, within_s=length)
            except ChildError as exc:
                if not number:
                    raise BenchmarkError(f"the reference failed while it was measured: {exc}") from exc
                self.found[number].status = f"failed: {exc}"
                continue
            by = "wall" if self._settings.scenario == "offline" else "median"
            paces[number] = pace_of(block | {"paced_by": by}) / self._settings.batch
        for number, pace in paces.items():
            self.found[number].paces_ns.append(pace)
            self.found[number].gains.append(math.log(paces[0] / pace))

    def drop(self, numbers: Sequence[int]) -> None:
        """Unload these."""
        for number in numbers:
            child = self._live.pop(number, None)
            if child is not None:
                child.kill()


def _halve(ring: _Ring, group: Sequence[int], keep: int, deadline: float, told: Progress) -> None:
    """Take turns; the clearly slower half goes home after every doubling of the turns, until ``keep`` are left."""
    alive, turns, goal = list(group), 0, _FIRST_TURNS
    if not alive:
        return
    seconds = max(_SHORTEST_S, min(_TURN_S, (deadline - ring.clock()) / (2 * _FIRST_TURNS * (len(alive) + 1))))
    while alive and turns < _MOST_TURNS:
        while alive and turns < goal:
            # Every other turn the other way round: nobody always follows the same neighbour.
            ring.turn(alive if turns % 2 else alive[::-1], seconds)
            turns += 1
            alive = [n for n in alive if ring.found[n].status == "ok"]
            told.advance(turns, _MOST_TURNS, f"turns of {len(alive)} candidates")
            late = ring.clock() - deadline
            if late > 0 and (turns >= _FIRST_TURNS or (turns >= 2 and late > _LATE_S)):
                break  # of two turns hardly anything can be told
        alive = _survivors(ring, alive, keep)
        if ring.clock() > deadline:
            break
        goal = turns * 2


def _survivors(ring: _Ring, alive: Sequence[int], keep: int) -> list[int]:
    """Those that may still be among the best ``keep``; of the others at most half go at a time, the slowest first."""
    ranked = sorted(alive, key=lambda n: -ring.found[n].value)
    if len(ranked) <= keep:
        return ranked
    line = ring.found[ranked[keep - 1]]
    out = []
    for number in ranked[max(keep, math.ceil(len(ranked) / 2)) :]:
        entry = ring.found[number]
        if line.value - entry.value > _BEHIND * math.hypot(line.error, entry.error):
            entry.status = f"slower: {math.exp(entry.value):.2f}x the reference, where others are faster"
            out.append(number)
    ring.drop(out)
    return [n for n in ranked if n not in out]
