"""What tests of executors share."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deploykit.progress import Progress


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.steps = []
        self.advances = []

    def step(self, text):
        self.steps.append(text)
        return super().step(text)

    def advance(self, done, total, unit):
        self.advances.append((done, total, unit))


def running(pid):
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(true, seconds=60.0):
    """Wait until something is so; it is an error where it never is."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="session")
def tools():
    return SimpleNamespace(Told=Told, running=running, wait_for=wait_for)


@pytest.fixture(scope="session", autouse=True)
def deeds_can_be_found():
    """By the processes of executors, which take over the environment."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before, str(Path(__file__).parent)]))
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def brief(monkeypatch):
    """Searches that measure as little as they can: their budget is for slow machines, and need not be spent."""
    from deploykit.benchmarks import budget
    from deploykit.benchmarks.plan import MIN_ROUNDS
    from deploykit.search import engine, tasks, timing

    monkeypatch.setattr(tasks, "_DEEDS", "brief:")
    monkeypatch.setitem(engine.SHARES, "tune", 0.08)
    for name, value in {
        "_ROUNDS": MIN_ROUNDS, "_LEAST_ROUNDS": MIN_ROUNDS, "_MOST_SECONDS": 0.1, "_LEAST_SECONDS": 0.1, "_TUNED": 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(timing, name, value)
    monkeypatch.setattr(budget, "START_S", 0.5)


@pytest.fixture
def folders(tmp_path):
    """Empty folders for results, one a call."""

    def make():
        folder = tmp_path / f"result-{len(list(tmp_path.glob('result-*')))}"
        folder.mkdir()
        return folder

    return make


@pytest.fixture(scope="session")
def digits_net(tmp_path_factory):
    """A small CNN really trained on scikit-learn's digits, `net.onnx`, with `calib.npz` beside it."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    found = load_digits()
    images = found.images[:, None].astype(np.float32) / 16
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # 64 channels, so that a batch of 16 has more activations than are counted.
    net = nn.Sequential(
        nn.Conv2d(1, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    x, y = torch.from_numpy(images[:1200]), torch.from_numpy(found.target[:1200])
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    for _ in range(4):
        for rows in torch.randperm(1200).split(64):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = net(torch.from_numpy(images[1200:])).argmax(1).numpy() == found.target[1200:]
    torch.set_num_threads(threads)
    assert right.mean() > 0.9
    folder = tmp_path_factory.mktemp("digits")
    torch.onnx.export(
        net.eval(), (x[:2],), str(folder / "net.onnx"), input_names=["x"], output_names=["y"], dynamo=False,
        dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
    )  # fmt: skip
    np.savez(folder / "calib.npz", x=images[:400], labels=found.target[:400])
    return folder / "net.onnx"
