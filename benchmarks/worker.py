"""Child process of a measurement: python -m deploykit.benchmarks.worker JOB.json.

It loads one model, says on standard output that it is ready, and then does what it is told on standard input, a JSON
document a line each way: "probe" runs the inputs once and keeps outputs, predictions and placement; "warm" and "time"
run them in a loop; "serve" sends them by a schedule; "end" asks for the peak of its memory. Where its parent dies, the
input ends, and so does the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from deploykit.benchmarks.loops import closed_loop, concurrent_loop, open_loop, poisson_schedule
from deploykit.benchmarks.outputs import read_outputs, write_feeds
from deploykit.errors import DataError, DeploykitError
from deploykit.runtimes import Session, open_session, require_device
from deploykit.specs import Array, fit_feeds

_MIN_WARMUP_RUNS, _FEWEST_RUNS, _SLOW_NS = 10, 3, 1_500_000_000
# Before each block: what a neighbour left in the caches and spinning on the cores must not count.
_SETTLE_NS = 10_000_000
_EVALUATION_BATCH = 32
_SWEPT_S = 0.2


def main(job_file: str) -> int:
    """Serve until told to end; 0 also where the model failed, with the reason in the last line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C the parent decides
    # Native libraries print to standard output; what the parent reads is a copy of it that they do not know.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        _serve(job, sys.stdin, answers)
    except DeploykitError as exc:
        _say(answers, {"error": str(exc)})
    except BrokenPipeError:
        return 1
    return 0


def _say(answers: IO[str], found: dict[str, Any]) -> None:
    answers.write(json.dumps(found) + "\n")
    answers.flush()


def _serve(job: dict[str, Any], commands: IO[str], answers: IO[str]) -> None:
    feeds = read_outputs(Path(job["feeds"]))
    require_device(job["device"])  # imports the runtime: that is no part of loading a model
    with ExitStack() as stack:
        started = time.perf_counter_ns()
        lanes = Lanes(job, stack)
        loaded = time.perf_counter_ns()
        # The inputs that this model has; a simplified one may have fewer.
        chosen = [fit_feeds(lanes.session.signature, f) for f in feeds]
        before_first = time.perf_counter_ns()
        lanes.session.run(chosen[0])
        first = time.perf_counter_ns()
        _say(
            answers,
            {
                "load_ms": (loaded - started) / 1e6,
                "first_ms": (first - before_first) / 1e6,
                "settings": {k: str(v) for k, v in lanes.session.settings.items()},
            },
        )
        for line in commands:
            told = json.loads(line)
            if told["do"] == "end":
                _say(answers, {"peak_memory_bytes": peak_memory_bytes()})
                return
            _say(answers, _DEEDS[told["do"]](lanes, chosen, told))


