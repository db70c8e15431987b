"""Fashion-MNIST as Debian packs it: 60,000 images of 28x28 grey bytes for training, 10,000 for the test, 10 classes."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
INSTALL = "apt-get install dataset-fashion-mnist"
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
# Images of the training part that are held back, to choose the weights on; the same share of every class.
VALIDATION = 5_000
# Of a quick run: training, validation, test.
QUICK = (2_000, 500, 500)
_SEED = 0

Pairs = tuple[np.ndarray, np.ndarray]


def read(part: str) -> Pairs:
    """Images uint8 [n, 1, 28, 28] and labels int64 [n].

    Args:
        part: "train" or "t10k", the test set.

    Raises:
        SystemExit: The package is not installed.
    """
    try:
        with gzip.open(FOLDER / f"{part}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(FOLDER / f"{part}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    except FileNotFoundError as exc:
        raise SystemExit(f"no Fashion-MNIST at {exc.filename}; run: {INSTALL} (or set FASHION_MNIST)") from exc
    return images, labels


def split(quick: bool = False) -> dict[str, Pairs]:
    """The parts by name: "train" and "val" out of the training images, and "test", which nothing is chosen on.

    Args:
        quick: A small part of each.
    """
    images, labels = read("train")
    held_out = read("t10k")
    order = np.random.default_rng(_SEED).permutation(len(labels))
    each = VALIDATION // len(CLASSES)
    validation = np.concatenate([order[labels[order] == c][:each] for c in range(len(CLASSES))])
    kept = order[~np.isin(order, validation)]
    validation = np.random.default_rng(_SEED).permutation(validation)
    parts = {
        "train": (images[kept], labels[kept]), "val": (images[validation], labels[validation]), "test": held_out
    }  # fmt: skip
    if not quick:
        return parts
    return {name: (x[:n], y[:n]) for (name, (x, y)), n in zip(parts.items(), QUICK, strict=True)}
