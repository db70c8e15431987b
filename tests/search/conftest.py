"""What tests of executors share."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

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
def folders(tmp_path):
    """Empty folders for results, one a call."""

    def make():
        folder = tmp_path / f"result-{len(list(tmp_path.glob('result-*')))}"
        folder.mkdir()
        return folder

    return make
