"""Choosing samples: the bound of k-center, herding's mean, shares of classes, features of models."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.data import Dataset
from deploykit.errors import DataError, OptimizationError
from deploykit.optimizers import coresets
from deploykit.optimizers.coresets import allot, choose, spread
from deploykit.optimizers.features import WIDTH, Sketch, Tensor, find_tensor, model_features, pool, raw_features
from deploykit.weights import LightModel

dice = np.random.default_rng(3)
POINTS = dice.normal(size=(300, 6)).astype(np.float32)


def distances(points: Any) -> Any:
    return np.sqrt(((points[:, None].astype(float) - points[None]) ** 2).sum(-1))


@pytest.mark.parametrize("seed", range(6))
def test_k_center_is_within_twice_the_best(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(12, 2)).astype(np.float32)
    apart = distances(points)
    best = min(apart[:, list(some)].min(1).max() for some in combinations(range(12), 4))
    chosen = choose(points, 4, seed=seed)
    assert len(set(chosen)) == 4
    radius = apart[:, chosen].min(1).max()
    assert best <= radius * (1 + 1e-6) and radius <= 2 * best * (1 + 1e-6)
    assert spread(points, chosen).radius == pytest.approx(radius)


def test_k_center_takes_the_furthest_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose(POINTS, 40, seed=5)
    apart = distances(POINTS)
    for count in range(1, 40):
        nearest = apart[:, chosen[:count]].min(1)
        assert nearest[chosen[count]] == pytest.approx(nearest.max())
    monkeypatch.setattr(coresets, "_BLOCK", 7)
    assert choose(POINTS, 40, seed=5) == chosen
    assert choose(POINTS, 40, seed=6) != chosen


@pytest.mark.parametrize("method", coresets.METHODS)
def test_equal_samples_are_each_taken_once(method: str) -> None:
    points = np.zeros((20, 3), np.float32)
    points[7] = 1
    chosen = choose(points, 19, method=method)
    assert len(set(chosen)) == 19
    assert sorted(choose(points, 99, method=method)) == list(range(20))


def test_herding_takes_what_brings_the_mean_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose(POINTS, 60, method="herding")
    mean, points = POINTS.mean(0, dtype=float), POINTS.astype(float)
    for count in (0, 1, 2, 5, 20):
        rest = [i for i in range(300) if i not in chosen[:count]]
        errors = [np.linalg.norm(points[[*chosen[:count], i]].mean(0) - mean) for i in rest]
        assert errors[rest.index(chosen[count])] == pytest.approx(min(errors))
    falling = [spread(POINTS, chosen[:count]).mean_error for count in (1, 4, 16, 60)]
    assert falling == sorted(falling, reverse=True)
    by_chance = [spread(POINTS, choose(POINTS, 60, method="random", seed=s)).mean_error for s in range(20)]
    assert falling[-1] < min(by_chance) / 5
    monkeypatch.setattr(coresets, "_BLOCK", 7)
    assert choose(POINTS, 60, method="herding") == chosen


def test_herding_far_from_the_origin() -> None:
    """Sums of squares around 1e8 would leave nothing of the differences."""
    assert choose(POINTS.astype(float) + 1e4, 30, method="herding") == choose(
        POINTS.astype(float), 30, method="herding"
    )


def test_k_center_finds_the_rare_ones() -> None:
    points = np.concatenate([POINTS, POINTS[:3] + 50])
    assert set(choose(points, 20)) & {300, 301, 302}


def test_strata() -> None:
    labels = np.array(["a"] * 200 + ["b"] * 97 + ["c"] * 3)
    for method in coresets.METHODS:
        chosen = choose(POINTS, 30, method=method, strata=labels)
        assert len(set(chosen)) == 30
        assert [int((labels[chosen] == kind).sum()) for kind in "abc"] == [20, 9, 1]
    alone = choose(POINTS[:200], 20, method="herding")
    assert choose(POINTS, 30, method="herding", strata=labels)[:20] == alone


def test_shares() -> None:
    assert allot([200, 97, 3], 30) == [20, 9, 1]
    assert allot([10, 10, 10], 2) == [1, 1, 0]
    assert allot([1000, 1, 1, 1], 4) == [1, 1, 1, 1]
    draw = np.random.default_rng(0)
    for _ in range(300):
        sizes = draw.integers(1, 50, draw.integers(1, 12)).tolist()
        count = int(draw.integers(1, sum(sizes) + 1))
        shares = allot(sizes, count)
        assert sum(shares) == count
        assert all(0 <= s <= size for s, size in zip(shares, sizes, strict=True))
        if count >= len(sizes):
            assert min(shares) >= 1


def test_what_cannot_be_chosen_from() -> None:
    with pytest.raises(OptimizationError, match="not finite"):
        choose(np.where(POINTS > 2, np.nan, POINTS), 5)
    with pytest.raises(OptimizationError, match="k-center"):
        choose(POINTS, 5, method="nosuch")
    with pytest.raises(OptimizationError, match="1 or more"):
        choose(POINTS, 0)


# --- features --------------------------------------------------------------------------------------------------------


def model(
    nodes: list[Any], inputs: dict[str, list[Any]], weights: dict[str, Any], output: str = "y"
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(w, np.float32), n) for n, w in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def conv_net(batch: int | str = "n") -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["d"]), helper.make_node("GlobalAveragePool", ["d"], ["y"]),
    ]  # fmt: skip
    weights = {"w": dice.normal(size=(5, 2, 3, 3)), "v": dice.normal(size=(4, 5, 1, 1))}
    return model(nodes, {"x": [batch, 2, 6, 6]}, weights)


def test_the_tensor_to_choose_by() -> None:
    assert find_tensor(conv_net()) == Tensor("r", 1)
    assert find_tensor(conv_net(), "c") == Tensor("c", 1)
    head = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "h"], ["s"]),
            helper.make_node("Softmax", ["s"], ["y"])]  # fmt: skip
    assert find_tensor(model(head, {"x": ["n", 3]}, {"w": np.eye(3)})) == Tensor("x", -1)
    assert find_tensor(model([helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", 3]}, {})) == Tensor("y", -1)
    with pytest.raises(OptimizationError, match="nosuch"):
        find_tensor(conv_net(), "nosuch")


def test_pooling() -> None:
    values = dice.normal(size=(2, 3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(pool(values, 2, Tensor("t", 1)), values.mean((2, 3)), rtol=1e-5, atol=1e-6)
    sequence = dice.normal(size=(2, 4, 3)).astype(np.float32)
    real = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    expected = np.stack([sequence[0, :2].mean(0), sequence[1].mean(0)])
    np.testing.assert_allclose(pool(sequence, 2, Tensor("t", -1), real), expected, rtol=1e-5)
    np.testing.assert_allclose(pool(sequence.reshape(8, 3), 2, Tensor("t", -1), real.ravel()), expected, rtol=1e-5)
    np.testing.assert_allclose(pool(sequence, 2, Tensor("t", -1)), sequence.mean(1), rtol=1e-5)
    assert pool(np.arange(4), 4, Tensor("t", -1)).shape == (4, 1)
    for wrong in (np.zeros((3, 2)), np.array(["a", "b"]), np.float32(1)):
        with pytest.raises(OptimizationError):
            pool(np.asarray(wrong), 2, Tensor("t", -1))


@pytest.mark.parametrize("batch", ["n", 4])
def test_features_of_a_model(tmp_path: Path, batch: int | str) -> None:
    """All samples have them, also where the last batch has to be filled up."""
    from deploykit.quantizer import DeviceOpener
    from deploykit.runtimes import parse_device

    images, labels = dice.normal(size=(10, 2, 6, 6)).astype(np.float32), np.arange(10)
    net, opener = conv_net(batch), DeviceOpener(parse_device("ort:cpu"))
    dataset = Dataset.from_arrays({"x": images, "labels": labels})
    light = LightModel(net, tmp_path)
    found = list(model_features(light, find_tensor(net), dataset, opener, tmp_path, batch_size=3))
    features = np.concatenate([f for f, _ in found])
    assert features.shape == (10, 5)
    assert np.concatenate([lab for _, lab in found if lab is not None]).tolist() == labels.tolist()
    alone = list(model_features(light, find_tensor(net), Dataset.from_arrays({"x": images[9:]}), opener, tmp_path,
                                batch_size=1))  # fmt: skip
    np.testing.assert_allclose(alone[0][0], features[9:], rtol=1e-5, atol=1e-6)
    assert alone[0][1] is None


def test_inputs_as_features() -> None:
    arrays = {
        "b": np.full((6, 2, 2), 100, np.uint8),
        "a": POINTS[:6],
        "text": np.array(list("abcdef")),
        "labels": np.arange(6),
    }
    (found, labels), *rest = list(raw_features(Dataset.from_arrays(arrays), 6))
    assert not rest
    assert found.shape == (6, 10)
    np.testing.assert_allclose(found[:, 6:], 1)
    assert labels is not None
    with pytest.raises(DataError, match="no numbers"):
        list(raw_features(Dataset.from_arrays({"text": np.array(["a"])}), 2))


def test_wide_features_are_folded() -> None:
    wide = dice.normal(size=(60, 3000)).astype(np.float32)
    fold = Sketch(0)
    folded = np.concatenate([fold(wide[:25]), fold(wide[25:])])
    assert folded.shape == (60, WIDTH)
    np.testing.assert_array_equal(folded, Sketch(0)(wide))
    assert not np.array_equal(folded, Sketch(1)(wide))
    ratio = (distances(folded) / np.maximum(distances(wide), 1e-9))[np.triu_indices(60, 1)]
    assert 0.9 < ratio.mean() < 1.1 and ratio.min() > 0.7 and ratio.max() < 1.3
    np.testing.assert_array_equal(Sketch(0)(POINTS), POINTS)
    with pytest.raises(DataError, match="3000"):
        fold(wide[:, :2999])
