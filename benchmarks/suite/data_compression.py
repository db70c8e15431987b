"""What packing and selecting data gain: python benchmarks/suite/data_compression.py [digits] [fashion]

For real images and a net that was trained on them:
- the size of the training images as float32 and in each form that a dataset may have;
- how fast normalized batches are read from the packed store, beside how fast ONNX Runtime takes them, in turns;
- accuracy, and error of the outputs, of the int8 model that all N calibration samples give, beside those of N/20 chosen
  by k-center and at random (five times each), and by herding, on the whole test set.

`digits` is scikit-learn's, 1,000 for training and 797 for the test; `fashion` is Fashion-MNIST with the residual net of
`real_models.py` (Debian's `dataset-fashion-mnist`, or the directory in `$FASHION_MNIST`). Without names, those that are
there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import deploykit
from deploykit.artifact import Artifact
from deploykit.machine import inspect_machine
from deploykit.optimizers import StaticConfig
from deploykit.optimizers.coresets import METHODS
from deploykit.packing import Normalization
from deploykit.progress import Progress
from deploykit.runtimes import open_session

_SUITE = Path(__file__).parent
_FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
_BATCH = 32
_FRACTION = 20


@dataclass
class Task:
    """Images of bytes with labels, for training and for the test; their normalization; a trained net."""

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    normalization: Normalization
    calibration: int
    net: Callable[[np.ndarray, np.ndarray], Any]

    def reals(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32, as the store gives them."""
        return self.normalization.scaling("image", images).apply(images)


