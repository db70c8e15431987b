"""The verb `quantize_qat`: a network that 8 bits spoil, and what training with the rounding gives back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deploykit
from deploykit.errors import ContractError, DataError, OptimizationError, OutputExistsError
from deploykit.optimizers import StaticConfig
from deploykit.optimizers.fake_quantize import fake_quantize
from deploykit.optimizers.scheme import Scheme
from deploykit.optimizers.training import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


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
def digits(digit_files: Callable[..., Path]) -> Path:
    return digit_files("image", 1, 8, 8)


@pytest.fixture(scope="module")
def net(digits: Path, taught: Callable[[Any, Path, int], Any]) -> Net:
    torch.manual_seed(0)
    made: Net = taught(Net(), digits, 10)
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

    # What stands in out.training goes on with the same only; that is said before anything is run.
    shutil.rmtree(tmp_path / "out")
    asked: dict[str, Any] = {
        "data": digits / "train.npz", "eval_data": digits / "eval.npz",
        "training": TrainConfig(epochs=6, learning_rate=1e-2), "devices": ["ort:cpu"],
    }  # fmt: skip
    with pytest.raises(OutputExistsError, match="--resume"):
        deploykit.quantize_qat("nosuch.py:make", tmp_path / "out", **asked)
    other = StaticConfig(weight_bits="7" if trained.params["weight_bits"] == 8 else "8")
    with pytest.raises(OptimizationError, match="begun with weight bits"):
        deploykit.quantize_qat(net, tmp_path / "out", example, **asked, config=other, resume=True)
    with pytest.raises(OptimizationError, match="begun with source 'module Net of"):
        deploykit.quantize_qat(nn.Sequential(nn.Linear(64, 10)), tmp_path / "out", example, **asked, resume=True)


def test_evaluation_data_are_tried_first(net: Net, digits: Path, tmp_path: Path) -> None:
    """Labels of another shape than the classes; nothing is left behind."""
    np.savez(tmp_path / "odd.npz", image=np.zeros((4, 1, 8, 8), np.float32), labels=np.zeros((4, 2), np.int64))
    with pytest.raises(DataError, match="labels of shape"):
        deploykit.quantize_qat(
            net, tmp_path / "out", torch.rand(4, 1, 8, 8), data=digits / "train.npz", eval_data=tmp_path / "odd.npz"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["odd.npz"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"config": StaticConfig(rounding="adaround")}, OptimizationError, "rounding adaround would change weights"),
        ({"config": StaticConfig(equalize=True)}, OptimizationError, "equalize True would change weights"),
        ({"max_drop": 0.1}, DataError, "--eval DATA"),
        ({"max_drop": "much", "eval_data": "eval.npz"}, DataError, "max drop"),
        ({"contract": ["ort:0.1"]}, ContractError, "ort"),
        ({"training": TrainConfig(metric="loss"), "max_drop": 0.1, "eval_data": "eval.npz"}, DataError, "--eval DATA"),
    ],
)
def test_what_is_refused(digits: Path, tmp_path: Path, changes: dict[str, Any], error: Any, said: str) -> None:
    with pytest.raises(error) as caught:
        deploykit.quantize_qat("net.py:make", tmp_path / "out", data=digits / "train.npz", **changes)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Smooth(nn.Module):
    """Behind an activation that no rounding contains: what the convolutions give is rounded itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(n, 8, 3, padding=1) for n in (1, 8, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, image: Any) -> Any:
        y = nn.functional.silu(self.two(self.one(image).relu()))
        return self.head(nn.functional.silu(self.three(y)).mean((2, 3)))


def test_the_training_rounds_what_the_quantizer_rounds(digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Smooth().eval()
    with torch.no_grad():
        for layer in (net.one, net.two, net.three, net.head):
            layer.weight *= 3  # outputs with something to lose
    with np.load(digits / "train.npz") as data:
        images = torch.tensor(data["image"][:64])
    np.savez(tmp_path / "few.npz", image=images.numpy())
    deploykit.export(net, tmp_path / "float", images[:4], devices=["ort:cpu"])
    deploykit.quantize_static(
        tmp_path / "float", tmp_path / "int8", data=tmp_path / "few.npz", min_cosine=-1.0, devices=["ort:cpu"],
        config=StaticConfig(weight_bits="7", smooth="off", bias_correction="off"), allow_slower=True, gate_seconds=0,
        escalate=False,
    )  # fmt: skip
    with deploykit.open_session(tmp_path / "int8", "ort:cpu") as session:
        (real,) = session.run({"image": images.numpy()}).values()
    with torch.no_grad():
        exact = net(images).numpy()
        rounding = fake_quantize(net, Scheme(7, per_channel=True), lambda: net(images))
        rounding.observe(net(images) for _ in range(1))
        seen = net(images).numpy()
    assert np.abs(seen - real).mean() < 0.25 * np.abs(exact - real).mean()
