"""The search for an accuracy target: what it chooses, and how many models it judges."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from deploykit.errors import AccuracyError, OptimizationError
from deploykit.goals import Score
from deploykit.ranking import LayerError
from deploykit.targeting import evaluation_limit, reach


def layers(count: int) -> list[LayerError]:
    return [LayerError((f"layer{i}",), float(i)) for i in range(count)]


def score(shortfall: float, collapsed: str = "") -> Score:
    return Score(100, 20.0, 0.9, None, None, shortfall, collapsed)


class Fake:
    """Settings are names; which layers have to be in float is known."""

    def __init__(self, count: int, needed: Callable[[set[str]], bool], missing: dict[str, float] | None = None) -> None:
        self.layers = layers(count)
        self.needed = needed
        self.missing = missing or {}
        self.judged: list[tuple[str, tuple[str, ...]]] = []
        self.ranked: list[str] = []

    def judge(self, config: str, floats: Sequence[LayerError]) -> Score:
        names = tuple(f.name for f in floats)
        assert (config, names) not in self.judged, "the same model twice"
        self.judged.append((config, names))
        if config == "broken":
            raise OptimizationError("no")
        if len(names) == len(self.layers):
            raise OptimizationError("nothing to quantize")
        return score(0.0 if self.needed(set(names)) else self.missing.get(config, 1.0))

    def rank(self, config: str) -> list[LayerError]:
        self.ranked.append(config)
        return self.layers


def words(found: Score) -> str:
    return f"shortfall {found.shortfall}"


def test_settings_that_reach_the_target_need_no_floats() -> None:
    bench = Fake(10, lambda floats: bench.judged[-1][0] == "second")
    found = reach(bench, ["first", "second", "third"], words)
    assert (found.config, found.floats, found.evaluations) == ("second", (), 2)
    assert not bench.ranked and ("third", ()) not in bench.judged


def test_the_best_settings_are_the_ones_whose_layers_are_ranked() -> None:
    bench = Fake(10, lambda floats: "layer0" in floats, {"first": 0.5, "second": 0.2, "third": 0.3})
    found = reach(bench, ["broken", "first", "second", "third"], words)
    assert found.config == "second" and bench.ranked == ["second"]
    assert [f.name for f in found.floats] == ["layer0"]
    assert found.evaluations == 5  # four settings and one with a layer in float


@pytest.mark.parametrize("count", [2, 3, 7, 20, 53, 500])
def test_the_shortest_prefix_in_few_trials(count: int) -> None:
    for wanted in {w for w in (1, 2, 3, count // 3, count // 2, count - 1) if 0 < w < count}:
        needed = {f"layer{i}" for i in range(wanted)}
        bench = Fake(count, lambda floats, needed=needed: needed <= floats)
        found = reach(bench, ["only"], words)
        assert [f.name for f in found.floats] == [f"layer{i}" for i in range(wanted)]
        assert found.evaluations == len(bench.judged) <= evaluation_limit(count) + 1
        assert found.ranked == count
    assert evaluation_limit(500) < 40


@pytest.mark.parametrize("needed", [{0}, {6}, {1, 6}, {4, 5}, {2, 9, 17}, {16}])
def test_layers_before_the_guilty_ones_go_back_to_integers(needed: set[int]) -> None:
    names = {f"layer{i}" for i in needed}
    bench = Fake(20, lambda floats: names <= floats)
    found = reach(bench, ["only"], words)
    assert {f.name for f in found.floats} == names
    assert found.evaluations <= evaluation_limit(20) + 1


def test_where_trials_run_out_the_set_is_larger_and_still_good() -> None:
    names = {f"layer{i}" for i in range(1, 98, 2)}
    bench = Fake(100, lambda floats: names <= floats)
    found = reach(bench, ["only"], words)
    assert names <= {f.name for f in found.floats} and len(found.floats) < 100
    assert found.evaluations <= evaluation_limit(100) + 2


def test_a_target_that_nothing_reaches() -> None:
    bench = Fake(9, lambda floats: False)
    with pytest.raises(AccuracyError, match="cannot be met"):
        reach(bench, ["only"], words)
    assert len(bench.judged) <= evaluation_limit(9)


def test_the_ranking_may_be_upside_down() -> None:
    bench = Fake(9, lambda floats: "layer8" in floats)
    found = reach(bench, ["only"], words)
    assert [f.name for f in found.floats] == ["layer8"]
    assert found.evaluations <= evaluation_limit(9)


def test_one_layer_is_never_left_in_float() -> None:
    with pytest.raises(AccuracyError):
        reach(Fake(1, lambda floats: bool(floats)), ["only"], words)


def test_settings_that_cannot_be_quantized_say_why() -> None:
    with pytest.raises(OptimizationError, match=r"^no"):
        reach(Fake(3, lambda floats: True), ["broken"], words)


def test_a_collapsed_model_is_worse_than_any_other() -> None:
    class Collapsing(Fake):
        def judge(self, config: str, floats: Sequence[LayerError]) -> Score:
            super().judge(config, floats)
            if floats:
                return score(0.0)
            return score(0.0, "it collapsed") if config == "first" else score(5.0)

    bench = Collapsing(5, lambda floats: True)
    assert reach(bench, ["first", "second"], words).config == "second"


def test_settings_are_made_only_when_they_are_needed() -> None:
    endless = (f"setting{i}" for i in itertools.count())
    bench = Fake(3, lambda floats: len(bench.judged) == 4)
    assert reach(bench, endless, words).config == "setting3"
