"""Jobs: the steps that a search hands out, each a pure function of what it names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from deploykit.progress import Progress
from deploykit.search.machines import Node

# Parameters, inputs by name, an empty folder for what it writes, and whom to tell; gives a JSON-ready value.
Deed = Callable[[Mapping[str, Any], Mapping[str, Path], Path, Progress], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """Work that may be done in any process, on any machine, any number of times, with the same result.

    Attributes:
        deed: `module:function` of a `Deed`.
        params: JSON-ready; together with the contents of `inputs` all that the result follows from.
        inputs: Files and directories that it reads, by name; an executor may hand it copies at other paths.
        label: For people.
        exclusive: Whether it measures time, so that nothing else may run on its machine meanwhile.
        timeout_s: Seconds after which it is ended; None for no limit.
        stall_s: Seconds after which it is ended where it says nothing more, once it has begun to; None for no limit.
        retries: How many times it is done again where its process died.
        node: The only machine that will do, by `Node.name`; None for any.
    """

    deed: str
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    label: str = ""
    exclusive: bool = False
    timeout_s: float | None = None
    stall_s: float | None = None
    retries: int = 1
    node: str | None = None

    def load(self) -> Deed:
        """The function."""
        module, _, name = self.deed.partition(":")
        found: Deed = getattr(importlib.import_module(module), name)
        return found


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a job.

    Attributes:
        value: What its function returned.
        folder: What it wrote.
        seconds: That it took, without waiting for its turn.
        notes: What the user must know.
        machine: `machine_of` where it ran.
        cached: Whether it was done earlier.
    """

    value: dict[str, Any]
    folder: Path
    seconds: float
    notes: tuple[str, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = False


class Executor(Protocol):
    """Does jobs, several at a time. Use as a context manager: on the way out what still runs is ended."""

    @property
    def slots(self) -> int:
        """How many jobs may run side by side."""
        ...

    def machines(self) -> tuple[Node, ...]:
        """Who does jobs."""
        ...

    def submit(self, job: Job, folder: Path) -> Future[Done]:
        """Have a job done.

        Args:
            job: What.
            folder: An empty directory of this machine that receives what the job writes.

        Returns:
            Raises, when it is asked: the `DeploykitError` that the job raised, `JobTimeoutError` where it took too
            long, or `WorkerError` where its process died more often than `Job.retries` allows. Anything else that
            the job raised is a bug, and comes as a `RuntimeError` with the traceback of its process.

        Raises:
            WorkerError: `Job.node` is none of `machines`, or the executor is closed.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...
