"""Accuracy algorithms of static quantization: each keeps the function, helps a trained net, and says what it left."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import deploykit.weights
from deploykit.errors import OptimizationError
from deploykit.optimizers import StaticConfig, escalation
from deploykit.optimizers.adaround import adaround, round_matrix
from deploykit.optimizers.bias_correction import product_depths
from deploykit.optimizers.editing import Editor
from deploykit.optimizers.equalize import equalize
from deploykit.optimizers.folding import apply_edits, find_convolution
from deploykit.optimizers.prepare import prepare
from deploykit.optimizers.products import find_products
from deploykit.optimizers.ranges import Ranges
from deploykit.optimizers.sampling import sample_rows
from deploykit.optimizers.scheme import Scheme, rounded_activation
from deploykit.optimizers.select_nodes import select_nodes
from deploykit.optimizers.smooth_quant import smooth
from deploykit.progress import Progress
from deploykit.weights import LightModel

Arrays = dict[str, Any]
INT8 = Scheme(8, True)


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def light_of(text: str, weights: Arrays, folder: Path) -> LightModel:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>' + text)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return LightModel(prepare(model)[0], folder)


def save(light: LightModel, path: Path) -> Path:
    onnx.checker.check_model(light.proto, full_check=True)
    path.write_bytes(light.proto.SerializeToString())
    return path


def feeder_of(data: Arrays, size: int = 16) -> Any:
    def feeder() -> Iterator[Arrays]:
        for i in range(0, len(next(iter(data.values()))), size):
            yield {n: a[i : i + size] for n, a in data.items()}

    return feeder


def initializers(model: onnx.ModelProto) -> Arrays:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


# --- SmoothQuant -----------------------------------------------------------------------------------------------------

# Three channels with outliers, as language models have them.
OUTLIERS = np.where(np.isin(np.arange(32), (3, 17, 30)), 40, 1).astype(np.float32)
NORM = {"gamma": OUTLIERS, "beta": normal(32, scale=0.1, seed=1), "w": normal(32, 48, scale=0.2, seed=2)}
HEADS = {n: normal(32, 32, scale=0.2, seed=i) for i, n in enumerate(("wq", "wk", "wv", "wo"))}
ATTENTION = """g (float[n,6,32] x) => (float[n,6,32] y) {
    q0 = MatMul(x, wq) q1 = Reshape(q0, split) q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk) k1 = Reshape(k0, split) k = Transpose<perm=[0,2,3,1]>(k1)
    v0 = MatMul(x, wv) v1 = Add(v0, bv) v2 = Reshape(v1, split) v = Transpose<perm=[0,2,1,3]>(v2)
    s = MatMul(q, k) p = Softmax<axis=-1>(s)
    c0 = MatMul(p, v) c1 = Transpose<perm=[0,2,1,3]>(c0) c = Reshape(c1, join)
    y = MatMul(c, wo)
}"""
SHAPES = {"split": np.int64([0, 0, 4, 8]), "join": np.int64([0, 0, 32])}
VALUES = HEADS | SHAPES | {"wv": HEADS["wv"] * OUTLIERS, "bv": normal(32, scale=0.1)}

FOLDED = {
    "LayerNormalization": (
        "g (float[n,6,32] x) => (float[n,6,48] y) { h = LayerNormalization<axis=-1>(x, gamma, beta) y = MatMul(h, w) }",
        NORM,
    ),
    "decomposed": (
        """g (float[n,6,32] x) => (float[n,6,48] y) {
            a = Tanh(x) b = Mul(a, gamma) h = Add(beta, b) y = MatMul(h, w)
        }""",
        NORM,
    ),
    "two readers": (
        """g (float[n,6,32] x) => (float[n,6,48] y) {
            h = LayerNormalization<axis=-1>(x, gamma, beta) a = MatMul(h, w) b = MatMul(h, v) y = Add(a, b)
        }""",
        NORM | {"v": normal(32, 48, scale=0.2, seed=9)},
    ),
    "Gemm and Relu": (
        "g (float[n,32] x) => (float[n,48] y) { a = Gemm<transB=1>(x, u, c) h = Relu(a) y = MatMul(h, w) }",
        {"u": normal(32, 32, scale=0.2) * OUTLIERS[:, None], "c": normal(32, scale=0.1), "w": NORM["w"]},
    ),
    "attention": (ATTENTION, VALUES),
    "guarded attention": (
        ATTENTION.replace("c1 = Transpose", "nan = IsNaN(c0) g = Where(nan, nil, c0) c1 = Transpose").replace(
            "c1 = Transpose<perm=[0,2,1,3]>(c0)", "c1 = Transpose<perm=[0,2,1,3]>(g)"
        ),
        VALUES | {"nil": np.float32(0)},
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_smoothing_is_folded_and_keeps_the_function(name: str, tools: Any, tmp_path: Path) -> None:
    text, weights = FOLDED[name]
    light = light_of(text, weights, tmp_path)
    x = normal(64, 32) if "float[n,32]" in text else normal(64, 6, 32)
    source = save(light, tmp_path / "source.onnx")
    want = tools.outputs_of(source, {"x": x})
    before = len(light.proto.graph.node)
    nodes = select_nodes(light.proto)
    [note, *_] = smooth(light, nodes, INT8, None, feeder_of({"x": x}), tools.opener, tmp_path, Progress())
    assert "1 smoothed for nothing, 0 by a Mul" in note
    assert len(light.proto.graph.node) == before
    target = save(light, tmp_path / "smooth.onnx")
    np.testing.assert_allclose(tools.outputs_of(target, {"x": x}), want, atol=2e-4 * np.abs(want).max())
    plain, _ = tools.quantized(source, tmp_path, StaticConfig(weight_bits="7", smooth="off"), {"x": x})
    better, _ = tools.quantized(source, tmp_path, StaticConfig(weight_bits="7", smooth="auto"), {"x": x})
    gain = tools.sqnr(tools.outputs_of(better, {"x": x}), want) - tools.sqnr(tools.outputs_of(plain, {"x": x}), want)
    assert gain > 2


RESIDUAL = """g (float[n,6,32] x) => (float[n,6,32] y) {
    h = LayerNormalization<axis=-1>(x, gamma, beta) a = MatMul(h, w) y = Add(a, h)
}"""
SQUARE = NORM | {"w": normal(32, 32, scale=0.2, seed=2)}


def test_smoothing_beside_a_residual_stream_takes_a_mul(tools: Any, tmp_path: Path) -> None:
    light = light_of(RESIDUAL, SQUARE, tmp_path)
    x = normal(64, 6, 32)
    want = tools.outputs_of(save(light, tmp_path / "source.onnx"), {"x": x})
    nodes = select_nodes(light.proto)
    [note] = smooth(light, nodes, INT8, None, feeder_of({"x": x}), tools.opener, tmp_path, Progress())
    assert "0 smoothed for nothing, 1 by a Mul" in note
    assert [n.op_type for n in light.proto.graph.node] == ["LayerNormalization", "Mul", "MatMul", "Add"]
    assert light.proto.graph.node[3].input[1] == "h"
    have = tools.outputs_of(save(light, tmp_path / "smooth.onnx"), {"x": x})
    np.testing.assert_allclose(have, want, atol=2e-4 * np.abs(want).max())


def test_smoothing_that_does_not_pay_is_left(tools: Any, tmp_path: Path) -> None:
    even = SQUARE | {"gamma": np.ones(32, np.float32)}
    light = light_of(RESIDUAL, even, tmp_path)
    before = light.proto.SerializeToString()
    nodes = select_nodes(light.proto)
    feeder = feeder_of({"x": normal(64, 6, 32)})
    [note] = smooth(light, nodes, INT8, None, feeder, tools.opener, tmp_path, Progress())
    assert "0 smoothed for nothing, 0 by a Mul of their own, 1 left" in note
    assert light.proto.SerializeToString() == before


def test_smoothing_leaves_weights_that_others_read(tools: Any, tmp_path: Path) -> None:
    text = RESIDUAL.replace("y = Add(a, h)", "b = Add(a, h) y = MatMul(b, w)")
    light = light_of(text, SQUARE, tmp_path)
    before = light.proto.SerializeToString()
    feeder = feeder_of({"x": normal(64, 6, 32)})
    notes = smooth(light, select_nodes(light.proto), INT8, None, feeder, tools.opener, tmp_path, Progress())
    assert any("their weights are read elsewhere too" in n for n in notes)
    assert light.proto.SerializeToString() == before


@pytest.mark.parametrize("other", ["q0", "y"])
def test_smoothing_leaves_products_that_share_weights(tools: Any, tmp_path: Path, other: str) -> None:
    """What is folded into one of them would change the other."""
    old, new = ("MatMul(x, wq)", "MatMul(x, wv)") if other == "q0" else ("MatMul(c, wo)", "MatMul(c, wv)")
    text = ATTENTION.replace(old, new)
    weights = HEADS | SHAPES | {"wv": HEADS["wv"] * OUTLIERS, "bv": normal(32, scale=0.1)}
    light = light_of(text, weights, tmp_path)
    x = normal(64, 6, 32)
    want = tools.outputs_of(save(light, tmp_path / "source.onnx"), {"x": x})
    feeder, nodes = feeder_of({"x": x}), select_nodes(light.proto)
    smooth(light, nodes, INT8, None, feeder, tools.opener, tmp_path, Progress())
    have = tools.outputs_of(save(light, tmp_path / "smooth.onnx"), {"x": x})
    np.testing.assert_allclose(have, want, atol=2e-4 * np.abs(want).max())


def test_smoothing_copies_norms_that_others_read(tools: Any, tmp_path: Path) -> None:
    """Exporters store equal gammas once."""
    text = """g (float[n,6,32] x) => (float[n,6,48] y, float[n,6,32] z) {
        h = LayerNormalization<axis=-1>(x, gamma, beta) y = MatMul(h, w) z = LayerNormalization<axis=-1>(x, gamma, beta)
    }"""
    light = light_of(text, NORM, tmp_path)
    x = normal(64, 6, 32)
    want = tools.opener(save(light, tmp_path / "source.onnx"))({"x": x})
    feeder = feeder_of({"x": x})
    [note] = smooth(light, select_nodes(light.proto), INT8, 0.6, feeder, tools.opener, tmp_path, Progress())
    assert "1 smoothed for nothing" in note and "alpha 0.6 to 0.6" in note
    have = tools.opener(save(light, tmp_path / "smooth.onnx"))({"x": x})
    for name in ("y", "z"):
        np.testing.assert_allclose(have[name], want[name], atol=2e-4 * np.abs(want[name]).max())


# --- cross-layer equalization ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbalanced(digits: Any, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained net with channels between convolutions divided by 1 to 100 and multiplied again."""
    folder = tmp_path_factory.mktemp("unbalanced")
    light = LightModel(prepare(onnx.load(digits.path))[0], folder)
    editor, draw, scaled = Editor(light), np.random.default_rng(0), 0
    products, _ = find_products(editor, [n.name for n in light.proto.graph.node])
    places = {p.name: find_convolution(editor, p.data, 4) for p in products if p.window}
    pairs = [p for p in products if places.get(p.name)]
    [samples] = sample_rows(light, pairs, feeder_of(digits.calibration), tools.opener, folder, limit=8)
    for product in pairs:
        place = places[product.name]
        assert place is not None
        free = samples[product.name].high * 1.25 < place.bound
        factors = np.where(free, 100.0 ** draw.random(len(free)), 1).astype(np.float32)
        assert apply_edits(editor, place.edits, 1 / factors)
        matrix = product.matrix(editor.read(product.weight)) * product.per_input(factors)
        editor.write(product.weight, product.weight_from(matrix))
        scaled += int(free.sum())
    assert scaled > 100
    path = save(light, folder / "unbalanced.onnx")
    np.testing.assert_allclose(
        tools.outputs_of(path, digits.test), tools.outputs_of(digits.path, digits.test), atol=0.2
    )
    return path


