"""Jobs in processes of this machine: the default, no server needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deploykit.machine import allowed_cores
from deploykit.progress import Progress
from deploykit.search.child import Child, Died
from deploykit.search.machines import LOCAL, Node, machine_of
from deploykit.search.pool import Pool, Task


class LocalExecutor(Pool):
    """Does jobs in processes that stay, so that runtimes are imported once each; a process starts when it is needed.

    A job that measures has the executor for itself; what else the machine does is not known to it.

    Args:
        workers: Jobs side by side; None for one on two cores.
        progress: Told what jobs report, their labels in front.
    """

    def __init__(self, workers: int | None = None, progress: Progress | None = None) -> None:
        super().__init__(progress)
        self._workers = max(1, workers if workers is not None else allowed_cores() // 2)
        self._idle: list[Child] = []
        self._busy: set[Child] = set()
        self._nodes: tuple[Node, ...] = ()

    def machines(self) -> tuple[Node, ...]:
        """This machine."""
        if not self._nodes:
            self._nodes = (Node(LOCAL, self._workers, machine_of()),)
        return self._nodes

    def _attempt(self, task: Task, place: str) -> Iterator[dict[str, Any]]:
        job = task.job
        told = {
            "deed": job.deed, "params": dict(job.params), "folder": str(task.folder.absolute()),
            "inputs": {name: str(path.absolute()) for name, path in job.inputs.items()}, "stall_s": job.stall_s,
        }  # fmt: skip
        with self._lock:
            if self._closed:
                raise Died("the executor is closed")
            child = self._idle.pop() if self._idle else Child()
            self._busy.add(child)
        try:
            yield from child.ask(told, job.timeout_s)
        except BaseException:
            child.kill()
            raise
        else:
            with self._lock:
                if not self._closed:
                    self._idle.append(child)
        finally:
            with self._lock:
                self._busy.discard(child)

    def _stop(self) -> None:
        with self._lock:
            children = [*self._idle, *self._busy]
            self._idle.clear()
        for child in children:
            child.kill()
