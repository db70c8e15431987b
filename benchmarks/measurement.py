"""Interleaved measurement: first who is right, then who is fast."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.benchmarks.environment import environment
from deploykit.benchmarks.journal import Journal, key_of
from deploykit.benchmarks.outputs import judge_outputs, read_outputs, write_feeds
from deploykit.benchmarks.parity import check_vacuity
from deploykit.benchmarks.plan import MIN_ROUNDS, Candidate, Entry, Settings
from deploykit.benchmarks.process import ChildError, Process
from deploykit.benchmarks.rates import RateSearch
from deploykit.benchmarks.report import Report, build_report, keeps_accuracy, missed_rounds, ranking
from deploykit.benchmarks.rounds import run_round, together, try_rate
from deploykit.benchmarks.statistics import percentile
from deploykit.data import Dataset
from deploykit.errors import BenchmarkError
from deploykit.machine import allowed_cores
from deploykit.progress import Progress
from deploykit.specs import Feeds

# Of how many the best are measured once more.
_CONFIRMED = 3
_SWEEP_S, _SWEEP_PASSES = 0.5, 2
# The smallest number of requests in flight that gives this share of the highest throughput is the knee.
_KNEE = 0.97


def measure(
    candidates: Sequence[Candidate],
    feeds: Sequence[Feeds],
    settings: Settings,
    *,
    data: Dataset | None = None,
    progress: Progress | None = None,
    journal: Path | None = None,
    resume: bool = False,
    within_s: float | None = None,
) -> Report:
    """Measure candidates in shuffled interleaved rounds, each in a fresh process.

    The first candidate is the reference. Every candidate runs the inputs once; those whose outputs are not the
    reference's are reported and not timed. The reference is timed twice a round, which gives the noise floor.

    Args:
        candidates: The reference first.
        feeds: Inputs to rotate through.
        settings: Rounds, seconds and limits.
        data: With `labels`: accuracy is measured over all of it.
        progress: Told about steps; an interrupt after three rounds keeps them.
        journal: A file that keeps every finished round; to be removed when the report is written.
        resume: Go on with what the journal holds.
        within_s: Seconds for all of it: no round begins, after the three that intervals need, that would end later.

    Raises:
        BenchmarkError: Settings that give no result, the reference does not run, or the journal is of another
            measurement.
    """
    settings.check()
    told = progress or Progress()
    return _Measurement(candidates, feeds, settings, data, told, Journal(journal), within_s).run(resume)


class _Measurement:
    """The steps of `measure`, with what they share."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        feeds: Sequence[Feeds],
        settings: Settings,
        data: Dataset | None,
        told: Progress,
        journal: Journal,
        within_s: float | None,
    ) -> None:
        self._entries = [Entry(c) for c in candidates]
        self._twin = Entry(candidates[0])
        self._feeds = feeds
        self._settings = settings
        self._labelled = data.source if data is not None and _has_labels(data) else None
        self._told = told
        self._journal = journal
        self._began = time.monotonic()
        self._until = math.inf if within_s is None else self._began + within_s

    def run(self, resume: bool) -> Report:
        told, settings = self._told, self._settings
        key = key_of(self._entries, self._feeds, settings, self._labelled)
        everything = [*self._entries, self._twin]
        with tempfile.TemporaryDirectory(prefix="deploykit-bench-") as name:
            folder = Path(name)
            write_feeds(folder / "feeds.npz", self._feeds)
            kept = self._journal.resume(everything, key) if resume else None
            if kept is not None:
                self._began -= kept["elapsed_s"]
                told.notes.extend(kept["notes"])
                told.note(f"resumed: {len(self._twin.rounds)} of {settings.rounds} rounds were there already")
            else:
                self._check_outputs(folder)
                self._keep(key)
            running = [e for e in self._entries if e.status == "ok"]
            if not together([*running, self._twin]):
                told.note("processes run one after the other: not all on CPUs, or too large to be loaded side by side")
            interrupted = self._run_rounds("rounds", running, folder, key)
            best = [] if interrupted else self._best(running)
            if best:
                interrupted = self._run_rounds("again", [self._entries[0], *best], folder, key)
        return build_report(
            self._entries, self._twin, settings, environment(),
            notes=told.notes, labelled=self._labelled, interrupted=interrupted,
        )  # fmt: skip

    def _keep(self, key: dict[str, Any]) -> None:
        elapsed = time.monotonic() - self._began
        self._journal.write([*self._entries, self._twin], key, elapsed_s=elapsed, notes=self._told.notes)

    def _check_outputs(self, folder: Path) -> None:
        entries, told = self._entries, self._told
        with told.step(f"check the outputs of {len(entries)} candidates"):
            for number, entry in enumerate(entries):
                told.advance(number, len(entries), "candidates")
                self._probe(entry, folder)
                if entries[0].status != "ok" and "rate_per_s" not in entries[0].probe and "sweep" in entries[0].probe:
                    raise BenchmarkError(
                        f"the reference {entries[0].candidate.label}: {entries[0].status}",
                        hint="name a model first that keeps the objective, or a larger one: --slo-p99-ms",
                    )
                if entries[0].status != "ok":
                    raise BenchmarkError(
                        f"the reference {entries[0].candidate.label} does not run: {entries[0].status}",
                        hint="check it: deploykit inspect -m " + entries[0].candidate.path,
                    )
                if entry.status != "ok":
                    told.note(f"{entry.candidate.label} does not enter: {entry.status}")
        vacuous = check_vacuity(entries[0].outputs)
        if vacuous:
            told.note(f"equal outputs prove nothing here: {vacuous}")
        for entry in entries:
            entry.outputs = []
        self._twin.probe = entries[0].probe

    def _probe(self, entry: Entry, folder: Path) -> None:
        outputs = folder / "outputs.npz"
        outputs.unlink(missing_ok=True)
        try:
            with Process(entry.candidate, self._settings, folder) as child:
                found = child.loaded | child.ask("probe", outputs=str(outputs), labelled=self._labelled)
                entry.outputs = read_outputs(outputs)
                if entry is not self._entries[0]:
                    entry.parity, why = judge_outputs(
                        self._entries[0].outputs, entry.outputs, self._feeds, self._settings.min_cosine
                    )
                    entry.outputs = []
                    entry.status = f"wrong outputs: {why}" if why else "ok"
                if entry.status == "ok" and self._settings.scenario != "latency":
                    found |= _find_load(child, entry.candidate, self._settings)
                    entry.status = found.pop("status", "ok")
                entry.probe = found | child.end()
        except ChildError as exc:
            entry.status = f"failed: {exc}"

    def _run_rounds(self, kind: str, entries: list[Entry], folder: Path, key: dict[str, Any]) -> bool:
        """Measure; True where an interrupt ended it after enough rounds.

        Args:
            kind: "rounds", or "again" for those that confirm the best.
            entries: The reference first; its twin is measured too.
            folder: Where the inputs are.
            key: Of the journal.
        """
        told, settings = self._told, self._settings
        running = [*entries, self._twin]
        what = f"measure {len(entries)} candidates" if kind == "rounds" else f"measure the best {len(entries) - 1} anew"
        total = settings.rounds * len(running)
        offset = settings.rounds if kind == "again" else 0
        with told.step(f"{what} in {settings.rounds} rounds"):
            first, began = len(getattr(self._twin, kind)), time.monotonic()
            for number in range(first, settings.rounds):
                each = (time.monotonic() - began) / max(1, number - first)
                if number >= MIN_ROUNDS and time.monotonic() + each > self._until:
                    told.note(f"the time was over after {number} of {settings.rounds} {_WORDS[kind]}")
                    self._settings = replace(settings, rounds=number)
                    return False
                done = number * len(running)
                told.advance(done, total, "runs")
                try:
                    results = run_round(
                        running, number + offset, folder, settings, self._began,
                        lambda n, done=done: told.advance(done + n, total, "runs"),  # type: ignore[misc]
                    )  # fmt: skip
                except KeyboardInterrupt:
                    if kind == "rounds" and number < MIN_ROUNDS:
                        raise
                    told.note(f"interrupted: {number} of {settings.rounds} {_WORDS[kind]} were measured")
                    return True
                for entry, result in zip(running, results, strict=True):
                    getattr(entry, kind).append(result)
                self._keep(key)
        return False

    def _best(self, running: list[Entry]) -> list[Entry]:
        """The candidates that are measured once more: what was chosen out of many was chosen for its luck too."""
        settings = self._settings
        eligible = [e for e in running if keeps_accuracy(e, running[0], settings.max_drop) and not missed_rounds(e)]
        if not settings.confirm or len(eligible) < _CONFIRMED:
            return []
        best = [eligible[i] for i in ranking([e.rounds for e in eligible])[:_CONFIRMED]]
        return [e for e in best if e is not running[0]]


