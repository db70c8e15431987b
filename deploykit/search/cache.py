"""An executor that has done only what was not done before; the store that it keeps results in, and their keys."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploykit.errors import DeploykitError, StorageError
from deploykit.search.contents import Contents, content_of, key_of, machine_here, tools_here
from deploykit.search.entries import Entry, copy_files
from deploykit.search.jobs import Done, Executor, Job
from deploykit.search.machines import Node
from deploykit.search.store import Cache, Writing, default_root

__all__ = ["Cache", "CachedExecutor", "Entry", "Writing", "content_of", "copy_files", "default_root", "key_of"]


class CachedExecutor:
    """Stands before another executor, and is used like it.

    A `Done` that is kept, found or new, has its `folder` in the cache, and the folder that `submit` was given stays
    empty. It must not be written to; `copy_files` gives a user what it holds. It is there until the cache is closed.
    Where the cache cannot be used, `Done.folder` is the folder that was given. Failures are never kept. A job that is
    submitted again while it runs is the same future.

    Args:
        executor: Who does jobs.
        cache: Where results are kept; closed on the way out.
        fresh: Whether what an earlier run measured is measured again; it is kept all the same.
        tools: Versions of the packages that take part; by default of all that are installed here.
        machine: The fingerprint of the machine that does exclusive jobs, or what gives it for a job; by default of
            the node that the job names, else of this one.
    """

    def __init__(
        self,
        executor: Executor,
        cache: Cache,
        *,
        fresh: bool = False,
        tools: Mapping[str, str] | None = None,
        machine: Mapping[str, Any] | Callable[[Job], Mapping[str, Any]] | None = None,
    ) -> None:
        self._executor = executor
        self._cache = cache
        self._fresh = fresh
        self._tools = tools
        self._machine = machine
        self._contents = Contents()
        self._running: dict[str, Future[Done]] = {}
        self._measured: set[str] = set()
        self._guard = threading.Lock()

    @property
    def slots(self) -> int:
        """How many jobs may run side by side."""
        return self._executor.slots

    def machines(self) -> Sequence[Node]:
        """See `Executor.machines`."""
        return self._executor.machines()

    def _machine_of(self, job: Job) -> Mapping[str, Any]:
        """The fingerprint of the machine that does a job."""
        if callable(self._machine):
            return self._machine(job)
        if self._machine is not None:
            return self._machine
        if job.node is None:
            return machine_here()
        return next((n.machine for n in self._executor.machines() if n.name == job.node), None) or machine_here()

    def __enter__(self) -> Self:
        self._executor.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._executor.__exit__(kind, exc, tb)
        finally:
            self._cache.close()

    def submit(self, job: Job, folder: Path) -> Future[Done]:
        """Find a job's result, or have it done; see `Executor.submit`."""
        if self._tools is None:
            self._tools = tools_here()
        try:
            machine = self._machine_of(job) if job.exclusive else None
            key = key_of(job, tools=self._tools, machine=machine, contents=self._contents)
        except DeploykitError:
            return self._executor.submit(job, folder)  # which says in its own words what is wrong with the input
        with self._guard:
            running = self._running.get(key)
            if running is not None:
                return running
            asked = self._running[key] = Future()
            again = self._fresh and job.exclusive and key not in self._measured
        asked.add_done_callback(lambda _: self._running.pop(key, None))
        found = None if again else self._cache.find(key)
        if found is not None:
            _give(asked, found)
            return asked
        try:
            self._have_done(job, key, folder, asked, replace=again)
        except BaseException:
            asked.cancel()  # so that nobody waits for it
            raise
        return asked

    def _have_done(self, job: Job, key: str, folder: Path, asked: Future[Done], *, replace: bool) -> None:
        writing = self._cache.begin(key, replace=replace)
        try:
            writing.open()
        except StorageError as exc:
            self._cache.give_up(exc)
            self._do_without(job, folder, asked)
            return

        def settle(inner: Future[Done]) -> None:
            try:
                done = self._keep(inner.result(), writing, job, folder)
                self._measured.add(key)
            except StorageError as exc:
                writing.close()
                # It may be the cache's file system that is full, and not that of the folder.
                self._do_without(job, folder, asked, why=exc)
            except CancelledError:
                writing.close()
                asked.cancel()
            except Exception as exc:  # noqa: BLE001 - whoever asks for the result gets it
                writing.close()
                _fail(asked, exc)
            else:
                writing.close()
                _give(asked, done)

        try:
            inner = self._executor.submit(job, writing.folder)
        except BaseException:
            writing.close()
            raise
        _pass_cancel(asked, inner)
        inner.add_done_callback(settle)

    def _keep(self, done: Done, writing: Writing, job: Job, folder: Path) -> Done:
        """Put a result into the cache, or else into the folder that was meant for it.

        What says that it is incomplete, because its time was over, is not to be found again by who has more time.
        """
        if done.value.get("incomplete"):
            return copy_files(done, folder)
        try:
            kept = writing.commit(done, deed=job.deed, label=job.label)
        except StorageError as exc:
            self._cache.give_up(exc)
            kept = None
        return kept or copy_files(done, folder)

    def _do_without(self, job: Job, folder: Path, asked: Future[Done], why: StorageError | None = None) -> None:
        """Have a job done without the cache, which is at fault where the job failed with ``why`` and now does not."""

        def settle(inner: Future[Done]) -> None:
            try:
                done = inner.result()
            except CancelledError:
                asked.cancel()
            except Exception as exc:  # noqa: BLE001 - whoever asks for the result gets it
                _fail(asked, exc)
            else:
                if why is not None:
                    self._cache.give_up(why)
                _give(asked, done)

        try:
            shutil.rmtree(folder, ignore_errors=True)  # what a copy left that failed half-way
            folder.mkdir(parents=True, exist_ok=True)
            inner = self._executor.submit(job, folder)
        except Exception as exc:  # noqa: BLE001 - we may be in a callback, where nobody would see it
            _fail(asked, exc)
            return
        _pass_cancel(asked, inner)
        inner.add_done_callback(settle)


def _pass_cancel(asked: Future[Done], inner: Future[Done]) -> None:
    asked.add_done_callback(lambda future: inner.cancel() if future.cancelled() else None)


def _give(asked: Future[Done], done: Done) -> None:
    if asked.set_running_or_notify_cancel():
        asked.set_result(done)


def _fail(asked: Future[Done], error: Exception) -> None:
    if asked.set_running_or_notify_cancel():
        asked.set_exception(error)
