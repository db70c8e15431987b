"""Which engine's model is kept."""

from __future__ import annotations

from typing import Any

import pytest

from deploykit.engines import Entry, choose, judge_entry, record
from deploykit.goals import Goal, Score

GOAL = Goal()
ORT, OPENVINO = "ort:cpu", "openvino:cpu"


def score(sqnr: float = 20.0, **other: Any) -> Score:
    plain = {"samples": 8, "agreement": 1.0, "value": None, "reference": None, "shortfall": 0.0}
    return Score(**(plain | other), sqnr_db=sqnr)


def entry(engine: str, ort: float, openvino: float, sqnr: float = 20.0, **other: Any) -> Entry:
    return Entry(engine, score(sqnr), ms={ORT: ort, OPENVINO: openvino}, **other)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("winner", "loser", "why"),
    [
        # 4 * 9 > 5 * 6: slower in one runtime, and faster by the geometric mean
        (entry("a", 5, 6), entry("b", 4, 9, sqnr=30), "slower than a: 0.91x over ort:cpu, openvino:cpu"),
        (entry("a", 5.1, 5.1, sqnr=21), entry("b", 5, 5), "as fast within 3%"),
        (entry("a", 9, 9), entry("b", 1, 1, refused="the target is missed"), "the target is missed"),
        (entry("a", 9, 9), Entry("b", None, "NNCF failed"), "NNCF failed"),
        (entry("a", 5, 5), entry("b", 2, 6, slower=(OPENVINO,)), "slower than the parent in openvino:cpu"),
        (entry("a", 9, 9, slower=(ORT,)), entry("b", 9.9, 9.9, slower=(ORT,)), "slower than a: 0.91x"),
        (Entry("a", score(21)), Entry("b", score(20)), "not timed, and no closer to the parent"),
        (Entry("a", score(21), "collapsed"), Entry("b", score(20), "collapsed"), "collapsed"),
        (entry("a", 5, 5), Entry("b", score(9), ms={ORT: 6}), "slower than a: 0.83x over ort:cpu"),
    ],
)
def test_the_better_one_is_kept_in_any_order(winner: Entry, loser: Entry, why: str, turned: bool) -> None:
    entries = [loser, winner] if turned else [winner, loser]
    kept, reasons = choose(entries, GOAL)
    assert entries[kept] is winner
    assert reasons[kept] == ""
    assert reasons[1 - kept].startswith(why)


def test_equals_keep_the_first() -> None:
    kept, reasons = choose([entry("a", 5, 5), entry("b", 5, 5)], GOAL)
    assert kept == 0 and reasons[1].startswith("as fast within 3%")


def test_what_refuses_an_entry() -> None:
    goal = Goal(min_sqnr_db=30)
    assert judge_entry("a", score(), goal, "").refused == ""
    assert judge_entry("a", score(shortfall=1.0), goal, "").refused == "the target (SQNR >= 30 dB) is missed"
    assert judge_entry("a", score(collapsed="it collapsed"), goal, "").refused == "it collapsed"
    assert judge_entry("a", score(), goal, "cosine 0.9").refused == "cosine 0.9"


def test_the_record_says_what_was_tried() -> None:
    assert record(entry("a", 1.23456, 2), "") == {
        "engine": "a", "score": {"sqnr_db": 20.0, "agreement": 1.0}, "ms": {ORT: 1.2346, OPENVINO: 2}, "kept": True,
    }  # fmt: skip
    assert record(Entry("b", None, "it failed"), "it failed") == {
        "engine": "b", "score": None, "ms": {}, "kept": False, "why": "it failed",
    }  # fmt: skip
    assert record(Entry("c", score(float("inf"), agreement=None)), "x")["score"] is None
