"""A small depthwise net that is really trained, on scikit-learn's digits, and helpers that run models.

Helpers are handed out as a fixture, because test files of pytest's importlib mode cannot import each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploykit.data import Dataset
from deploykit.optimizers import StaticConfig, StepResult, optimize
from deploykit.runtimes import open_session

_TRAINED = 1200


@dataclass(frozen=True)
class Trained:
    """A model with its data: what it was trained on, and what not."""

    path: Path
    calibration: dict[str, Any]
    test: dict[str, Any]
    labels: Any

    def accuracy(self, path: Path) -> float:
        return float(np.mean(outputs_of(path, self.test).argmax(1) == self.labels))


def opener(path: Path) -> Callable[[Any], Any]:
    return open_session(path, threads=1).run


def outputs_of(path: Path, feeds: dict[str, Any]) -> Any:
    """The first output."""
    return next(iter(opener(path)(feeds).values()))


def sqnr(have: Any, want: Any) -> float:
    return float(10 * np.log10(np.square(want).sum() / max(np.square(have - want).sum(), 1e-30)))


def quantized(source: Path, folder: Path, config: StaticConfig, data: dict[str, Any]) -> tuple[Path, StepResult]:
    target = folder / f"{len(list(folder.iterdir()))}.onnx"
    result = optimize(
        source, config, target, check=lambda path: None, open_model=opener, data=Dataset.from_arrays(data)
    )
    return target, result


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    return SimpleNamespace(opener=opener, outputs_of=outputs_of, sqnr=sqnr, quantized=quantized)


def _digits_net() -> Any:
    from torch import nn

    def block(inner: int, outer: int, stride: int, middle: int) -> list[Any]:
        return [
            nn.Conv2d(inner, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU6(),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False), nn.BatchNorm2d(middle), nn.ReLU6(),
            nn.Conv2d(middle, outer, 1, bias=False), nn.BatchNorm2d(outer),
        ]  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(), *block(16, 24, 2, 48),
        *block(24, 32, 1, 72), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.fixture(scope="session")
def digits(made_once: Callable[..., Path]) -> Trained:
    """MobileNet's blocks with Relu6, 0.96 and more on digits that it has not seen."""
    from sklearn import datasets

    found = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    images = (found.images[order, None].astype(np.float32) / 16 - 0.3) / 0.35
    labels = found.target[order]
    folder = made_once("digits", lambda empty: _train(images, labels, empty))
    path = folder / "fp32" / "model.onnx"
    made = Trained(path, {"x": images[:512]}, {"x": images[_TRAINED:]}, labels[_TRAINED:])
    assert made.accuracy(path) > 0.96
    return made


def _train(images: Any, labels: Any, folder: Path) -> None:
    import torch
    from torch.nn import functional as F

    import deploykit

    torch.manual_seed(0)
    net = _digits_net()
    x, y = torch.from_numpy(images[:_TRAINED]), torch.from_numpy(labels[:_TRAINED])
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    for _ in range(15):
        for rows in torch.randperm(_TRAINED).split(64):
            loss = F.cross_entropy(net(x[rows]), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.onnx.export(
        net.eval(), (x[:2],), str(folder / "raw.onnx"), input_names=["x"], output_names=["y"], dynamo=False,
        dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
    )  # fmt: skip
    deploykit.simplify(folder / "raw.onnx", folder / "fp32")
