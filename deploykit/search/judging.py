"""Judges the seats of a search on real data, and sees what they run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploykit.progress import Progress
from deploykit.search.crew import NOT_TRIED, Crew
from deploykit.search.jobs import Done
from deploykit.search.state import Seat
from deploykit.search.tasks import Tasks
from deploykit.search.timing import GRACE_S
from deploykit.search.wish import Wish


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
        for number, (device, found) in enumerate(waiting.items()):
            # What is not judged in time is lost only where its numbers may be others: that comes first.
            found.sort(key=lambda seat: not seat.lossy)
            share = max(1.0, (until - self._clock()) / (len(waiting) - number))
            # It stops by itself, but not within a model; the crew's limit is for one that hangs.
            (outcome,) = self._crew.do(
                [self._tasks.judge(device, found, share)], self._clock() + share + max(GRACE_S, share)
            )
            if isinstance(outcome, Done):
                self._take_in(found, outcome.value["found"])
                continue
            self._told.note(f"nothing is judged on {device}: {outcome}")
            for seat in found:
                # What gives the exported model's numbers within rounding needs no judge; where it does not run,
                # screening will tell.
                if seat.lossy:
                    seat.drop("judge", str(outcome))

    def _take_in(self, seats: Sequence[Seat], found: Mapping[str, Mapping[str, Any]]) -> None:
        for seat in seats:
            told = found[f"{seat.place.model}/{seat.place.config.precision}"]
            seat.quality, seat.placement = told.get("quality"), told.get("placement")
            if "error" in told and (told["error"] != NOT_TRIED or seat.lossy):
                seat.drop("judge", told["error"])
            elif seat.quality is not None and not seat.quality["met"]:
                seat.missed = True
                if not self._wish.goal.asked or seat.quality.get("collapsed"):
                    seat.drop("judge", f"wrong: {seat.quality['summary']}")
            if seat.placement is not None and _in_float(seat.placement):
                seat.drop("judge", "nothing of it runs on integers there: as fast as its parent at best")


def drop_missed(seats: Sequence[Seat]) -> None:
    """What misses the target goes no further."""
    for seat in seats:
        if seat.missed and seat.quality is not None:
            seat.drop("judge", f"too inaccurate: {seat.quality['summary']}")


def _in_float(placement: Mapping[str, Any]) -> bool:
    layers = placement.get("layers") or {}
    return bool(layers) and not any(n["int8"] for n in layers.values())
