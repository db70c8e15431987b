"""Residual networks for 28x28 grey images: the teacher, the trained teacher, and the student.

`deploykit` calls the factories without arguments, in the folder where the trainings stand. The normalization is a part
of the network: what it takes are bytes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

# Of the training images, as shares of 255.
MEAN, STD = 0.2860, 0.3530
# Channels and blocks of each stage; every stage but the first halves the image.
TEACHER = ((24, 2), (48, 2), (96, 2), (192, 2))
STUDENT = ((16, 0), (32, 1), (64, 1))
CLASSES = 10
_TRAINED = "baseline.training/weights.pt"

Example = tuple[nn.Module, tuple[torch.Tensor]]


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height / stride, width / stride]."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class Residual(nn.Module):
    """A stem that halves the image, stages of blocks, the mean over the image, one linear layer.

    Args:
        stages: Channels and blocks of each.
    """

    def __init__(self, stages: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        first = stages[0][0]
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        blocks, inputs = [], first
        for number, (outputs, count) in enumerate(stages):
            for place in range(count):
                blocks.append(Block(inputs, outputs, 2 if number and not place else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, CLASSES)
        self.to(memory_format=torch.channels_last)  # which torch trains faster in on CPUs

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image uint8 [batch, 1, 28, 28] to logits [batch, 10]."""
        x = (image.float() / 255 - MEAN) / STD
        if self.training:  # half of the images are mirrored, anew in every epoch
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def teacher() -> Example:
    """The network that is compressed, with random weights."""
    torch.manual_seed(0)
    return Residual(TEACHER).eval(), _example()


def trained() -> Example:
    """The same as `deploykit finetune` trained it."""
    module, example = teacher()
    module.load_state_dict(torch.load(Path(__file__).parent / _TRAINED, weights_only=True))
    return module, example


def student() -> Example:
    """A shallower and narrower network, with random weights."""
    torch.manual_seed(0)
    return Residual(STUDENT).eval(), _example()


def pruned() -> Example:
    """The trained network as `deploykit prune` left it, to be trained on."""
    from deploykit.pruning import restore

    module, example = trained()
    return restore(module, Path(__file__).parent / "pruned").eval(), example


def _example() -> tuple[torch.Tensor]:
    return (torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),)
