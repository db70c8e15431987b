import random
from dataclasses import replace

import pytest

from deploykit.benchmarks.arena import ProcessArena
from deploykit.benchmarks.plan import Candidate, Settings
from deploykit.benchmarks.statistics import busy_ns
from deploykit.benchmarks.tuner import LostError, search
from deploykit.benchmarks.tuner_space import Config, Stage, stages_for, thread_counts
from deploykit.machine import inspect_machine


class FakeArena:
    """Configurations with a known pace, and a machine that slows down at random for all of a turn."""

    def __init__(self, pace, noise=0.0, broken=(), wrong=(), seed=0, load_s=0.5):
        self.load_s = load_s
        self.pace, self.noise = pace, noise
        self.broken, self.lies = set(broken), set(wrong)
        self.rng = random.Random(seed)
        self.live, self.loads, self.now = set(), [], 0.0

    def clock(self):
        return self.now

    def load(self, configs):
        failed = {c: "failed: no" for c in configs if c in self.broken}
        fresh = [c for c in configs if c not in self.live and c not in failed]
        self.loads += fresh
        self.live.update(fresh)
        self.now += self.load_s * len(fresh)
        return failed

    def turn(self, config, seconds):
        assert config in self.live
        self.now += seconds
        return self.pace(config) * 1e6 * (1 + self.noise * self.rng.random())

    def drop(self, configs):
        self.live.difference_update(configs)

    def wrong(self, config):
        return "other numbers" if config in self.lies else ""


def threads(*counts):
    return Stage("threads", (tuple(lambda base, n=n: Config(n, settings=base.settings) for n in counts),))


def switch(name, value):
    return Stage(name, ((lambda base: base, lambda base: base.having(**{name: value})),))


def test_it_finds_the_best_stage_by_stage_and_unloads_everything():
    arena = FakeArena(lambda c: {1: 9, 2: 5, 4: 4, 8: 6}[c.threads] - (1 if dict(c.settings).get("spin") == "0" else 0))
    found = search(Config(8), [threads(1, 2, 4, 8), switch("spin", "0")], arena, 60, clock=arena.clock)
    assert found.chosen == Config(4).having(spin="0")
    assert not arena.live
    assert [t.config.threads for t in found.trials if t.kept] == [4, 4]
    assert {t.stage for t in found.trials} == {"threads", "spin"}


def test_the_worse_half_runs_less():
    arena = FakeArena(lambda c: float(c.threads))
    found = search(Config(1), [threads(1, 2, 3, 4, 5, 6, 7, 8)], arena, 60, clock=arena.clock)
    turns = {t.config.threads: len(t.paces) for t in found.trials}
    assert turns[1] > turns[8]
    assert turns[1] >= 12


def test_what_gains_nothing_is_hardly_ever_chosen():
    """Noise of 10 % in every turn; leaving the base takes twice the standard error."""
    kept = 0
    for seed in range(100):
        arena = FakeArena(lambda c: 5.0, 0.1, seed=seed)
        kept += search(Config(2), [threads(1, 2)], arena, 60, clock=arena.clock).chosen == Config(2)
    assert kept >= 93


def test_a_configuration_that_fails_or_lies_is_out_with_its_reason():
    broken, lying = Config(1), Config(2).having(flush="1")
    arena = FakeArena(lambda c: 1.0 if c.settings else float(c.threads), broken=[broken], wrong=[lying])
    risky = Stage("flush", ((lambda base: base.having(flush="1"),),), risky=True)
    found = search(Config(2), [threads(1, 2, 4), risky], arena, 60, clock=arena.clock)
    assert found.chosen == Config(2)
    reasons = {t.config: t.status for t in found.trials}
    assert reasons[broken] == "failed: no"
    assert reasons[lying] == "wrong outputs: other numbers"


def test_the_budget_is_kept():
    arena = FakeArena(lambda c: float(c.threads))
    found = search(Config(8), [threads(*range(1, 9)), switch("spin", "0")], arena, 20, clock=arena.clock)
    assert found.spent_s < 25
    assert found.chosen.threads == 1
    tight = FakeArena(lambda c: float(c.threads))
    assert search(Config(8), [threads(1, 8)], tight, 0.1, clock=tight.clock).chosen == Config(8)


