"""A process that holds a model: python -m deploykit.serving.worker LANES.

LANES is JSON: for each lane the descriptor of a socket, and those of the arenas of its slots, for inputs and outputs.
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
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import Artifact
from deploykit.data import ValueRange, generate
from deploykit.errors import ArtifactError, DataError, DeploykitError, InferenceError, ModelError, first_line
from deploykit.machine import inspect_machine
from deploykit.runtimes import RuntimeSettings, Session, open_session, parse_device
from deploykit.sealed import Seal
from deploykit.serving.arenas import Arena, ArenaFull, Joined, read, write
from deploykit.serving.loaded import bare_files, batch_symbol, digest_of, signature_as_json
from deploykit.serving.memory import keep_freed_memory
from deploykit.specs import Array, Feeds, Signature, fit_feeds

_WARM_RUNS = 3
_WARM_CASES = 4
# How far a joined row may be from the same row alone, of its norm; int8 kernels of other shapes round otherwise.
_SAME = 0.05


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
        session, told = _load(job, len(lanes))
        runs = [request.run for request in session.requests(len(lanes))] if len(lanes) > 1 else [session.run]
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
        slots: Descriptors of the arenas.
    """

    def __init__(self, control: int, slots: Sequence[tuple[int, int]]) -> None:
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
    arenas = [(Arena(given, limit), Arena(taken, limit)) for given, taken in lane.slots]
    dtypes = {spec.name: spec.dtype for spec in signature.outputs}
    while (told := lane.receive()) is not None:
        given, taken = arenas[told["slot"]]
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


def _load(job: dict[str, Any], lanes: int) -> tuple[Session, dict[str, Any]]:
    """Check the files again, open the model, and run it until it is warm."""
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
    ranges: Mapping[str, ValueRange] = model.ranges if isinstance(model, Artifact) else {}
    notes = list(session.settings.get("tuned_notes", ()))
    max_batch = job["max_batch"] if batch_symbol(signature) else 1
    if cases:
        batched = _warm_up(session, signature, cases, ranges, max_batch, notes)
    else:
        try:
            made = generate(signature.inputs, dict.fromkeys(signature.symbols, 2), ranges=ranges)
            batched = _warm_up(session, signature, [made], ranges, max_batch, notes)
        except (DataError, InferenceError) as exc:
            batched = False
            notes.append(f"not warmed up, and requests are not joined, for want of golden inputs: {exc}")
    return session, {
        "ready": {
            "signature": signature_as_json(signature),
            "batched": batched,
            "notes": notes,
            "load_s": opened - started,
            "warm_s": time.perf_counter() - opened,
        }
    }


def _compare(manifest: Signature, session: Signature, path: Path) -> None:
    """Refuse a model whose file is not what its manifest says."""
    for ours, theirs in ((manifest.inputs, session.inputs), (manifest.outputs, session.outputs)):
        if {(s.name, s.dtype) for s in ours} != {(s.name, s.dtype) for s in theirs}:
            raise ArtifactError(
                f"{path}: the model has {', '.join(map(str, theirs))}", expected=", ".join(map(str, ours))
            )


def _warm_up(
    session: Session,
    signature: Signature,
    cases: list[dict[str, Array]],
    ranges: Mapping[str, ValueRange],
    max_batch: int,
    notes: list[str],
) -> bool:
    """Run the cases, alone and beside other rows; whether rows get what they get alone."""
    joins = max_batch > 1
    for case in cases:
        feeds = fit_feeds(signature, case)
        for _ in range(_WARM_RUNS):
            alone = session.run(feeds)
        if not joins:
            continue
        try:
            other = _differs(session, signature, feeds, alone, ranges, max_batch)
        except (DataError, InferenceError) as exc:
            other = str(exc)
        if other:
            notes.append(f"requests are not joined: {other}")
            joins = False
    return joins


def _differs(
    session: Session,
    signature: Signature,
    feeds: dict[str, Array],
    alone: dict[str, Array],
    ranges: Mapping[str, ValueRange],
    max_batch: int,
) -> str:
    """What is not the same for rows beside others, or beside none; empty where all is."""
    rows = next(iter(feeds.values())).shape[0]
    if rows > 1:
        one = session.run({name: array[:1] for name, array in feeds.items()})
        for name, array in one.items():
            if not _same(array, alone[name][:1]):
                return f"{name!r} of a row is another without the other rows"
    sizes = {
        dim: size
        for spec in signature.inputs
        for dim, size in zip(spec.shape or (), feeds[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
    try:
        beside = generate(signature.inputs, sizes, ranges=ranges, seed=1)
    except DataError:  # strings
        beside = feeds
    times = max(1, max_batch // max(rows, 1) - 1)
    joined = {name: np.concatenate([array, *[beside[name]] * times]) for name, array in feeds.items()}
    for _ in range(_WARM_RUNS):
        found = session.run(joined)
    for name, array in found.items():
        if array.ndim == 0 or array.shape[0] != rows * (1 + times) or not _same(array[:rows], alone[name]):
            return f"{name!r} of a row is another beside other rows"
    return ""


def _same(found: Array, wanted: Array) -> bool:
    """Whether outputs are the same, but for what rounding does to them."""
    if found.shape != wanted.shape:
        return False
    if wanted.dtype.kind not in "fc":
        # Indices may change with what they are taken of by rounding; a model of which many do is another matter.
        return bool(np.mean(found == wanted) >= 1 - _SAME) if wanted.size else True
    wide = np.complex128 if wanted.dtype.kind == "c" else np.float64
    a, b = found.astype(wide), wanted.astype(wide)
    finite = np.isfinite(a) & np.isfinite(b)
    away = np.linalg.norm(a[finite] - b[finite])
    return bool(np.array_equal(np.isfinite(a), np.isfinite(b)) and away <= _SAME * np.linalg.norm(b[finite]) + 1e-6)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
