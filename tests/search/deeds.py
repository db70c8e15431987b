"""Deeds that tests hand to executors; imported by the processes that do them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from deploykit.errors import DataError, SearchError


def double(params, inputs, folder, progress):
    """Writes twice what its input holds, in a folder of the result."""
    values = np.load(inputs["values"])
    (folder / "made" / "empty").mkdir(parents=True)
    np.save(folder / "made" / "twice.npy", values * 2)
    with progress.step("double"):
        progress.advance(1, 2, "halves")
    progress.note(f"{values.size} values")
    return {"sum": float(values.sum() * 2), "pid": os.getpid(), "params": dict(params)}


def tree(params, inputs, folder, progress):
    """What it was given: names and contents."""
    root = inputs["model"]
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    return {"name": root.name, "files": {p.relative_to(root).as_posix(): p.read_text() for p in files}}


def interval(params, inputs, folder, progress):
    """When it ran, on the clock that all processes of the machine share."""
    begin = time.clock_gettime(time.CLOCK_MONOTONIC)
    time.sleep(params["seconds"])
    return {"begin": begin, "end": time.clock_gettime(time.CLOCK_MONOTONIC), "pid": os.getpid()}


def meet(params, inputs, folder, progress):
    """Ends only where another one runs beside it."""
    place = Path(params["place"])
    (place / params["name"]).touch()
    while not (place / params["other"]).exists():
        time.sleep(0.01)
    return {"pid": os.getpid()}


def hang(params, inputs, folder, progress):
    """Starts children, in its group and in one of their own, says who they are, and never ends."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
    written = Path(params["pids"]).with_suffix(".part")
    written.write_text(" ".join(str(p) for p in (os.getpid(), *(c.pid for c in children))))
    written.rename(params["pids"])
    time.sleep(600)


def stand_still(params, inputs, folder, progress):
    """Says something, twice, and then nothing more."""
    progress.note("begun")
    time.sleep(params["pause"])
    progress.note("still there")
    time.sleep(600)


def die(params, inputs, folder, progress):
    """Is killed as often as it is told to be, and leaves something half done."""
    seen = Path(params["seen"])
    with seen.open("a") as file:
        file.write("x")
    left_over = [p.name for p in folder.iterdir()]
    (folder / "half").write_text("done")
    if len(seen.read_text()) <= params["deaths"]:
        print("about to be killed", file=sys.stderr, flush=True)
        victim = os.getpid()
        for _ in range(params.get("above", 0)):  # 1: its guard, 2: who started that
            victim = int(Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(victim, signal.SIGKILL)
        time.sleep(600)
    (folder / "half").unlink()
    return {"left over": left_over}


def refuse(params, inputs, folder, progress):
    kind = {"data": DataError, "search": SearchError}[params["kind"]]
    raise kind("no such thing", expected="a thing", hint="give one")


def blunder(params, inputs, folder, progress):
    return {"never": 1 // 0}


def litter(params, inputs, folder, progress):
    """Leaves what the next job must not see."""
    print("on standard output")
    found = {
        "cwd": str(Path.cwd()), "seen": os.environ.get("DEPLOYKIT_TEST_LITTER"), "path": list(sys.path),
        "home": os.environ.get("HOME"), "random": random.random(), "numpy": float(np.random.rand()),
    }  # fmt: skip
    os.environ["DEPLOYKIT_TEST_LITTER"] = "1"
    os.environ.pop("HOME", None)
    os.chdir("/")
    sys.path.insert(0, "/nowhere")
    return found | {"pid": os.getpid()}
