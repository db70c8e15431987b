"""Zeros in the weights, and that a training leaves them there."""

import copy

import pytest
import torch
from torch import nn

from deploykit.errors import OptimizationError
from deploykit.optimizers.pruning import PruneConfig, count_zeros, make_sparse
from deploykit.optimizers.pruning.sparse import pattern_mask, scheduled


def training(inputs):
    """A recovery with momentum and weight decay, which would both move zeros."""

    def recover(module, step, hold):
        optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
        for number in range(3):
            optimizer.zero_grad()
            module(inputs).square().mean().backward()
            optimizer.step()
            hold(module, number)

    return recover


@pytest.mark.parametrize("allocation", ["sensitivity", "uniform"])
def test_the_smallest_weights_become_zero_and_stay_so_while_the_others_learn(residual, allocation):
    net = residual.module
    before = copy.deepcopy(net.state_dict())
    config = PruneConfig("magnitude", ratio=0.6, steps=2, allocation=allocation)
    masks = make_sparse(net, config, training(residual.example["image"]))
    found = count_zeros(net, masks)
    assert found.count == pytest.approx(0.6 * found.weights, abs=1 if allocation == "sensitivity" else 3)
    assert found.count / found.weights == pytest.approx(masks.sparsity)
    assert found.parameters == sum(p.numel() for p in net.parameters()) > found.weights
    state = net.state_dict()
    for name, mask in masks.kept.items():
        assert not state[name][~mask].any()
        assert state[name][mask].ne(before[name][mask]).float().mean() > 0.5
    assert "block.depthwise.weight" not in masks.kept
    assert "few weights" in masks.left["block.depthwise"]
    if allocation == "uniform":
        assert all(abs(zeros - 0.6 * total) <= 0.5 for zeros, total in found.layers.values())


def zeros_of(net, config):
    return count_zeros(net, make_sparse(net, config))


def test_what_one_layer_may_not_lose_the_others_do():
    """Most of the first one's weights are tiny beside its own mean: alone it would lose nearly all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5))
    with torch.no_grad():
        net[0].weight.mul_(1e-4)[0] = 1.0
    found = zeros_of(net, PruneConfig("magnitude", ratio=0.7, max_ratio=0.75))
    assert found.layers["0.weight"] == (300, 400)
    assert found.count == round(0.7 * 900)
    assert max(zeros / total for zeros, total in found.layers.values()) <= 0.75


@pytest.mark.parametrize("allocation", ["sensitivity", "uniform"])
def test_of_equal_weights_as_many_go_as_are_asked_for(allocation):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in net:
        nn.init.constant_(layer.weight, 0.5)
    found = zeros_of(net, PruneConfig("magnitude", ratio=0.5, allocation=allocation))
    assert found.count == 64
    if allocation == "uniform":
        assert found.layers == {"0.weight": (32, 64), "1.weight": (32, 64)}


def test_the_weights_of_recurrent_and_attention_layers_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.cell = nn.LSTM(8, 8), nn.GRUCell(8, 8)
            self.attention = nn.MultiheadAttention(8, 2)

    net = Net()
    found = zeros_of(net, PruneConfig("magnitude", ratio=0.5, allocation="uniform"))
    assert set(found.layers) == {
        "memory.weight_ih_l0", "memory.weight_hh_l0", "cell.weight_ih", "cell.weight_hh",
        "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip
    assert found.count == found.weights / 2
    assert not (net.memory(torch.randn(3, 2, 8))[0]).isnan().any()


def test_weights_of_two_owners_and_computed_ones():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 8)
            self.first, self.twin, self.named = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.twin.weight = self.first.weight
            self.made = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.head = nn.Linear(8, 10)
            self.head.weight = self.words.weight

    net = Net()
    before = net.words.weight.detach().clone()
    masks = make_sparse(net, PruneConfig("magnitude", ratio=0.5))
    assert set(masks.kept) == {"first.weight", "named.weight"}
    assert "words (Embedding) has the same weight" in masks.left["head"]
    assert "computed" in masks.left["made"]
    assert torch.equal(net.words.weight, before)
    masks = make_sparse(net, PruneConfig("magnitude", ratio=0.5, keep=("twin",)))
    assert set(masks.kept) == {"named.weight"}
    assert "twin, which stays" in masks.left["first"]


def test_two_of_four_neighbours_are_zero_and_stay_so(residual):
    net = residual.module
    masks = make_sparse(net, PruneConfig("2:4"), training(residual.example["image"]))
    assert masks.sparsity == 0.5
    assert "stem.0" in masks.left and "multiple of 4" in masks.left["stem.0"]
    for name in masks.kept:
        weight = net.get_parameter(name).detach().movedim(1, -1)
        assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    assert net.hidden.weight.detach().count_nonzero() > 0.45 * net.hidden.weight.numel()


def test_in_two_steps_one_of_four_goes_first(residual):
    shares = []
    masks = make_sparse(
        residual.module, PruneConfig("2:4", steps=2),
        lambda module, step, hold: shares.append(float((module.hidden.weight == 0).double().mean())),
    )  # fmt: skip
    assert shares == [0.25, 0.5]
    assert masks.sparsity == 0.5


def test_the_pattern_lies_along_what_a_product_sums_over():
    """So that each output of a product of the exported graph has two of four: [in, out] for MatMul."""
    net = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 8, 1), nn.ConvTranspose2d(8, 4, 1))
    masks = make_sparse(net, PruneConfig("2:4"))
    assert set(masks.kept) == {"0.weight"}
    assert "no multiple of 4" in masks.left["1"]
    assert "transposed" in masks.left["2"]
    rows = net[0].weight.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    assert ((rows != 0).sum(1) == 2).all()


def test_the_larger_two_of_four_are_kept():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert pattern_mask(weight).tolist()[0] == [False, True, False, True]
    assert pattern_mask(weight).sum() == 4
    kernel = torch.randn(6, 8, 3, 3)
    mask = pattern_mask(kernel)
    assert mask.shape == kernel.shape
    assert (mask.reshape(6, 2, 4, 3, 3).sum(2) == 2).all()


def test_much_goes_at_first_and_little_at_the_end():
    shares = [scheduled(0.8, step, 4) for step in range(1, 5)]
    gains = [b - a for a, b in zip([0.0, *shares], shares, strict=False)]
    assert shares[-1] == 0.8
    assert gains == sorted(gains, reverse=True)


def test_a_module_without_weights_that_could_go_is_refused():
    with pytest.raises(OptimizationError, match=r"no weight.*multiple of 4"):
        make_sparse(nn.Sequential(nn.Linear(3, 5)), PruneConfig("2:4"))
    with pytest.raises(OptimizationError, match="it stays as it is"):
        make_sparse(nn.Sequential(nn.Linear(4, 5)), PruneConfig("magnitude", ratio=0.5, keep=("*",)))
