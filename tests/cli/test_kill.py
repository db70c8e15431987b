"""kill -9 at any moment leaves either no artifact or a whole one, and the next run is not in its way."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from deploykit.artifact import Artifact

COMMANDS = {
    "export": ["export", "{0}/net.onnx"],
    "simplify": ["simplify", "-m", "{0}/net.onnx"],
    "quantize": ["quantize", "static", "-m", "{0}/net.onnx", "--data", "{0}/calib.npz"],
}


# Has imported what the commands need, and runs each in a fork that leads a group: what is killed is at work by then.
FORKS = """
import json, os, sys
import numpy, onnx, onnxruntime, openvino
from deploykit import pipeline
from deploykit.cli import main

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        try:
            main(json.loads(line))
        except SystemExit as exc:
            os._exit(exc.code)
        os._exit(70)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def ready():
    """A process that runs commands in forks of itself."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


@pytest.mark.parametrize("name", COMMANDS)
def test_kill_leaves_nothing_or_a_whole_artifact(name, conv_model, tmp_path, ready):
    command = [word.format(tmp_path) for word in COMMANDS[name]]

    def begin(output):
        ready.stdin.write(json.dumps([*command, "-o", str(tmp_path / output)]) + "\n")
        ready.stdin.flush()
        return int(ready.stdout.readline())

    def end():
        return int(ready.stdout.readline())

    started = time.monotonic()
    begin("whole")
    assert end() == 0
    duration = time.monotonic() - started
    order = random.Random(name)
    outcomes = set()
    for number in range(6):
        output = tmp_path / f"out{number}"
        pid = begin(output.name)
        # One in each sixth: the first run is slower than those after it, which chance alone could let end every time.
        time.sleep(duration * (number + order.random()) / 6)
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.killpg(pid, signal.SIGKILL)
        assert end() in (0, -signal.SIGKILL)
        outcomes.add(output.exists())
        if output.exists():
            Artifact.open(output)  # raises where a byte is missing
    assert False in outcomes  # some kills came in time to matter
    # What the killed writers left is hidden, and swept by the next writer to the same place.
    leftovers = [p for p in tmp_path.iterdir() if ".tmp-" in p.name]
    assert all(p.name.startswith(".") for p in leftovers)
    for stale in leftovers:
        os.utime(stale, (0, 0))
    killed = next(n for n in range(6) if not (tmp_path / f"out{n}").exists())
    done = [sys.executable, "-m", "deploykit", *command, "-o", f"out{killed}"]
    subprocess.run(done, cwd=tmp_path, check=True, capture_output=True)
    Artifact.open(tmp_path / f"out{killed}")
    assert not list(tmp_path.glob(f".out{killed}.tmp-*"))


def test_sigterm_cleans_up(conv_model, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "deploykit", "simplify", "-m", "net.onnx", "-o", "out"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.tmp-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
