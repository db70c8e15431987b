"""A module that is run, traced or tried out is as it was afterwards, also where that fails."""

import pytest
import torch
from torch import nn

from deploykit.errors import OptimizationError
from deploykit.optimizers.pruning import Subject
from deploykit.optimizers.pruning.groups import find_structure
from deploykit.optimizers.pruning.importance import sensitivities, taylor
from deploykit.optimizers.pruning.subject import trace


def run(module, batch):
    return module(**batch)


class Counting(nn.Module):
    """Writes to a buffer, keeps what it computed, and fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(2))
        self.kept, self.fails = None, False

    def forward(self, x):
        self.calls += 1
        self.seen = x.detach().sum(0)[:2]
        self.kept = self.norm(self.first(x)).relu()
        if self.fails:
            raise ValueError("no more")
        return self.last(self.kept)


@pytest.fixture
def subject():
    torch.manual_seed(0)
    made = Counting().eval()
    made.norm.train()
    made.last.weight.requires_grad_(False)
    return Subject(made, {"x": torch.randn(6, 4)}, run)


def state(module):
    return (
        [part.training for part in module.modules()],
        [len(part._forward_hooks) for part in module.modules()],
        [p.requires_grad for p in module.parameters()],
        [b.clone().tolist() for b in module.buffers()],
        [p.grad for p in module.parameters()],
    )


def losses(module):
    yield module(torch.randn(6, 4)).square().mean()


def surveyed(subject):
    groups = find_structure(subject).groups
    values = taylor(subject, groups, losses)
    return sensitivities(subject, groups, values, [])


@pytest.mark.parametrize("what", [trace, Subject.outputs, find_structure, surveyed])
def test_what_is_run_is_as_it_was(subject, what):
    before = state(subject.module)
    what(subject)
    assert state(subject.module) == before
    assert subject.copied().module is not subject.module  # an activation with a history could not be copied


def test_a_forward_that_fails_leaves_nothing_behind(subject):
    before = state(subject.module)
    subject.module.fails = True
    with pytest.raises(OptimizationError, match="no more"):
        trace(subject)
    assert state(subject.module) == before
    with pytest.raises(ValueError, match="no more"):
        taylor(subject, {}, losses)
    assert state(subject.module) == before


def test_a_module_that_cannot_be_copied_is_an_error(subject):
    subject.module.generator = (n for n in range(3))
    with pytest.raises(OptimizationError, match="cannot be copied"):
        find_structure(subject)
