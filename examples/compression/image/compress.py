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
CALIBRATION = "512"
# How much faster pruning makes it; what a quantized model may lose of the accuracy on the validation images.
SPEEDUP, DROP = "3", "0.005"


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
            *("--epochs", "1" if quick else str(epochs), "--batch", "64"),
            *("--schedule", "one-cycle", "--learning-rate", f"{rate:g}"),
        ]

    found = [common.Stage(f"{name}.zarr", ["data", "pack", f"{name}.npz"]) for name in PARTS]
    found += [
        common.Stage("baseline", ["finetune", "model.py:teacher", *judged, *training(3, 5e-3)], resumes=True),
        common.Stage(
            "distilled",
            ["distill", "model.py:trained", "--student", "model.py:student", *judged, *training(8, 5e-3)],
            resumes=True,
        ),
        # What is as fast as asked is told by the table; a busy machine must not cost the training.
        common.Stage(
            "pruned",
            ["prune", "model.py:trained", "--speedup", SPEEDUP, "--round-to", "8", "--allow-slower", *judged,
             *training(4, 3e-3)],
            resumes=True,
        ),
    ]  # fmt: skip
    gentle = ["--eval", "val.zarr", "--max-drop", DROP, "--allow-slower"]
    for name in ("baseline", "pruned", "distilled"):
        calibrated = ["-m", name, "--data", "train.zarr", "--max-samples", CALIBRATION]
        found.append(common.Stage(f"{name}-int8", ["quantize", "static", *calibrated, *gentle]))
    return found


if __name__ == "__main__":
    common.run(common.Example("image", HERE, ["model.py"], prepare, stages, common.MODELS, "test.zarr"))