def test_equalization_restores_a_depthwise_net(digits: Any, unbalanced: Path, tools: Any, tmp_path: Path) -> None:
    """One scale a weight: without equalization, the net guesses."""
    base = StaticConfig(per_channel=False, weight_bits="8", smooth="off")
    plain, _ = tools.quantized(unbalanced, tmp_path, base, digits.calibration)
    assert digits.accuracy(plain) < 0.7
    config = StaticConfig(per_channel=False, weight_bits="8", smooth="off", equalize=True)
    better, result = tools.quantized(unbalanced, tmp_path, config, digits.calibration)
    assert digits.accuracy(better) > digits.accuracy(digits.path) - 0.01
    assert any(n.startswith("equalization: ") for n in result.notes)
    want = tools.outputs_of(unbalanced, digits.test)
    gain = tools.sqnr(tools.outputs_of(better, digits.test), want)
    assert gain > tools.sqnr(tools.outputs_of(plain, digits.test), want) + 20


def test_equalization_keeps_the_function(digits: Any, unbalanced: Path, tools: Any, tmp_path: Path) -> None:
    light = LightModel(prepare(onnx.load(unbalanced))[0], tmp_path)
    before = initializers(light.proto)
    feeder = feeder_of(digits.calibration)
    equalize(light, select_nodes(light.proto), Scheme(8, False), feeder, tools.opener, tmp_path, Progress())
    after = initializers(light.proto)
    assert any(not np.array_equal(after[n], a) for n, a in before.items())
    have = tools.outputs_of(save(light, tmp_path / "equal.onnx"), digits.calibration)
    want = tools.outputs_of(unbalanced, digits.calibration)
    np.testing.assert_allclose(have, want, atol=1e-3 * np.abs(want).max())


