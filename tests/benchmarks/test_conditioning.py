"""A few values that rounding moves are no difference; wrong ones are, also beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploykit.benchmarks.conditioning import slack_of
from deploykit.benchmarks.parity import Verdict, compare
from deploykit.comparing import within_rounding

_SCALE = np.float32(1e5)


def source(feeds: Any) -> dict[str, Any]:
    """The input, and in one place a difference of neighbours that magnifies their rounding."""
    y = feeds["x"].copy()
    y[0, 7] = (y[0, 0] - y[0, 1]) * _SCALE
    return {"y": y}


def exported(feeds: Any) -> dict[str, Any]:
    """The same, in another order."""
    y = feeds["x"].copy()
    y[0, 7] = y[0, 0] * _SCALE - y[0, 1] * _SCALE
    return {"y": y}


def inputs(seed: int, gap: float) -> dict[str, Any]:
    x = np.random.default_rng(seed).standard_normal((1, 65536)).astype(np.float32)
    x[0, :2] = 1.3, 1.3 - gap
    return {"x": x}


def judge(made: list[Any], feeds: list[Any], run: Any = source) -> tuple[Any, set[int]]:
    expected = [source(case) for case in feeds]
    return within_rounding(compare(expected, made), feeds, expected, made, run, None, ())


def test_what_the_sources_rounding_explains() -> None:
    feeds = [inputs(0, 0.0), inputs(1, 3.1e-6), inputs(2, 0.0)]
    made = [exported(case) for case in feeds]
    expected = [source(case) for case in feeds]
    assert compare(expected, made).verdict is Verdict.FAILED
    found, loose = judge(made, feeds)
    assert found.verdict is Verdict.PASSED
    assert loose == {1}
    assert "1 of 65536 values differ, the most at [0, 7]" in found.relaxed[0]
    # Nobody to ask, no case that is right without it, and the whole is off: all stay as they were.
    assert judge(made, feeds, lambda _: None) == (compare(expected, made), set())
    assert judge(made[1:2], feeds[1:2])[0].verdict is Verdict.FAILED
    assert judge([{"y": case["y"] * np.float32(1.0002)} for case in made], feeds)[0].verdict is Verdict.FAILED


def test_what_it_does_not_explain() -> None:
    feeds = [inputs(0, 0.0), inputs(1, 3.1e-6)]
    for place, error in ((8, 0.02), (7, 0.2)):
        made = [exported(case) for case in feeds]
        made[1]["y"][0, place] += error
        found, loose = judge(made, feeds)
        assert found.verdict is Verdict.FAILED
        assert not loose
    missing = [exported(feeds[0]), {"y": np.full_like(feeds[1]["x"], np.nan)}]
    assert judge(missing, feeds)[0].verdict is Verdict.FAILED


def test_many_values_are_never_explained() -> None:
    """Where all of an output hangs on rounding, equality to it would prove nothing."""

    def torn(feeds: Any) -> dict[str, Any]:
        return {"y": (feeds["x"] - feeds["x"][:, ::-1]) * _SCALE}

    x = (np.float32(1.3) + np.zeros((1, 100), np.float32)).cumsum(1) * np.float32(1e-7) + np.float32(1)
    expected, made = [torn({"x": x})], [{"y": x * _SCALE - x[:, ::-1] * _SCALE}]
    slack = slack_of([{"x": x}], expected, torn)
    assert slack is not None
    assert slack[0]["y"].max() > np.abs(made[0]["y"] - expected[0]["y"]).max()
    assert compare(expected, made, slack=slack).verdict is Verdict.FAILED


def test_inputs_without_rounding_give_no_slack() -> None:
    assert slack_of([{"ids": np.arange(3)}], [{"y": np.ones(3)}], lambda _: {"y": np.ones(3)}) is None
