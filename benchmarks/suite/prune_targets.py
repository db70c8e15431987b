"""Does a pruned model take the time that was asked for? python benchmarks/suite/prune_targets.py [--speedups 1.5 2 3]

A residual network with depthwise convolutions and a small BERT, both without training (a latency does not mind what the
weights are), are pruned to several speed-ups on each device. Printed are what was asked for, what was measured after
export, in rounds of fresh processes, how many pruned copies were timed on the way, and what is left. Wants an idle
machine. Exit code 1 where a target is missed by more than 5 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deploykit
from deploykit.errors import SpeedError
from deploykit.optimizers.pruning import PruneConfig


class Block(nn.Module):
    """An inverted residual: wide in between, depthwise there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Beside a shortcut."""
        return x + self.body(x)


class Images(nn.Module):
    """Three stages of blocks, for 96 x 96 pictures."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        before = 3
        for width in (64, 128, 256):
            stages += [nn.Conv2d(before, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), Block(width), Block(width)]
            before = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, 100)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Scores of 100 classes."""
        return self.head(self.stages(image).mean((2, 3)))


def images() -> tuple[Any, Any]:
    """The network and an example."""
    return Images().eval(), torch.randn(1, 3, 96, 96)


def text() -> tuple[Any, Any]:
    """A BERT of four layers, for 128 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_hidden_layers=4, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    ids = torch.randint(1, 30_000, (1, 128))
    return BertForSequenceClassification(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> int:
    """Prune, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--devices", nargs="+", default=["ort:cpu", "openvino:cpu"])
    parser.add_argument("--seconds", type=float, default=20.0, help="timed seconds of a proof")
    args = parser.parse_args()
    missed = 0
    print(f"{'network':8} {'device':14} {'asked':>6} {'measured':>22} {'copies':>6} {'MACs':>6} {'parameters':>10}")
    for name, make in (("images", images), ("text", text)):
        for device in args.devices:
            for speedup in args.speedups:
                missed += report(name, make, device, speedup, args.seconds)
    return int(missed > 0)


def report(name: str, make: Any, device: str, speedup: float, seconds: float) -> int:
    """One line; 1 where the target is missed."""
    torch.manual_seed(0)
    module, example = make()
    with tempfile.TemporaryDirectory(prefix="deploykit-prune-") as folder:
        try:
            made = deploykit.prune(
                module, Path(folder) / "out", example, config=PruneConfig(), speedup=speedup, devices=[device],
                gate_seconds=seconds,
            )  # fmt: skip
        except SpeedError as exc:
            print(f"{name:8} {device:14} {speedup:5g}x  {exc.what}")
            return 1
        (record,) = made.manifest.evidence.benchmark
        params: Any = made.manifest.lineage[0].params
    left = [after / before for before, after in (params["macs"], params["parameters"])]
    interval = f"{record['ratio']:.2f}x [{record['low']:.2f}, {record['high']:.2f}]"
    print(
        f"{name:8} {device:14} {speedup:5g}x {interval:>22} {len(params['trials']):6} {left[0]:6.1%} {left[1]:10.1%}",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