CHAIN = """g (float[n,4,8,8] x) => (float[n,4,8,8] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1) r = Clip(a, zero, six) y = Conv<pads=[1,1,1,1]>(r, w2)
}"""


def chain(**more: Any) -> Arrays:
    sizes = np.float32([0.02, 0.02, 1, 1]).reshape(4, 1, 1, 1)
    return {
        "w1": normal(4, 4, 3, 3, scale=0.2) * sizes,
        "w2": normal(4, 4, 3, 3, scale=0.2, seed=1) / sizes.reshape(1, 4, 1, 1),
        "zero": np.float32(0),
        "six": np.float32(6),
    } | more


def equalized(light: LightModel, x: Any, tools: Any, folder: Path) -> list[str]:
    nodes = select_nodes(light.proto)
    return equalize(light, nodes, Scheme(8, False), feeder_of({"x": x}), tools.opener, folder, Progress())


@pytest.mark.parametrize("bound", [6.0, 1.5])
def test_channels_that_reach_a_bound_are_left(tools: Any, tmp_path: Path, bound: float) -> None:
    """Also for values that calibration did not show: channels that were clipped are clipped where they were."""
    x = normal(64, 4, 8, 8)
    light = light_of(CHAIN, chain(six=np.float32(bound)), tmp_path)
    source = save(light, tmp_path / "source.onnx")
    before = initializers(light.proto)["w1"]
    notes = equalized(light, x, tools, tmp_path)
    changed = np.abs(initializers(light.proto)["w1"] / before - 1).max(axis=(1, 2, 3)) > 1e-3
    assert changed[:2].all()
    clipped = np.array([0, 0, bound == 1.5, bound == 1.5], bool)
    assert not (changed & clipped).any()
    assert any("reach the bound of a Clip" in n for n in notes) == clipped.any()
    have, want = (tools.outputs_of(p, {"x": x}) for p in (save(light, tmp_path / "target.onnx"), source))
    np.testing.assert_allclose(have, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("r = Clip(a, zero, six)", "r = Sigmoid(a)"),
        ("r = Clip(a, zero, six)", "r = Clip(a, six, six)"),
        ("y = Conv<pads=[1,1,1,1]>(r, w2)", "b = Conv<pads=[1,1,1,1]>(r, w2) y = Add(b, r)"),
    ],
    ids=["no factor passes", "lower bound", "read elsewhere"],
)
def test_chains_that_cannot_be_equalized(tools: Any, tmp_path: Path, old: str, new: str) -> None:
    light = light_of(CHAIN.replace(old, new), chain(), tmp_path)
    before = light.proto.SerializeToString()
    assert "nothing to do" in equalized(light, normal(16, 4, 8, 8), tools, tmp_path)[0]
    assert light.proto.SerializeToString() == before


