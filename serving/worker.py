"""A process that holds a model: python -m deploykit.serving.worker LANES.

LANES is JSON: for each lane the descriptor of a socket, and of each slot those of its arenas, for inputs and outputs,
and of the pipe that says whether a request is still to run.
The first line that comes in on the first lane says what to load; once it is loaded and warm, every lane answers
requests in a thread of its own, one after another. When the other end is gone, the process ends at once: nobody waits
for what it computes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import Artifact
from deploykit.data import ValueRange, generate
from deploykit.errors import ArtifactError, DataError, DeploykitError, InferenceError, ModelError, first_line
from deploykit.machine import inspect_machine
from deploykit.runtimes import RuntimeSettings, Session, open_session, parse_device
from deploykit.sealed import Seal
from deploykit.serving.arenas import Arena, ArenaFull, Joined, read, size_of, write
from deploykit.serving.claims import Claims
from deploykit.serving.joining import WARM_RUNS, Joining, is_lossy, one_scale, other_request, try_rows
from deploykit.serving.loaded import bare_files, batch_symbol, digest_of, signature_as_json
from deploykit.serving.memory import keep_freed_memory
from deploykit.specs import Array, Feeds, Signature, fit_feeds

_WARM_CASES = 4


def main(lanes_json: str) -> int:
    """Serve until the front is gone; 1 where the model could not be loaded."""
    # When the server ends is for the server to say, also where a signal is sent to all processes of a service.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    os.dup2(2, 1)  # native libraries print to standard output
    lanes = [_Lane(*found) for found in json.loads(lanes_json)]
    threading.Thread(target=lanes[0].end_with_it, daemon=True).start()
    job = lanes[0].receive()
    if job is None:
        return 0
    try:
        _confine(job)
        session, told, largest = _load(job)
        runs = [request.run for request in session.requests(len(lanes))] if len(lanes) > 1 else [session.run]
        _warm_lanes(runs, largest)
        del largest
    except DeploykitError as exc:
        lanes[0].send({"failed": str(exc)})
        return 1
    except (MemoryError, RecursionError) as exc:
        lanes[0].send({"failed": f"{job['path']} cannot be loaded and warmed up: {first_line(exc)}"})
        return 1
    limit = job["arena_bytes"]
    for lane, run in zip(lanes[1:], runs[1:], strict=True):
        threading.Thread(target=_serve, args=(lane, run, session.signature, limit), daemon=True).start()
    lanes[0].send(told)
    _serve(lanes[0], runs[0], session.signature, limit)
    return 0


def _confine(job: Mapping[str, Any]) -> None:
    """Limit what a model of unknown origin can take of the machine; a crash of it writes no core."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Drivers of accelerators map far more memory than they use.
    if not parse_device(job["settings"]["device"]).on_cpu:
        return
    most = job.get("memory_bytes") or inspect_machine().memory_bytes
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if most is not None and (hard == resource.RLIM_INFINITY or most < hard):
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


class _Lane:
    """One request after another: a socket, and arenas for inputs and outputs of each slot.

    Args:
        control: Descriptor of the socket.
        slots: Descriptors of the arenas, and of the pipe of `claims`.
    """

    def __init__(self, control: int, slots: Sequence[tuple[int, int, int]]) -> None:
        self._socket = socket.socket(fileno=control)
        self._lines = self._socket.makefile("rb")
        self.slots = slots

    def receive(self) -> Any:
        """The next thing that is told; None where the other end is gone."""
        try:
            line = self._lines.readline()
        except ConnectionError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def end_with_it(self) -> None:
        """Wait until the other end is gone, and end the process then, whatever it computes."""
        watched = select.poll()
        watched.register(self._socket.fileno(), 0)  # a hang-up is always told
        watched.poll()
        os._exit(0)

    def send(self, told: dict[str, Any]) -> None:
        """Tell something."""
        self._socket.sendall(json.dumps(told).encode() + b"\n")


def _serve(lane: _Lane, run: Callable[[Feeds], dict[str, Array]], signature: Signature, limit: int) -> None:
    """Answer one request after another, and end the process when the other end is gone."""
    slots = [(Arena(given, limit), Arena(taken, limit), Claims(claims)) for given, taken, claims in lane.slots]
    dtypes = {spec.name: spec.dtype for spec in signature.outputs}
    while (told := lane.receive()) is not None:
        given, taken, claims = slots[told["slot"]]
        if not claims.take(told["offer"]):
            continue
        answer = _answer(run, dtypes, given, taken, told)
        try:
            lane.send({"slot": told["slot"], **answer})
        except ConnectionError:
            break
    os._exit(0)


def _answer(
    run: Callable[[Feeds], dict[str, Array]], dtypes: dict[str, str], given: Arena, taken: Arena, told: dict[str, Any]
) -> dict[str, Any]:
    try:
        feeds = read(given, told["tensors"], told["total"])
        started = time.perf_counter_ns()
        outputs = run(feeds)
        ended = time.perf_counter_ns()
        placed, total = write(taken, [Joined(n, dtypes[n], (np.asarray(a),)) for n, a in outputs.items()])
    except DataError as exc:
        return {"error": "invalid", "what": exc.what, "expected": exc.expected, "hint": exc.hint}
    except ArenaFull as exc:
        return {"error": "too_large", "what": f"the answer is too large: {exc}"}
    except DeploykitError as exc:
        return {"error": "failed", "what": exc.what, "expected": exc.expected, "hint": exc.hint}
    except Exception as exc:  # noqa: BLE001 - one request must not end the process that the others need
        return {"error": "failed", "what": first_line(exc)}
    return {"compute_ns": ended - started, "tensors": placed, "total": total}


