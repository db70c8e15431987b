"""Child process of `measure`: python -m deploykit.benchmarks.worker JOB.json.

Two jobs: "probe" runs the inputs once and keeps the outputs, predictions and placement; "time" runs them in a loop and
keeps every latency. The result goes to the file that the job names; what goes wrong is in there too.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DataError, DeploykitError
from deploykit.runtimes import Session, open_session, require_device
from deploykit.specs import Array, fit_feeds

_MIN_WARMUP_RUNS = 10
_EVALUATION_BATCH = 32


def main(job_file: str) -> int:
    """Do the job; 0 also where the model failed, with the reason in the result."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        result = _work(job)
    except DeploykitError as exc:
        result = {"error": str(exc)}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _work(job: dict[str, Any]) -> dict[str, Any]:
    feeds = _read_feeds(job["feeds"])
    require_device(job["device"])  # imports the runtime: that is no part of loading a model
    started = time.perf_counter_ns()
    with open_session(job["model"], job["device"], threads=job["threads"], precision=job["precision"]) as session:
        loaded = time.perf_counter_ns()
        chosen = [_for(session, f) for f in feeds]
        before_first = time.perf_counter_ns()
        session.run(chosen[0])
        first = time.perf_counter_ns()
        result: dict[str, Any] = {
            "load_ms": (loaded - started) / 1e6,
            "first_ms": (first - before_first) / 1e6,
            "settings": {k: str(v) for k, v in session.settings.items()},
        }
        if job["mode"] == "probe":
            result |= _probe(session, chosen, job)
        else:
            result |= _time(session, chosen, job["warmup_s"], job["seconds"])
        result["peak_memory_bytes"] = peak_memory_bytes()
        return result


def _read_feeds(path: str) -> list[dict[str, Array]]:
    feeds: dict[int, dict[str, Array]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            number, _, name = key.partition("/")
            feeds.setdefault(int(number), {})[name] = archive[key]
    return [feeds[n] for n in sorted(feeds)]


def _for(session: Session, feeds: dict[str, Array]) -> dict[str, Array]:
    """The inputs that this model has; a simplified one may have fewer."""
    return fit_feeds(session.signature, feeds)


def _probe(session: Session, feeds: list[dict[str, Array]], job: dict[str, Any]) -> dict[str, Any]:
    outputs = {f"{i}/{name}": array for i, f in enumerate(feeds) for name, array in session.run(f).items()}
    outputs = {k: a.astype(str) if a.dtype.kind == "O" else a for k, a in outputs.items()}
    np.savez(job["outputs"], **outputs)  # type: ignore[arg-type]
    result: dict[str, Any] = {"placement": session.placement(feeds[0]).summary()}
    if job.get("labelled"):
        result["accuracy"] = _evaluate(session, job["labelled"])
    return result


def _evaluate(session: Session, source: str) -> dict[str, Any]:
    """Accuracy over a whole dataset, in batches that the model takes."""
    from deploykit.benchmarks.metrics import classification_scores, decide, reduce_outputs
    from deploykit.data import LABELS, Dataset

    first = [s.shape[0] for s in session.signature.inputs if s.shape]
    fixed = next((d for d in first if isinstance(d, int)), None)
    labels, guesses = [], []
    for batch in Dataset.open(source).batches(fixed or _EVALUATION_BATCH):
        if LABELS not in batch:
            raise DataError(f"{source} has no {LABELS!r}")
        count = len(batch[LABELS])
        if fixed and count < fixed:  # fill the last batch up, and forget what was filled in
            batch = {k: np.concatenate([v, np.repeat(v[-1:], fixed - count, 0)]) for k, v in batch.items()}
        outputs = session.run(fit_feeds(session.signature, batch))
        guesses.append(reduce_outputs(outputs)[:count])
        labels.append(batch[LABELS][:count])
    return classification_scores(np.concatenate(labels), decide(guesses)).as_dict()


def _time(session: Session, feeds: list[dict[str, Array]], warmup_s: float, seconds: float) -> dict[str, Any]:
    clock, run, count = time.perf_counter_ns, session.run, len(feeds)
    runs = 0
    end = clock() + int(warmup_s * 1e9)
    while runs < _MIN_WARMUP_RUNS or clock() < end:
        run(feeds[runs % count])
        runs += 1
    samples: list[int] = []
    started = now = clock()
    end = started + int(seconds * 1e9)
    index = 0
    while now < end:
        began = clock()
        run(feeds[index])
        now = clock()
        samples.append(now - began)
        index = index + 1 if index + 1 < count else 0
    return {"samples_ns": samples, "wall_ns": now - started, "warmup_runs": runs}


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
