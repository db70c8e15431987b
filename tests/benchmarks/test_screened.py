"""What screening claims to know."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploykit.benchmarks.plan import Candidate
from deploykit.benchmarks.screening import Screened, _halve
from deploykit.progress import Progress

CANDIDATE = Candidate("a", "a.onnx", "ort:cpu", "0", 1)


@pytest.mark.parametrize("turns", [2, 4, 16])
def test_the_interval_covers_what_it_says_however_few_the_turns(turns: int) -> None:
    rng = np.random.default_rng(turns)
    covered = 0
    for _ in range(2000):  # turns of one model
        found = Screened(
            CANDIDATE, gains=list(rng.normal(math.log(1.5), 0.05, turns)), paces_ns=[1.0] * turns
        ).as_dict()
        covered += found["low"] <= 1.5 <= found["high"]
    assert 0.93 <= covered / 2000 <= 0.97


def test_one_turn_says_nothing_about_the_spread() -> None:
    found = Screened(CANDIDATE, gains=[math.log(2)], paces_ns=[1.0]).as_dict()
    assert found["ratio"] == pytest.approx(2)
    assert found["low"] < 0.01 and found["high"] > 100


@pytest.mark.parametrize(("turn_s", "turns"), [(0.1, 4), (2.0, 2)])
def test_where_loading_took_the_time_a_few_turns_are_made_all_the_same(turn_s: float, turns: int) -> None:
    """Of two turns hardly anything can be told; of a slow model no more are made than that."""
    now = [0.0]
    found = [Screened(CANDIDATE), Screened(CANDIDATE)]

    def turn(numbers: Any, seconds: float) -> None:
        now[0] += turn_s
        for number in numbers:
            found[number].gains.append(0.1 * len(found[number].gains))

    ring: Any = SimpleNamespace(found=found, clock=lambda: now[0], turn=turn, drop=lambda numbers: None)
    _halve(ring, [1], 4, -0.5, Progress())
    assert len(found[1].gains) == turns
