"""How long each path to ONNX takes, for the nets whose symbolic shapes or recurrent layers cost the most.

    python benchmarks/suite/export_time.py [NAME ...] [--limit SECONDS]

Prints a line a model and path: CPU seconds of the export process, nodes of the graph, and what came of it; then which
path `deploykit export` chose by itself. CPU seconds, because they hold on a busy machine.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.nn import functional as F

import deploykit
from deploykit.errors import DeploykitError
from deploykit.progress import Progress


class Recurrent(nn.Module):
    """Recurrent layers and a linear one at every step."""

    def __init__(self, kind: type[nn.RNNBase], layers: int, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.recurrent = kind(32, 32, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(64 if bidirectional else 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(x)[0])


class Crnn(nn.Module):
    """A reader of text lines: convolutions, then a bidirectional LSTM over the width."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 1)), nn.Conv2d(64, 64, (4, 1)),
        )  # fmt: skip
        self.recurrent = nn.LSTM(64, 64, 2, bidirectional=True)
        self.head = nn.Linear(128, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = self.features(x).squeeze(2).permute(2, 0, 1)
        return self.head(self.recurrent(columns)[0]).log_softmax(-1)


def _block(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU())


class UNet(nn.Module):
    """Four scales; skip connections are fitted by interpolation, padding or cropping."""

    def __init__(self, fit: str, width: int = 8, depth: int = 4) -> None:
        super().__init__()
        sizes = [width * 2**i for i in range(depth)]
        self.fit = fit
        self.down = nn.ModuleList([_block(i, o) for i, o in zip([3, *sizes], sizes, strict=False)])
        self.up = nn.ModuleList([_block(sizes[i] + sizes[i - 1], sizes[i - 1]) for i in range(depth - 1, 0, -1)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            skip = skips.pop()
            if self.fit == "interpolate":
                x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            else:
                x = F.interpolate(x, scale_factor=2.0)
                high, wide = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
                if self.fit == "pad":
                    x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
                else:
                    top, left = high // 2, wide // 2
                    skip = skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]
            x = block(torch.cat([skip, x], 1))
        return self.head(x)


class SameConv(nn.Conv2d):
    """TensorFlow's padding, computed from the input's size, as EfficientDet ports do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


class EfficientDetLike(nn.Module):
    """Halving levels of `SameConv`, summed up from the smallest: size arithmetic on size arithmetic."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(SameConv(8 if i else 3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.SiLU(), SameConv(8, 8, 5))
            for i in range(levels)
        )
        self.head = SameConv(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        for feature in reversed(features[:-1]):
            x = F.interpolate(x, size=feature.shape[-2:]) + feature
        return self.head(x)


class Perceptron(nn.Sequential):
    """The least that there is: what an export costs at all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


SEQUENCE = "x:0=batch,1=sequence"
IMAGE = "x:0=batch,2=height,3=width"
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "mlp": (lambda: Perceptron(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (2, 8), "batch"),
    "lstm-1": (lambda: Recurrent(nn.LSTM, 1), (2, 16, 32), SEQUENCE),
    "lstm-2-bidirectional": (lambda: Recurrent(nn.LSTM, 2, bidirectional=True), (2, 16, 32), SEQUENCE),
    "lstm-4": (lambda: Recurrent(nn.LSTM, 4), (2, 16, 32), SEQUENCE),
    "lstm-1-steps-512": (lambda: Recurrent(nn.LSTM, 1), (2, 512, 32), "batch"),
    "gru-2": (lambda: Recurrent(nn.GRU, 2), (2, 16, 32), SEQUENCE),
    "crnn": (Crnn, (2, 1, 32, 100), "x:0=batch,3=width"),
    "unet-interpolate": (lambda: UNet("interpolate"), (2, 3, 64, 96), IMAGE),
    "unet-pad": (lambda: UNet("pad"), (2, 3, 64, 96), IMAGE),
    "unet-crop": (lambda: UNet("crop"), (2, 3, 64, 96), IMAGE),
    "efficientdet-4": (lambda: EfficientDetLike(4), (2, 3, 64, 96), IMAGE),
    "efficientdet-6": (lambda: EfficientDetLike(6), (2, 3, 128, 192), IMAGE),
}
chosen = ""


def make() -> Any:
    """The factory that the exports name: the model that is measured now."""
    torch.manual_seed(0)
    build, shape, _ = MODELS[chosen]
    return build().eval(), torch.randn(shape)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _measure(name: str, exporter: str, limit: float | None) -> str:
    """One line: seconds, nodes, and the path, or why there is none."""
    global chosen
    chosen = name
    progress = Progress()
    with tempfile.TemporaryDirectory() as folder:
        before = _cpu_s()
        try:
            artifact = deploykit.export(
                "__main__:make", Path(folder) / "out", dynamic=[MODELS[name][2]], exporter=exporter,
                devices=["ort:cpu"], timeout_s=limit, progress=progress,
            )  # fmt: skip
        except DeploykitError as exc:
            return f"{name:22} {exporter:13} {_cpu_s() - before:7.1f} s        -  {exc.what.partition(': ')[2]:.120}"
        nodes = len(onnx.load(str(artifact.model_path), load_external_data=False).graph.node)
        path = artifact.manifest.lineage[-1].params["exporter"]
        return f"{name:22} {exporter:13} {_cpu_s() - before:7.1f} s {nodes:8}  {path}"


def main() -> None:
    """Measure the models that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*MODELS, []])
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds for a single path")
    arguments = parser.parse_args()
    print(f"{'model':22} {'exporter':13} {'CPU time':>9} {'nodes':>8}  path, or why not")
    for name in arguments.names or MODELS:
        for exporter in ("torch.export", "torchscript"):
            print(_measure(name, exporter, arguments.limit), flush=True)
        print(_measure(name, "auto", None), flush=True)


if __name__ == "__main__":
    main()
