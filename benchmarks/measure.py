"""Interleaved measurement: first who is right, then who is fast."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import deploykit
from deploykit.benchmarks.environment import environment
from deploykit.benchmarks.parity import Outputs, Verdict, check_vacuity, compare, compare_lossy, without_padding
from deploykit.benchmarks.plan import MIN_ROUNDS, Candidate, Settings
from deploykit.benchmarks.report import Report, Row, build_report
from deploykit.data import Dataset
from deploykit.errors import BenchmarkError
from deploykit.progress import Progress
from deploykit.specs import Array, Feeds

# The slowest thing that is waited for: loading a large model, ten runs of it, and the timed seconds.
_GRACE_S = 1800.0


@dataclass(slots=True)
class Entry:
    """A candidate while it is measured.

    Attributes:
        candidate: What.
        probe: What the first process found.
        outputs: Its outputs on the inputs of the benchmark.
        status: "ok", or why it does not enter the measurement.
        parity: Comparison with the reference.
        rounds: One result a round.
    """

    candidate: Candidate
    probe: dict[str, Any] = field(default_factory=dict)
    outputs: list[dict[str, Array]] = field(default_factory=list)
    status: str = "ok"
    parity: dict[str, Any] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)


def measure(
    candidates: Sequence[Candidate],
    feeds: Sequence[Feeds],
    settings: Settings,
    *,
    data: Dataset | None = None,
    progress: Progress | None = None,
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

    Raises:
        BenchmarkError: Settings that give no result, or the reference does not run.
    """
    settings.check()
    told = progress or Progress()
    with tempfile.TemporaryDirectory(prefix="deploykit-bench-") as name:
        folder = Path(name)
        arrays = {f"{i}/{k}": v for i, f in enumerate(feeds) for k, v in f.items()}
        # Object arrays would need pickle; strings are stored as numpy's own.
        plain = {k: v.astype(str) if v.dtype.kind == "O" else v for k, v in arrays.items()}
        np.savez(folder / "feeds.npz", **plain)  # type: ignore[arg-type]
        entries = [Entry(c) for c in candidates]
        labelled = data.source if data is not None and _has_labels(data) else None
        with told.step(f"check the outputs of {len(entries)} candidates"):
            for number, entry in enumerate(entries):
                told.advance(number, len(entries), "candidates")
                _probe(entry, entries[0], folder, feeds, settings, labelled)
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
        twin = Entry(entries[0].candidate)
        interrupted = _run_rounds(entries, twin, folder, settings, told)
        rows = [Row(e.candidate, e.status, e.probe, e.parity, e.rounds) for e in entries]
        return build_report(
            rows, twin.rounds, settings, environment(), notes=told.notes, labelled=labelled, interrupted=interrupted
        )


def _has_labels(data: Dataset) -> bool:
    if data.has_labels is not None:
        return data.has_labels
    return "labels" in data.head(1)


def _probe(
    entry: Entry, reference: Entry, folder: Path, feeds: Sequence[Feeds], settings: Settings, labelled: str | None
) -> None:
    outputs = folder / "outputs.npz"
    job = {"mode": "probe", "outputs": str(outputs), "labelled": labelled}
    entry.probe = _spawn(entry.candidate, job, folder, settings)
    if "error" in entry.probe:
        entry.status = f"failed: {entry.probe['error']}"
        return
    with np.load(outputs, allow_pickle=False) as archive:
        found: dict[int, dict[str, Array]] = {}
        for key in archive.files:
            number, _, name = key.partition("/")
            found.setdefault(int(number), {})[name] = archive[key]
    entry.outputs = [found[n] for n in sorted(found)]
    if entry is not reference:
        entry.parity, why = _judge(reference.outputs, entry.outputs, feeds, settings.min_cosine)
        entry.status = f"wrong outputs: {why}" if why else "ok"
        entry.outputs = []


def _judge(
    expected: Sequence[Outputs], actual: Sequence[Outputs], feeds: Sequence[Feeds], min_cosine: float
) -> tuple[dict[str, Any], str]:
    """A parity record, and why the outputs are wrong; empty where they are the reference's, or near enough."""
    strict = compare(expected, actual)
    if strict.verdict is Verdict.PASSED:
        return {"kind": "equal", **strict.as_dict(), "cosine": strict.cosine}, ""
    lossy = compare_lossy(without_padding(expected, feeds), without_padding(actual, feeds), min_cosine)
    return {"kind": "near", **lossy.as_dict(), "cosine": lossy.cosine}, lossy.reason


def _run_rounds(entries: list[Entry], twin: Entry, folder: Path, settings: Settings, told: Progress) -> bool:
    """Measure; True where an interrupt ended it after enough rounds."""
    running = [e for e in entries if e.status == "ok"] + [twin]
    order = random.Random(settings.seed)
    done = 0
    with told.step(f"measure {len(running) - 1} candidates in {settings.rounds} rounds"):
        for number in range(settings.rounds):
            order.shuffle(running)
            try:
                results = []
                for entry in running:
                    told.advance(done, settings.rounds * len(running), "runs")
                    results.append(_time(entry, folder, settings))
                    done += 1
            except KeyboardInterrupt:
                if number < MIN_ROUNDS:
                    raise
                told.note(f"interrupted: {number} of {settings.rounds} rounds were measured")
                return True
            for position, (entry, result) in enumerate(zip(running, results, strict=True)):
                entry.rounds.append(result | {"position": position})
    return False


def _time(entry: Entry, folder: Path, settings: Settings) -> dict[str, Any]:
    job = {"mode": "time", "warmup_s": settings.warmup_s, "seconds": settings.seconds}
    result = _spawn(entry.candidate, job, folder, settings)
    if "error" in result:
        raise BenchmarkError(
            f"{entry.candidate.label} ran once and failed while it was measured: {result['error']}",
            hint="measure the others without it",
        )
    return result


def _spawn(candidate: Candidate, job: dict[str, Any], folder: Path, settings: Settings) -> dict[str, Any]:
    """Run a worker and block until it ends; a poll would take time from it."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    job_file = folder / "job.json"
    full = job | {
        "model": candidate.path,
        "device": candidate.device,
        "threads": settings.threads,
        "precision": candidate.precision or settings.precision,
        "feeds": str(folder / "feeds.npz"),
        "result": str(result),
    }
    job_file.write_text(json.dumps(full), encoding="utf-8")
    # The child has to find this very copy of DeployKit, also in a bare checkout and from another directory.
    home = str(Path(deploykit.__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deploykit.benchmarks.worker", str(job_file)],
            capture_output=True, text=True, errors="replace", env=env, check=False,
            stdin=subprocess.DEVNULL, timeout=_GRACE_S + settings.seconds + settings.warmup_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": "it did not finish in time"}
    if not result.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return {"error": f"its process ended with {how} ({lines[-1][:200] if lines else 'no message'})"}
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
