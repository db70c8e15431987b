"""A new module of the same class takes over structure and weights, and can be trained."""

import copy
import json

import pytest
import torch
from torch import nn

from deploykit.errors import OptimizationError
from deploykit.optimizers.pruning import (
    PruneConfig,
    Subject,
    attributes_of,
    changed_attributes,
    prune_structured,
    restore_structure,
)


@pytest.mark.parametrize("name", ["residual", "bert"])
def test_structure_and_weights_are_taken_over(name, request):
    subject = request.getfixturevalue(name)
    fresh = copy.deepcopy(subject.module)
    before = attributes_of(subject.module)
    prune_structured(subject, PruneConfig(ratio=0.5, round_to=4))
    changed = json.loads(json.dumps(changed_attributes(before, subject.module)))
    restore_structure(fresh, changed, subject.module.state_dict())
    assert torch.equal(subject.of(fresh).outputs()[0], subject.outputs()[0])
    subject.feed(fresh.train(), subject.example)
    loss = subject.of(fresh).feed(fresh, subject.example)
    (loss if isinstance(loss, torch.Tensor) else loss.logits).sum().backward()
    assert all(p.grad is not None for n, p in fresh.named_parameters() if "head" in n or "query" in n)


def test_another_module_is_refused(residual):
    with pytest.raises(OptimizationError, match="no 'stem"):
        restore_structure(nn.Linear(2, 2), {}, residual.module.state_dict())
    weights = residual.module.state_dict()
    weights.pop("head.bias")
    with pytest.raises(OptimizationError, match=r"lack 'head\.bias'"):
        restore_structure(residual.module, {}, weights)
    weights["head.bias"] = torch.zeros(3)
    with pytest.raises(OptimizationError, match=r"head\.bias has the shape \[10\], and had \[3\]"):
        restore_structure(residual.module, {}, weights)


class Tied(nn.Module):
    """Its embedding is its last layer as well."""

    def __init__(self):
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(12, 8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.second(self.first(self.words(ids)).relu()))


def test_what_is_tied_stays_tied():
    torch.manual_seed(0)
    subject = Subject(Tied().eval(), {"ids": torch.arange(12)[None]}, lambda module, batch: module(**batch))
    before = attributes_of(subject.module)
    done = prune_structured(subject, PruneConfig(ratio=0.5, round_to=8))
    assert done.channels == {"first": (32, 16)}
    assert "shares its weight" in done.kept["head"]
    fresh = Tied().eval()
    changed = changed_attributes(before, subject.module)
    restore_structure(fresh, changed, dict(subject.module.named_parameters()))
    assert fresh.head.weight is fresh.words.weight
    assert torch.equal(subject.of(fresh).outputs()[0], subject.outputs()[0])