class Lanes:
    """The requests that may be in flight at a time.

    Args:
        job: "concurrency" of them, over "sessions" sessions of "threads" threads each.
        stack: Closes the sessions.
    """

    def __init__(self, job: dict[str, Any], stack: ExitStack) -> None:
        self._job = job
        self._stack = stack
        self.session = self._open()
        self._sessions = [self.session]
        self._sessions += [self._open() for _ in range(1, job.get("sessions") or 1)]
        self._calls: list[Callable[[Any], object]] = [self.session.run]
        self.cursor = 0
        self.widen(job.get("concurrency") or 1)

    def _open(self) -> Session:
        job = self._job
        return self._stack.enter_context(
            open_session(
                job["model"], job["device"], threads=job["threads"], precision=job["precision"],
                optimize=job.get("optimize", True), settings=job.get("settings"),
            )
        )  # fmt: skip

    def widen(self, count: int) -> None:
        """Have ``count`` requests, spread over the sessions."""
        if count == 1:
            self._calls = [self.session.run]
            return
        shares = [count // len(self._sessions) + (i < count % len(self._sessions)) for i in range(len(self._sessions))]
        self._calls = [r.run for s, n in zip(self._sessions, shares, strict=True) if n for r in s.requests(n)]

    @property
    def calls(self) -> Sequence[Callable[[Any], object]]:
        """One callable a request in flight."""
        return self._calls


def _keep_outputs(lanes: Lanes, feeds: list[dict[str, Array]], told: dict[str, Any]) -> dict[str, Any]:
    write_feeds(Path(told["outputs"]), [lanes.session.run(f) for f in feeds])
    return {"peak_memory_bytes": peak_memory_bytes()}


def _probe(lanes: Lanes, feeds: list[dict[str, Array]], told: dict[str, Any]) -> dict[str, Any]:
    session = lanes.session
    _keep_outputs(lanes, feeds, told)
    result: dict[str, Any] = {"placement": session.placement(feeds[0]).summary()}
    if told.get("labelled"):
        result["accuracy"] = _evaluate(session, told["labelled"])
    return result


def _evaluate(session: Session, source: str) -> dict[str, Any]:
    """Accuracy over a whole dataset, in batches that the model takes."""
    from deploykit.benchmarks.metrics import classification_scores, decide, reduce_outputs
    from deploykit.data import LABELS, Dataset

    first = [s.shape[0] for s in session.signature.inputs if s.shape]
    fixed = next((d for d in first if isinstance(d, int)), None)
    labels, guesses = [], []
    for batch in Dataset.open(source).fitted(session.signature.inputs).batches(fixed or _EVALUATION_BATCH):
        if LABELS not in batch:
            raise DataError(f"{source} has no {LABELS!r}")
        count = len(batch[LABELS])
        if fixed and count < fixed:  # fill the last batch up, and forget what was filled in
            batch = {k: np.concatenate([v, np.repeat(v[-1:], fixed - count, 0)]) for k, v in batch.items()}
        outputs = session.run(fit_feeds(session.signature, batch))
        guesses.append(reduce_outputs(outputs)[:count])
        labels.append(batch[LABELS][:count])
    return classification_scores(np.concatenate(labels), decide(guesses)).as_dict()


def _warm(lanes: Lanes, feeds: list[dict[str, Array]], told: dict[str, Any]) -> dict[str, Any]:
    """Run for some seconds, and at least ten times and three times in every lane, or only the latter where that takes
    long; says how long a request takes by now.
    """
    runs, passes, latest = 0, 0, [0]
    began = time.perf_counter_ns()
    end, slow = began + int(told["seconds"] * 1e9), began + _SLOW_NS
    while True:
        now = time.perf_counter_ns()
        enough = passes >= _FEWEST_RUNS and (runs >= _MIN_WARMUP_RUNS or now >= slow)
        if enough and now >= end:
            break
        # Every lane runs once in a pass, whatever its length.
        left = max(0, end - now) if enough else 0
        timed = concurrent_loop(lanes.calls, feeds, left / 1e9, start=runs)
        runs, passes = runs + len(timed.samples_ns), passes + 1
        latest = timed.samples_ns[-1:]
    return {"warmup_runs": runs, "request_ns": latest[0], "peak_memory_bytes": peak_memory_bytes()}


def _time(lanes: Lanes, feeds: list[dict[str, Array]], told: dict[str, Any]) -> dict[str, Any]:
    """A block of requests, after a few that do not count."""
    closed_loop(lanes.calls[0], feeds, _SETTLE_NS / 1e9, start=lanes.cursor)
    timed = concurrent_loop(lanes.calls, feeds, told["seconds"], start=lanes.cursor)
    lanes.cursor = timed.cursor
    return timed.as_dict() | {"ends_ns": timed.ends_ns or (timed.wall_ns,)}


def _sweep(lanes: Lanes, feeds: list[dict[str, Array]], told: dict[str, Any]) -> dict[str, Any]:
    """Requests in a second at each number of requests in flight, in several passes."""
    found: dict[int, dict[str, Any]] = {}
    for _ in range(told["passes"]):
        for count in told["concurrencies"]:
            lanes.widen(count)
            concurrent_loop(lanes.calls, feeds, min(_SWEPT_S, told["seconds"]))
            timed = concurrent_loop(lanes.calls, feeds, told["seconds"])
            kept = found.setdefault(count, {"concurrency": count, "samples_ns": [], "wall_ns": 0})
            kept["samples_ns"] += timed.samples_ns
            kept["wall_ns"] += timed.wall_ns
    return {"points": list(found.values())}


def _widen(lanes: Lanes, feeds: list[dict[str, Array]], told: dict[str, Any]) -> dict[str, Any]:
    lanes.widen(told["concurrency"])
    return {}


def _schedule(lanes: Lanes, feeds: list[dict[str, Array]], told: dict[str, Any]) -> dict[str, Any]:
    """An open loop; latencies count from the intended times."""
    request_ns = min(closed_loop(lanes.calls[0], feeds, _SETTLE_NS / 1e9).samples_ns)
    schedule = poisson_schedule(told["rate_per_s"], told["queries"], told["seed"])
    timed = open_loop(lanes.calls, feeds, schedule, objective_ns=told["objective_ns"])
    return timed.as_dict() | {
        "queries": len(timed.samples_ns), "asked": len(schedule), "last_ns": schedule[-1], "request_ns": request_ns,
    }  # fmt: skip


_DEEDS: dict[str, Callable[[Lanes, list[dict[str, Array]], dict[str, Any]], dict[str, Any]]] = {
    "outputs": _keep_outputs,
    "probe": _probe,
    "warm": _warm,
    "time": _time,
    "sweep": _sweep,
    "widen": _widen,
    "serve": _schedule,
}


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process; `ru_maxrss` would include the parent's, inherited over fork."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