_WORDS = {"rounds": "rounds", "again": "rounds of confirmation"}


def _has_labels(data: Dataset) -> bool:
    if data.has_labels is not None:
        return data.has_labels
    return "labels" in data.head(1)


def _find_load(child: Process, candidate: Candidate, settings: Settings) -> dict[str, Any]:
    """How many requests in flight, and for a server the rate to begin the rounds at; "status" where there is none."""
    child.ask("warm", seconds=settings.warmup_s, within_s=settings.warmup_s)
    asked = candidate.concurrency or settings.concurrency
    counts = [asked] if asked else concurrencies(candidate)
    told = child.ask("sweep", concurrencies=counts, seconds=min(_SWEEP_S, settings.seconds), passes=_SWEEP_PASSES)
    points = [_point(p, settings.batch) for p in told["points"]]
    most = max(p["throughput_per_s"] for p in points)
    knee = next(p for p in points if p["throughput_per_s"] >= _KNEE * most)
    found: dict[str, Any] = {"sweep": points, "knee": knee, "concurrency": knee["concurrency"]}
    if settings.scenario == "offline":
        return found
    child.ask("widen", concurrency=knee["concurrency"])
    # A closed loop's throughput is what the model can do; at a higher rate the queue would only grow.
    capacity = found["capacity_per_s"] = most / settings.batch
    search = RateSearch(0.7 * capacity, limit=capacity)
    trials = []
    while not search.done:
        trial, _ = try_rate(child, search.rate_per_s, settings, settings.seed)
        search.learn(trial)
        trials.append(trial.as_dict())
    found["trials"] = trials
    if search.best is None:
        return found | {"status": f"no rate keeps its p99 within {settings.slo_p99_ms:g} ms"}
    return found | {"rate_per_s": search.best.rate_per_s}


def concurrencies(candidate: Candidate) -> list[int]:
    """1, 2, 4, ... up to twice the cores, but no fewer than there are sessions."""
    most = max(2 * allowed_cores(), candidate.sessions)
    return [n for n in (2**k for k in range(12)) if candidate.sessions <= n <= most] or [candidate.sessions]


def _point(found: dict[str, Any], batch: int) -> dict[str, Any]:
    samples = np.asarray(found["samples_ns"], np.int64)
    p50, p99 = (None if (q := percentile(samples, p)) is None else q / 1e6 for p in (50.0, 99.0))
    # Each pass ends with its slowest request; their wall times are added up.
    per_s = samples.size * batch / (found["wall_ns"] / 1e9)
    return {"concurrency": found["concurrency"], "throughput_per_s": per_s, "p50_ms": p50, "p99_ms": p99}
