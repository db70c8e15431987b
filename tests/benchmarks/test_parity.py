"""When two sets of outputs count as the same, and when that proves nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from deploykit.benchmarks.parity import (
    Tolerance,
    Verdict,
    check_vacuity,
    compare,
    compare_lossy,
    top1_agreement,
)

RNG = np.random.default_rng(0)


def case(**outputs: Any) -> dict[str, Any]:
    return {n: np.asarray(a) for n, a in outputs.items()}


def noise(shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def softmax(logits: Any) -> Any:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def verdict(want: Any, have: Any, tolerance: Tolerance | None = None) -> Verdict:
    return compare([case(y=want)], [case(y=have)], tolerance).verdict


# --- tolerances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1.0, 1e6, 1e25])
def test_tolerance_goes_with_the_outputs_scale(scale: float) -> None:
    want = noise((4, 250), scale)
    assert verdict(want, want * np.float32(1 + 2e-5)) is Verdict.PASSED
    assert verdict(want, want + noise((4, 250), scale * 1e-5, 1)) is Verdict.PASSED
    assert verdict(want, want + noise((4, 250), scale * 1e-2, 1)) is Verdict.FAILED
    assert verdict(want, want * np.float32(1.01)) is Verdict.FAILED
    assert verdict(want, np.zeros_like(want)) is Verdict.FAILED
    assert verdict(want, -want) is Verdict.FAILED
    assert verdict(want, np.roll(want, 1)) is Verdict.FAILED


def test_one_wrong_element_is_enough() -> None:
    want = noise((1000,))
    have = want.copy()
    have[77] += 0.01
    result = compare([case(y=want)], [case(y=have)])
    assert result.verdict is Verdict.FAILED
    assert "1 of 1000 values differ, the most at [77]" in result.reason
    assert result.outputs[0].max_abs == pytest.approx(0.01, rel=1e-3)


def test_small_error_everywhere_is_caught_by_the_norm() -> None:
    want = noise((1000,))
    have = want + np.float32(5e-4)
    result = compare([case(y=want)], [case(y=have)])
    assert result.verdict is Verdict.FAILED
    assert "of the output's norm" in result.reason
    assert verdict(want, have, Tolerance(norm=1e-2)) is Verdict.PASSED


def test_wrong_graph_with_tiny_outputs_fails() -> None:
    """An absolute tolerance of 1e-3 would wave these through."""
    logits = noise((2, 1000))
    want = softmax(logits)
    assert np.abs(want).max() < 0.05
    for wrong in (softmax(-logits), softmax(noise((2, 1000), seed=1)), np.full_like(want, 1e-3), want * 1.02):
        assert np.abs(wrong - want).max() < 0.1
        assert verdict(want, wrong.astype(np.float32)) is Verdict.FAILED
    assert verdict(want, softmax(logits + noise((2, 1000), 1e-6, 2))) is Verdict.PASSED


def test_half_precision_is_wider() -> None:
    want = noise((1000,)).astype(np.float16)
    have = (want.astype(np.float32) * 1.005).astype(np.float16)
    result = compare([case(y=want)], [case(y=have)])
    assert result.verdict is Verdict.PASSED
    assert result.tolerance == Tolerance.for_dtype("float16")
    assert verdict(want.astype(np.float32), have.astype(np.float32)) is Verdict.FAILED
    assert verdict(want, (want.astype(np.float32) * 1.1).astype(np.float16)) is Verdict.FAILED


def test_zeros() -> None:
    zero = np.zeros(5, np.float32)
    assert verdict(zero, zero) is Verdict.PASSED
    assert verdict(zero, zero + np.float32(1e-9)) is Verdict.FAILED
    assert verdict(-zero, zero) is Verdict.PASSED
    assert verdict(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32)) is Verdict.PASSED


def test_probabilities_about_zero_may_differ_by_what_sigmoid_kernels_do() -> None:
    """A detector that sees nothing in one picture, and something in another."""
    nothing = np.abs(noise((1, 100), 1e-6))
    want = [case(y=nothing), case(y=np.abs(noise((1, 100), 0.1, 1)))]
    have = [case(y=nothing + np.float32(1.2e-7)), want[1]]
    assert compare(want, have).verdict is Verdict.FAILED
    assert compare(want, have, bounded=["y"]).verdict is Verdict.PASSED
    assert compare(want, [case(y=nothing + np.float32(1e-6)), want[1]], bounded=["y"]).verdict is Verdict.FAILED
    # Where every picture shows nothing, a graph that ignores its inputs would pass: no allowance.
    assert compare(want[:1] * 2, have[:1] * 2, bounded=["y"]).verdict is Verdict.FAILED


def test_worst_of_all_cases_counts() -> None:
    good, want = noise((10,)), noise((10,), seed=1)
    result = compare([case(y=good), case(y=want), case(y=good)], [case(y=good), case(y=-want), case(y=good)])
    assert result.verdict is Verdict.FAILED
    assert result.reason.startswith("y: case 1, shape [10]: ")
    assert result.cosine == pytest.approx(-1)
    assert result.outputs[0].sqnr_db == pytest.approx(-6.02, abs=0.01)
    assert result.cases == 3


def test_every_output_counts() -> None:
    a, b = noise((4,)), noise((4,), seed=1)
    result = compare([case(a=a, b=b)], [case(a=a, b=a)])
    assert result.verdict is Verdict.FAILED
    assert [o.equal for o in result.outputs] == [True, False]
    assert "b: is missing" in compare([case(a=a, b=b)], [case(a=a)]).reason


# --- NaN, Inf and masks ----------------------------------------------------------------------------------------------

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("want", "have", "passed"),
    [
        ([1, NAN, 2], [1, NAN, 2], True),
        ([1, NAN, 2], [NAN, 1, 2], False),
        ([1, NAN, 2], [1, 0, 2], False),
        ([1, 3, 2], [1, NAN, 2], False),
        ([1, INF, -INF], [1, INF, -INF], True),
        ([1, INF, 2], [1, -INF, 2], False),
        ([1, INF, 2], [1, 3e38, 2], False),
        ([1, 3, 2], [1, INF, 2], False),
        ([NAN, NAN], [NAN, NAN], True),
        ([INF, NAN, 1], [INF, NAN, -1], False),
        ([INF, 1], [NAN, 1], False),
    ],
)
def test_nan_and_inf_have_to_stand_in_the_same_places(want: list[float], have: list[float], passed: bool) -> None:
    x, y = np.float32(want), np.float32(have)
    assert (verdict(x, y) is Verdict.PASSED) is passed
    assert (compare_lossy([case(y=x)], [case(y=y)], 0.999).verdict is Verdict.PASSED) is (passed)


def test_mask_constants_do_not_hide_wrong_values() -> None:
    want = noise((4, 100))
    want[:, 50:] = np.finfo(np.float32).min
    have = want.copy()
    assert verdict(want, have) is Verdict.PASSED
    have[0, 0] += 1
    assert verdict(want, have) is Verdict.FAILED
    have = want.copy()
    have[0, 60] = 0
    assert verdict(want, have) is Verdict.FAILED
    have[0, 60] = -1e38
    assert verdict(want, have) is Verdict.FAILED


def test_numbers_whose_squares_overflow() -> None:
    want = np.array([1e200, 2e200, 3e200])
    assert verdict(want, want) is Verdict.PASSED
    assert verdict(want, want * 1.5) is Verdict.FAILED
    assert compare_lossy([case(y=want)], [case(y=-want)], 0.9).verdict is Verdict.FAILED


# --- shapes and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("want", "have", "word"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), "shape [3, 2] instead of [2, 3]"),
        (np.zeros((2, 1), np.float32), np.zeros(2, np.float32), "shape"),
        (np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32), "shape"),
        (np.zeros(2, np.float32), np.zeros(2), "float64 instead of float32"),
        (np.zeros(2, np.int64), np.zeros(2, np.int32), "int32 instead of int64"),
        (np.zeros(2, bool), np.zeros(2, np.uint8), "uint8 instead of bool"),
        (np.array(["a"]), np.array([1]), "instead of"),
        (np.array([1, 2, 3]), np.array([1, 2, 4]), "1 of 3 values differ"),
        (np.array([True, False]), np.array([True, True]), "1 of 2 values differ"),
        (np.array(["a", "bc"]), np.array(["a", "bd"], object), "1 of 2 values differ"),
    ],
)
def test_other_shapes_dtypes_and_exact_values(want: Any, have: Any, word: str) -> None:
    result = compare([case(y=want)], [case(y=have)])
    assert result.verdict is Verdict.FAILED
    assert word in result.reason
    assert compare([case(y=want)], [case(y=want.copy())]).verdict is Verdict.PASSED
    assert compare_lossy([case(y=want)], [case(y=have)], 0.99).verdict is Verdict.FAILED


def test_strings_of_other_widths_are_the_same() -> None:
    assert verdict(np.array(["a", "b"]), np.array(["a", "b"], "U9")) is Verdict.PASSED
    assert verdict(np.array(["a", "b"]), np.array(["a", "b"], object)) is Verdict.PASSED


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_complex_numbers(shape: tuple[int, ...]) -> None:
    want = np.asarray(noise(shape, 1, 1) + 1j * noise(shape, 1, 2)).astype(np.complex64)
    assert verdict(want, want * np.complex64(1 + 1e-6j)) is Verdict.PASSED
    assert verdict(want, want.conj()) is Verdict.FAILED


def test_scalars() -> None:
    assert verdict(np.float32(3), np.float32(3.00001)) is Verdict.PASSED
    assert verdict(np.float32(3), np.float32(3.1)) is Verdict.FAILED


def test_result_is_json_without_nan() -> None:
    want, have = np.float32([1, 2]), np.float32([1, NAN])
    for result in (
        compare([case(y=want)], [case(y=have)]),
        compare([case(y=want)], [case(y=want)]),
        compare_lossy([case(y=want)], [case(y=-want)], 0.9),
    ):
        text = json.dumps(result.as_dict(), allow_nan=False)
        assert json.loads(text)["verdict"] == str(result.verdict)
        assert json.loads(text)["shapes"] == [{"y": [2]}]


# --- vacuity ---------------------------------------------------------------------------------------------------------


def vacuous(*outputs: Any) -> str:
    return check_vacuity([case(y=a) for a in outputs])


def test_outputs_that_react() -> None:
    assert vacuous(noise((2, 5)), noise((2, 5), seed=1)) == ""
    assert vacuous(noise((1, 5)), noise((3, 5), seed=1)) == ""  # rows in common
    assert vacuous(np.array([1, 2]), np.array([1, 3])) == ""
    assert vacuous(np.array(["a"]), np.array(["b"])) == ""
    tiny = [softmax(noise((2, 1000), seed=s)) for s in range(2)]
    assert vacuous(*tiny) == ""
    assert vacuous(*(t * np.float32(1e-9) for t in tiny)) == ""


def test_constant_outputs_prove_nothing() -> None:
    fixed = noise((2, 5))
    assert "no output changes" in vacuous(fixed, fixed.copy(), fixed.copy())
    assert "no output changes" in vacuous(np.zeros((2, 5)), np.zeros((2, 5)))
    assert "no output changes" in vacuous(noise((1, 5)))  # one case of one row
    assert "no output changes" in vacuous(np.ones((4, 5)))  # one batch of equal rows
    assert vacuous(noise((4, 5))) == ""  # the rows of one batch are inputs enough
    assert "no output changes" in check_vacuity([case(), case()])


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-4])
def test_nearly_constant_outputs_prove_nothing(size: float) -> None:
    fixed = noise((2, 500))
    assert "'y' hardly changes" in vacuous(fixed, fixed + noise((2, 500), size, 1))
    assert "no output changes" in vacuous(np.full((1, 4), 7.0), np.full((3, 4), 7.0))


def test_graph_that_ignores_its_inputs_passes_only_where_it_is_vacuous() -> None:
    """What the check is for: a stuck graph must fail parity wherever vacuity says that parity means something."""
    for spread in (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1.0):
        base = noise((2, 500), seed=9)
        outputs = [base + noise((2, 500), spread, s) for s in range(3)]
        expected = [case(y=o) for o in outputs]
        stuck = [case(y=outputs[0])] * 3
        if not check_vacuity(expected):
            assert compare(expected, stuck).verdict is Verdict.FAILED
    assert not check_vacuity(expected)  # the widest spread
    half = [case(y=o.astype(np.float16)) for o in outputs]
    assert not check_vacuity(half)
    assert compare(half, [half[0]] * 3).verdict is Verdict.FAILED


def test_table_of_constants_beside_an_output_that_reacts() -> None:
    anchors, dull = noise((4, 4)), noise((4, 4), seed=5)
    outputs = [case(y=noise((2, 5), seed=s), anchors=anchors) for s in range(3)]
    assert check_vacuity(outputs) == ""
    for i, output in enumerate(outputs):
        output["dull"] = dull + np.float32(i * 1e-6)
    assert "'dull' hardly changes" in check_vacuity(outputs)


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_constants_of_every_row_beside_an_output_that_reacts(dtype: str) -> None:
    """Positions, made-up masks and labels of one class have one row a sample, so their shape follows the batch."""
    row = np.arange(6).astype(dtype)
    outputs = [case(y=noise((n, 5), seed=n), rows=np.tile(row, (n, 1))) for n in (4, 1, 3, 2)]
    assert check_vacuity(outputs) == ""
    assert "no output changes" in check_vacuity([{"rows": o["rows"]} for o in outputs])
    outputs[1]["rows"] = np.zeros((1, 0), dtype)
    assert "'rows' hardly changes" in check_vacuity(outputs[:2])


def test_shapes_that_change_with_the_input() -> None:
    assert vacuous(np.zeros((2, 3)), np.ones((2, 3, 1))) == ""
    assert "hardly" in vacuous(np.zeros((0, 3)), np.ones((4, 3)))


# --- quantized models ------------------------------------------------------------------------------------------------


def test_lossy_judges_by_cosine() -> None:
    want = noise((4, 100))
    near = want + noise((4, 100), 0.05, 1)
    far = want + noise((4, 100), 1.0, 1)
    assert verdict(want, near) is Verdict.FAILED
    good = compare_lossy([case(y=want)], [case(y=near)], 0.99)
    assert good.verdict is Verdict.PASSED
    assert 0.99 < good.cosine < 1
    assert good.reason == ""
    bad = compare_lossy([case(y=want)] * 2, [case(y=near), case(y=far)], 0.99)
    assert bad.verdict is Verdict.FAILED
    assert "is below 0.99" in bad.reason


@pytest.mark.parametrize("factor", [0.5, 1.5, 100])
def test_lossy_notices_a_wrong_scale(factor: float) -> None:
    """The cosine alone does not."""
    want = noise((4, 100))
    result = compare_lossy([case(y=want)], [case(y=want * np.float32(factor))], 0.99)
    assert result.cosine > 0.999
    assert result.verdict is Verdict.FAILED
    assert "of the output's norm" in result.reason
    assert compare_lossy([case(y=want)], [case(y=want * np.float32(1.05))], 0.99).verdict is Verdict.PASSED


def test_lossy_judges_classes_by_agreement() -> None:
    want, have = np.arange(100), np.arange(100)
    have[:2] = -1
    assert compare_lossy([case(y=want)], [case(y=have)], 0.97).verdict is Verdict.PASSED
    result = compare_lossy([case(y=want)], [case(y=have)], 0.99)
    assert result.verdict is Verdict.FAILED
    assert "98.0% of the values agree" in result.reason


@pytest.mark.parametrize("have", [np.zeros((2, 2), np.float32), np.zeros((2, 3)), np.full((2, 3), NAN, np.float32)])
def test_lossy_is_not_lossy_about_form(have: Any) -> None:
    want = noise((2, 3))
    assert compare_lossy([case(y=want)], [case(y=have)], -1.0).verdict is Verdict.FAILED
    for first in (want, want * np.float32(1.1)):
        result = compare_lossy([case(y=want)] * 2, [case(y=first), case(y=have)], -1.0)
        assert result.verdict is Verdict.FAILED
        assert "case 1" in result.reason


def test_top1_agreement() -> None:
    scores = np.float32([[0, 1], [1, 0], [0, 1]])
    other = np.float32([[0, 1], [0, 1], [0, 1]])
    assert top1_agreement([case(y=scores)], [case(y=scores)]) == 1.0
    assert top1_agreement([case(y=scores)], [case(y=other)]) == pytest.approx(2 / 3)
    assert top1_agreement([case(y=scores), case(y=scores)], [case(y=other), case(y=scores)]) == pytest.approx(5 / 6)
    assert top1_agreement([case(y=scores[:, :1])], [case(y=scores[:, :1])]) is None
    assert top1_agreement([case(b=np.array([1]), y=scores)], [case(b=np.array([2]), y=other)]) == pytest.approx(2 / 3)


# --- columns ---------------------------------------------------------------------------------------------------------


def boxes_and_scores(rows: int, layout: str, seed: int, scale: float = 640.0) -> tuple[Any, Any]:
    """An output of boxes beside scores, and the same with scores that are 5 % off."""
    boxes, scores = noise((rows, 20, 4), scale, seed), softmax(noise((rows, 20, 6), seed=seed + 9))
    right, wrong = (np.concatenate([boxes, s], -1) for s in (scores, scores * np.float32(1.05)))
    return (right, wrong) if layout == "last" else (right.swapaxes(1, 2), wrong.swapaxes(1, 2))


@pytest.mark.parametrize("scale", [640.0, 1e4])
@pytest.mark.parametrize("layout", ["last", "middle"])
def test_wrong_scores_beside_large_boxes(layout: str, scale: float) -> None:
    pairs = [boxes_and_scores(n, layout, n, scale) for n in (2, 1, 3)]
    result = compare([case(y=right) for right, _ in pairs], [case(y=wrong) for _, wrong in pairs])
    assert result.verdict is Verdict.FAILED
    assert "is small beside the others, is off by 5.0e-02 of its own norm" in result.reason
    assert result.outputs[0].case is not None
    assert len(result.outputs[0].index or ()) == 3
    want = pairs[0][0]
    rounded = want + noise(want.shape, scale * 3e-7, 5)
    assert verdict(want, rounded.astype(np.float32)) is Verdict.PASSED


def test_targets_in_other_units() -> None:
    """Two predictions of one regression: a price and a share."""
    want = np.stack([3e5 + noise((9,), 1e5), 0.3 + noise((9,), 0.1, 1)], 1).astype(np.float32)
    have = want.copy()
    have[:, 1] = 0.8
    assert verdict(want, have) is Verdict.FAILED
    assert verdict(want, want * np.float32(1 + 2e-7)) is Verdict.PASSED


def test_small_columns_are_rounded_as_the_large_ones_are() -> None:
    """A Fourier transform in float32: what is nearly 0 at one frequency is a difference of large numbers."""
    rng = np.random.default_rng(0)
    tone = np.sin(2 * np.pi * 5 * np.arange(512) / 512 + np.arange(4)[:, None])
    signal = tone + 1e-5 * rng.standard_normal((4, 512))
    exact = np.abs(np.fft.rfft(signal))
    angle = 2 * np.pi * np.outer(np.arange(512), np.arange(257)) / 512
    real, imaginary = (signal.astype(np.float32) @ f(angle).astype(np.float32) for f in (np.cos, np.sin))
    assert np.median(exact) < 1e-5 * exact.max()
    assert verdict(exact.astype(np.float32), np.hypot(real, imaginary)) is Verdict.PASSED


def test_mask_constants_and_nan_are_no_columns() -> None:
    want = noise((6, 4))
    want[:, 1], want[:, 2] = -np.inf, np.nan
    half = want.astype(np.float16)
    assert verdict(half, half.copy()) is Verdict.PASSED
    want[2, 0] = -3.4e38
    assert verdict(want, want.copy()) is Verdict.PASSED


def test_a_cosine_never_leaves_its_range() -> None:
    """Rounding would make -1 smaller than -1, and fail a comparison that asks for nothing."""
    for seed in range(200):
        values = np.random.default_rng(seed).standard_normal(2 + seed % 5).astype(np.float32)
        for sign in (1, -1):
            found = compare_lossy([{"y": values}], [{"y": sign * values}], -1.0)
            assert found.verdict is Verdict.PASSED and -1 <= found.cosine <= 1
