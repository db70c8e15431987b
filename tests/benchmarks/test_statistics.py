import numpy as np
import pytest

from deploykit.benchmarks.statistics import MIN_SAMPLES, Outcome, compare_rounds, noise_floor, percentile


@pytest.mark.parametrize("q", MIN_SAMPLES)
def test_percentiles_need_their_minimum_of_samples(q):
    samples = np.random.default_rng(0).permutation(MIN_SAMPLES[q]) + 1
    assert percentile(samples[:-1], q) is None
    # Nearest rank: an observed value, no interpolation.
    rank = int(np.ceil(q / 100 * samples.size))
    assert percentile(samples, q) == rank


def rounds(rng, median, noise, count=10):
    return list(median * np.exp(rng.normal(0, noise, count)))


def test_a_model_against_itself_is_a_tie():
    """Drift that both see cancels out; what is left is noise, and noise is no winner."""
    ties = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        drift = np.exp(np.cumsum(rng.normal(0, 0.05, 10)))
        a, b, twin = (list(np.asarray(rounds(rng, 5.0, 0.02)) * drift) for _ in range(3))
        floor = noise_floor(a, twin)
        ties += compare_rounds(a, b, floor, seed).outcome is Outcome.TIE
    assert ties >= 190


def test_a_real_difference_is_found_and_has_a_direction():
    rng = np.random.default_rng(1)
    slow, twin, fast = rounds(rng, 6.0, 0.01), rounds(rng, 6.0, 0.01), rounds(rng, 4.0, 0.01)
    floor = noise_floor(slow, twin)
    found = compare_rounds(slow, fast, floor, 0)
    assert found.outcome is Outcome.FASTER
    assert found.low < 1.5 < found.high or found.ratio == pytest.approx(1.5, rel=0.02)
    assert compare_rounds(fast, slow, floor, 0).outcome is Outcome.SLOWER


def test_the_floor_is_never_below_one_percent():
    assert noise_floor([5.0] * 5, [5.0] * 5) == 0.01
