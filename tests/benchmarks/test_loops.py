import threading
from itertools import pairwise

import pytest

from deploykit.benchmarks.loops import closed_loop, concurrent_loop, open_loop, poisson_schedule


class Clock:
    """Time that passes where somebody says so, and a microsecond with every look at it."""

    def __init__(self, tick=0):
        self.now, self.tick = 0, tick

    def __call__(self):
        self.now += self.tick
        return self.now

    def sleep(self, seconds):
        self.now += max(1, int(seconds * 1e9))

    def pass_ms(self, ms):
        self.now += int(ms * 1e6)


def test_a_closed_loop_rotates_its_inputs_and_ends_in_time():
    clock, seen = Clock(), []

    def run(feed):
        seen.append(feed)
        clock.pass_ms(10)

    timed = closed_loop(run, "abc", 0.05, start=1, clock=clock)
    assert seen == list("bcabc")
    assert timed.samples_ns == [10_000_000] * 5
    assert timed.wall_ns == 50_000_000
    assert timed.cursor == 0


def test_a_closed_loop_sends_one_request_however_slow():
    clock = Clock()
    assert closed_loop(lambda feed: clock.pass_ms(500), "a", 0.0, clock=clock).samples_ns == [500_000_000]


def test_requests_in_flight_really_overlap():
    """Each waits for the other: one after the other they would never end."""
    both = threading.Barrier(2, timeout=20)
    timed = concurrent_loop([lambda feed: both.wait(), lambda feed: both.wait()], "ab", 0.0)
    assert len(timed.samples_ns) == 2


def test_a_failure_in_a_thread_is_raised():
    def broken(feed):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        concurrent_loop([broken, lambda feed: None], "a", 0.0)
    with pytest.raises(ValueError, match="no"):
        open_loop([broken, broken], "a", [0, 1])


def test_a_poisson_schedule_has_its_rate_and_its_spread():
    schedule = poisson_schedule(100.0, 20_000, 0)
    assert schedule == sorted(schedule)
    assert schedule[-1] / 1e9 == pytest.approx(200, rel=0.03)
    gaps = [b - a for a, b in pairwise(schedule)]
    mean = sum(gaps) / len(gaps)
    # Of an exponential distribution the standard deviation is the mean.
    assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.05)
    assert poisson_schedule(100.0, 5, 1) != poisson_schedule(100.0, 5, 2)


@pytest.mark.parametrize("stall_ms", [0, 200])
def test_an_open_loop_shows_a_stall_to_all_that_waited(stall_ms):
    """Requests every 10 ms of 1 ms each; one of a thousand stalls. A closed loop sees one slow request in a thousand;
    what arrives meanwhile waits too, and that is twenty requests: two per cent."""
    clock, count = Clock(tick=1000), 0

    def run(feed):
        nonlocal count
        count += 1
        clock.pass_ms(1 + (stall_ms if count == 500 else 0))

    schedule = [n * 10_000_000 for n in range(1000)]
    timed = open_loop([run], "a", schedule, clock=clock, sleep=clock.sleep)
    p99 = sorted(timed.samples_ns)[989]
    assert max(timed.samples_ns) == pytest.approx((1 + stall_ms) * 1e6, rel=0.01)
    if stall_ms:
        assert p99 > 80e6
        # In a closed loop the same stall is one sample among a thousand.
        count = 0
        closed = sorted(closed_loop(run, "a", 1.3, clock=clock).samples_ns)
        assert len(closed) > 1000
        assert closed[-1] > 200e6 > 2e6 > closed[-2]
    else:
        assert p99 == pytest.approx(1e6, rel=0.2)


def test_a_rate_that_cannot_meet_its_objective_any_more_is_given_up():
    """Of 1000 requests ten may be late; the eleventh ends it."""
    clock = Clock(tick=1000)
    schedule = [n * 1_000_000 for n in range(1000)]
    timed = open_loop(
        [lambda feed: clock.pass_ms(10)], "a", schedule, objective_ns=50_000_000, clock=clock, sleep=clock.sleep
    )
    assert sum(n > 50_000_000 for n in timed.samples_ns) == 11
    assert len(timed.samples_ns) < 20
    rare = open_loop(
        [lambda feed: clock.pass_ms(10 if feed else 0.5)], [0] * 99 + [1], [20 * n for n in schedule],
        objective_ns=9_000_000, clock=clock, sleep=clock.sleep,
    )  # fmt: skip
    assert len(rare.samples_ns) == 1000


def test_two_servers_share_an_open_loop():
    """Every second request finds the first server busy; all are answered once."""
    lock, seen = threading.Lock(), []

    def run(feed):
        with lock:
            seen.append(feed)

    timed = open_loop([run, run], list(range(50)), [n * 1000 for n in range(50)])
    assert sorted(seen) == list(range(50))
    assert len(timed.samples_ns) == 50
