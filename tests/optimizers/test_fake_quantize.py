"""Training with rounding in the way: the numbers are the quantizer's, the gradients those of real numbers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.errors import OptimizationError
from deploykit.optimizers.fake_quantize import fake_quantize, fold_batch_norms
from deploykit.optimizers.scheme import Scheme, rounded_activation


@pytest.mark.parametrize("bits", [8, 7])
def test_numbers_are_those_of_the_scheme(bits: int) -> None:
    torch.manual_seed(0)
    layer, rows = nn.Linear(6, 4), torch.randn(50, 6)
    before = layer.weight.detach().clone()
    scheme = Scheme(bits, per_channel=True)
    rounding = fake_quantize(layer, scheme)
    layer.eval()
    rounding.observe(layer(part) for part in rows.split(25))
    wide = 2 * rows  # some of it is clipped
    inputs = rounded_activation(wide.numpy(), float(rows.min()), float(rows.max()))
    weight = scheme.rounded(before.numpy().T[None])[0]
    with torch.no_grad():
        np.testing.assert_allclose(layer(wide), inputs @ weight + layer.bias.numpy(), atol=1e-5)

    given = wide.clone().requires_grad_()
    layer(given).sum().backward()
    inside = (wide >= rows.min() - 0.02) & (wide <= rows.max() + 0.02)
    assert bool((given.grad[wide.abs() < 1] != 0).all())
    assert bool((given.grad[~inside] == 0).all()) and bool((~inside).any())
    (kept,) = [p for n, p in layer.named_parameters() if n.endswith("original")]
    np.testing.assert_allclose(kept.grad, np.repeat(inputs.sum(0)[None], 4, 0), rtol=1e-4, atol=1e-4)

    rounding.remove()
    assert list(layer.state_dict()) == ["weight", "bias"] or sorted(layer.state_dict()) == ["bias", "weight"]
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        np.testing.assert_allclose(layer(rows), rows @ before.T + layer.bias, atol=1e-6)


def test_ranges_are_those_of_the_last_batches() -> None:
    layer = nn.Linear(1, 1)
    rounding = fake_quantize(layer, Scheme(8, per_channel=True))
    rounding.observe(layer(torch.tensor([[v]])) for v in (-1.0, 3.0, 2.0))
    part = layer.deploykit_input
    assert (float(part.low), float(part.high)) == (-1, 3)
    layer.train()(torch.tensor([[2.0]]))
    assert (float(part.low), float(part.high)) == pytest.approx((-0.98, 2.94))
    layer(torch.tensor([[13.0]]))
    assert float(part.high) == 13
    layer.eval()(torch.tensor([[100.0]]))
    assert float(part.high) == 13


def test_attention_of_torch_is_left_alone() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    rounding = fake_quantize(layer, Scheme(8, per_channel=True))
    assert list(rounding.layers) == ["linear1", "linear2"]
    with pytest.raises(OptimizationError, match="nothing to quantize"):
        fake_quantize(nn.LSTM(3, 4), Scheme(8, per_channel=True))


class Residual(nn.Module):
    """Two normalized convolutions; `direct` reads the first one's output past its normalization."""

    def __init__(self, direct: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.direct = direct

    def forward(self, x: Any) -> Any:
        first = self.one(x)
        y = self.norms[0](first).relu()
        y = y + self.norms[1](self.two(y))
        return self.head((y + first if self.direct else y).mean((2, 3)))


@pytest.fixture
def picture() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 1, 5, 5)


def trained(net: nn.Module, picture: torch.Tensor) -> nn.Module:
    """With statistics and scales that are not those of the beginning."""
    for _ in range(3):
        net.train()(3 * picture + 1)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.normal_(part.bias)
    return net.eval()


def test_batch_normalizations_are_folded(picture: torch.Tensor) -> None:
    net = trained(Residual(), picture)
    with torch.no_grad():
        before = net(picture)
        assert fold_batch_norms(net, lambda: {"y": net(picture)}) == 3
        torch.testing.assert_close(net(picture), before, atol=1e-5, rtol=1e-4)
    assert not [part for part in net.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert fold_batch_norms(net, lambda: {"y": net(picture)}) == 0


def test_an_output_that_is_read_elsewhere_is_refused(picture: torch.Tensor) -> None:
    net = trained(Residual(direct=True), picture)
    with pytest.raises(OptimizationError, match="folded the module gives another 'y'"):
        fold_batch_norms(net, lambda: {"y": net(picture)})


def test_a_copy_rounds_by_itself() -> None:
    """As the average of a training's weights does."""
    layer = nn.Linear(2, 2)
    rounding = fake_quantize(layer, Scheme(8, per_channel=True))
    rounding.observe(layer(torch.ones(1, 2)) for _ in range(1))
    other = copy.deepcopy(layer)
    other.train()(torch.full((1, 2), 101.0))
    assert float(other.deploykit_input.high) == 101
    assert float(layer.deploykit_input.high) == 1


class Positions(nn.Module):
    """[batch, positions, features], normalized position by position."""

    def __init__(self, positions: int, features: int) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, features), nn.BatchNorm1d(positions)

    def forward(self, x: Any) -> Any:
        return self.norm(self.layer(x))


