"""Small modules to export: the sources of these tests name functions in this file, as users name theirs."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import signal
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


class Recurrent(nn.Module):
    def __init__(self, kind: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.recurrent = getattr(nn, kind)(4, 6, **options)

    def forward(self, x: torch.Tensor, state: Any = None) -> dict[str, Any]:
        y, last = self.recurrent(x, state)
        return {"y": y, "state": last}


def lstm() -> Any:
    return seeded(Recurrent(batch_first=True, bidirectional=True, num_layers=2)), torch.randn(3, 5, 4)


def lstm_with_state() -> Any:
    return seeded(Recurrent(batch_first=True)), (torch.randn(3, 5, 4), (torch.randn(1, 3, 6), torch.randn(1, 3, 6)))


def lstm_with_projections() -> Any:
    return seeded(Recurrent(batch_first=True, proj_size=2)), torch.randn(3, 5, 4)


def gru_steps_first() -> Any:
    return seeded(Recurrent("GRU")), torch.randn(5, 3, 4)


def packed() -> Any:
    return seeded(Recurrent()), nn.utils.rnn.pack_sequence([torch.randn(5, 4), torch.randn(2, 4)])


class Mode(enum.Enum):
    SUM = 1


@dataclasses.dataclass
class Batch:
    image: torch.Tensor
    mask: torch.Tensor | None = None
    mode: Mode = Mode.SUM


class TakesNest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: Any, features: Any = (), *, scale: Any = None) -> Any:
        image, mask = (batch["image"], batch["mask"]) if isinstance(batch, dict) else (batch.image, batch.mask)
        y = self.layer(image) if scale is None else self.layer(image) * scale["by"][0]
        y = sum((self.layer(f) for f in features), y)
        return Batch(y.tanh(), None if mask is None else mask * 2)


def takes_dict() -> Any:
    """Not keyword arguments: `forward` has no such parameters."""
    return seeded(TakesNest()), {"image": torch.randn(2, 4), "mask": None}


def takes_dataclass() -> Any:
    return seeded(TakesNest()), Batch(torch.randn(2, 4), torch.randn(2, 4))


def takes_nest() -> Any:
    batch = {"image": torch.randn(2, 4), "mask": torch.randn(2, 4)}
    return seeded(TakesNest()), (batch, [torch.randn(2, 4)] * 2), {"scale": {"by": (torch.tensor(2.0), 3)}}


class TakesList(nn.Module):
    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(maps, 1).tanh()


def takes_list() -> Any:
    return TakesList(), [torch.randn(2, 4), torch.randn(2, 3)]


class Checks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.isnan(x).any():
            raise ValueError("not a number")
        return x.tanh()


def checks() -> Any:
    return Checks(), torch.randn(2, 4)


class Shortcut(nn.Module):
    """A decision that makes no difference."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x.tanh() if mask.all() else torch.where(mask, x.tanh(), x.tanh())


def shortcut() -> Any:
    return Shortcut(), (torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool))


class Cut(nn.Module):
    """Another path beyond 64 rows, far from the example; with a recurrent layer or without."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 64:
            x = x[:, :64]
        y = self.layer(x)
        return (y[0] if isinstance(y, tuple) else y).mean(1)


def cut() -> Any:
    return seeded(Cut(nn.Linear(4, 3))), torch.randn(2, 10, 4)


def cut_recurrent() -> Any:
    return seeded(Cut(nn.GRU(4, 3, batch_first=True))), torch.randn(2, 10, 4)


class Table(nn.Module):
    """A size that forward itself bounds, as models with a table of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > len(self.table):
            raise ValueError("too long")
        return (x + self.table[: x.shape[1]]).tanh()


def table() -> Any:
    return seeded(Table()), torch.randn(2, 10, 4)


class Skips(nn.Module):
    """A decision that makes no difference for a full mask, which is what the example has."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = x.tanh()
        if mask.all():
            return y.sum(1)
        return y.masked_fill(~mask, 0.0).sum(1)


def skips() -> Any:
    return Skips(), (torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool))


class Unseen(nn.Module):
    """A decision that nothing was found to turn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.new_ones(()) if (x * 1e-30).abs().max() < 1.0 else x.clamp(-1e9, 1e9)


def unseen() -> Any:
    return Unseen(), torch.randn(2, 4)


