import pytest

from deploykit.benchmarks.rates import RateSearch, Trial


def trial(rate, met):
    return Trial(rate, rate, 700, 1.0, 5.0, met, 1)


def run(capacity, start):
    search, tried = RateSearch(start), []
    while not search.done:
        tried.append(search.rate_per_s)
        search.learn(trial(search.rate_per_s, search.rate_per_s <= capacity))
    return search, tried


@pytest.mark.parametrize("start", [20.0, 90.0, 101.0, 400.0])
def test_it_finds_the_highest_rate_from_anywhere(start):
    search, tried = run(100.0, start)
    assert search.best.rate_per_s == pytest.approx(100, rel=0.07)
    assert search.best.rate_per_s <= 100
    assert len(tried) <= 10


def test_it_ends_where_there_is_none():
    search, tried = run(0.0, 50.0)
    assert search.best is None
    assert len(tried) == 10


def test_a_lucky_trial_above_an_unlucky_one_does_not_confuse_it():
    search = RateSearch(100.0)
    search.learn(trial(100.0, False))
    search.learn(trial(120.0, True))
    assert search.best.rate_per_s == 120
    assert search.rate_per_s > 120


def test_a_trial_is_met_only_with_every_request_sent_and_enough_of_them():
    told = {
        "samples_ns": [1_000_000] * 662,
        "wall_ns": 10**9,
        "queries": 662,
        "asked": 662,
        "last_ns": 990_000_000,
        "request_ns": 1,
    }
    good = Trial.judge(600.0, told, 2.0)
    assert good.met
    assert good.p99_ms == 1.0
    assert good.achieved_per_s == pytest.approx(662)
    assert not Trial.judge(600.0, told | {"asked": 700}, 2.0).met
    assert not Trial.judge(600.0, told, 0.5).met
    few = {
        "samples_ns": [1_000_000] * 661,
        "wall_ns": 10**9,
        "queries": 661,
        "asked": 661,
        "last_ns": 10**9,
        "request_ns": 1,
    }
    assert Trial.judge(600.0, few, 2.0).p99_ms is None
    assert not Trial.judge(600.0, few, 2.0).met


def test_queries_are_enough_for_a_99th_percentile():
    assert Trial.queries_for(1.0, 1.0) == 662
    assert Trial.queries_for(1000.0, 2.0) == 2000


def test_a_queue_that_only_grows_is_not_met_however_lax_the_objective():
    """Due over a second, answered over 1.2: a fifth more than the model can do."""
    told = {"samples_ns": [1_000_000] * 700, "wall_ns": 1_200_000_000, "queries": 700, "asked": 700}
    assert not Trial.judge(700.0, told | {"last_ns": 10**9, "request_ns": 1_700_000}, 5000.0).met
    assert Trial.judge(700.0, told | {"last_ns": 1_190_000_000, "request_ns": 1_700_000}, 5000.0).met


def test_no_rate_above_the_limit_is_tried():
    search = RateSearch(70.0, limit=100.0)
    while not search.done:
        assert search.rate_per_s <= 100
        search.learn(trial(search.rate_per_s, True))
    assert search.best.rate_per_s == 100
