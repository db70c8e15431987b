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