def digits() -> Task:
    """Handwritten digits of 8x8, values 0 to 16."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = pixels.astype(np.uint8).reshape(-1, 1, 8, 8)
    return Task(
        "digits", (images[:1000], labels[:1000]), (images[1000:], labels[1000:]), Normalization(rescale=1 / 16), 1000,
        _digits_net,
    )  # fmt: skip


def _digits_net(images: np.ndarray, labels: np.ndarray) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(40):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def fashion() -> Task:
    """Fashion-MNIST."""
    sys.path.insert(0, str(_SUITE))
    import real_models

    def bytes_of(part: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = real_models.fashion(part)
        return np.rint((images * 0.3530 + 0.2860) * 255).astype(np.uint8), labels

    return Task(
        "fashion", bytes_of("train"), bytes_of("t10k"), Normalization((0.2860,), (0.3530,)), 2000,
        lambda images, labels: real_models.residual()[0],
    )  # fmt: skip


TASKS = {"digits": digits, "fashion": fashion}


def sizes(task: Task, folder: Path) -> dict[str, int]:
    """Bytes of the training images in each form; the stores hold labels too."""
    images, labels = task.train
    reals = task.reals(images)
    np.savez(folder / "reals.npz", image=reals, labels=labels)
    np.savez_compressed(folder / "deflated.npz", image=reals, labels=labels)
    np.savez(folder / "bytes.npz", image=images, labels=labels)
    deploykit.pack_data(folder / "reals.npz", folder / "reals.zarr")
    deploykit.pack_data(folder / "reals.npz", folder / "half.zarr", float16=True)
    deploykit.pack_data(folder / "bytes.npz", folder / "train.zarr", normalization=task.normalization)

    def size(name: str) -> int:
        path = folder / name
        return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size

    return {
        "float32, raw": reals.nbytes + labels.nbytes, ".npz, deflated": size("deflated.npz"),
        ".npz of bytes": size("bytes.npz"), "packed float32": size("reals.zarr"), "packed float16": size("half.zarr"),
        "packed bytes, normalized when read": size("train.zarr"),
    }  # fmt: skip


def speeds(model: Path, store: Path, rounds: int) -> dict[str, float]:
    """Samples a second: read and normalized from the store, and taken by ONNX Runtime from memory, in turns."""
    dataset = deploykit.Dataset.open(store)
    batches = [batch["image"] for batch in dataset.batches(_BATCH)]
    samples = sum(map(len, batches))
    read, run = [], []
    with open_session(model, "ort:cpu") as session:
        name = session.signature.inputs[0].name
        session.run({name: batches[0]})
        for _ in range(rounds):
            start = time.perf_counter_ns()
            for _batch in dataset.batches(_BATCH):
                pass
            middle = time.perf_counter_ns()
            for batch in batches:
                session.run({name: batch})
            read.append(samples / (middle - start) * 1e9)
            run.append(samples / (time.perf_counter_ns() - middle) * 1e9)
    return {"read": statistics.median(read), "inference": statistics.median(run)}


def outputs(model: Path, task: Task) -> np.ndarray:
    """What a model file gives for the whole test set."""
    images, found = task.reals(task.test[0]), []
    with open_session(model, "ort:cpu") as session:
        name, output = session.signature.inputs[0].name, session.signature.outputs[0].name
        for start in range(0, len(images), 100):
            found.append(session.run({name: images[start : start + 100]})[output])
    return np.concatenate(found)


def calibrations(
    task: Task, fp32: Artifact, folder: Path, config: StaticConfig, chances: int
) -> dict[str, list[tuple[float, float]]]:
    """Accuracy of int8 models by what they were calibrated with, and the SQNR of their outputs in dB."""
    images, labels = task.train
    np.savez(folder / "calibration.npz", image=images[: task.calibration], labels=labels[: task.calibration])
    whole = folder / "calibration.zarr"
    deploykit.pack_data(folder / "calibration.npz", whole, normalization=task.normalization)
    sources = {"all": [whole]}
    for method in METHODS:
        count = 1 if method == "herding" else chances  # nothing in it is random
        sources[method] = [folder / f"{method}-{seed}.zarr" for seed in range(count)]
        for seed, part in enumerate(sources[method]):
            deploykit.select_data(whole, part, model=fp32.path, fraction=1 / _FRACTION, method=method, seed=seed)
    want = outputs(fp32.model_path, task)

    def score(model: Path) -> tuple[float, float]:
        have = outputs(model, task)
        error = float(np.square(have - want).sum())
        sqnr = 10 * np.log10(float(np.square(want).sum()) / error) if error else float("inf")
        return float((have.argmax(1) == task.test[1]).mean()), float(sqnr)

    found = {"float32": [score(fp32.model_path)]}
    for label, stores in sources.items():
        found[label] = []
        for number, store in enumerate(stores):
            made = deploykit.quantize_static(
                fp32.path, folder / f"int8-{label}-{number}", data=store, config=config, min_cosine=-1, gate_seconds=0,
                check_rows=0, progress=Progress(),
            )  # fmt: skip
            found[label].append(score(made.model_path))
    return found


def measure(task: Task, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a task, printed as they come."""
    print(f"\n{task.name}: {len(task.train[0])} training and {len(task.test[0])} test images")
    found = sizes(task, folder)
    raw = found["float32, raw"]
    for label, size in found.items():
        print(f"  {label:36} {size / 1e6:9.3f} MB {raw / size:6.1f}x smaller")
    images, labels = task.reals(task.train[0]), task.train[1]
    import torch

    net = task.net(images, labels)
    fp32 = deploykit.simplify(
        deploykit.export(
            net, folder / "exported", example_inputs=torch.from_numpy(images[:4]), data=folder / "reals.npz"
        ).path,
        folder / "fp32",
    )
    speed = speeds(fp32.model_path, folder / "train.zarr", options.rounds)
    print(
        f"  read {speed['read']:,.0f} samples/s, inference {speed['inference']:,.0f} samples/s in batches of {_BATCH}"
    )
    config = StaticConfig(calibration=options.calibration)
    scores = calibrations(task, fp32, folder, config, options.chances)
    full = scores["all"][0][0]
    print(f"  int8 accuracy (SQNR in dB), {options.calibration}, N = {task.calibration} samples or N/{_FRACTION}:")
    for label, values in scores.items():
        told = ", ".join(f"{100 * value:.2f} % ({sqnr:.1f})" for value, sqnr in values)
        worst = min(100 * (value - full) for value, _ in values)
        print(f"  {label:10} {told}" + ("" if label in ("float32", "all") else f"; {worst:+.2f} points at worst"))
    return {"task": task.name, "bytes": found, "samples_per_s": speed, "accuracy": scores}


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--rounds", type=int, default=7, help="of reading and inference in turns")
    parser.add_argument("--chances", type=int, default=5, help="seeds of k-center and of random choices")
    parser.add_argument("--calibration", default="minmax", help="as of deploykit quantize static")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in TASKS]
    if unknown:
        parser.error(f"no {unknown[0]}; there is {', '.join(TASKS)}")
    there = ["digits", *(["fashion"] if _FASHION.is_dir() else [])]
    print(inspect_machine())
    figures = []
    for name in options.names or there:
        with tempfile.TemporaryDirectory(prefix="data-compression-") as scratch:
            figures.append(measure(TASKS[name](), Path(scratch), options))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
