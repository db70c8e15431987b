"""Several types of machines: what is best on each, measured there.

Models are made once, by whichever machine has time. What hangs on the machine, accuracy in integers and speed, is
judged and measured on one node of each type; nodes are of one type where `machines.machine_of` is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.errors import DeploykitError
from deploykit.progress import Progress
from deploykit.search.crew import Crew
from deploykit.search.jobs import Executor
from deploykit.search.judging import Judging, drop_missed
from deploykit.search.machines import Node, machine_of
from deploykit.search.state import Place, Seat, Variant
from deploykit.search.tasks import Tasks
from deploykit.search.timing import Timing
from deploykit.search.wish import Wish

# Of the time that is left when a part begins, what it may take.
_SHARES = {"judge": 0.2, "screen": 0.4, "tune": 0.4, "decide": 0.95}


def stations_of(executor: Executor) -> list[Node]:
    """One node of each type of machine, the type of this machine first where it takes part.

    Empty where all are of one type and this machine is of it too: then it does not matter which one measures.
    """
    here = machine_of()
    kinds: dict[str, Node] = {}
    for node in executor.machines():
        kinds.setdefault(node.kind, node)
    found = sorted(kinds.values(), key=lambda n: n.machine != here)
    return [] if len(found) == 1 and found[0].machine == here else found


class Station:
    """The measurements of a search on one type of machine, beside those of the others.

    Args:
        node: That measures.
        wish: What is asked for.
        variants: Of the search; all are made.
        seats: All that may run there, open.
        executor: Who does the jobs.
        scratch: Gives a new empty directory for the files of a job.
        run: Names the search.
        clock: Seconds.
        began: When the search did.

    Attributes:
        failure: Why there is no result; empty where there is one.
    """

    def __init__(
        self,
        node: Node,
        wish: Wish,
        variants: dict[str, Variant],
        seats: list[Seat],
        executor: Executor,
        scratch: Callable[[], Path],
        run: str,
        clock: Callable[[], float],
        began: float,
    ) -> None:
        self.node = node
        self.wish = wish
        self.variants = variants
        self.seats = seats
        self.told = Progress()
        self.failure = ""
        self._crew = Crew(executor, scratch, self.told, clock)
        self._clock = clock
        tasks = Tasks(wish, variants, run, node=node)
        self._judging = Judging(wish, tasks, self._crew, self.told, clock)
        self.timing = Timing(wish, variants, seats, tasks, self._crew, self.told, clock, began, node=node)
        self.cores = self.timing.cores
        self._thread = threading.Thread(target=self._go, name=f"station {node.name}", daemon=True)
        self._until = began + wish.budget_s

    @property
    def reference(self) -> Place:
        """See `Timing.reference`."""
        return self.timing.reference

    def start(self) -> None:
        """Judge and measure, beside whatever else goes on."""
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it came to its end, which an interrupt may have kept it from."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def finish(self) -> None:
        """Wait until it is done."""
        self._thread.join()

    def _go(self) -> None:
        try:
            self._judging.judge(self.seats, self._by("judge"))
            drop_missed(self.seats)
            self.timing.screen([s for s in self.seats if s.status == "open"], self._by("screen"))
            if self.wish.tune:
                self.timing.tune(self._by("tune"))
            self.timing.decide(self._by("decide"))
        except DeploykitError as exc:
            self.failure = str(exc)

    def _by(self, part: str) -> float:
        now = self._clock()
        return now + _SHARES[part] * max(0.0, self._until - now)


def describe(machine: Mapping[str, Any]) -> str:
    """A type of machine, for people."""
    parts = [str(machine.get("cpu") or "unknown processor"), f"{machine.get('cores_allowed')} cores"]
    flags = machine.get("flags") or ()
    fast = [name for name in ("avx512_vnni", "avx_vnni", "amx_int8", "bf16") if name in flags]
    return ", ".join([*parts, *fast])


def stop(stations: Sequence[Station]) -> None:
    """Wait for all of them."""
    for station in stations:
        station.finish()
