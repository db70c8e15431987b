"""Small modules to export: the sources of these tests name functions in this file, as users name theirs."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


def seeded(module: nn.Module) -> nn.Module:
    """The same weights in every process."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.eval()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(image)).relu().mean((2, 3)))


def classifier() -> Any:
    return seeded(Classifier()), torch.randn(2, 3, 16, 16)


def classifier_of_one() -> Any:
    return seeded(Classifier()), torch.randn(1, 3, 16, 16)


def classifier_alone() -> nn.Module:
    return seeded(Classifier())


def classifier_in_training() -> Any:
    return seeded(Classifier()).train(), torch.randn(2, 3, 16, 16)


def classifier_partly_in_training() -> Any:
    module = seeded(Classifier())
    module.norm.train()
    return module, torch.randn(2, 3, 16, 16)


shared = seeded(Classifier()).train()


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.conv(image), scale_factor=2.0)


def fully_convolutional() -> Any:
    return seeded(Conv()), torch.randn(1, 3, 16, 16)


class Pair(nn.Module):
    """Names that collide with each other and with what torch calls its own values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, linear: torch.Tensor, add: torch.Tensor) -> dict[str, Any]:
        hidden = self.layer(linear) + add
        return {"linear": hidden, "add": hidden * 2, "mul": {"a-b": hidden.tanh(), "a_b": hidden.sigmoid()}}


def pair() -> Any:
    return seeded(Pair()), (torch.randn(2, 4), torch.randn(2, 4))


class Repeats(nn.Module):
    """An input, one value twice, and a constant as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.arange(6.0).view(3, 2))

    def forward(self, x: torch.Tensor) -> Any:
        y = x.tanh()
        return x, [y, y], self.anchors, None, x.shape[0]


def repeats() -> Any:
    return Repeats(), torch.randn(2, 4)


@dataclasses.dataclass
class Scores:
    logits: torch.Tensor
    features: torch.Tensor


class ReturnsDataclass(nn.Module):
    def forward(self, x: torch.Tensor) -> Scores:
        return Scores(x.tanh(), x * 2)


def returns_dataclass() -> Any:
    return ReturnsDataclass(), torch.randn(2, 4)


class Box(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


class ReturnsNamedTuple(nn.Module):
    def forward(self, x: torch.Tensor) -> Box:
        return Box(x - 1, x + 1)


def returns_namedtuple() -> Any:
    return ReturnsNamedTuple(), torch.randn(2, 4)


class Opaque:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class ReturnsOpaque(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"y": x.tanh(), "state": Opaque(x)}


def returns_opaque() -> Any:
    return ReturnsOpaque(), torch.randn(2, 4)


class ReturnsNothing(nn.Module):
    def forward(self, x: torch.Tensor) -> None:
        return None


def returns_nothing() -> Any:
    return ReturnsNothing(), torch.randn(2, 4)


class Options(nn.Module):
    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, power: int = 1, *, bias: torch.Tensor
    ) -> torch.Tensor:
        y = x**power + bias
        return y if mask is None else y * mask


def keywords() -> Any:
    return Options(), {"x": torch.randn(2, 4), "bias": torch.randn(2, 4), "power": 3, "mask": None}


class Between(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, power: int, y: torch.Tensor) -> torch.Tensor:
        return x**power - y if mask is None else x * mask


def constants_between() -> Any:
    return Between(), (torch.randn(2, 4), None, 3, torch.randn(2, 4))


class Stack(nn.Module):
    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        return torch.cat(parts, 1).tanh()


def variadic() -> Any:
    return Stack(), (torch.randn(2, 4), torch.randn(2, 3))


class Ignores(nn.Module):
    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        return x.tanh() + 1


def ignores_an_input() -> Any:
    return Ignores(), (torch.randn(2, 4), torch.randn(2, 4))


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > -1e6:
            return x + 1
        return x - 1


def branches() -> Any:
    return Branches(), torch.ones(2, 4)


class HasNoOnnx(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def unsupported() -> Any:
    return HasNoOnnx(), torch.randn(2, 4)


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 3, 4).sum(1)


def fixed_batch() -> Any:
    return FixedBatch(), torch.randn(2, 12)


class Specializes(nn.Module):
    """Runs at any batch; a trace at batch 2 is wrong at all others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] == 2 else x + 1


def specializes() -> Any:
    return Specializes(), torch.randn(2, 4)


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def random() -> Any:
    return Random(), torch.randn(2, 4)


class WritesItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x.tanh()


def writes_its_input() -> Any:
    return WritesItsInput(), torch.randn(2, 4)


def wrong_example() -> Any:
    return seeded(Classifier()), torch.randn(2, 4, 16, 16)


def too_many_examples() -> Any:
    return seeded(Classifier()), (torch.randn(2, 3, 16, 16), torch.randn(2))


def no_tensor() -> Any:
    return seeded(Classifier()), (3,)


def list_example() -> Any:
    return seeded(Classifier()), {"image": [torch.randn(2, 3, 16, 16)]}


def broken() -> Any:
    raise ValueError("no weights\nat the usual place")


def forty_two() -> Any:
    return 42


def on_meta() -> Any:
    return nn.Linear(4, 4, device="meta"), torch.randn(2, 4)


def scripted() -> Any:
    return torch.jit.script(nn.Linear(4, 4)), torch.randn(2, 4)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids)).tanh()


def tokens_alone() -> nn.Module:
    return seeded(Tokens())


a_number = 7