# --- bias correction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fast", "full"])
def test_bias_correction_helps_a_trained_net(digits: Any, tools: Any, tmp_path: Path, kind: str) -> None:
    """How much by tensor and how much by channel hangs on the machine that trained the net."""
    want = tools.outputs_of(digits.path, digits.test)
    found, shift = {}, {}
    for per_channel in (False, True):
        for way in ("off", kind):
            config = StaticConfig(weight_bits="7", bias_correction=way, per_channel=per_channel)
            path, result = tools.quantized(digits.path, tmp_path, config, digits.calibration)
            got = tools.outputs_of(path, digits.test)
            found[per_channel, way] = tools.sqnr(got, want)
            shift[per_channel, way] = np.linalg.norm((got - want).mean(axis=0))
        assert any(n.startswith(f"{kind} bias correction of 8 layers") for n in result.notes)
    gains = [found[per_channel, kind] - found[per_channel, "off"] for per_channel in (False, True)]
    assert min(gains) > 0 and sum(gains) > 1.0
    left = [shift[per_channel, kind] / shift[per_channel, "off"] for per_channel in (False, True)]
    assert max(left) < {"fast": 1.0, "full": 0.5}[kind]


def test_bias_correction_that_does_not_hold_is_undone(tools: Any, tmp_path: Path) -> None:
    """The samples that judge are others than those of the correction: here, the other way round."""
    light = light_of("g (float[n,8] x) => (float[n,8] y) { y = Gemm(x, w) }", {"w": normal(8, 8)}, tmp_path)
    source = save(light, tmp_path / "source.onnx")
    half = np.abs(normal(128, 8)) + 1
    data = {"x": np.concatenate([half, -half])}
    plain, _ = tools.quantized(source, tmp_path, StaticConfig(weight_bits="7"), data)
    config = StaticConfig(weight_bits="7", bias_correction="full")
    path, result = tools.quantized(source, tmp_path, config, data)
    assert any("full bias correction left out" in n for n in result.notes)
    np.testing.assert_array_equal(tools.outputs_of(path, data), tools.outputs_of(plain, data))


