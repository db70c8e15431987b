"""A small residual classifier of handwritten digits, trained on scikit-learn's data in a few seconds.

`python model.py DIR` trains and writes `weights.safetensors`, `calib.npz` and `eval.npz` into DIR; `make` is the
factory that `deploykit export` calls.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

EPOCHS = 8


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, height, width] to the same shape."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(y)))


class Digits(nn.Module):
    """8x8 grey images, values 0 to 1, to 10 classes."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(Block(channels), Block(channels), nn.MaxPool2d(2), Block(channels))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image [batch, 1, 8, 8] to logits [batch, 10]."""
        return self.head(self.blocks(functional.relu(self.stem(image))))


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and held-out images and labels; the held-out third is never trained on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(images))
    train, held_out = order[:1200], order[1200:]
    return images[train], labels[train], images[held_out], labels[held_out]


def train(folder: Path) -> None:
    """Train and write weights, calibration data (of the training images) and evaluation data (held out)."""
    torch.manual_seed(0)
    images, labels, held_out, held_out_labels = split()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=EPOCHS * 19)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(torch.from_numpy(held_out)).argmax(1).numpy() == held_out_labels).mean()
    print(f"trained; accuracy on {len(held_out)} held-out images: {accuracy:.4f}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "weights.safetensors")
    np.savez(folder / "calib.npz", image=images[:256])
    np.savez(folder / "eval.npz", image=held_out, labels=held_out_labels)


def make() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The trained model and an example input; `DIGITS` names the folder with the weights."""
    folder = Path(os.environ.get("DIGITS", Path(__file__).parent))
    model = Digits()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model.eval(), (torch.from_numpy(split()[2][:4]),)


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