class Frozen(nn.Module):
    """A branch that no example takes, in code that does not compile."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors = {**{"a": 2}}
        if x.abs().max().item() > 100:
            return x * factors["a"]
        return x.tanh()


def frozen() -> Any:
    return Frozen(), torch.randn(2, 4)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x)


def counts() -> Any:
    return seeded(Counts()), torch.randn(2, 4)


class Remembers(nn.Module):
    """The same outputs for the same inputs, as long as the position is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(3, 4))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.cache[at] = x.mean(0)
        return x + self.cache.sum(0)


def remembers() -> Any:
    return Remembers(), (torch.randn(2, 4), torch.tensor(1))


class HalfTable(nn.Module):
    """Kept in float16, computed in float32."""

    def __init__(self, *, cast: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.cast = cast
        self.register_buffer("table", torch.randn(8, 4).half())

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        row = self.table[at]
        if self.cast:
            return self.layer(x) + row.float()
        return self.layer(x) + (x.half() * row).float()


def half_table() -> Any:
    return seeded(HalfTable(cast=True)), (torch.randn(3, 4), torch.tensor([1, 2, 5]))


def half_product() -> Any:
    return seeded(HalfTable(cast=False)), (torch.randn(3, 4), torch.tensor([1, 2, 5]))


class KeepsFirst(nn.Module):
    """What it saw first stays in an attribute, and the same inputs give the same outputs ever after."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mean is None:
            self.mean = x.mean()
        return x - self.mean


def keeps_first() -> Any:
    return KeepsFirst(), torch.randn(2, 4)


class KeepsTable(nn.Module):
    """A table that is made when it is needed, and follows from nothing but the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or self.table.shape != x.shape[1:]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)
        return x.tanh() + self.table


def keeps_table() -> Any:
    return KeepsTable(), torch.randn(2, 4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 32)
        self.head = nn.Linear(32, 500, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def tied() -> Any:
    return seeded(Tied()), torch.arange(10).view(2, 5)


class HalfInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.to(self.layer.weight.dtype)).float().softmax(-1)


def half() -> Any:
    return seeded(HalfInside()).half(), torch.randn(2, 8)


def bfloat16() -> Any:
    return seeded(HalfInside()).bfloat16(), torch.randn(2, 8)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x).float()


def autocast() -> Any:
    return seeded(Autocast()), torch.randn(2, 8)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


def masked() -> Any:
    return Masked().eval(), (torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))


def compiled() -> Any:
    module = nn.Sequential(torch.compile(nn.Linear(4, 4)), nn.ReLU()).eval()
    module.compile()
    return nn.DataParallel(module), torch.randn(2, 4)


def quantized() -> Any:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}), torch.randn(2, 4)


def lazy() -> Any:
    return nn.Sequential(nn.LazyLinear(4)), torch.randn(2, 4)


class SparseWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(4).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.matrix, x.T).T


def sparse_weight() -> Any:
    return SparseWeight(), torch.randn(2, 4)


def complex_input() -> Any:
    return nn.Identity(), torch.randn(2, 4, dtype=torch.complex64)


class MissingOperator(nn.Module):
    def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.ops.torchvision.nms(boxes, scores, 0.5)


def missing_operator() -> Any:
    return MissingOperator(), (torch.rand(5, 4), torch.rand(5))


class Squeezes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh().squeeze()


def squeezes() -> Any:
    return Squeezes(), torch.randn(3, 4)


def scripted_branches() -> Any:
    return torch.jit.script(Branches()), torch.ones(2, 4)


class Sleeps(nn.Module):
    """Forever, but only in an export."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while torch.compiler.is_exporting():
            pass
        return x.tanh()


def sleeps() -> Any:
    return Sleeps(), torch.randn(2, 4)


class Crashes(nn.Module):
    """The whole process, but only in an export."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            os.kill(os.getpid(), signal.SIGSEGV)
        return x.tanh()


def crashes() -> Any:
    return Crashes(), torch.randn(2, 4)


def bad_keywords() -> Any:
    return seeded(Classifier()), torch.randn(2, 3, 16, 16), torch.randn(2)


a_number = 7


def options_alone() -> nn.Module:
    return Options()


class SamePadding(nn.Conv2d):
    """TensorFlow's padding, out of Python's arithmetic on sizes."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        pads = []
        for size in (image.shape[3], image.shape[2]):
            pad = max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return F.conv2d(F.pad(image, pads), self.weight, self.bias, 2)


def same_padding() -> Any:
    return seeded(nn.Sequential(SamePadding(3, 4, 3), SamePadding(4, 4, 3))), torch.randn(2, 3, 8, 8)