def test_products_without_a_bias_are_named(tools: Any, tmp_path: Path) -> None:
    text = """g (float[n,16] x) => (float[n,16] y) {
        a = MatMul(x, w1) b = Add(a, c) r = Relu(b) d = Gemm(r, w2) t = Tanh(d) [last] y = MatMul(t, w3)
    }"""
    weights = {f"w{i}": normal(16, 16, scale=0.3, seed=i) for i in (1, 2, 3)} | {"c": normal(16)}
    source = save(light_of(text, weights, tmp_path), tmp_path / "source.onnx")
    data = {"x": np.abs(normal(256, 16))}
    config = StaticConfig(weight_bits="7", bias_correction="fast")
    path, result = tools.quantized(source, tmp_path, config, data)
    assert any("of 2 layers" in n for n in result.notes)
    assert any("1 layers have no bias: last" in n for n in result.notes)
    made = onnx.load(path)
    assert len(next(n for n in made.graph.node if n.op_type == "Gemm").input) == 3


def test_depths_follow_the_longest_way() -> None:
    text = """g (float[n,4,8,8] x) => (float[n,4,8,8] y) {
        [one] a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) [two] b = Conv<pads=[1,1,1,1]>(r, w)
        [side] c = Conv<pads=[1,1,1,1]>(x, w) d = Add(b, c) [three] y = Conv<pads=[1,1,1,1]>(d, w)
    }"""
    light = light_of(text, {"w": normal(4, 4, 3, 3)}, Path())
    products, _ = find_products(Editor(light), [n.name for n in light.proto.graph.node])
    assert product_depths(light.proto, products) == {"one": 1, "two": 2, "side": 1, "three": 3}


