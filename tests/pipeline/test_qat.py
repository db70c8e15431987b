"""The verb `quantize_qat`: a network that 8 bits spoil, and what training with the rounding gives back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import deploykit
from deploykit.errors import DataError, OptimizationError
from deploykit.optimizers import StaticConfig
from deploykit.optimizers.training import TrainConfig


class Net(nn.Module):
    """8x8 pictures to digits; channels of very different size, which ReLU hands on and the next layer undoes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.two = nn.Conv2d(16, 24, 3, 2, 1)
        self.head = nn.Linear(24 * 4, 10)

    def forward(self, image: Any) -> Any:
        return self.head(self.two(self.norm(self.one(image)).relu()).relu().flatten(1))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    np.savez(folder / "train.npz", image=images[:1200], labels=labels[:1200])
    np.savez(folder / "eval.npz", image=images[1200:], labels=labels[1200:])
    return folder


@pytest.fixture(scope="module")
def net(digits: Path) -> Net:
    torch.manual_seed(0)
    made = Net()
    with np.load(digits / "train.npz") as data:
        images, labels = torch.tensor(data["image"]), torch.tensor(data["labels"])
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    for _ in range(10):
        for index in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(made(images[index]), labels[index]).backward()
            optimizer.step()
    factors = torch.logspace(-2, 2, 16)[torch.randperm(16)]
    with torch.no_grad():
        made.norm.weight *= factors
        made.norm.bias *= factors
        made.two.weight /= factors[:, None, None]
    return made.eval()


def test_training_gives_back_what_rounding_took(net: Net, digits: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    example = torch.rand(4, 1, 8, 8)
    deploykit.export(net, tmp_path / "float", example, devices=["ort:cpu"])
    plain = deploykit.quantize_static(
        tmp_path / "float", tmp_path / "plain", data=digits / "train.npz", eval_data=digits / "eval.npz",
        metric="accuracy", max_drop=1.0, min_cosine=-1.0, config=StaticConfig(max_samples=256), devices=["ort:cpu"],
        allow_slower=True, gate_seconds=0, escalate=False,
    )  # fmt: skip
    artifact = deploykit.quantize_qat(
        net, tmp_path / "out", example, data=digits / "train.npz", eval_data=digits / "eval.npz", max_drop=0.1,
        training=TrainConfig(epochs=6, learning_rate=1e-2), devices=["ort:cpu"], allow_slower=True, gate_seconds=0,
    )  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    (spoiled,), (found,) = plain.manifest.evidence.accuracy, artifact.manifest.evidence.accuracy
    assert spoiled["value"] < spoiled["parent"] - 0.2  # else there would be nothing to give back
    assert found["value"] > spoiled["value"] + 0.1
    assert found["value"] > spoiled["parent"] - 0.1
    trained, exported, quantized = artifact.manifest.lineage
    assert (trained.step, exported.step, quantized.step) == ("qat", "export", "quantize-static")
    assert trained.params["folded"] == 1
    assert trained.params["layers"] == 3
    assert trained.params["rounded_before"] < trained.params["rounded_after"]
    # What the training saw is what the quantizer makes.
    assert spoiled["value"] == pytest.approx(trained.params["rounded_before"], abs=0.1)
    assert found["value"] == pytest.approx(trained.params["rounded_after"], abs=0.05)
    assert quantized.params["smooth"] == "off"
    assert json.loads((tmp_path / "out.training" / "history.json").read_bytes())[-1]["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"config": StaticConfig(rounding="adaround")}, OptimizationError, "rounding adaround would change weights"),
        ({"config": StaticConfig(equalize=True)}, OptimizationError, "equalize True would change weights"),
        ({"max_drop": 0.1}, DataError, "--eval DATA"),
        ({"training": TrainConfig(metric="loss"), "max_drop": 0.1, "eval_data": "eval.npz"}, DataError, "--eval DATA"),
    ],
)
def test_what_is_refused(digits: Path, tmp_path: Path, changes: dict[str, Any], error: Any, said: str) -> None:
    with pytest.raises(error) as caught:
        deploykit.quantize_qat("net.py:make", tmp_path / "out", data=digits / "train.npz", **changes)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []
