"""The ratio that meets a latency, on made-up latencies."""

import math

import numpy as np
import pytest

from deploykit.optimizers.pruning.search import Probe, find_ratio

START = 10.0


def smooth(ratio):
    return 1.0 + 9.0 * (1 - ratio) ** 2


def stairs(ratio):
    return smooth(math.floor(ratio * 8) / 8)


def search(latency, target, **options):
    calls = []

    def counted(ratio):
        calls.append(ratio)
        return latency(ratio)

    found = find_ratio(counted, target, start=Probe(0.0, START), highest=0.9, **options)
    assert [p.ratio for p in found.probes] == calls
    return found


@pytest.mark.parametrize("target", [9.0, 7.0, 5.0, 3.0, 2.0, 1.2])
def test_a_smooth_latency_is_met_within_five_percent(target):
    found = search(smooth, target)
    assert found.met
    assert found.ms == pytest.approx(target, rel=0.05)
    assert len(found.probes) <= 6


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_two_percent_is_no_trouble(seed):
    noise = np.random.default_rng(seed)
    found = search(lambda ratio: smooth(ratio) * (1 + 0.02 * noise.standard_normal()), 4.0)
    assert found.met
    assert smooth(found.ratio) == pytest.approx(4.0, rel=0.1)
    assert len(found.probes) <= 10


def test_steps_that_jump_over_the_target_end_just_below_it():
    found = search(stairs, 4.0)  # the stairs are at 4.52 and at 3.25
    assert found.met
    assert found.ms == stairs(4 / 8)
    assert len(found.probes) <= 10


def test_a_target_out_of_reach_is_said_and_the_fastest_is_given():
    found = search(smooth, 1.0)
    assert not found.met
    assert found.ratio == 0.9
    assert found.ms == smooth(0.9)


def test_a_straight_guess_takes_one_probe():
    exact = 1 - math.sqrt((4.0 - 1) / 9)
    assert len(search(smooth, 4.0, guess=exact).probes) == 1


def test_a_latency_that_is_there_already_takes_none():
    found = search(smooth, 11.0)
    assert (found.ratio, found.met, found.probes) == (0.0, True, ())