@pytest.mark.parametrize("load_s", [2.0, 5.0, 8.0])
def test_the_budget_is_kept_also_where_loading_takes_long(load_s):
    """A stage that would only load is left out, also where the largest lever has to do with less."""
    arena = FakeArena(lambda c: float(c.threads), load_s=load_s)
    stages = [threads(*range(1, 9)), switch("spin", "0"), switch("block", "4"), switch("flush", "1")]
    found = search(Config(8), stages, arena, 20, clock=arena.clock)
    assert found.spent_s < 22
    assert found.chosen.threads == 1
    assert any("not tried" in t.status for t in found.trials)


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
def test_thread_counts_stay_within_the_cores_allowed(cores):
    assert max(thread_counts(cores)) == cores
    assert min(thread_counts(cores)) == 1


@pytest.mark.parametrize("device", ["ort:cpu", "openvino:cpu"])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_every_stage_keeps_the_base_and_varies_it(device, objective):
    machine = inspect_machine()
    base = Config(machine.cores_allowed)
    for stage in stages_for(device, objective, machine, native=True, batches=True):
        found = stage.around(base)
        assert found[0] == base
        assert len(set(found)) == len(found)
        for config in found:
            assert config.threads * config.sessions <= max(machine.cores_allowed, config.sessions)
            assert config.concurrency >= config.sessions
            assert config.threads * dict(config.settings).get("NUM_STREAMS", 1) <= max(
                machine.cores_allowed, dict(config.settings).get("NUM_STREAMS", 1)
            )


@pytest.mark.parametrize("device", ["ort:cpu", "openvino:cpu"])
def test_threads_and_requests_that_were_asked_for_are_kept(device):
    machine = replace(inspect_machine(), cores_allowed=8)
    stages = stages_for(device, "throughput", machine, native=False, batches=False, cores=4, concurrency=2)
    found = [config for stage in stages for config in stage.around(Config(4, concurrency=2))]
    assert {config.concurrency for config in found} == {2}
    assert max(config.threads * max(1, config.sessions) for config in found) == 4
    assert max(config.sessions for config in found) <= 2


def test_a_setting_that_is_none_is_taken_away():
    assert Config(1).having(a="1").having(a=None) == Config(1)
    assert Config(2, batch=4, precision="native", optimize="extended").having(a="1").label == (
        "2 threads, batch 4, native, optimize extended, a=1"
    )


def test_a_configuration_that_dies_in_the_middle_is_out_and_the_search_goes_on():
    class Dying(FakeArena):
        def turn(self, config, seconds):
            if config.threads == 1 and self.now > 3:
                raise LostError("its process ended with signal 9")
            return super().turn(config, seconds)

    arena = Dying(lambda c: float(c.threads))
    found = search(Config(4), [threads(1, 2, 4)], arena, 60, clock=arena.clock)
    assert found.chosen == Config(2)
    assert {t.config.threads: t.status for t in found.trials}[1] == "failed: its process ended with signal 9"
    assert not arena.live


def test_what_the_budget_does_not_reach_is_said():
    arena = FakeArena(lambda c: float(c.threads))
    found = search(Config(40), [threads(*range(1, 41))], arena, 8, clock=arena.clock)
    assert any(t.status.startswith("not tried") for t in found.trials)
    assert found.spent_s < 12


def in_flight(*counts):
    return Stage("parallelism", (tuple(lambda base, n=n: Config(1, sessions=2, concurrency=n) for n in counts),))


@pytest.mark.parametrize(("gain", "chosen"), [(1.0, 2), (0.996, 2), (1.03, 2), (0.85, 4)])
def test_more_requests_in_flight_have_to_gain_something(gain, chosen):
    """Both are twice as fast as the base, in turns with a noise of 10 %: which of them ranks first is chance."""
    paces, right = {1: 2.0, 2: 1.0, 4: gain}, 0
    for seed in range(30):
        arena = FakeArena(lambda c: paces[c.concurrency], 0.1, seed=seed)
        found = search(Config(2), [in_flight(2, 4)], arena, 15, clock=arena.clock)
        right += found.chosen.concurrency == chosen
        assert [t.config for t in found.trials if t.kept] == [found.chosen]
    assert right >= 27


