"""Judges the seats of a search on real data, and sees what they run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploykit.progress import Progress
from deploykit.search.crew import NOT_TRIED, Crew
from deploykit.search.jobs import Done
from deploykit.search.so_far import read_so_far
from deploykit.search.state import Seat
from deploykit.search.tasks import Tasks
from deploykit.search.timing import GRACE_S
from deploykit.search.wish import Wish

_SHORTEST_S = 0.5


class Judging:
    """Drops what is wrong, and marks what misses the target.

    Args:
        wish: What is asked for.
        tasks: Makes the jobs.
        crew: Has them done.
        told: Told what could not be judged.
        clock: Seconds.
    """

    def __init__(self, wish: Wish, tasks: Tasks, crew: Crew, told: Progress, clock: Callable[[], float]) -> None:
        self._wish = wish
        self._tasks = tasks
        self._crew = crew
        self._told = told
        self._clock = clock

    def judge(self, seats: Sequence[Seat], until: float) -> None:
        """Judge open seats, a device at a time.

        Args:
            seats: Of one machine.
            until: When it has to be done by; what is not reached is dropped where its numbers may be others than the
                exported model's.
        """
        waiting = {d: [s for s in seats if s.place.device == d and s.status == "open"] for d in self._wish.devices}
        waiting = {device: found for device, found in waiting.items() if found}
        whole = max(1.0, (until - self._clock()) / max(1, len(waiting)))
        for number, (device, found) in enumerate(waiting.items()):
            # What is not judged in time is lost only where its numbers may be others: that comes first.
            found.sort(key=lambda seat: not seat.lossy)
            # One that hangs on a device costs the next device nothing.
            self._judge_on(device, found, max(whole, (until - self._clock()) / (len(waiting) - number)))

    def _judge_on(self, device: str, seats: Sequence[Seat], share: float) -> None:
        """Judge the seats of a device; one that hangs may take half of the time, and those behind it have the rest."""
        end, waiting = self._clock() + share, list(seats)
        while waiting:
            left = end - self._clock()
            if left < _SHORTEST_S:
                _drop_lossy(waiting, NOT_TRIED)
                return
            stall_s = max(GRACE_S, share / 2)
            so_far = self._crew.scratch() / "judged"
            # It stops by itself, but not within a model.
            (outcome,) = self._crew.do(
                [self._tasks.judge(device, waiting, max(1.0, left), stall_s, so_far)], self._clock() + left + stall_s
            )
            if isinstance(outcome, Done):
                self._take_in(waiting, outcome.value["found"])
                return
            told, now = read_so_far(so_far)
            self._take_in([s for s in waiting if key_of(s) in told], told)
            waiting = [s for s in waiting if key_of(s) not in told]
            guilty = next((s for s in waiting if key_of(s) == now), None)
            if guilty is None:
                self._told.note(f"nothing {'more ' * bool(told)}is judged on {device}: {outcome}")
                _drop_lossy(waiting, str(outcome))
                return
            self._told.note(f"{guilty.place.label} could not be judged: {outcome}")
            # It would hang in the screening too, and take all others with it; without the exported model there is none.
            if guilty.lossy or not guilty.exported:
                guilty.drop("judge", str(outcome))
            waiting.remove(guilty)

    def _take_in(self, seats: Sequence[Seat], found: Mapping[str, Mapping[str, Any]]) -> None:
        for seat in seats:
            told = found[key_of(seat)]
            seat.quality, seat.placement = told.get("quality"), told.get("placement")
            if "error" in told and (told["error"] != NOT_TRIED or seat.lossy):
                seat.drop("judge", told["error"])
            elif seat.quality is not None and not seat.quality["met"]:
                seat.missed = True
                if not self._wish.goal.asked or seat.quality.get("collapsed"):
                    seat.drop("judge", f"wrong: {seat.quality['summary']}")
            if seat.placement is not None and _in_float(seat.placement):
                seat.drop("judge", "nothing of it runs on integers there: as fast as its parent at best")


def key_of(seat: Seat) -> str:
    """What a judge calls it."""
    return f"{seat.place.model}/{seat.place.config.precision}"


def _drop_lossy(seats: Sequence[Seat], reason: str) -> None:
    """What gives the exported model's numbers within rounding needs no judge; where it does not run, screening will
    tell.
    """
    for seat in seats:
        if seat.lossy:
            seat.drop("judge", reason)


def drop_missed(seats: Sequence[Seat]) -> None:
    """What misses the target goes no further."""
    for seat in seats:
        if seat.missed and seat.quality is not None:
            seat.drop("judge", f"too inaccurate: {seat.quality['summary']}")


def _in_float(placement: Mapping[str, Any]) -> bool:
    layers = placement.get("layers") or {}
    return bool(layers) and not any(n["int8"] for n in layers.values())
