"""Models exported for an old runtime run in that very runtime, with the right numbers: `pytest -m slow`.

Installs the runtimes from the package index into environments of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        steps = torch.relu(self.conv(image)).mean(3).transpose(1, 2)
        return self.head(nn.functional.gelu(self.lstm(self.norm(steps))[0][:, -1]))


def make():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(2, 3, 16, 16),)
"""

# Replays golden cases with nothing but numpy and the runtime; prints the largest difference, or the error.
REPLAY = """
import json, sys
import numpy as np

runtime, folder = sys.argv[1:]
outputs = [t["name"] for t in json.load(open(folder + "/manifest.json"))["outputs"]]
golden = np.load(folder + "/golden.npz")
try:
    if runtime == "onnxruntime":
        import onnxruntime
        session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
        run = lambda feeds: session.run(outputs, feeds)
    else:
        import openvino
        compiled = openvino.Core().compile_model(folder + "/model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        run = lambda feeds: list(compiled(feeds).values())
    worst = 0.0
    for case in {key.split("/")[0] for key in golden.files}:
        start = case + "/in/"
        found = run({key[len(start):]: golden[key] for key in golden.files if key.startswith(start)})
        for name, value in zip(outputs, found):
            worst = max(worst, float(np.abs(value - golden[f"{case}/out/{name}"]).max()))
    print(json.dumps({"worst": worst}))
except Exception as exc:
    print(json.dumps({"error": str(exc)}))
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same module, exported with and without contracts."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "net.py").write_text(MODULE, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    contracts = {"plain": [], "ort": ["--for", "ort:1.17"], "openvino": ["--for", "openvino:2024.6"]}
    for name, options in contracts.items():
        command = [sys.executable, "-m", "deploykit", "export", "net.py:make", "-o", name, *options]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


def replay(folder: Path, artifact: Path, *packages: str) -> dict[str, object]:
    """What a runtime of another version makes of an artifact's golden cases."""
    place = folder / packages[0]
    if not place.exists():
        venv.create(place, with_pip=True)
        install = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(install, check=True, capture_output=True)
    script = folder / "replay.py"
    script.write_text(REPLAY, encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(place / "bin" / "python"), str(script), packages[0].split("==")[0], str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_onnxruntime_1_17(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ort")
    packages = ("onnxruntime==1.17.3", "numpy<2")
    found = replay(folder, artifacts / "ort", *packages)
    assert found.get("error") is None and float(str(found["worst"])) < 1e-5
    # What the contract is for: without it the file is too new.
    assert "IR version" in str(replay(folder, artifacts / "plain", *packages).get("error"))


def test_openvino_2024_6(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = replay(tmp_path_factory.mktemp("openvino"), artifacts / "openvino", "openvino==2024.6.0", "numpy<2")
    assert found.get("error") is None and float(str(found["worst"])) < 1e-5
