"""What screening claims to know."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deploykit.benchmarks.plan import Candidate
from deploykit.benchmarks.screening import Screened

CANDIDATE = Candidate("a", "a.onnx", "ort:cpu", "0", 1)


@pytest.mark.parametrize("turns", [2, 4, 16])
def test_the_interval_covers_what_it_says_however_few_the_turns(turns: int) -> None:
    rng = np.random.default_rng(turns)
    covered = 0
    for _ in range(2000):
        found = Screened(
            CANDIDATE, gains=list(rng.normal(math.log(1.5), 0.05, turns)), paces_ns=[1.0] * turns
        ).as_dict()
        covered += found["low"] <= 1.5 <= found["high"]
    assert 0.93 <= covered / 2000 <= 0.97


def test_one_turn_says_nothing_about_the_spread() -> None:
    found = Screened(CANDIDATE, gains=[math.log(2)], paces_ns=[1.0]).as_dict()
    assert found["ratio"] == pytest.approx(2)
    assert found["low"] < 0.01 and found["high"] > 100
