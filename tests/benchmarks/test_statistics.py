import numpy as np
import pytest

from deploykit.benchmarks.statistics import (
    MIN_SAMPLES,
    Outcome,
    decide,
    drift_of,
    floor_of,
    interval,
    log_ratios,
    percentile,
    student_975,
)


@pytest.mark.parametrize("q", MIN_SAMPLES)
def test_percentiles_need_their_minimum_of_samples(q):
    samples = np.random.default_rng(0).permutation(MIN_SAMPLES[q]) + 1
    assert percentile(samples[:-1], q) is None
    # Nearest rank: an observed value, no interpolation.
    rank = int(np.ceil(q / 100 * samples.size))
    assert percentile(samples, q) == rank


def rounds(rng, median, noise, count=10, drift=1.0):
    """Rounds of one turn of one request each."""
    paces = median * np.exp(rng.normal(0, noise, count)) * drift * 1e6
    return [{"samples_ns": [int(pace)], "wall_ns": int(pace)} for pace in paces]


def judged(reference, candidate, twin, seed=0):
    return decide(log_ratios(reference, candidate), floor_of(log_ratios(reference, twin)), seed)


def test_a_model_against_itself_is_a_tie():
    """Drift that both see cancels out; what is left is noise, and noise is no winner."""
    ties = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        drift = np.exp(np.cumsum(rng.normal(0, 0.05, 10)))
        a, b, twin = (rounds(rng, 5.0, 0.02, drift=drift) for _ in range(3))
        ties += judged(a, b, twin, seed).outcome is Outcome.TIE
    assert ties >= 190


def test_a_real_difference_is_found_and_has_a_direction():
    rng = np.random.default_rng(1)
    slow, twin, fast = rounds(rng, 6.0, 0.01), rounds(rng, 6.0, 0.01), rounds(rng, 4.0, 0.01)
    found = judged(slow, fast, twin)
    assert found.outcome is Outcome.FASTER
    assert found.low < 1.5 < found.high or found.ratio == pytest.approx(1.5, rel=0.02)
    assert judged(fast, slow, fast).outcome is Outcome.SLOWER


def test_the_floor_is_never_below_one_percent():
    assert floor_of([0.0] * 5) == 0.01
    assert floor_of([0.05, 0.05]) == floor_of([-0.05, -0.05]) == pytest.approx(np.expm1(0.05))


@pytest.mark.parametrize("count", [3, 5, 10, 30])
def test_intervals_of_few_rounds_cover_what_they_promise(count):
    """Nominal 95 %; the percentile bootstrap alone covers 73 to 84 % at 3 to 5 rounds."""
    covered = 0
    for seed in range(300):
        logs = np.random.default_rng(seed).normal(0.1, 0.03, count)
        _, low, high = interval(list(logs), seed)
        covered += low <= 0.1 <= high
    assert covered >= 0.93 * 300


def test_student_quantiles():
    assert student_975(1) == pytest.approx(12.706)
    assert student_975(10) == pytest.approx(2.228)
    # Tables: 2.201, 2.086, 1.984.
    for freedom, wanted in ((11, 2.201), (20, 2.086), (100, 1.984)):
        assert student_975(freedom) == pytest.approx(wanted, abs=1e-3)


def test_one_round_says_nothing():
    assert interval([0.5], 0)[1:] == (-np.inf, np.inf)


def turns(paces, factor=1.0):
    """A round of one request a turn."""
    return {"samples_ns": [int(p * factor * 1e6) for p in paces], "block_sizes": [1] * len(paces), "wall_ns": 1}


def test_a_machine_that_slows_down_for_a_turn_cancels_out():
    """Half of the turns at a third of the speed, for both: the ratio is that of every turn."""
    slow, fast = turns([1, 3, 1, 3, 1, 3]), turns([1, 3, 1, 3, 1, 3], 0.8)
    assert np.exp(log_ratios([slow], [fast])[0]) == pytest.approx(1.25)


def test_without_turns_medians_are_compared():
    a = {"samples_ns": [10, 20, 30], "wall_ns": 60}
    b = {"samples_ns": [5, 10, 15, 20], "wall_ns": 50, "block_sizes": [2, 2]}
    assert np.exp(log_ratios([a], [b])[0]) == pytest.approx(20 / 12.5)


def test_throughput_and_rates_are_compared_the_other_way():
    a = {"samples_ns": [10, 10], "wall_ns": 20, "paced_by": "wall"}
    b = {"samples_ns": [10, 10], "wall_ns": 10, "paced_by": "wall"}
    assert np.exp(log_ratios([a], [b])[0]) == pytest.approx(2.0)
    assert np.exp(log_ratios([{"rate_per_s": 10}], [{"rate_per_s": 15}])[0]) == pytest.approx(1.5)


def test_drift_is_the_second_half_over_the_first():
    assert drift_of([{"samples_ns": [10, 10, 20, 20]}, {"samples_ns": [10, 10, 22, 22]}]) == pytest.approx(2.1)
    assert drift_of([{"samples_ns": [10]}]) == 1.0
