"""`deploykit finetune` as a person sees it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np

from deploykit.artifact import Artifact

NET = """
import os, time
import torch
from torch import nn


class Net(nn.Sequential):
    def forward(self, x):
        if self.training:
            time.sleep(float(os.environ.get("SLOW", "0")))
        return super().forward(x)


def make():
    torch.manual_seed(0)
    return Net(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), (torch.zeros(2, 8),)
"""


def write(folder):
    (folder / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, labels=(x.sum(1) > 0).astype(np.int64))


def test_ctrl_c_and_resume(tmp_path, cli):
    write(tmp_path)
    command = ["finetune", "net.py:make", "--data", "data.npz", "--eval", "data.npz", "-o", "out", "--epochs", "12",
               "--batch", "16", "--learning-rate", "0.02", "--device", "ort:cpu"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "deploykit", *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "SLOW": "0.4"}, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.training" / "last.ckpt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "with --resume" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    done = cli(*command)
    assert done.returncode == 1
    assert "--resume" in done.stderr
    done = cli(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert "the training goes on after step" in done.stderr
    assert "epoch 12 of 12: loss " in done.stderr
    assert "epoch 1 of 12" not in done.stderr
    assert "quality accuracy " in done.stdout
    history = json.loads((tmp_path / "out.training" / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == list(range(1, 13))
    assert Artifact.open(tmp_path / "out").manifest.lineage[0].params["epochs"] == 12


def test_wrong_options(tmp_path, cli):
    write(tmp_path)
    done = cli(
        "finetune", "net.py:make", "--data", "data.npz", "-o", "out", "--loss", "mse", "--label-smoothing", "0.1"
    )
    assert done.returncode == 1
    assert "label smoothing does nothing with loss mse" in done.stderr
    assert cli("finetune", "net.py:make", "--data", "data.npz", "-o", "out", "--schedule", "x").returncode == 2
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["data.npz", "net.py"]
