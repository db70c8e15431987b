"""Fashion-MNIST: a residual network trained, pruned, distilled and quantized, and all of it in one table.

python examples/compression/image/compress.py [OUTPUT] [--quick] [--steps table]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import data  # noqa: E402

PARTS = ("train", "val", "test")
MODELS = [
    ("baseline fp32", "baseline"),
    ("baseline int8", "baseline-int8"),
    ("pruned fp32", "pruned"),
    ("pruned int8", "pruned-int8"),
    ("distilled fp32", "distilled"),
    ("distilled int8", "distilled-int8"),
]
CALIBRATION = "512"
# How much faster pruning makes it; what a quantized model may lose of the accuracy on the validation images.
SPEEDUP, DROP = "4", "0.005"


def prepare(output: Path, quick: bool) -> None:
    """Write the parts of the data where they are not there yet."""
    if all((output / f"{name}.npz").is_file() for name in PARTS):
        return
    for name, (images, labels) in data.split(quick).items():
        common.save_arrays(output / f"{name}.npz", image=images, labels=labels)
        print(f"{name}: {len(labels):,} images")


def stages(quick: bool) -> list[common.Stage]:
    """From the data to the last model."""
    judged = ["--data", "train.zarr", "--eval", "val.zarr"]

    def training(epochs: int, rate: float) -> list[str]:
        return [
            *("--epochs", "1" if quick else str(epochs), "--batch", "128"),
            *("--schedule", "one-cycle", "--learning-rate", f"{rate:g}"),
        ]

    found = [common.Stage(f"{name}.zarr", ["data", "pack", f"{name}.npz"]) for name in PARTS]
    found += [
        common.Stage("calibration.npz", ["data", "select", "train.zarr", "-n", CALIBRATION, "--method", "random"]),
        common.Stage("baseline", ["finetune", "model.py:teacher", *judged, *training(4, 4e-3)], resumes=True),
        common.Stage(
            "pruned",
            ["prune", "model.py:trained", "--speedup", SPEEDUP, "--round-to", "8", *judged, *training(4, 2e-3)],
        ),
        common.Stage(
            "distilled",
            ["distill", "model.py:trained", "--student", "model.py:student", *judged, *training(8, 4e-3)],
            resumes=True,
        ),
    ]
    found += [
        common.Stage(
            f"{name}-int8",
            ["quantize", "static", "-m", name, "--data", "calibration.npz", "--eval", "val.zarr", "--max-drop", DROP,
             "--allow-slower"],
        )
        for name in ("baseline", "pruned", "distilled")
    ]  # fmt: skip
    return found


if __name__ == "__main__":
    common.run(common.Example("image", HERE, ["model.py"], prepare, stages, MODELS, "test.zarr"))