# --- AdaRound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
def test_adaround_stays_on_the_grid_and_beats_the_nearest(per_channel: bool) -> None:
    rows = np.maximum(normal(1024, 12) @ normal(12, 72, seed=1), 0)[None]
    weight = normal(1, 72, 16, scale=0.1, seed=2)
    scheme = Scheme(7, per_channel)
    made, gain = round_matrix(weight, rows, rounded_activation(rows, 0, float(rows.max())), scheme)
    assert gain < 0.6
    steps = scheme.steps(weight)
    assert np.abs(made - weight).max() < 1.001 * steps.max()
    # Whoever rounds these to the nearest integer finds the same grid and the same integers.
    np.testing.assert_allclose(scheme.steps(made), steps, rtol=1e-6)
    np.testing.assert_allclose(scheme.rounded(made), made, atol=1e-4 * steps.max())
    assert not np.array_equal(scheme.rounded(weight), scheme.rounded(made))


def test_adaround_helps_a_trained_net(digits: Any, tools: Any, tmp_path: Path) -> None:
    """Depthwise and other convolutions and a Gemm, with 7 bits a weight."""
    want = tools.outputs_of(digits.path, digits.test)
    found = {}
    for way in ("nearest", "adaround"):
        config = StaticConfig(weight_bits="7", rounding=way)
        path, result = tools.quantized(digits.path, tmp_path, config, digits.calibration)
        found[way] = tools.sqnr(tools.outputs_of(path, digits.test), want)
    assert found["adaround"] > found["nearest"] + 1
    assert any("of 8 layers rounded" in n for n in result.notes)


def test_adaround_stops_in_time_and_leaves_shared_weights(tools: Any, tmp_path: Path) -> None:
    text = """g (float[n,16] x) => (float[n,16] y) {
        a = MatMul(x, w1) r = Relu(a) b = MatMul(r, w2) s = Relu(b) y = MatMul(s, w2)
    }"""
    weights = {"w1": normal(16, 16, scale=0.3), "w2": normal(16, 16, scale=0.3, seed=1)}
    light = light_of(text, weights, tmp_path)
    before = light.proto.SerializeToString()
    nodes, feeder = select_nodes(light.proto), feeder_of({"x": normal(256, 4) @ normal(4, 16, seed=3)})
    ranges = Ranges(dict.fromkeys("xrs", -20.0), dict.fromkeys("xrs", 20.0))
    products, _ = find_products(Editor(light), nodes)
    notes = adaround(
        light, products, ranges, Scheme(7, True), feeder, tools.opener, tmp_path, Progress(), time_limit_s=0
    )  # fmt: skip
    assert any("1 layers keep their nearest integers, 0 s were over" in n for n in notes)
    assert any("2 layers left" in n and "read elsewhere" in n for n in notes)
    assert light.proto.SerializeToString() == before
    adaround(light, products, ranges, Scheme(7, True), feeder, tools.opener, tmp_path, Progress())
    after = initializers(light.proto)
    assert not np.array_equal(after["w1"], weights["w1"])
    np.testing.assert_array_equal(after["w2"], weights["w2"])


# --- together --------------------------------------------------------------------------------------------------------

ALL = StaticConfig(weight_bits="8", smooth="auto", equalize=True, bias_correction="full", rounding="adaround")


