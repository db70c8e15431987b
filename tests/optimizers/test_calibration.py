"""Calibration: exact counts, in any order; ranges by method; states on disk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.errors import DataError, DeploykitError, OutputExistsError
from deploykit.optimizers import histogram
from deploykit.optimizers.calibration import Calibration
from deploykit.optimizers.histogram import MASK_MAGNITUDE, SAMPLED, Histogram, look_at, stride_for
from deploykit.optimizers.thresholds import LEVELS, METHODS, choose_range, divergences, expected_error

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
ARRAYS = st.lists(st.lists(FLOATS, min_size=0, max_size=12), min_size=1, max_size=6)


def seen(*arrays):
    found = Histogram()
    for array in arrays:
        found.update(np.asarray(array, np.float32))
    found.settle()
    return found


def same(first, second):
    assert (first.low, first.high, first.count) == (second.low, second.high, second.count)
    assert (first.nonfinite, first.hidden) == (second.nonfinite, second.hidden)
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.counts, second.counts)


@settings(deadline=None)
@given(ARRAYS, st.randoms(use_true_random=False))
def test_shards_in_any_order_and_grouping_give_the_same_bits(arrays, random):
    whole = seen(*arrays)
    shuffled = list(arrays)
    random.shuffle(shuffled)
    shards = [seen(array) for array in shuffled]
    while len(shards) > 1:
        first = shards.pop(random.randrange(len(shards)))
        shards[random.randrange(len(shards))].merge(first)
    same(shards[0], whole)


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=50))
def test_bins_hold_what_was_seen(values):
    found = seen(values)
    below, above, _, counts = found.bins()
    assert counts.sum() == len(values) == found.count
    for value in np.asarray(values, np.float32):
        assert ((below <= value) & (value <= above)).any()
    assert found.low == np.float32(min(values)) and found.high == np.float32(max(values))
    assert (np.diff(below) > 0).all()


def test_what_no_scale_can_hold_is_told_apart():
    found = seen([1.0, np.nan, np.inf, -np.inf, -3.4e38, MASK_MAGNITUDE, 2.0, -1.0])
    assert (found.low, found.high, found.count, found.nonfinite, found.hidden) == (-1.0, 2.0, 8, 3, 2)
    assert found.counts.sum() == 3
    assert not seen([np.nan, np.inf]).seen and not seen([]).seen


def test_extremes_count_wherever_they_stand_in_a_large_array():
    values = np.zeros(SAMPLED * 9, np.float32)
    values[1], values[-2] = 7, -5
    found = seen(values)
    assert (found.low, found.high, found.count) == (-5, 7, values.size)
    assert SAMPLED / 2 < found.counts.sum() <= SAMPLED


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SPECIAL = [0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e30, -3.4e38, 1e-45, -1e-45]
LISTS = st.one_of(
    st.lists(NUMBERS.filter(lambda v: abs(v) < 1e30), min_size=1, max_size=20),
    st.lists(st.floats(0, 2.0**60, width=32), min_size=1, max_size=20),
    st.lists(st.floats(-(2.0**60), 0, width=32), min_size=1, max_size=20),
    st.lists(st.one_of(NUMBERS, st.sampled_from(SPECIAL)), min_size=1, max_size=20),
)


@settings(deadline=None, max_examples=300)
@given(LISTS, st.integers(1, 5))
def test_walking_in_pieces_finds_what_a_plain_look_finds(values, piece):
    array = np.asarray(values, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram, "_PIECE", piece)
        patch.setattr(histogram, "SAMPLED", 4)
        found, step = look_at(array), stride_for
        finite = array[np.isfinite(array)]
        kept = finite[np.abs(finite) < np.float32(MASK_MAGNITUDE)]
        np.testing.assert_array_equal(found.sample, kept[:: step(kept.size)])
    assert (found.count, found.nonfinite) == (array.size, array.size - finite.size)
    assert found.hidden == finite.size - kept.size
    ends = (kept.min(), kept.max()) if kept.size else (np.inf, -np.inf)
    assert (found.low, found.high) == ends
    # Zero's sign would hang on the order.
    assert not any(np.signbit(end) for end in (found.low, found.high) if end == 0)
    assert not look_at(array, count=False).sample.size


@pytest.mark.parametrize("size", [SAMPLED, SAMPLED * 4, 10**7, 10**8 + 1])
def test_samples_do_not_keep_step_with_rows(size):
    step = stride_for(size)
    assert size / step <= SAMPLED * 2
    assert step == 1 or all(np.gcd(step, row) == 1 for row in (2, 3, 7, 14, 28, 56, 64, 96, 112, 224, 384, 768))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_taken(dtype):
    found = Histogram()
    found.update(np.array([[1, -2], [0, 4]], dtype))
    found.settle()
    assert found.counts.tolist() == [1, 1, 1, 1]
    assert (found.low, found.high, found.count) == (-2, 4, 4)


RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.normal(size=40_000),
    "laplace": RNG.laplace(size=40_000),
    "after relu": np.maximum(RNG.normal(size=40_000), 0),
    "an outlier": np.concatenate([RNG.normal(size=40_000), [80.0]]),
    "negative": -np.abs(RNG.normal(size=40_000)),
}


def error(values, low, high):
    """Of the scheme itself: uint8, asymmetric."""
    step = (high - low) / 255
    zero = np.rint(-low / step)
    return float(np.mean(((np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step - values) ** 2))


@pytest.mark.parametrize("name", DATA)
def test_the_expected_error_is_that_of_the_scheme(name):
    values = DATA[name]
    found = seen(values)
    for share in (1.0, 0.7, 0.4):
        low, high = min(values.min(), 0) * share, max(values.max(), 0) * share
        expected = expected_error(found, np.array([low]), np.array([high]))[0, 0]
        assert expected == pytest.approx(error(values, low, high), rel=0.05)


@pytest.mark.parametrize("name", DATA)
def test_mse_is_better_than_what_was_seen_and_auto_never_worse(name):
    values = DATA[name]
    found = seen(values)
    errors = {m: error(values, *choose_range(found, m, 99.99)) for m in METHODS}
    assert errors["mse"] <= errors["minmax"] * 1.01
    assert errors["auto"] <= errors["minmax"] * 1.01


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("method", METHODS)
def test_ranges_hold_zero_and_stay_inside(name, method):
    values = DATA[name]
    low, high = choose_range(seen(values), method, 99.9)
    assert np.float32(min(values.min(), 0)) <= low <= 0 <= high <= np.float32(max(values.max(), 0))
    assert low < high


def test_percentile_leaves_out_the_share_that_was_named():
    values = DATA["normal"]
    low, high = choose_range(seen(values), "percentile", 98)
    assert np.mean((values < low) | (values > high)) == pytest.approx(0.02, abs=0.002)


def test_entropy_clips_a_long_tail_and_keeps_what_is_flat():
    assert choose_range(seen(DATA["laplace"]), "entropy", 0)[1] < 0.9 * DATA["laplace"].max()
    flat = RNG.uniform(-1, 1, 40_000)
    assert choose_range(seen(flat), "entropy", 0)[1] > 0.9


def divergence(middle, counts, low, high):
    """Bin by bin, as the definition says it."""
    inside = (middle >= low) & (middle <= high)
    if inside.sum() < 2:
        return np.inf
    kept = counts[inside]
    reference = kept.copy()
    reference[0] += counts[middle < low].sum()
    reference[-1] += counts[middle > high].sum()
    level = np.clip(np.rint((middle[inside] - low) / ((high - low) / LEVELS)), 0, LEVELS).astype(int)
    spread = (np.bincount(level, kept) / np.maximum(np.bincount(level), 1))[level]
    p, q = reference / reference.sum(), spread / spread.sum()
    return np.sum(p * np.log((p + 1e-12) / (q + 1e-12)))


@pytest.mark.parametrize("values", [*DATA.values(), [1.0, 2.0], [-3.0, 1.0, 1.5, 40.0]], ids=[*DATA, "two", "four"])
def test_divergences_are_those_of_the_definition(values):
    found = seen(values)
    _, _, middle, counts = found.bins()
    middle, counts = middle[middle != 0], counts[middle != 0]
    shares = np.geomspace(1, 0.04, 12)
    lows, highs = min(found.low, 0) * shares, max(found.high, 0) * shares
    expected = [divergence(middle, counts, low, high) for low, high in zip(lows, highs, strict=True)]
    np.testing.assert_allclose(divergences(middle, counts, lows, highs), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0, 5.0], [1e-42, -1e-42], [3.0]])
def test_few_values_have_a_range_too(method, values):
    low, high = choose_range(seen(values), method, 99.99)
    assert low <= 0 <= high and np.isfinite([low, high]).all()


def state(**arrays):
    return Calibration("model", {n: seen(*a) for n, a in arrays.items()}, samples=3)


def test_a_saved_state_comes_back(tmp_path):
    before = state(a=[DATA["normal"]], b=[[np.nan, 1, 2]], empty=[])
    before.save(tmp_path / "state")
    after = Calibration.load(tmp_path / "state")
    assert (after.model, after.samples, list(after.tensors)) == ("model", 3, ["a", "b", "empty"])
    for name, tensor in before.tensors.items():
        same(tensor, after.tensors[name])
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_states_add_up(tmp_path):
    first, second = state(a=[[1.0, 2.0]]), state(a=[[-5.0]], b=[[1.0]])
    first.merge(second)
    assert first.samples == 6 and first.tensors["a"].low == -5 and first.tensors["a"].count == 3
    assert set(first.ranges("minmax", 0).low) == {"a", "b"}
    with pytest.raises(DataError, match="another graph"):
        first.merge(Calibration("other"))


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "state").write_text("mine")
    with pytest.raises(OutputExistsError):
        state().save(tmp_path / "state")
    assert (tmp_path / "state").read_text() == "mine"
    with pytest.raises(DataError, match="does not exist"):
        state().save(tmp_path / "nowhere" / "state")


def test_damaged_states_are_refused(tmp_path):
    state(a=[DATA["normal"]]).save(tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for number in range(60):
        damaged = bytearray(whole)
        if number % 2:
            del damaged[int(rng.integers(len(whole))) :]
        else:
            damaged[int(rng.integers(len(whole)))] ^= 0xFF
        (tmp_path / "damaged").write_bytes(bytes(damaged))
        try:
            found = Calibration.load(tmp_path / "damaged")
        except DeploykitError:
            refused += 1
        else:
            same(found.tensors["a"], state(a=[DATA["normal"]]).tensors["a"])  # a byte that nobody reads
    assert refused > 40
    with pytest.raises(DataError):
        np.savez(tmp_path / "other.npz", x=np.zeros(3))
        Calibration.load(tmp_path / "other.npz")
    with pytest.raises(DataError, match="does not exist"):
        Calibration.load(tmp_path / "missing")