@pytest.mark.parametrize(("positions", "features"), [(5, 4), (4, 4), (1, 4)])
def test_a_normalization_over_positions_is_not_folded(positions: int, features: int) -> None:
    """Its factors are those of positions, and the layer before it has none for them, even where there are as many."""
    torch.manual_seed(0)
    x = torch.randn(6, positions, 3)
    net = trained(Positions(positions, features), x)
    with torch.no_grad():
        before = net(x)
        assert fold_batch_norms(net, lambda: {"y": net(x)}) == 0
        assert torch.equal(net(x), before)


def test_a_transposed_convolution_has_its_outputs_on_axis_1() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 4, 2, bias=False)
    with torch.no_grad():
        layer.weight *= torch.tensor([0.01, 1, 3, 100.0])[:, None, None]
    scheme = Scheme(8, per_channel=True)
    before = layer.weight.detach().clone()
    fake_quantize(layer, scheme)
    columns = before.permute(0, 2, 3, 1).reshape(1, 12, 4).numpy()
    want = torch.tensor(scheme.rounded(columns)).reshape(3, 2, 2, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer.weight.detach(), want)


def test_a_layer_may_be_called_by_name() -> None:
    layer = nn.Linear(2, 2)
    rounding = fake_quantize(layer, Scheme(8, per_channel=True))
    rounding.observe(layer(input=torch.full((1, 2), 3.0)) for _ in range(1))
    assert float(layer.deploykit_input.high) == 3
    layer.eval()
    assert torch.equal(layer(input=torch.ones(1, 2)), layer(torch.ones(1, 2)))


def test_dropout_does_not_widen_the_ranges() -> None:
    """In training it doubles what it leaves; the deployed model never sees that."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4, bias=False))
    rows = torch.rand(64, 4)
    rows[:, 0] = 1  # of the largest ones some are always left
    rounding = fake_quantize(net, Scheme(8, per_channel=True))
    rounding.observe(net.eval()(rows) for _ in range(1))
    part = net[1].deploykit_input
    range_of = float(part.low), float(part.high)
    seen: list[torch.Tensor] = []
    net[1].deploykit_input.register_forward_hook(lambda layer, given, output: seen.append(output.detach()))
    net.train()(rows)
    assert (float(part.low), float(part.high)) == range_of
    # Rounded on the same grid as without the dropout, and doubled.
    step = range_of[1] / 255
    (rounded,) = seen
    torch.testing.assert_close(rounded / (2 * step), (rounded / (2 * step)).round(), atol=1e-3, rtol=0)
    assert float(rounded.max()) > range_of[1]


class Readers(nn.Module):
    """Convolutions whose outputs are read in every way."""

    def __init__(self) -> None:
        super().__init__()
        names = ("relu", "inplace", "clip", "chained", "dropped", "silu", "added", "both", "returned")
        for name in names:
            setattr(self, name, nn.Conv2d(2, 2, 1))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Any) -> Any:
        y = nn.functional.relu(self.relu(x))
        y = nn.functional.max_pool2d(self.inplace(y).relu_(), 1)
        y = nn.functional.relu6(self.clip(y))
        y = self.drop(self.dropped(self.chained(y))).relu()
        y = nn.functional.silu(self.silu(y))
        y = y + self.added(y)
        z = self.both(y)
        y = z.relu() + z.shape[0] * z.mean()
        return self.returned(y)


def test_what_a_convolution_gives_is_rounded_where_the_quantizer_rounds_it() -> None:
    """Not before an activation that becomes a part of the rounding, nor where the next layer rounds it anyway."""
    net = Readers().eval()
    x = torch.rand(2, 2, 3, 3)
    rounding = fake_quantize(net, Scheme(8, per_channel=True), lambda: net(x))
    rounded = [name for name, layer in rounding.layers.items() if hasattr(layer, "deploykit_output")]
    assert rounded == ["silu", "added", "both", "returned"]
    rounding.observe(net(x) for _ in range(1))
    with torch.no_grad():
        steps = net(x) / ((net.returned.deploykit_output.high - net.returned.deploykit_output.low) / 255)
    torch.testing.assert_close(steps, steps.round(), atol=1e-2, rtol=0)
    rounding.remove()
    assert not [name for name in net.state_dict() if "deploykit" in name or "parametrizations" in name]
