"""Classification metrics against scikit-learn's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from deploykit.benchmarks.metrics import classification_scores, decide, predictions, reduce_outputs
from deploykit.errors import DataError

CLASSES = st.integers(0, 5)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(CLASSES, CLASSES), min_size=1, max_size=40), st.sampled_from([np.int64, np.uint8, np.int32]))
def test_scores_are_those_of_scikit_learn(pairs: list[tuple[int, int]], dtype: Any) -> None:
    truth, guess = np.array(pairs, dtype).T
    scores = classification_scores(truth, guess)
    assert scores.samples == len(pairs)
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(truth, guess))
    options: dict[str, Any] = {"average": "macro", "zero_division": 0}
    assert scores.precision == pytest.approx(metrics.precision_score(truth, guess, **options))
    assert scores.recall == pytest.approx(metrics.recall_score(truth, guess, **options))
    assert scores.f1 == pytest.approx(metrics.f1_score(truth, guess, **options))


def test_known_values() -> None:
    scores = classification_scores(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]))
    assert scores.as_dict() == {
        "samples": 4,
        "accuracy": 0.5,
        "precision": pytest.approx((1 + 1 / 3 + 0) / 3),
        "recall": pytest.approx((1 / 2 + 1 + 0) / 3),
        "f1": pytest.approx((2 / 3 + 1 / 2 + 0) / 3),
    }


@given(st.lists(st.tuples(st.integers(-100, 3), CLASSES), min_size=1, max_size=20))
def test_padding_is_left_out(pairs: list[tuple[int, int]]) -> None:
    truth, guess = np.array(pairs).T
    kept = truth >= 0
    if not kept.any():
        with pytest.raises(DataError, match="no labels"):
            classification_scores(truth, guess)
        return
    assert classification_scores(truth, guess) == classification_scores(truth[kept], guess[kept])


def test_positions_count_one_by_one() -> None:
    truth, guess = np.array([[0, 1, -100], [2, -100, -100]]), np.array([[0, 2, 5], [2, 0, 0]])
    assert classification_scores(truth, guess) == classification_scores(np.array([0, 1, 2]), np.array([0, 2, 2]))


def test_booleans_are_classes() -> None:
    truth = np.array([True, False, True])
    assert classification_scores(truth, np.array([1, 0, 0])).accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("truth", "guess", "word"),
    [
        (np.array([0, 1]), np.array([0, 1, 1]), "shape"),
        (np.array([[0], [1]]), np.array([0, 1]), "shape"),
        (np.array([0.0, 1.0]), np.array([0, 1]), "float64"),
        (np.array(["a"]), np.array([0]), "expected integer classes"),
        (np.array([], np.int64), np.array([], np.int64), "no labels"),
    ],
)
def test_labels_that_do_not_fit(truth: Any, guess: Any, word: str) -> None:
    with pytest.raises(DataError, match=word):
        classification_scores(truth, guess)


@pytest.mark.parametrize(
    ("outputs", "classes"),
    [
        ({"logits": np.float32([[0, 3, 1], [5, 3, 1]])}, [1, 0]),
        ({"logits": np.float16([[[0, 3], [2, 1]]])}, [[1, 0]]),
        ({"score": np.float32([-0.2, 3, 0.4])}, [0, 1, 1]),
        ({"score": np.float32([[-0.2], [3]])}, [0, 1]),
        ({"probability": np.float32([0.2, 0.6, 1])}, [0, 1, 1]),
        ({"label": np.array([4, 2])}, [4, 2]),
        ({"embedding": np.zeros((2, 3, 4, 4), np.float32), "logits": np.float32([[0, 1], [1, 0]])}, [1, 0]),
        ({"flag": np.array([True]), "logits": np.float32([[0, 1]])}, [1]),
    ],
    ids=range(8),
)
def test_predictions(outputs: dict[str, Any], classes: Any) -> None:
    found = predictions(outputs)
    assert found.dtype.kind in "iu"
    assert found.tolist() == classes


@pytest.mark.parametrize("outputs", [{}, {"boxes": np.zeros((1, 2, 3, 4), np.float32)}, {"s": np.array(["a"])}])
def test_outputs_that_hold_no_classes(outputs: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="hold no classes"):
        predictions(outputs)


def test_the_threshold_of_single_scores_does_not_change_between_batches() -> None:
    """The second batch alone would look like probabilities; with the first it is clear that they are logits."""
    batches = [reduce_outputs({"y": np.array(b, np.float32)}) for b in ([[-3.0], [2.0]], [[0.2], [0.4]])]
    assert decide(batches).tolist() == [0, 1, 1, 1]
    assert decide(batches[1:]).tolist() == [0, 0]
