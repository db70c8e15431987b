"""Optimizers and schedules against their formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.errors import OptimizationError
from deploykit.optimizers.training import TrainConfig
from deploykit.optimizers.training.updates import make_optimizer, make_schedule, parameter_groups, rate_factor

STEPS = 40


def rates(watched=None, **settings):
    """The learning rate of every step, as a training sees it."""
    config = TrainConfig(learning_rate=0.5, **settings)
    net = nn.Linear(2, 2)
    optimizer = make_optimizer(config, [net])
    schedule = make_schedule(config, optimizer, STEPS, higher_is_better=True)
    found = []
    for step in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*(() if watched is None else (watched(step),)))
    return np.array(found)


def test_cosine():
    found = rates(schedule="cosine", warmup=0.0)
    want = 0.25 * (1 + np.cos(math.pi * np.arange(STEPS) / STEPS))
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_warmup_rises_in_a_line_to_the_highest_rate():
    found = rates(schedule="cosine", warmup=0.25)
    np.testing.assert_allclose(found[:10], 0.5 * np.arange(1, 11) / 11, rtol=1e-6)
    assert found.argmax() == 10
    assert found[10] == pytest.approx(0.5)
    assert (np.diff(found[10:]) < 0).all()
    assert 0 < found[-1] < 0.01


def test_one_cycle_goes_up_and_far_down():
    found = rates(schedule="one-cycle")
    top = round(0.3 * STEPS) - 1
    assert found[0] == pytest.approx(0.5 / 25)  # the paper's start, in torch's default
    assert found.argmax() == top
    assert found[top] == pytest.approx(0.5)
    assert found[-1] < 1e-5
    assert (np.diff(found[top:]) < 0).all()


def test_one_cycle_is_that_of_torch():
    for steps, share in ((40, 0.3), (8, 0.5), (100, 0.9)):
        net = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), 0.5)
        theirs = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.5, total_steps=steps, pct_start=share, cycle_momentum=False
        )
        config = TrainConfig(schedule="one-cycle", warmup=share)
        for step in range(steps):
            assert 0.5 * rate_factor(config, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
            optimizer.step()
            if step + 1 < steps:
                theirs.step()


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "step", "constant"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.25, 0.3, 0.5, 0.99, 0.9999])
def test_few_steps_divide_by_nothing(schedule, share):
    """One-cycle of 4 steps with a share of 0.25 rises in none; a single step is the first and the last."""
    config = TrainConfig(schedule=schedule, warmup=share)
    for steps in (1, 2, 3, 4, 10, 100):
        found = [rate_factor(config, step, steps) for step in range(steps + 1)]  # asked once after the last
        assert all(0 <= factor <= 1 for factor in found)
        assert max(found[:-1]) >= (1 if schedule == "one-cycle" else 0.1)  # some step learns


def test_steps_and_constant():
    found = rates(schedule="step", warmup=0.0)
    np.testing.assert_allclose(found, [0.5] * 20 + [0.05] * 10 + [0.005] * 10)
    np.testing.assert_allclose(rates(schedule="constant", warmup=0.0), 0.5)
    assert rate_factor(TrainConfig(schedule="cosine"), 99, 99) == pytest.approx(0, abs=1e-12)  # asked after the last


def test_plateau_halves_where_nothing_gets_better():
    found = rates(watched=lambda step: min(step, 5), schedule="plateau")
    assert found[5] == 0.5
    np.testing.assert_allclose(found[[8, 9, 12]], [0.5, 0.25, 0.125])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.table = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5)
        self.out.weight = self.table.weight  # tied
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def test_decay_is_for_matrices():
    net = Net()
    pulled, others = parameter_groups([net], 0.3)
    assert [g["weight_decay"] for g in (pulled, others)] == [0.3, 0.0]
    assert {id(p) for p in pulled["params"]} == {id(net.conv.weight), id(net.table.weight)}
    assert {id(p) for p in others["params"]} == {
        id(p) for p in (net.conv.bias, net.norm.weight, net.norm.bias, net.out.bias)
    }


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_without_a_gradient_matrices_shrink_and_biases_stay(name):
    net = nn.Linear(3, 2)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = make_optimizer(TrainConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5), [net])
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(net.bias.detach(), before["bias"])


def test_optimizers_are_what_was_asked_for():
    made = {n: make_optimizer(TrainConfig(optimizer=n), [nn.Linear(2, 2)]) for n in ("adamw", "adam", "sgd", "rmsprop")}
    assert {n: type(o).__name__ for n, o in made.items()} == {
        "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "rmsprop": "RMSprop",
    }  # fmt: skip
    assert made["sgd"].param_groups[0]["momentum"] == made["rmsprop"].param_groups[0]["momentum"] == 0.9


def test_a_frozen_module_cannot_be_trained():
    with pytest.raises(OptimizationError, match="all are frozen"):
        parameter_groups([nn.Linear(2, 2).requires_grad_(False)], 0.1)
