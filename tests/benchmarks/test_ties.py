"""Choices between equal scores: what may differ, and what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.benchmarks.parity import Verdict, compare
from deploykit.comparing import graph_choices, outputs_of, relax_ties
from deploykit.runtimes import parse_device

ORT = parse_device("ort:cpu")
ROWS, WIDTH, TOP = 6, 20, 4


def save(path: Path, nodes: list[Any], outputs: dict[str, Any], weights: dict[str, Any], **inputs: Any) -> Path:
    made = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in inputs.items()],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))
    return path


def detector(path: Path, *, order: Any = None, shift: float = 0.0, gather: str = "boxes", largest: int = 1) -> Path:
    """Scores over places (the columns), their top k, labels out of the indices, and boxes gathered by them.

    Args:
        path: Where it goes.
        order: The places are computed in this order; the indices are translated back, so that the model is the same
            but for the order of equal scores.
        shift: Added to one score, as rounding would.
        gather: Which table the boxes are taken from.
        largest: Of the TopK.
    """
    order = np.arange(WIDTH) if order is None else np.asarray(order)
    rng = np.random.default_rng(0)
    boxes = rng.standard_normal((WIDTH, 4)).astype(np.float32)
    nudge = np.zeros(WIDTH, np.float32)
    nudge[3] = shift
    nodes = [
        helper.make_node("Add", ["x", "nudge"], ["raw"]),
        helper.make_node("Gather", ["raw", "order"], ["scores"], axis=1),
        helper.make_node("TopK", ["scores", "k"], ["values", "places"], axis=-1, largest=largest, name="pick"),
        helper.make_node("Gather", ["order", "places"], ["indices"]),
        helper.make_node("Mod", ["indices", "seven"], ["labels"]),
        helper.make_node("Gather", [gather, "indices"], ["boxes_out"]),
    ]
    weights = {
        "nudge": nudge, "order": order.astype(np.int64), "k": np.array([TOP]), "seven": np.array(7), "boxes": boxes,
        "other": boxes[::-1].copy(),
    }  # fmt: skip
    kinds = {"values": TensorProto.FLOAT, "labels": TensorProto.INT64, "boxes_out": TensorProto.FLOAT}
    return save(path, nodes, kinds, weights, x=["rows", WIDTH])


def tied_scores() -> Any:
    x = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    x[2, 5] = x[2, 11] = 9.0  # a tie at the top
    x[4, 1] = x[4, 8] = x[4, 15] = 7.0
    return x


def judged(candidate: Path, reference: Path, **feeds: Any) -> Any:
    cases = [feeds]
    expected, outputs = outputs_of(reference, ORT, cases), outputs_of(candidate, ORT, cases)
    strict = compare(expected, outputs)
    return strict, relax_ties(strict, candidate, ORT, cases, expected, outputs, graph_choices(reference, ORT))


def test_swapped_ties_pass_with_all_that_follows_from_them(tmp_path: Path) -> None:
    strict, found = judged(
        detector(tmp_path / "a.onnx", order=np.arange(WIDTH)[::-1]), detector(tmp_path / "b.onnx"), x=tied_scores()
    )
    assert strict.verdict is Verdict.FAILED
    assert "at [2, " in strict.reason
    assert found.verdict is Verdict.FAILED  # the candidate's scores are in another order: not the same choice
    assert "makes no choice from the scores" in found.reason


def swapped(path: Path, *, wrong: bool = False) -> Path:
    """Breaks ties the other way: the last of equal scores instead of the first, by a nudge far below the tolerance."""
    detector(path)
    model = onnx.load(str(path))
    tilt = (np.arange(WIDTH) * 1e-7).astype(np.float32)
    if wrong:
        tilt[7] = 30.0  # one place wins everywhere
    next(t for t in model.graph.initializer if t.name == "nudge").CopyFrom(numpy_helper.from_array(tilt, "nudge"))
    onnx.save(model, str(path))
    return path


def test_other_choice_between_ties_passes_and_says_so(tmp_path: Path) -> None:
    x = np.zeros((ROWS, WIDTH), np.float32) + np.random.default_rng(1).permutation(WIDTH).astype(np.float32) / 50
    x[2, 5] = x[2, 11] = 0.9
    x[4, 1] = x[4, 8] = x[4, 15] = 0.7
    strict, found = judged(swapped(tmp_path / "a.onnx"), detector(tmp_path / "b.onnx"), x=x)
    assert strict.verdict is Verdict.FAILED
    assert found.verdict is Verdict.PASSED, found.reason
    assert found.relaxed == ("case 0: pick (TopK): ties in 2 of 6 rows",)
    assert found.as_dict()["relaxed"] == list(found.relaxed)


@pytest.mark.parametrize("fault", ["scores", "table", "smallest"])
def test_really_wrong_choices_fail(tmp_path: Path, fault: str) -> None:
    reference = detector(tmp_path / "b.onnx")
    candidate = {
        "scores": lambda p: swapped(p, wrong=True),
        "table": lambda p: detector(p, gather="other"),
        "smallest": lambda p: detector(p, largest=0),
    }[fault](tmp_path / "a.onnx")
    strict, found = judged(candidate, reference, x=tied_scores())
    assert strict.verdict is found.verdict is Verdict.FAILED
    assert not found.relaxed
    if fault == "smallest":
        assert "which is no tie" in found.reason


def test_wrong_table_behind_a_tie_fails(tmp_path: Path) -> None:
    """The tie excuses the choice, not what is made of it."""
    candidate = swapped(tmp_path / "a.onnx")
    model = onnx.load(str(candidate))
    model.graph.node[-1].input[0] = "other"
    onnx.save(model, str(candidate))
    x = np.zeros((ROWS, WIDTH), np.float32) + np.arange(WIDTH, dtype=np.float32) / 50
    x[2, 5] = x[2, 11] = 0.9
    _, found = judged(candidate, detector(tmp_path / "b.onnx"), x=x)
    assert found.verdict is Verdict.FAILED
    assert found.reason.startswith("boxes_out")


def wrong_index(path: Path, source: Path) -> Path:
    """The same scores and values, but the indices are one too high."""
    model = onnx.load(str(source))
    add = helper.make_node("Add", ["places", "one"], ["off"])
    model.graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    model.graph.node.insert(3, add)
    next(n for n in model.graph.node if n.op_type == "Gather" and n.output[0] == "indices").input[1] = "off"
    onnx.save(model, str(path))
    return path


def test_index_off_by_one_fails(tmp_path: Path) -> None:
    reference = detector(tmp_path / "b.onnx")
    x = np.tile(np.arange(WIDTH, 0, -1, dtype=np.float32), (ROWS, 1))
    strict, found = judged(wrong_index(tmp_path / "a.onnx", reference), reference, x=x)
    assert strict.verdict is found.verdict is Verdict.FAILED


def arg(path: Path, op: str, tilt: float, *, scale: float = 1.0) -> Path:
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["m"]),
        helper.make_node("Add", ["m", "tilt"], ["scores"]),
        helper.make_node(op, ["scores"], ["top"], axis=1, keepdims=0, name="class"),
        helper.make_node("Cast", ["top"], ["y"], to=TensorProto.INT32),
    ]
    weights = {"tilt": (np.arange(WIDTH) * tilt).astype(np.float32), "scale": np.float32(scale)}
    return save(path, nodes, {"y": TensorProto.INT32}, weights, x=["rows", WIDTH])


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_arg_max_differs_only_where_scores_tie(tmp_path: Path, op: str) -> None:
    x = np.random.default_rng(3).integers(0, 4, (50, WIDTH)).astype(np.float32)
    tilt = 1e-6 if op == "ArgMax" else -1e-6
    strict, found = judged(arg(tmp_path / "a.onnx", op, tilt), arg(tmp_path / "b.onnx", op, 0.0), x=x)
    assert strict.verdict is Verdict.FAILED
    assert found.verdict is Verdict.PASSED, found.reason
    assert "class (Arg" in found.relaxed[0] and "of 50 rows" in found.relaxed[0]
    _, wrong = judged(arg(tmp_path / "c.onnx", op, 0.0, scale=-1.0), arg(tmp_path / "b.onnx", op, 0.0), x=x)
    assert wrong.verdict is Verdict.FAILED


def suppressor(path: Path, *, threshold: float = 0.5, flip: bool = False) -> Path:
    """NonMaxSuppression, and the boxes it selects."""
    nodes = [
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "low"], ["chosen"], name="nms"),
        *([helper.make_node("Gather", ["chosen", "backwards"], ["rows"], axis=0)] if flip else []),
        helper.make_node("Slice", ["rows" if flip else "chosen", "two", "three", "one"], ["column"]),
        helper.make_node("Squeeze", ["column", "one"], ["flat"]),
        helper.make_node("Squeeze", ["boxes", "zero"], ["table"]),
        helper.make_node("Gather", ["table", "flat"], ["picked"]),
    ]
    weights = {
        "most": np.array([10]), "iou": np.float32([threshold]), "low": np.float32([0.1]), "two": np.array([2]),
        "three": np.array([3]), "one": np.array([1]), "zero": np.array([0]), "backwards": np.array([2, 1, 0]),
    }  # fmt: skip
    return save(path, nodes, {"picked": TensorProto.FLOAT}, weights, boxes=[1, 4, 4], scores=[1, 1, 4])


def test_other_boxes_of_a_suppression_fail(tmp_path: Path) -> None:
    boxes = np.float32([[[0, 0, 1, 1], [0, 0, 1, 0.9], [5, 5, 6, 6], [9, 9, 10, 10]]])
    scores = np.float32([[[0.9, 0.8, 0.7, 0.6]]])
    reference = suppressor(tmp_path / "b.onnx")
    strict, found = judged(suppressor(tmp_path / "a.onnx", threshold=0.95), reference, boxes=boxes, scores=scores)
    assert strict.verdict is found.verdict is Verdict.FAILED
    assert "chosen by one side only" in found.reason
    _, moved = judged(suppressor(tmp_path / "c.onnx", flip=True), reference, boxes=boxes, scores=scores)
    assert moved.verdict is Verdict.FAILED  # the order that the graph itself makes is not the operator's


def test_suppressed_rows_in_another_order_are_the_same_set() -> None:
    from deploykit.benchmarks.ties import Choice, _judge

    node = helper.make_node("NonMaxSuppression", ["b", "s"], ["o"])
    rows = np.array([[0, 0, 3], [0, 0, 1], [0, 1, 2]])

    def verdict(other: Any) -> str:
        return _judge(node, Choice("NonMaxSuppression", (), (rows,)), Choice("NonMaxSuppression", (), (other,)))

    assert verdict(rows) == ""
    assert verdict(rows[[1, 0, 2]]) == "another order of 2 of 3 rows"
    assert verdict(rows[:2]).startswith("!1 rows are chosen by one side only")
    assert verdict(rows + 1).startswith("!")


def threshold(path: Path, op: str = "Greater", nudge: float = 0.0) -> Path:
    nodes = [
        helper.make_node("Add", ["x", "nudge"], ["scores"]),
        helper.make_node(op, ["scores", "limit"], ["over"], name="over"),
        helper.make_node("NonZero", ["over"], ["places"]),
        helper.make_node("Transpose", ["places"], ["rows"]),
        helper.make_node("GatherND", ["x", "rows"], ["kept"]),
    ]
    weights = {"nudge": np.float32(nudge), "limit": np.float32(0.5)}
    kinds = {"rows": TensorProto.INT64, "kept": TensorProto.FLOAT}
    return save(path, nodes, kinds, weights, x=[3, 5])


def test_values_at_a_threshold_of_non_zero(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)
    x[1, 2] = 0.5
    reference = threshold(tmp_path / "b.onnx")
    strict, found = judged(threshold(tmp_path / "a.onnx", nudge=1e-6), reference, x=x)
    assert strict.verdict is Verdict.FAILED and "shape" in strict.reason
    assert found.verdict is Verdict.PASSED, found.reason
    assert found.relaxed == ("case 0: over (Greater): 1 of 15 values at the threshold",)
    for wrong in (threshold(tmp_path / "c.onnx", nudge=0.2), threshold(tmp_path / "d.onnx", op="Less")):
        assert judged(wrong, reference, x=x)[1].verdict is Verdict.FAILED


def test_graph_without_choices_is_left_alone(tmp_path: Path) -> None:
    def plain(path: Path, factor: float) -> Path:
        node = helper.make_node("Mul", ["x", "f"], ["y"])
        return save(path, [node], {"y": TensorProto.FLOAT}, {"f": np.float32(factor)}, x=[2, 3])

    strict, found = judged(plain(tmp_path / "a.onnx", 2.0), plain(tmp_path / "b.onnx", 3.0), x=np.ones((2, 3), "f4"))
    assert found is strict
