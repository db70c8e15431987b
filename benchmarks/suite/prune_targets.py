"""Does a pruned model take the time that was asked for? python benchmarks/suite/prune_targets.py [--speedups 1.5 2 3]

A residual network with depthwise convolutions and a small BERT, both without training (a latency does not mind what the
weights are), are pruned to several speed-ups, and to a latency in milliseconds, on each device. Printed are what was
asked for; what the pruning itself measured after export; what `deploykit benchmark` finds for the same two files
afterwards, with more rounds, and how far that is from what was asked for; how many pruned copies were timed on the way;
and what is left. Wants an idle machine. Exit code 1 where the second measurement is more than 5 % off, to either side:
faster than asked for is more taken out than had to go.
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

_ALLOWED = 0.05
# Of the second measurement.
_ROUNDS, _SECONDS = 9, 1.0


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
    parser.add_argument("--networks", nargs="+", choices=["images", "text"], default=["images", "text"])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--devices", nargs="+", default=["ort:cpu", "openvino:cpu"])
    parser.add_argument("--seconds", type=float, default=20.0, help="timed seconds of a proof")
    args = parser.parse_args()
    missed = 0
    print(
        f"{'network':8} {'device':14} {'asked':>9} {'proof':>9} {'benchmark':>22} {'off':>7} {'copies':>6} {'MACs':>6} "
        f"{'parameters':>10}"
    )
    with tempfile.TemporaryDirectory(prefix="deploykit-prune-") as folder:
        for name in args.networks:
            for device in args.devices:
                work = Path(folder) / f"{name}-{device.replace(':', '-')}"
                work.mkdir()
                original = deploykit.export(made(name)[0], work / "original", made(name)[1], dynamic=["none"]).path
                for speedup in args.speedups:
                    missed += report(name, device, original, {"speedup": speedup}, args.seconds, work)
                base_ms = deploykit.benchmark([original], devices=[device]).candidates[0]["median_ms"]
                asked = {"latency_ms": round(base_ms / args.speedups[0], 3)}
                missed += report(name, device, original, asked, args.seconds, work)
    return int(missed > 0)


def made(name: str) -> tuple[Any, Any]:
    """A network of this name, the same every time, and an example."""
    torch.manual_seed(0)
    return {"images": images, "text": text}[name]()


def report(name: str, device: str, original: Path, asked: dict[str, float], seconds: float, work: Path) -> int:
    """One line; 1 where the target is missed."""
    module, example = made(name)
    ((kind, target),) = asked.items()
    unit = "x" if kind == "speedup" else "ms"
    place = work / f"{kind}-{target:g}"
    start = f"{name:8} {device:14} {f'{target:g} {unit}':>9}"
    try:
        artifact = deploykit.prune(
            module, place, example, config=PruneConfig(), devices=[device], gate_seconds=seconds, dynamic=["none"],
            **asked,
        )  # fmt: skip
    except SpeedError as exc:
        print(f"{start}  {exc.what}", flush=True)
        return 1
    (proof,) = artifact.manifest.evidence.benchmark
    # Other weights, other outputs: what counts is the time.
    found = deploykit.benchmark([original, place], devices=[device], rounds=_ROUNDS, seconds=_SECONDS, min_cosine=-1.0)
    second = found.candidates[1]
    against = second["against_reference"]
    if kind == "speedup":
        off = against["ratio"] / target - 1
        own, other = (
            f"{proof['ratio']:.2f} x",
            f"{against['ratio']:.2f} x [{against['low']:.2f}, {against['high']:.2f}]",
        )
    else:
        off = target / second["median_ms"] - 1
        own, other = f"{proof['ms']:.3f} ms", f"{second['median_ms']:.3f} ms"
    params: Any = artifact.manifest.lineage[0].params
    left = [after / before for before, after in (params["macs"], params["parameters"])]
    print(
        f"{start} {own:>9} {other:>22} {off:+7.1%} {len(params['trials']):6} {left[0]:6.1%} {left[1]:10.1%}", flush=True
    )
    return int(abs(off) > _ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
