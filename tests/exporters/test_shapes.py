"""`--input` and `--dynamic`: what they mean, and what is said about those that mean nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deploykit.data import ValueRange
from deploykit.errors import ExportError
from deploykit.exporters import Case, ExportOptions
from deploykit.exporters.shapes import (
    example_sizes,
    make_cases,
    observed_outputs,
    parse_dynamic,
    parse_input,
    plan_inputs,
    sizes_to_check,
    vary,
)
from deploykit.specs import TensorSpec

EXAMPLES = {"x": np.ones((2, 3, 8), np.float32), "y": np.ones((2, 5), np.int64)}


@pytest.mark.parametrize(
    ("text", "spec", "limits"),
    [
        ("x=float32[batch,3,224,224]", TensorSpec("x", "float32", ("batch", 3, 224, 224)), None),
        (
            "ids=int64[batch, sequence]:0..30521",
            TensorSpec("ids", "int64", ("batch", "sequence")),
            ValueRange(0, 30521),
        ),
        (" t=float32[]:-1.5..2 ", TensorSpec("t", "float32", ()), ValueRange(-1.5, 2)),
    ],
)
def test_input(text: str, spec: TensorSpec, limits: ValueRange | None) -> None:
    assert parse_input(text) == (spec, limits)


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "x=float32",
        "x=float99[2]",
        "x=float32[0]",
        "x=float32[-1]",
        "x=float32[a b]",
        "x=float32[²]",
        "x=int64[2]:1.2.3..4",
        "x=int64[2]:5..1",
        "=float32[2]",
    ],
)
def test_unreadable_input(message: Any, text: str) -> None:
    assert "--input" in message(ExportError, lambda: parse_input(text))


@pytest.mark.parametrize(
    ("texts", "wishes"),
    [
        ((), {"x": {0: "batch"}, "y": {0: "batch"}}),
        (("batch",), {"x": {0: "batch"}, "y": {0: "batch"}}),
        (("none",), {}),
        (("x:0=batch,2=width",), {"x": {0: "batch", 2: "width"}}),
        (("batch", "x:2=width"), {"x": {0: "batch", 2: "width"}, "y": {0: "batch"}}),
        (("x:0=n", "y:0=n, 1=m"), {"x": {0: "n"}, "y": {0: "n", 1: "m"}}),
    ],
)
def test_dynamic(texts: tuple[str, ...], wishes: dict[str, dict[int, str]]) -> None:
    assert parse_dynamic(texts, EXAMPLES) == wishes


@pytest.mark.parametrize(
    "texts",
    [
        ("x",),
        ("z:0=batch",),
        ("x:3=batch",),
        ("x:-1=batch",),
        ("x:²=batch",),
        ("x:0",),
        ("x:0=",),
        ("x:0=a b",),
        ("x:",),
        ("none", "x:0=batch"),
    ],
)
def test_unreadable_dynamic(message: Any, texts: tuple[str, ...]) -> None:
    assert "--dynamic" in message(ExportError, lambda: parse_dynamic(texts, EXAMPLES))


def test_default_batch_needs_one_size(message: Any) -> None:
    unequal = {"x": np.ones((2, 3)), "y": np.ones((4, 3))}
    assert parse_dynamic((), unequal) == {}
    assert "first axes differ" in message(ExportError, lambda: parse_dynamic(("batch",), unequal))


def test_symbols_of_inputs_are_the_users_choice() -> None:
    planned = plan_inputs(EXAMPLES, ExportOptions(inputs=("x=float32[n,3,length]",)))
    assert [s.shape for s in planned] == [("n", 3, "length"), (2, 5)]


def test_none_wins_over_symbols_of_inputs() -> None:
    planned = plan_inputs(EXAMPLES, ExportOptions(inputs=("x=float32[n,3,length]",), dynamic=("none",)))
    assert [s.shape for s in planned] == [(2, 3, 8), (2, 5)]


def test_one_input_described_twice(message: Any) -> None:
    options = ExportOptions(inputs=("x=float32[2,3,8]", "x=float32[n,3,8]"))
    assert "twice" in message(ExportError, lambda: plan_inputs(EXAMPLES, options))


def test_one_symbol_with_two_sizes(message: Any) -> None:
    specs = (TensorSpec("x", "float32", ("n", 3, "n")), TensorSpec("y", "int64", (2, 5)))
    call = lambda: make_cases(specs, EXAMPLES, lambda feeds: {"out": feeds["x"]})  # noqa: E731
    assert "is 2 and 8" in message(ExportError, call)


def test_sizes_differ_between_symbols_and_stay_in_limits() -> None:
    found = sizes_to_check({"n": 4, "height": 8, "width": 8}, {"height": (4, 16)}, ("n",))
    assert found[0] == {"n": 4, "height": 8, "width": 8}
    assert {s["n"] for s in found} >= {1, 2, 3}
    assert any(s["height"] != s["width"] for s in found)
    assert all(4 <= s["height"] <= 16 for s in found)


def test_refused_shapes_are_noted() -> None:
    def even_only(feeds: Any) -> Any:
        if feeds["x"].shape[2] % 2:
            raise ValueError("odd\nwidth")
        return {"out": feeds["x"] * 2}

    cases, notes = make_cases((TensorSpec("x", "float32", (2, 3, "width")),), {"x": EXAMPLES["x"]}, even_only)
    assert len(cases) >= 2
    assert notes
    assert all("does not run at width=" in note and "\n" not in note for note in notes)


def test_variations_stay_legal_and_differ() -> None:
    rng = np.random.default_rng(0)
    ids = vary(np.array([[3, 7]]), (4, 9), rng)
    assert ids.dtype == np.int64
    assert set(np.unique(ids)) <= {3, 7}
    reals = vary(np.ones((1, 4), np.float32), (3, 4), rng)
    assert reals.dtype == np.float32
    assert len(np.unique(reals, axis=0)) == 3


def test_values_that_are_legal_in_their_places_only() -> None:
    """Ids of two tables side by side, in one input; drawn from both, the smaller table has no such row."""
    small, large = np.arange(5.0), np.arange(100.0)

    def look_up(feeds: Any) -> dict[str, Any]:
        ids = feeds["ids"].astype(int)
        return {"y": small[ids[:, 0]] + large[ids[:, 1]]}

    ids = np.array([[[0, 4, 2, 1], [99, 5, 6, 70]], [[3, 3, 1, 0], [8, 50, 98, 7]]])
    for dtype in (np.int64, np.float32):
        for shape in (("batch", 2, "length"), (2, 2, "length"), ("batch", 2, 4), (2, 2, 4)):
            cases, notes = make_cases(
                [TensorSpec("ids", np.dtype(dtype).name, shape)], {"ids": ids.astype(dtype)}, look_up
            )
            assert not notes
            assert len(cases) >= 4
            assert len({case.feeds["ids"].tobytes() for case in cases}) == len(cases)
            assert all(case.feeds["ids"].dtype == dtype for case in cases)


def test_ids_of_two_inputs_of_reals() -> None:
    """A noise about ids is no id: what the source then takes are values that the example holds."""
    table = np.arange(7.0)
    example = {"ids": np.array([[0, 6, 3], [1, 2, 2]], np.float32), "x": np.ones((2, 3), np.float32)}
    specs = [TensorSpec(name, "float32", ("batch", 3)) for name in example]

    def look_up(feeds: Any) -> dict[str, Any]:
        if not np.isin(feeds["ids"], np.arange(7)).all():
            raise IndexError("no such row")
        return {"y": table[feeds["ids"].astype(int)] + feeds["x"]}

    cases, notes = make_cases(specs, example, look_up)
    assert not notes
    assert all(set(case.feeds["ids"].ravel()) <= {0, 1, 2, 3, 6} for case in cases[1:])


def test_values_that_a_fixed_shape_refuses_are_said_once() -> None:
    def picky(feeds: Any) -> dict[str, Any]:
        if not np.array_equal(feeds["x"], [[1.0, 2.0]]):
            raise ValueError("no")
        return {"y": feeds["x"]}

    cases, notes = make_cases([TensorSpec("x", "float32", (1, 2))], {"x": np.array([[1, 2]], np.float32)}, picky)
    assert len(cases) == 1
    assert notes == ["the source itself does not run on other values of the example's shape (ValueError: no)"]


def test_sizes_of_sums_follow() -> None:
    specs = [
        TensorSpec("mask", "int64", ("batch", "past + sequence")),
        TensorSpec("ids", "int64", ("batch", "sequence")),
    ]
    feeds = {"mask": np.ones((2, 7), np.int64), "ids": np.ones((2, 4), np.int64)}
    assert example_sizes(specs, feeds) == {"batch": 2, "sequence": 4, "past": 3}


def test_sums_are_observed_and_axes_that_are_one_have_one_name() -> None:
    def case(past: int, new: int, frames: int) -> Case:
        outputs = {"keys": np.zeros((past + new, 3)), "states": np.zeros((frames, 2)), "cross": np.zeros((5, frames))}
        return Case({"sequence": new, "past": past}, {}, outputs)

    keys, states, cross = observed_outputs([case(3, 4, 9), case(0, 2, 8), case(5, 1, 11)])
    assert keys.shape == ("past + sequence", 3)
    assert states.shape == ("states_dim0", 2)
    assert cross.shape == (5, "states_dim0")
