"""Which channels go: in multiples, the cheapest first, and more of them for a larger ratio."""

from itertools import pairwise

import numpy as np
import pytest

from deploykit.errors import OptimizationError
from deploykit.optimizers.pruning import PruneConfig, check_prune_config
from deploykit.optimizers.pruning.allocation import Prospect, allocate, highest_ratio, least_important, sizes_of


def prospect(name, units, losses, *, step=16, saving=1.0, width=1, original=None):
    return Prospect(name, units, original or units, width, step, np.asarray(losses, float), saving)


def test_sizes_are_multiples_and_keep_enough():
    assert sizes_of(prospect("a", 64, np.ones(64)), 0.9) == [64, 48, 32, 16]
    assert sizes_of(prospect("a", 100, np.ones(100)), 0.5) == [100, 96, 80, 64]
    assert sizes_of(prospect("a", 8, np.ones(8)), 0.9) == [8]  # there is no smaller multiple
    assert sizes_of(prospect("heads", 4, np.ones(4), step=1), 0.9) == [4, 3, 2, 1]
    assert sizes_of(prospect("a", 32, np.ones(32), original=64), 0.5) == [32]  # it has lost its half already
    assert highest_ratio([prospect("a", 64, np.ones(64)), prospect("b", 64, np.ones(64))], 0.5) == 0.5


def test_cheap_channels_go_first_and_a_larger_ratio_takes_them_too():
    groups = [
        prospect("dear", 64, np.full(64, 9.0)),
        prospect("cheap", 64, np.full(64, 1.0)),
        prospect("slow", 64, np.full(64, 9.0), saving=100.0),  # as dear, and it saves a hundred times as much
    ]
    assert allocate(groups, 0.25, 0.8) == {"dear": 64, "cheap": 64, "slow": 16}
    kept = [allocate(groups, ratio, 0.8) for ratio in np.linspace(0.01, 0.9, 30)]
    for before, after in pairwise(kept):
        assert all(after[name] <= before[name] for name in after)
    assert kept[-1] == {"dear": 16, "cheap": 16, "slow": 16}
    gone = 1 - sum(allocate(groups, 0.5, 0.8).values()) / 192
    assert gone == pytest.approx(0.5, abs=0.05)


def test_uniform_takes_the_same_share_everywhere():
    groups = [prospect("dear", 64, np.full(64, 9.0)), prospect("cheap", 128, np.full(128, 1.0))]
    assert allocate(groups, 0.5, 0.9, uniform=True) == {"dear": 32, "cheap": 64}


def test_the_least_important_units_go():
    found = least_important({"a": np.array([3.0, 0.1, 2.0, 0.2]), "b": np.ones(4)}, {"a": 2, "b": 4})
    assert found == {"a": [1, 3]}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (PruneConfig(method="channels"), "method 'channels'"),
        (PruneConfig(ratio=1.0), "ratio of 1"),
        (PruneConfig(steps=0), "0 pruning steps"),
        (PruneConfig(round_to=0), "multiples of 0"),
        (PruneConfig(method="2:4", ratio=0.5), "one half"),
        (PruneConfig(method="magnitude", ratio=0.95), r"at most 0\.9 of each.*--max-ratio 0\.975"),
        (PruneConfig(method="2:4", allocation="uniform"), "allocation does nothing with the method 2:4"),
        (PruneConfig(method="magnitude", ratio=0.5, importance="taylor"), "importance does nothing"),
    ],
)
def test_contradictions_are_refused(config, says):
    with pytest.raises(OptimizationError, match=says):
        check_prune_config(config)
