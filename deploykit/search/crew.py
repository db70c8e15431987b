"""Has jobs done, several side by side, within a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path

from deploykit.errors import DeploykitError, JobTimeoutError, SearchError
from deploykit.progress import Progress
from deploykit.search.jobs import Done, Executor, Job

NOT_TRIED = "not tried: the budget is too small"
NOT_FINISHED = "not finished: the budget is too small"
_SHORTEST_S = 0.5
# Of the time that is left, what a job may take that others wait for.
_MOST = 0.6


class Crew:
    """Hands jobs to an executor, and takes in what comes of them.

    Args:
        executor: Who does them.
        scratch: Gives a new empty directory for the files of a job.
        told: Told how far it is.
        clock: Seconds.

    Attributes:
        failures: Jobs that gave no result, with the reason.
        done: Jobs that gave one.
        scratch: As given.
        cached: Of those, how many had been done earlier.
    """

    def __init__(
        self,
        executor: Executor,
        scratch: Callable[[], Path],
        told: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures: list[dict[str, str]] = []
        self.done = 0
        self.cached = 0
        self._executor = executor
        self.scratch = scratch
        self._told = told
        self._clock = clock

    def do(self, jobs: Sequence[Job], until: float | None) -> list[Done | DeploykitError]:
        """Have jobs done, as many side by side as may be.

        Args:
            jobs: In the order in which they are begun.
            until: When those that are not done are ended; None for no limit. One that others wait for has no more than
                a share of what is left.

        Returns:
            What came of each: a result, or why there is none.
        """
        found: dict[int, Done | DeploykitError] = {}
        waiting, running = list(range(len(jobs))), dict[Future[Done], int]()
        while waiting or running:
            while waiting and len(running) < max(1, self._executor.slots):
                number = waiting.pop(0)
                left = None if until is None else until - self._clock()
                if left is not None and left < _SHORTEST_S:
                    found[number] = SearchError(NOT_TRIED)
                    continue
                # A slow one must not starve those that wait for it.
                mine = left if left is None or not waiting else _MOST * left
                job = jobs[number] if mine is None else replace(jobs[number], timeout_s=mine)
                running[self._executor.submit(job, self.scratch())] = number
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                number = running.pop(future)
                found[number] = self._outcome(future, jobs[number])
                self._told.advance(len(found), len(jobs), "jobs")
        return [found[number] for number in range(len(jobs))]

    def _outcome(self, future: Future[Done], job: Job) -> Done | DeploykitError:
        try:
            done = future.result()
        except DeploykitError as exc:
            told = str(exc).removeprefix(f"{job.label}: ").removeprefix(f"{job.label} ")
            self.failures.append({"label": job.label, "error": told})
            return SearchError(f"{NOT_FINISHED} ({told})") if isinstance(exc, JobTimeoutError) else exc
        except RuntimeError as exc:  # a bug of ours in one job must not take the others with it, nor be hidden
            last = str(exc).strip().splitlines()[-1]
            self.failures.append({"label": job.label, "error": str(exc)})
            self._told.note(f"{job.label} crashed; please report it: {last}")
            return SearchError(f"it crashed: {last}")
        self.done += 1
        self.cached += done.cached
        return done