def test_the_smaller_batch_is_kept_where_a_larger_one_gains_nothing():
    sizes = Stage("batch", (tuple(lambda base, n=n: replace(base, batch=n) for n in (1, 8, 16, 32)),))
    arena = FakeArena(lambda c: {1: 2.0, 8: 1.004, 16: 1.002, 32: 1.0}[c.batch], 0.02)
    assert search(Config(2), [sizes], arena, 60, clock=arena.clock).chosen.batch == 8


def simulated(senders, lanes, seconds, rng):
    """A block as `concurrent_loop` sends it: requests of about 10 ms that share some lanes evenly."""
    left = {sender: 10e6 * rng.uniform(0.9, 1.1) for sender in range(senders)}
    now, ends, count = 0.0, [], 0
    while left:
        rate = min(1.0, lanes / len(left))
        first = min(left, key=left.get)
        taken = left[first]
        now, count = now + taken / rate, count + 1
        left = {sender: work - taken for sender, work in left.items()}
        if now < seconds * 1e9:
            left[first] = 10e6 * rng.uniform(0.9, 1.1)
        else:
            del left[first]
            ends.append(int(now))
    return ends, count


@pytest.mark.parametrize(("seconds", "gap"), [(0.03, 0.03), (0.15, 0.006)])
def test_lanes_that_have_run_out_of_requests_are_not_slow(seconds, gap):
    """Two lanes of 10 ms give a sample in 5 ms, in a block of any length, and however many are in flight."""
    rng, by_wall = random.Random(0), {}
    for senders in (2, 4):
        blocks = [simulated(senders, 2, seconds, rng) for _ in range(2000)]
        paces = [busy_ns(ends, 2) / count for ends, count in blocks]
        assert sum(paces) / len(paces) == pytest.approx(5e6, rel=0.003)
        by_wall[senders] = sum(max(ends) / count for ends, count in blocks) / len(blocks)
    # By the wall, four in flight would look that much faster, and are not.
    assert by_wall[2] / by_wall[4] > 1 + gap


def test_lanes_are_sessions_times_streams():
    assert Config(1, sessions=3).lanes == 3
    assert Config(1).having(NUM_STREAMS=2).lanes == Config(1).having(NUM_STREAMS="2").lanes == 2
    assert Config(1).having(NUM_STREAMS="AUTO").lanes == 1
    assert busy_ns([7], 1) == busy_ns([5, 7], 1) == 7
    assert busy_ns([5, 7], 2) == 6


def test_a_turn_is_paced_by_the_lanes_at_work(tmp_path):
    class Child:
        def ask(self, do, **told):
            return {"samples_ns": [10, 10, 20], "wall_ns": 20, "ends_ns": [10, 20]}

    for by_wall, expected in ((True, 15 / 3), (False, 10)):
        arena = ProcessArena(Candidate("m", "m", "ort:cpu", "", 0), Settings(), lambda n: [], tmp_path, by_wall=by_wall)
        config = Config(1, sessions=2, concurrency=2, batch=2)
        arena._live[config] = Child()
        assert arena.turn(config, 0.1) == expected / 2


@pytest.mark.parametrize(("device", "most"), [("ort:cpu", 1), ("openvino:cpu", 2)])
def test_requests_of_onnx_runtime_take_no_more_cores_than_were_asked_for(device, most):
    """Each works in its sender's thread."""
    machine = replace(inspect_machine(), cores_allowed=8)
    (stage, *_) = stages_for(device, "throughput", machine, native=False, batches=False, cores=2)
    found = stage.around(Config(2))
    assert max(c.concurrency / c.lanes for c in found) == most
    (stage, *_) = stages_for(device, "throughput", machine, native=False, batches=False, cores=8)
    assert max(c.concurrency / c.lanes for c in stage.around(Config(8))) == 2


def test_loading_keeps_to_its_share_where_the_base_is_there_already():
    """The second stage has what the first left of 40 s, and loads for half of it, half a second each."""
    many = Stage("many", (tuple(lambda base, n=n: base.having(n=n) for n in range(100)),))
    arena = FakeArena(lambda c: 1.0)
    search(Config(2), [threads(2, 3), many], arena, 40, clock=arena.clock)
    seconds = 0.5 * sum(bool(config.settings) for config in arena.loads)
    assert 10 < seconds <= 20
