"""Child process of an executor, started by its `guard`.

It reads jobs from standard input and answers on standard output, a JSON document a line. It keeps what it imported from
one job to the next, and nothing else that could change a result. Where its parent dies the input ends, and so do this
process and all that it started.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from deploykit import errors
from deploykit.errors import DeploykitError
from deploykit.progress import Progress
from deploykit.search.guard import descendants, end_group, end_process
from deploykit.search.jobs import Job
from deploykit.search.machines import machine_of

Say = Callable[[dict[str, Any]], None]
_ADVANCE_S = 0.1
_TORCH_SEED = 67280421310721  # what it starts with


def main() -> int:
    """Do jobs until the input ends."""
    # What native libraries print, and what children of a job read, is none of the conversation.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    lock = threading.Lock()

    def say(what: dict[str, Any]) -> None:
        with lock:
            answers.write(json.dumps(what) + "\n")
            answers.flush()

    told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands, told), daemon=True).start()
    say({"ready": machine_of()})
    while True:
        say(_do(told.get(), say))


def _listen(commands: IO[str], told: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in commands:
        told.put(json.loads(line))
    for pid in descendants(os.getpid()):
        end_process(pid)
    end_group(os.getpgrp())


def _do(told: dict[str, Any], say: Say) -> dict[str, Any]:
    progress = Teller(say)
    started = time.perf_counter()
    try:
        with _unchanged():
            deed = Job(told["deed"]).load()
            inputs = {name: Path(path) for name, path in told["inputs"].items()}
            value = deed(told["params"], inputs, Path(told["folder"]), progress)
        json.dumps(value)
    except DeploykitError as exc:
        return {"error": pack_error(exc)}
    except Exception:  # noqa: BLE001 - a bug, told to the parent, which raises it
        return {"bug": traceback.format_exc()}
    return {"value": value, "seconds": time.perf_counter() - started, "notes": progress.notes}


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    """Every job starts alike, whatever the one before it left: directory, environment, import path, random numbers."""
    folder, environment, path = Path.cwd(), dict(os.environ), list(sys.path)
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(_TORCH_SEED)
    try:
        yield
    finally:
        os.chdir(folder)
        sys.path[:] = path
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        for name, value in environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


class Teller(Progress):
    """Tells what a job reports to the parent.

    Args:
        say: Takes it there.
    """

    def __init__(self, say: Say) -> None:
        super().__init__()
        self._say = say
        self._told = 0.0

    def note(self, text: str) -> None:
        """Keep and tell."""
        super().note(text)
        self._say({"said": "note", "text": text})

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Tell its beginning and its end."""
        self._say({"said": "step", "text": text})
        try:
            yield
        except BaseException:
            self._say({"said": "end", "failed": True})
            raise
        self._say({"said": "end", "failed": False})

    def advance(self, done: int, total: int | None, unit: str) -> None:
        """Tell it, ten times a second at most."""
        now = time.monotonic()
        if now - self._told >= _ADVANCE_S or done == total:
            self._told = now
            self._say({"said": "advance", "done": done, "total": total, "unit": unit})


def pack_error(exc: DeploykitError) -> dict[str, Any]:
    """An error as JSON can hold it."""
    kind = type(exc)
    return {
        "module": kind.__module__, "name": kind.__qualname__, "what": exc.what, "expected": exc.expected,
        "hint": exc.hint,
    }  # fmt: skip


def unpack_error(packed: dict[str, Any]) -> DeploykitError:
    """The same error; of the base class, where its own is none of ours and cannot be imported here."""
    kind: Any = getattr(errors, packed["name"], None)
    if kind is None:
        with contextlib.suppress(ImportError, AttributeError):
            kind = getattr(importlib.import_module(packed["module"]), packed["name"])
    if not (isinstance(kind, type) and issubclass(kind, DeploykitError)):
        kind = DeploykitError
    found: DeploykitError = kind(packed["what"], expected=packed["expected"], hint=packed["hint"])
    return found
