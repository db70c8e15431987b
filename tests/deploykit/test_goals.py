"""Goals and judges: what is asked, and what counts as reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from deploykit.data import Dataset
from deploykit.errors import DataError
from deploykit.goals import Goal, Judge, read_drop
from deploykit.modelfile import signature_of
from deploykit.quantizing import make_goal
from deploykit.runtimes import parse_device

F32 = np.float32
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((100, 4)).astype(F32)
DEVICE = parse_device("ort:cpu")


@pytest.mark.parametrize(
    ("text", "want"), [("0.01", (0.01, False)), (0.02, (0.02, False)), ("1%", (0.01, True)), (0, (0, False))]
)
def test_drops(text: Any, want: tuple[float, bool]) -> None:
    assert read_drop(text) == want


@pytest.mark.parametrize("text", ["x", "-1%", "nan", "200%", "1 percent", ""])
def test_drops_that_are_none(text: str) -> None:
    with pytest.raises(DataError, match="max drop"):
        read_drop(text)


def test_options_that_belong_together() -> None:
    assert make_goal("e", None, None, None, None, None) == Goal("accuracy", 0.01)
    assert make_goal("e", "f1", "2%", None, None, "y") == Goal("f1", 0.02, True, output="y")
    assert make_goal("e", None, None, 20.0, None, None).metric is None
    assert not make_goal(None, None, None, None, None, None).asked
    for options in [
        (None, "accuracy", None, None, None, None),
        (None, None, 0.1, None, None, None),
        ("e", None, 0.1, 20.0, None, None),
        ("e", "mse", None, None, None, None),
        ("e", None, None, None, 1.5, None),
    ]:
        with pytest.raises(DataError):
            make_goal(*options)


@pytest.fixture
def judged(build: Any, tmp_path: Path) -> Any:
    """Judge a model whose scores are its inputs, times 3, plus a shift; another output comes first."""

    def model(name: str, shift: Any, batch: Any = "batch", factor: float = 1.0) -> Path:
        made = build(
            [
                helper.make_node("Mul", ["x", "three"], ["m"]),
                helper.make_node("Add", ["m", "shift"], ["scores"]),
                helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=0),
            ],
            {"x": [batch, 4]},
            {"sum": [batch], "scores": [batch, 4]},
            {"three": F32(3 * factor), "shift": np.asarray(shift, F32), "axes": np.array([1])},
        )
        onnx.save(made, str(tmp_path / name))
        return tmp_path / name

    def judge(goal: Goal, data: dict[str, Any], shift: Any = 0.0, batch: Any = "batch", factor: float = 1.0) -> Any:
        parent = model("parent.onnx", np.zeros(4), batch)
        folder = tmp_path / f"kept{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        held = Judge(parent, signature_of(onnx.load(parent)), DEVICE, Dataset.from_arrays(data), goal, folder)
        return held.judge(model("candidate.onnx", shift * np.ones(4), batch, factor)), held

    return judge


def test_labels_decide(judged: Any) -> None:
    labels = ROWS.argmax(1)
    labels[:10] = (labels[:10] + 1) % 4
    data = {"x": ROWS, "labels": labels}
    shift = np.array([0.6, 0, 0, 0])
    score, judge = judged(Goal("accuracy", 0.5), data, shift)
    have = (3 * ROWS + shift.astype(F32)).argmax(1)
    assert score.reference == pytest.approx(0.9)
    assert score.value == pytest.approx(np.mean(have == labels))
    assert score.agreement == pytest.approx(np.mean(have == ROWS.argmax(1)))
    assert score.samples == 100
    record = judge.record(score)
    assert record["output"] == "scores" and record["certified"] is True and "certified: accuracy" in record["summary"]
    drop = score.reference - score.value
    assert 0 < drop < 0.2
    for goal, met in [
        (Goal("accuracy", drop), True),
        (Goal("accuracy", drop - 0.005), False),
        (Goal("accuracy", drop / 0.9 + 1e-6, relative=True), True),
        (Goal("accuracy", drop / 0.9 - 0.005, relative=True), False),
        (Goal("accuracy", 0.5, min_agreement=0.999), False),
    ]:
        assert judged(goal, data, shift)[0].met is met, goal


def test_outputs_that_are_no_numbers_are_not_called_without_error(judged: Any) -> None:
    goal = Goal(min_agreement=0.0)
    score, judge = judged(goal, {"x": ROWS}, np.nan)
    assert not score.met and "no error" not in score.describe(goal)
    assert score.describe(goal).endswith("its outputs are not finite, or of another shape")
    assert judge.record(score)["sqnr_db"] is None
    assert "no error" in judged(goal, {"x": ROWS}, 0.0)[0].describe(goal)


def test_without_labels(judged: Any) -> None:
    score, judge = judged(Goal(min_sqnr_db=19.9, min_agreement=1.0), {"x": ROWS}, 0.0, "batch", 1.1)
    assert score.sqnr_db == pytest.approx(20.0, abs=1e-4) and score.agreement == 1.0 and score.met
    assert judge.record(score)["certified"] is True
    assert not judged(Goal(min_sqnr_db=20.1), {"x": ROWS}, 0.0, "batch", 1.1)[0].met
    with pytest.raises(DataError, match="no 'labels'"):
        judged(Goal("accuracy"), {"x": ROWS})


def test_the_output_is_chosen_by_name(judged: Any) -> None:
    score, judge = judged(Goal(min_sqnr_db=60, output="sum"), {"x": ROWS}, 5.0)
    assert score.met and judge.record(score)["output"] == "sum" and score.sqnr_db == np.inf
    with pytest.raises(DataError, match="no output 'other'"):
        judged(Goal(min_sqnr_db=60, output="other"), {"x": ROWS})


def test_a_fixed_batch_is_filled_up_and_what_was_filled_in_does_not_count(judged: Any) -> None:
    data = {"x": ROWS, "labels": ROWS.argmax(1)}
    fixed, _ = judged(Goal("accuracy", 1.0, min_sqnr_db=0.0), data, np.array([1, 0, 0, 0]), 7)
    free, _ = judged(Goal("accuracy", 1.0, min_sqnr_db=0.0), data, np.array([1, 0, 0, 0]))
    assert fixed.samples == 100
    assert (fixed.value, fixed.agreement) == (free.value, free.agreement)
    assert fixed.sqnr_db == pytest.approx(free.sqnr_db)


def test_a_collapse_is_no_success_whatever_was_asked(judged: Any) -> None:
    score, judge = judged(Goal(min_sqnr_db=-100), {"x": ROWS}, np.array([50, 0, 0, 0]))
    assert score.shortfall == 0 and not score.met and "collapsed" in score.collapsed
    assert judge.record(score)["certified"] is False
    nan, _ = judged(Goal(min_sqnr_db=-100), {"x": ROWS}, np.nan)
    assert not nan.met and nan.collapsed


def test_near_ties_are_no_collapse(judged: Any) -> None:
    """Where the parent is never sure, another class proves nothing: networks with random weights are like that."""
    rows = (10 * np.array([1, 1, 1, 0]) + 1e-3 * RNG.standard_normal((100, 4))).astype(F32)
    score, _ = judged(Goal(min_sqnr_db=20), {"x": rows}, np.array([0.1, 0, 0, 0]))
    assert score.agreement < 0.5 and score.met


def test_no_certificate_without_a_target(judged: Any) -> None:
    score, judge = judged(Goal(), {"x": ROWS})
    record = judge.record(score)
    assert record["certified"] is False and record["summary"].startswith("not certified: no accuracy target")
