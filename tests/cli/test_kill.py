"""kill -9 at any moment leaves either no artifact or a whole one, and the next run is not in its way."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from deploykit.artifact import Artifact

COMMANDS = {
    "export": ["export", "net.onnx"],
    "simplify": ["simplify", "-m", "net.onnx"],
    "quantize": ["quantize", "static", "-m", "net.onnx", "--data", "calib.npz"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_kill_leaves_nothing_or_a_whole_artifact(name, conv_model, tmp_path):
    command = [sys.executable, "-m", "deploykit", *COMMANDS[name]]
    started = time.monotonic()
    subprocess.run([*command, "-o", "whole"], cwd=tmp_path, check=True, capture_output=True)
    duration = time.monotonic() - started
    order = random.Random(name)
    outcomes = set()
    for number in range(6):
        output = tmp_path / f"out{number}"
        process = subprocess.Popen(
            [*command, "-o", output.name], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        time.sleep(duration * order.uniform(0.2, 1.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
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
    subprocess.run([*command, "-o", f"out{killed}"], cwd=tmp_path, check=True, capture_output=True)
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
