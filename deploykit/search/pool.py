"""What all executors share: the queue, the futures, doing it again, and how a job's progress reaches the user."""

from __future__ import annotations

import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploykit.errors import JobTimeoutError, WorkerError
from deploykit.progress import Progress
from deploykit.search.child import Died, Late
from deploykit.search.jobs import Done, Job
from deploykit.search.machines import Node
from deploykit.search.turns import Place, starts
from deploykit.search.worker import unpack_error

_JOIN_S = 30.0


@dataclass(eq=False, slots=True)
class Task:
    """A job on its way.

    Attributes:
        job: What.
        folder: For what it writes.
        future: Whom to tell.
        deaths: How often its process died.
    """

    job: Job
    folder: Path
    future: Future[Done] = field(default_factory=Future)
    deaths: int = 0

    @property
    def exclusive(self) -> bool:
        """Whether nothing may run beside it."""
        return self.job.exclusive

    @property
    def node(self) -> str | None:
        """The only machine that will do."""
        return self.job.node


class Pool(ABC):
    """An executor but for who does the jobs.

    Args:
        progress: Told what jobs report, their labels in front.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._lock = threading.RLock()
        self._queue: list[Task] = []
        self._places: list[Place] | None = None
        self._threads: set[threading.Thread] = set()
        self._closed = False

    @abstractmethod
    def machines(self) -> tuple[Node, ...]:
        """Who does jobs."""

    @abstractmethod
    def _attempt(self, task: Task, place: str) -> Iterator[dict[str, Any]]:
        """Have a job done once; as `Child.ask`."""

    @abstractmethod
    def _stop(self) -> None:
        """End what runs, and what waits for work."""

    def _leave(self) -> None:
        """Nothing runs any more."""
        return

    @property
    def slots(self) -> int:
        """How many jobs may run side by side."""
        return sum(node.slots for node in self.machines())

    def submit(self, job: Job, folder: Path) -> Future[Done]:
        """Have a job done; see `Executor.submit`."""
        with self._lock:
            if self._closed:
                raise WorkerError("the executor is closed", expected="jobs to be given inside its `with` block")
            known = self.machines()
            if job.node is not None and job.node not in {n.name for n in known}:
                raise WorkerError(
                    f"no machine is called {job.node!r}", expected=f"one of {', '.join(n.name for n in known)}"
                )
            if self._places is None:
                self._places = [Place(node.name, node.slots) for node in known]
            task = Task(job, folder)
            self._queue.append(task)
            self._pump()
            return task.future

    def _pump(self) -> None:
        """Start what may start."""
        with self._lock:
            self._queue = [t for t in self._queue if not t.future.cancelled()]
            if self._closed or not self._queue:
                return
            self._give_up_lost()
            started = []
            for position, place in starts(self._queue, self._places or []):
                task = self._queue[position]
                started.append(task)
                thread = threading.Thread(target=self._run, args=(task, place), daemon=True)
                self._threads.add(thread)
                thread.start()
            self._queue = [t for t in self._queue if not any(t is s for s in started)]

    def _give_up_lost(self) -> None:
        """Fail jobs for machines that are there no more."""
        left = {place.name for place in self._places or []}
        lost = [t for t in self._queue if not left or (t.node is not None and t.node not in left)]
        self._queue = [t for t in self._queue if not any(t is other for other in lost)]
        for task in lost:
            if task.deaths or task.future.set_running_or_notify_cancel():
                task.future.set_exception(WorkerError(f"{_name(task.job)}: the machine that was to do it is gone"))

    def _run(self, task: Task, place: Place) -> None:
        result: Done | None = None
        error: BaseException | None = None
        again = False
        try:
            # A job that is done again runs already.
            if task.deaths or task.future.set_running_or_notify_cancel():
                result = self._finish(task, self._listen(task, place.name))
        except Died as exc:
            task.deaths += 1
            again = task.deaths <= task.job.retries and not self._closed
            if again:
                self._tell_again(task, exc)
            error = self._ended(task, exc)
        except Late as exc:
            error = JobTimeoutError(f"{_name(task.job)} {exc} and was ended")
        except BaseException as exc:  # noqa: BLE001 - the future carries it to who asks
            error = exc
        with self._lock:
            place.end()
            if again:
                try:
                    _empty(task.folder)
                    self._queue.insert(0, task)
                except OSError as exc:
                    again, error = False, exc
        if error is not None and not again:
            task.future.set_exception(error)
        elif result is not None:
            task.future.set_result(result)
        self._pump()
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _listen(self, task: Task, place: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        relay = Relay(self._progress, self._lock, task.job.label)
        try:
            for found in self._attempt(task, place):
                if "said" in found:
                    relay.hear(found)
        finally:
            relay.close()
        return found

    def _finish(self, task: Task, found: dict[str, Any]) -> Done:
        if "error" in found:
            raise unpack_error(found["error"])
        if "bug" in found:
            raise RuntimeError(f"{_name(task.job)} failed in its process:\n{found['bug']}")
        return Done(found["value"], task.folder, found["seconds"], tuple(found["notes"]), found["machine"])

    def _tell_again(self, task: Task, died: Died) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress.note(f"{_name(task.job)} is done again: {died}")

    def _ended(self, task: Task, died: Died) -> WorkerError:
        if self._closed:
            return WorkerError(f"{_name(task.job)} was not finished: the executor was closed")
        times = "" if task.deaths == 1 else f", {task.deaths} times"
        killed = "signal 9" in str(died)
        return WorkerError(
            f"{_name(task.job)}: {died}{times}",
            hint="signal 9 is mostly the kernel, out of memory: use fewer workers" if killed else None,
        )

    def close(self) -> None:
        """End what runs and forget what waits."""
        with self._lock:
            self._closed = True
            waiting, self._queue = self._queue, []
            threads = [t for t in self._threads if t is not threading.current_thread()]
        for task in waiting:
            if not task.deaths:
                task.future.cancel()
            else:
                task.future.set_exception(WorkerError(f"{_name(task.job)} was not finished: the executor was closed"))
        self._stop()
        for thread in threads:
            thread.join(_JOIN_S)
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Relay:
    """Repeats what a job reports.

    Args:
        progress: To whom.
        lock: Held meanwhile, since several jobs report at a time.
        label: Stands in front.
    """

    def __init__(self, progress: Progress | None, lock: threading.RLock, label: str) -> None:
        self._progress = progress
        self._lock = lock
        self._front = f"{label}: " if label else ""
        self._steps: list[AbstractContextManager[None]] = []

    def hear(self, found: dict[str, Any]) -> None:
        """Repeat one thing."""
        if self._progress is None:
            return
        with self._lock:
            if found["said"] == "note":
                self._progress.note(self._front + found["text"])
            elif found["said"] == "step":
                step = self._progress.step(self._front + found["text"])
                step.__enter__()
                self._steps.append(step)
            elif found["said"] == "end" and self._steps:
                self._leave(failed=found["failed"])
            elif found["said"] == "advance":
                self._progress.advance(found["done"], found["total"], found["unit"])

    def close(self) -> None:
        """The job is over, whatever it was at."""
        with self._lock:
            while self._steps:
                self._leave(failed=True)

    def _leave(self, *, failed: bool) -> None:
        error = RuntimeError("in its process") if failed else None
        self._steps.pop().__exit__(type(error) if error else None, error, None)


def _name(job: Job) -> str:
    return job.label or job.deed


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
