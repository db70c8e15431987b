"""Zeros in the weights, and that a training leaves them there."""

import copy

import pytest
import torch
from torch import nn

from deploykit.errors import OptimizationError
from deploykit.optimizers.pruning import PruneConfig, make_sparse
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
    assert masks.sparsity == pytest.approx(0.6, abs=0.02)
    state = net.state_dict()
    for name, mask in masks.kept.items():
        assert not state[name][~mask].any()
        assert state[name][mask].ne(before[name][mask]).float().mean() > 0.5
    assert "block.depthwise.weight" not in masks.kept
    assert "few weights" in masks.left["block.depthwise"]
    if allocation == "uniform":
        assert all(share == pytest.approx(0.6, abs=0.05) for share in masks.layers().values())


def test_two_of_four_neighbours_are_zero_and_stay_so(residual):
    net = residual.module
    masks = make_sparse(net, PruneConfig("2:4"), training(residual.example["image"]))
    assert masks.sparsity == 0.5
    assert "stem.0" in masks.left and "multiple of 4" in masks.left["stem.0"]
    for name in masks.kept:
        weight = net.get_parameter(name).detach().movedim(1, -1)
        assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    assert net.hidden.weight.detach().count_nonzero() > 0.45 * net.hidden.weight.numel()


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