def _warm_lanes(runs: Sequence[Callable[[Feeds], dict[str, Array]]], feeds: Feeds) -> None:
    """Run all lanes at once, so that the memory that they take beside each other is there before the first request."""
    if len(runs) > 1 and feeds:
        with ThreadPoolExecutor(len(runs)) as pool:
            for _ in pool.map(lambda run: run(feeds), runs):
                pass


def _load(job: dict[str, Any]) -> tuple[Session, dict[str, Any], Feeds]:
    """Check the files again, open the model, and run it until it is warm.

    Returns:
        The model; what the front is told of it; the largest inputs that it ran with.
    """
    started = time.perf_counter()
    path = Path(job["path"])
    model: Path | Artifact = path
    cases: list[dict[str, Array]] = []
    seal = Seal()
    if path.is_dir():
        model = Artifact.open(path)
        digest = model.digest
        cases = [inputs for inputs, _ in model.golden()[:_WARM_CASES]]
    else:
        if not path.is_file():
            raise ModelError(f"{path} does not exist any more")
        seal.add(bare_files(path))
        digest = digest_of(path)
    if digest != job["digest"]:
        raise ArtifactError(f"{path} has changed since it was looked at", hint="send the server SIGHUP")
    settings = RuntimeSettings.from_dict(job["settings"])
    session = open_session(model, tuned=settings)
    seal.check()
    opened = time.perf_counter()
    signature = model.signature if isinstance(model, Artifact) else session.signature
    _compare(signature, session.signature, path)
    trial = _Trial(session, signature, model, job)
    if cases:
        trial.run(cases)
    else:
        try:
            trial.run([generate(signature.inputs, dict.fromkeys(signature.symbols, 2), ranges=trial.ranges)])
        except (DataError, InferenceError) as exc:
            trial.give_up(exc)
    joining, force = trial.joining, trial.force
    remark = joining.remark(force=force)
    way_out = " (--force-batching joins them all the same)" if joining.possible and remark and not force else ""
    told = {
        "ready": {
            "signature": signature_as_json(signature),
            "batched": joining.allowed(force=force),
            "batching": remark,
            "bytes": trial.nbytes,
            "notes": [*session.settings.get("tuned_notes", ()), *trial.notes, *([remark + way_out] if remark else [])],
            "load_s": opened - started,
            "warm_s": time.perf_counter() - opened,
        }
    }
    return session, told, trial.largest


def _compare(manifest: Signature, session: Signature, path: Path) -> None:
    """Refuse a model whose file is not what its manifest says."""
    for ours, theirs in ((manifest.inputs, session.inputs), (manifest.outputs, session.outputs)):
        if {(s.name, s.dtype) for s in ours} != {(s.name, s.dtype) for s in theirs}:
            raise ArtifactError(
                f"{path}: the model has {', '.join(map(str, theirs))}", expected=", ".join(map(str, ours))
            )


class _Trial:
    """Runs a model until it is warm, and finds out whether requests may be joined.

    Args:
        session: The model, open.
        signature: Its inputs and outputs.
        model: The artifact, or the file.
        job: What the worker was told.

    Attributes:
        force: Whether requests are joined also where that changes their numbers.
        ranges: Values that inputs may take.
        joining: Whether requests may be joined.
        nbytes: The largest inputs that ran, and outputs, in bytes, as an arena holds them.
        largest: Those inputs.
        notes: What users have to know beside that.
    """

    def __init__(self, session: Session, signature: Signature, model: Path | Artifact, job: Mapping[str, Any]) -> None:
        self._session = session
        self._signature = signature
        self._max_batch = job["max_batch"]
        self._lossy = is_lossy(model, session.device)
        self.force = bool(job.get("force_batching"))
        self.ranges: Mapping[str, ValueRange] = model.ranges if isinstance(model, Artifact) else {}
        self.notes: list[str] = []
        self.nbytes = (0, 0)
        self.largest: Feeds = {}
        self.joining = Joining(possible=self._max_batch > 1)
        if self.joining.possible and batch_symbol(signature) is None:
            reason = "the first dimension of all inputs and outputs is not one symbol, or is not the only place of it"
            self.joining = Joining(possible=False, reason=reason)
        elif self.joining.possible:
            path = model.model_path if isinstance(model, Artifact) else model
            self.joining = Joining(possible=True, reason=one_scale(path))

    def give_up(self, why: Exception) -> None:
        """There are no golden inputs, and those that were made up do not run."""
        self.notes.append(f"not warmed up, for want of golden inputs: {why}")
        if self.joining.possible:
            self.joining = Joining(possible=False, reason="there are no golden inputs to try it with")

    def run(self, cases: Sequence[Mapping[str, Array]]) -> None:
        """Run inputs, alone and beside other rows."""
        for case in cases:
            feeds = fit_feeds(self._signature, case)
            for _ in range(WARM_RUNS):
                alone = self._run(feeds)
            if not self.joining.allowed(force=self.force):
                continue
            other = other_request(self._signature, feeds, cases, self.ranges, self._max_batch)
            found = try_rows(self._run, feeds, alone, other, lossy=self._lossy)
            known = self.joining.reason if found.possible else ""
            self.joining = Joining(found.possible, known or found.reason)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        outputs = self._session.run(feeds)
        given, taken = size_of(feeds), size_of(outputs)
        if given > self.nbytes[0]:
            self.largest = feeds
        self.nbytes = (max(self.nbytes[0], given), max(self.nbytes[1], taken))
        return outputs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
