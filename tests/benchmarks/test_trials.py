"""Two ways in turns: what counts as faster, and that both ways are really run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.benchmarks import trials
from deploykit.benchmarks.trials import LoadMeter, Trial, in_processes, in_turns, one_after_another, whole_runs_us
from deploykit.runtimes import open_session


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])], [weight],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


FEEDS = {"x": np.ones((2, 8), np.float32)}


@pytest.mark.parametrize("count", [5, 9, 18])
def test_the_bound_is_that_of_the_sign_test(count: int) -> None:
    rank = trials._sign_rank(count)
    chance = [sum(math.comb(count, k) for k in range(r + 1)) / 2**count for r in (rank, rank + 1)]
    assert chance[0] <= 0.05 < chance[1]


def test_one_lucky_turn_is_no_gain() -> None:
    even = trials._trial([(1.0, 1.0)] * 8 + [(9.0, 1.0)])
    assert not even.gains(1.05)
    mixed = trials._trial([(1.3, 1.0)] * 6 + [(0.9, 1.0)] * 3)
    assert mixed.ratio == pytest.approx(1.3)
    assert not mixed.gains(1.05)
    clear = trials._trial([(1.3, 1.0)] * 8 + [(0.9, 1.0)])
    assert clear.gains(1.2)
    assert not clear.gains(1.4)


def test_what_is_saved_follows_from_the_ratio() -> None:
    assert Trial(10.0, 7.0, 2.0, 1.5).saved_us == pytest.approx(5000)
    assert Trial(10.0, 7.0, 0.5, 0.4).saved_us < 0


def test_turns_alternate_and_are_doubled_where_noise_hides_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ways = {name: lambda: None for name in ("first", "second")}
    first, second = (lambda: None), (lambda: None)
    times = {id(first): [2.0, 2.0, 0.5, 0.5, 0.5, 2, 2, 2, 2] * 2, id(second): [1.0] * 18}

    def block(run: Any, count: int, *, quick: bool) -> float:
        order.append("first" if run is first else "second")
        return times[id(run)].pop(0)

    monkeypatch.setattr(trials, "_block", block)
    found = in_turns(first, second)
    assert len(order) == 2 * 18
    assert order[:4] == ["first", "second", "second", "first"]
    assert found.ratio == 2.0
    assert len(ways) == 2


def test_a_second_look_does_not_make_chance_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 18 turns, 5 against it are more than one in forty trials of equal things has; the first look was one more."""
    first, second = (lambda: None), (lambda: None)
    times = {id(first): [0.5, 0.5, *[2.0] * 7, 0.5, 0.5, 0.5, *[2.0] * 6], id(second): [1.0] * 18}
    monkeypatch.setattr(trials, "_block", lambda run, count, quick: times[id(run)].pop(0))
    found = in_turns(first, second)
    assert times[id(first)] == []
    assert found.ratio == 2.0
    assert not found.gains(1.05)
    for turns in (trials._TURNS, trials._FEW_TURNS):
        wrong = 0.0
        for count, chance in ((turns, trials._CHANCE), (2 * turns, trials._CHANCE / 2)):
            rank = trials._sign_rank(count, chance)
            wrong += sum(math.comb(count, k) for k in range(rank + 1)) / 2**count
        assert wrong <= 0.05


def test_both_ways_run_and_a_slower_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9))
    monkeypatch.setattr(trials.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(trials.time, "perf_counter", lambda: next(clock) * 1e-3)
    calls: Counter[str] = Counter()

    def slow() -> None:
        calls["slow"] += 1
        for _ in range(4):
            trials.time.perf_counter()

    found = in_turns(slow, lambda: calls.update(["quick"]))
    assert calls["slow"] == calls["quick"] > 9
    assert found.ratio == pytest.approx(5.0)
    assert found.gains(2.0)


def test_sessions_of_one_after_another_never_live_together(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_OPENED_S", 0.001)
    alive: list[str] = []
    most, opened = [0], Counter[str]()

    class Watched:
        def __init__(self, name: str) -> None:
            self.name, self.session = name, open_session(model, threads=1)

        def __enter__(self) -> Any:
            alive.append(self.name)
            opened[self.name] += 1
            most[0] = max(most[0], len(alive))
            return self.session.__enter__()

        def __exit__(self, *exc: Any) -> None:
            alive.remove(self.name)
            self.session.__exit__(None, None, None)

    found = one_after_another(lambda: Watched("a"), lambda: Watched("b"), FEEDS)  # type: ignore[arg-type, return-value]
    assert most == [1]
    assert opened == {"a": 5, "b": 5}
    assert found.first_ms > 0 < found.second_ms


def test_each_side_gets_its_settings_in_a_process_of_its_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = trials._child

    def child(path: Path, device: str, feeds: Path, threads: int, precision: str, settings: Any, level: Any) -> Any:
        seen.append(settings["session.set_denormal_as_zero"])
        return real(path, device, feeds, threads, precision, settings, level) if len(seen) <= 2 else 1.0

    monkeypatch.setattr(trials, "_child", child)
    sides = [{"session.set_denormal_as_zero": "0"}, {"session.set_denormal_as_zero": "1"}]
    found = in_processes(model, "ort:cpu", FEEDS, 1, "fp32", sides, 0.0)
    assert found is not None
    assert seen == ["0", "1", "1", "0", "0", "1", "1", "0", "0", "1"]
    assert found.first_ms > 0


def test_a_first_turn_without_a_difference_is_the_last(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 2.0, 9.0, 1.0])
    monkeypatch.setattr(trials, "_child", lambda *args: next(times))
    found = in_processes(model, "ort:cpu", FEEDS, 1, "fp32", [{}, {}], 2.0)
    assert found is not None
    assert found.ratio == 1.5
    assert not found.gains(1.0)
    assert list(times) == [9.0, 1.0]


@pytest.mark.parametrize("name", ["file", "a/b"])
def test_an_input_may_have_any_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    renamed = onnx.load(str(model))
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = name
    onnx.save(renamed, str(tmp_path / "named.onnx"))
    monkeypatch.setattr(trials, "_FEW_TURNS", 1)
    found = in_processes(tmp_path / "named.onnx", "ort:cpu", {name: FEEDS["x"]}, 1, "fp32", [{}, {}], 0.0)
    assert found is not None


def test_a_process_that_fails_gives_nothing(model: Path) -> None:
    sides = [{"session.set_denormal_as_zero": "0"}, {"no_such_option": "1"}]
    assert in_processes(model, "openvino:cpu", FEEDS, 1, "fp32", sides, 1.1) is None


def test_whole_runs_give_median_and_first_decile() -> None:
    median, quick = whole_runs_us(lambda: None)
    assert 0 < quick <= median


def test_the_load_of_others_does_not_hold_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([(10.0, 100.0, 5.0), (12.0, 104.0, 6.0)])
    monkeypatch.setattr(LoadMeter, "_now", staticmethod(lambda: next(states)))
    assert LoadMeter().others() == pytest.approx(1.5)
    silent = iter([(10.0, 0.0, 5.0), (12.0, 0.0, 6.0)])
    monkeypatch.setattr(LoadMeter, "_now", staticmethod(lambda: next(silent)))
    assert LoadMeter().others() is None