def test_weights_on_disk_become_the_same(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is too large to be held is rewritten in a copy of its weights; its own file is not touched."""
    text = """g (float[n,300] x) => (float[n,8] y) {
        h = LayerNormalization<axis=-1>(x, gamma, beta) a = MatMul(h, w) b = Add(a, c) r = Relu(b) y = Gemm(r, v, d)
    }"""
    weights = {
        "gamma": np.where(np.arange(300) % 25, 1, 30).astype(np.float32),
        "beta": normal(300),
        "w": normal(300, 260, scale=0.07),
        "c": normal(260),
        "v": normal(260, 8, scale=0.14),
        "d": normal(8),
    }
    source = save(light_of(text, weights, tmp_path), tmp_path / "source.onnx")
    content = source.read_bytes()
    data = {"x": normal(64, 300)}
    whole, notes = tools.quantized(source, tmp_path, ALL, data)
    monkeypatch.setattr(deploykit.weights, "WHOLE_LIMIT_BYTES", 0)
    monkeypatch.setattr(deploykit.weights, "LARGE_BYTES", 1 << 17)
    light, lighter_notes = tools.quantized(source, tmp_path, ALL, data)
    assert notes.notes == lighter_notes.notes
    assert "2 smoothed for nothing" in " ".join(notes.notes)
    np.testing.assert_array_equal(tools.outputs_of(whole, data), tools.outputs_of(light, data))
    assert source.read_bytes() == content
    assert not list(tmp_path.glob(".*"))


def test_what_was_done_is_in_the_parameters(digits: Any, tools: Any, tmp_path: Path) -> None:
    _, result = tools.quantized(digits.path, tmp_path, StaticConfig(smooth=0.5, equalize=True), digits.calibration)
    keys = ("smooth", "equalize", "bias_correction", "rounding")
    assert [result.params[k] for k in keys] == [0.5, True, "off", "nearest"]


@pytest.mark.parametrize(
    "config",
    [
        StaticConfig(smooth="on"),
        StaticConfig(smooth=1.5),
        StaticConfig(smooth=True),
        StaticConfig(bias_correction="slow"),
        StaticConfig(rounding="up"),
    ],
)
def test_impossible_options(digits: Any, tools: Any, tmp_path: Path, config: StaticConfig) -> None:
    with pytest.raises(OptimizationError, match="expected"):
        tools.quantized(digits.path, tmp_path, config, digits.calibration)


# --- escalation ------------------------------------------------------------------------------------------------------


def turned_on(configs: list[StaticConfig]) -> list[str]:
    """The field that each step changed."""
    fields = ("calibration", "smooth", "equalize", "bias_correction", "rounding")
    found = []
    for old, new in itertools.pairwise(configs):
        [name] = [f for f in fields if getattr(old, f) != getattr(new, f)]
        found.append(name)
    return found


def test_escalation_of_a_convolutional_net(digits: Any) -> None:
    start = StaticConfig(smooth="off", exclude=("Gemm",), max_samples=9)
    configs = list(escalation(digits.path, start))
    assert configs[0] == start
    assert turned_on(configs) == ["calibration", "equalize", "smooth", "bias_correction", "bias_correction", "rounding"]
    assert all(c.exclude == ("Gemm",) and c.max_samples == 9 for c in configs)


def test_escalation_of_a_transformer(tmp_path: Path) -> None:
    weights = HEADS | SHAPES | {"bv": normal(32)}
    path = save(light_of(ATTENTION, weights, tmp_path), tmp_path / "model.onnx")
    configs = list(escalation(path, StaticConfig(smooth="off", bias_correction="off")))
    assert turned_on(configs) == ["calibration", "smooth", "bias_correction", "bias_correction", "rounding"]
    asked = StaticConfig(calibration="entropy", smooth=0.3, bias_correction="full")
    configs = list(escalation(path, asked))
    assert turned_on(configs) == ["rounding"]
    assert all(c.smooth == 0.3 and c.bias_correction == "full" for c in configs)
