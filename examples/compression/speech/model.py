"""The networks, as factories that `deploykit` takes: a residual network, and a DS-CNN that learns from it.

Both read log-mels `sound` [batch, 1, mels, frames] and give a score for each of the classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

CLASSES, MELS, FRAMES = 12, 40, 51
WIDTHS = (32, 64, 128)
STUDENT_WIDTH, STUDENT_BLOCKS = 64, 4
WEIGHTS = Path(__file__).parent / "baseline.training" / "weights.pt"


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2015)."""

    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(made)
        same = given == made and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, given, height, width] to [batch, made, height / stride, width / stride]."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network on log-mels, as Tang and Lin (2018) have it for keywords, in three resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        given, blocks = WIDTHS[0], []
        for number, width in enumerate(WIDTHS):
            blocks += [Residual(given, width, 1 if number == 0 else 2), Residual(width, width, 1)]
            given = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(given, CLASSES)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        """Log-mels [batch, 1, mels, frames] to scores [batch, classes]."""
        return self.head(self.drop(self.pool(self.blocks(self.stem(sound))).flatten(1)))


class Separable(nn.Module):
    """A 3x3 convolution of each channel, then one of 1x1 (MobileNet, Howard et al., 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep = nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.point = nn.Conv2d(width, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width, height, width] to the same shape."""
        return functional.relu(self.norm2(self.point(functional.relu(self.norm1(self.deep(x))))))


class DsCnn(nn.Module):
    """DS-CNN-S of Hello Edge (Zhang et al., 2017): one convolution with a large stride, then separable ones.

    There it has 10 coefficients a frame; here the first convolution makes 10 rows of 40 mel filters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, STUDENT_WIDTH, (8, 10), 4, (2, 4), bias=False), nn.BatchNorm2d(STUDENT_WIDTH), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(Separable(STUDENT_WIDTH) for _ in range(STUDENT_BLOCKS)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(STUDENT_WIDTH, CLASSES)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        """Log-mels [batch, 1, mels, frames] to scores [batch, classes]."""
        return self.head(self.pool(self.blocks(self.stem(sound))).flatten(1))


def teacher() -> tuple[nn.Module, torch.Tensor]:
    """The baseline before its training, and example inputs."""
    torch.manual_seed(0)
    return ResNet(), _example()


def trained() -> tuple[nn.Module, torch.Tensor]:
    """The trained baseline: what is pruned, and what the student learns from."""
    made, example = teacher()
    made.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return made, example


def student() -> tuple[nn.Module, torch.Tensor]:
    """The small network before its training."""
    torch.manual_seed(0)
    return DsCnn(), _example()


def _example() -> torch.Tensor:
    # From quiet clips to loud ones.
    noise = torch.randn(4, 1, MELS, FRAMES, generator=torch.Generator().manual_seed(1))
    return noise + torch.linspace(-1.5, 1.5, 4).reshape(-1, 1, 1, 1)
