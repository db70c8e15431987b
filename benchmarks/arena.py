"""Where the tuner's configurations run: a live process each, of which one works at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from deploykit.benchmarks.outputs import judge_outputs, read_outputs, write_feeds
from deploykit.benchmarks.plan import Candidate, Settings
from deploykit.benchmarks.process import ChildError, Process
from deploykit.benchmarks.statistics import busy_ns, pace_of
from deploykit.benchmarks.tuner import LostError
from deploykit.benchmarks.tuner_space import Config
from deploykit.machine import free_memory
from deploykit.specs import Array, Feeds

_MEMORY_SHARE = 0.6
_WARM_S = 0.1


class ProcessArena:
    """Runs configurations of one model on one device. Use as a context manager.

    Args:
        candidate: The model and the device.
        settings: For the comparison of outputs.
        feeds_for: Inputs at a batch size.
        folder: For files.
        by_wall: Whether a pace is wall time over requests, as throughput wants it, or the median latency. Of the wall
            time only that counts in which lanes were at work: turns are short, and their ends are not.
    """

    def __init__(
        self,
        candidate: Candidate,
        settings: Settings,
        feeds_for: Callable[[int], Sequence[Feeds]],
        folder: Path,
        *,
        by_wall: bool = False,
    ) -> None:
        self._by_wall = by_wall
        self._candidate = candidate
        self._settings = settings
        self._feeds_for = feeds_for
        self._feeds: dict[int, Sequence[Feeds]] = {}
        self._folder = folder
        self._live: dict[Config, Process] = {}
        self._expected: dict[int, list[dict[str, Array]]] = {}
        self._copy_bytes = 0

    def candidate_of(self, config: Config) -> Candidate:
        """The candidate with a configuration's settings."""
        return replace(
            self._candidate, precision=config.precision, threads=config.threads, sessions=config.sessions,
            concurrency=config.concurrency, optimize=config.optimize, settings=dict(config.settings), tuned=True,
        )  # fmt: skip

    def load(self, configs: Sequence[Config]) -> dict[Config, str]:
        """Load those that are not there yet, all at the same time; gives those that cannot run, with the reason."""
        failed: dict[Config, str] = {}
        fresh = [config for config in configs if config not in self._live]
        if fresh and not self._copy_bytes:
            # How large it is, the first one tells.
            failed |= self._start(fresh[:1])
            fresh = fresh[1:]
        fitting: list[Config] = []
        for config in fresh:
            if self._fits([*fitting, config]):
                fitting.append(config)
            else:
                failed[config] = "too large to be loaded beside the others"
        return failed | self._start(fitting)

    def _start(self, configs: Sequence[Config]) -> dict[Config, str]:
        failed: dict[Config, str] = {}
        started: list[tuple[Config, Process]] = []
        try:
            for config in configs:
                name = self._write_feeds(config.batch)
                child = Process(
                    self.candidate_of(config), self._settings, self._folder, config.concurrency, feeds=name, wait=False
                )
                started.append((config, child))
            for config, child in started:
                try:
                    child.ready()
                    warm = child.ask("warm", seconds=_WARM_S)
                    copies = (warm["peak_memory_bytes"] or 0) // config.sessions
                    self._copy_bytes = max(self._copy_bytes, copies)
                    self._live[config] = child
                except ChildError as exc:
                    child.kill()
                    failed[config] = f"failed: {exc}"
        except BaseException:
            for _, child in started:
                child.kill()
            raise
        return failed

    def _fits(self, configs: Sequence[Config]) -> bool:
        """Whether these fit into the memory that is free; what runs already has taken its part."""
        free = free_memory()
        return free is None or self._copy_bytes * sum(c.sessions for c in configs) < _MEMORY_SHARE * free

    def _write_feeds(self, batch: int) -> str:
        name = f"feeds-{batch}.npz"
        if batch not in self._feeds:
            self._feeds[batch] = self._feeds_for(batch)
            write_feeds(self._folder / name, self._feeds[batch])
        return name

    def turn(self, config: Config, seconds: float) -> float:
        """Run one for a while; nanoseconds a sample."""
        try:
            found = self._live[config].ask("time", seconds=seconds, within_s=seconds)
        except ChildError as exc:
            raise LostError(str(exc)) from exc
        if self._by_wall:
            return busy_ns(found["ends_ns"], config.lanes) / len(found["samples_ns"]) / config.batch
        return pace_of(found) / config.batch

    def drop(self, configs: Sequence[Config]) -> None:
        """Unload these."""
        for config in configs:
            child = self._live.pop(config, None)
            if child is not None:
                child.kill()

    def wrong(self, config: Config) -> str:
        """Why its outputs are not those of fp32 without any of its settings; empty where they are."""
        try:
            if config.batch not in self._expected:
                plain = replace(config, precision="fp32", optimize=True, settings=())
                with Process(
                    self.candidate_of(plain), self._settings, self._folder, feeds=self._write_feeds(config.batch)
                ) as child:
                    self._expected[config.batch] = self._outputs_of(child)
            outputs = self._outputs_of(self._live[config])
        except ChildError as exc:
            return str(exc)
        expected = self._expected[config.batch]
        feeds = self._feeds[config.batch]
        return judge_outputs(expected, outputs, feeds, self._settings.min_cosine)[1]

    def _outputs_of(self, child: Process) -> list[dict[str, Array]]:
        path = self._folder / "tuned-outputs.npz"
        child.ask("outputs", outputs=str(path))
        return read_outputs(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.drop(list(self._live))
