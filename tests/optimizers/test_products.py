"""Products as matrices, samples of their inputs, and the 8-bit scheme in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from deploykit.optimizers import StaticConfig
from deploykit.optimizers.editing import Editor
from deploykit.optimizers.products import find_products
from deploykit.optimizers.sampling import sample_rows
from deploykit.optimizers.scheme import Scheme, rounded_activation
from deploykit.runtimes import open_session
from deploykit.weights import LightModel

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def one_node(op: str, attributes: dict[str, Any], x: tuple[int, ...], w: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], name="node", **attributes)],
        "graph",
        [helper.make_tensor_value_info("x", 1, x)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(w, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


CASES = [
    ("Conv", {"pads": [1] * 4}, (2, 4, 7, 8), (6, 4, 3, 3)),
    ("Conv", {"pads": [1, 0, 2, 1], "strides": [2, 1], "group": 4}, (2, 4, 7, 8), (8, 1, 3, 3)),
    ("Conv", {"dilations": [2, 1], "group": 2}, (2, 4, 9, 8), (6, 2, 3, 2)),
    ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (2, 4, 7, 8), (6, 4, 4, 3)),
    ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (2, 4, 7, 8), (6, 4, 4, 3)),
    ("Conv", {"pads": [3, 2], "strides": [4]}, (2, 1, 40), (6, 1, 8)),
    ("Conv", {"pads": [1] * 6}, (1, 2, 4, 5, 6), (3, 2, 3, 3, 3)),
    ("MatMul", {}, (2, 5, 4), (4, 3)),
    ("Gemm", {"transB": 1}, (5, 4), (3, 4)),
    ("Gemm", {}, (5, 4), (4, 3)),
]


@pytest.mark.parametrize(("op", "attributes", "x_shape", "w_shape"), CASES)
def test_rows_times_matrix_is_the_node(
    op: str, attributes: dict[str, Any], x_shape: tuple[int, ...], w_shape: tuple[int, ...]
) -> None:
    x, w = normal(*x_shape), normal(*w_shape)
    model = one_node(op, attributes, x_shape, w)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    [product], left = find_products(Editor(LightModel(model, Path())), ["node"])
    assert not left
    matrix = product.matrix(w)
    np.testing.assert_array_equal(product.weight_from(matrix), w)
    # One factor an input channel, on the data or on the matrix: the same.
    factors = RNG.uniform(0.5, 2, product.input_channels).astype(np.float32)
    shape = [1] * x.ndim
    shape[product.channel_axis] = -1
    for scaled, weight in ((x, matrix), (x * factors.reshape(shape), matrix * product.per_input(factors))):
        want = np.moveaxis(session.run(None, {"x": scaled})[0], product.channel_axis, -1)
        rows = product.rows(x)
        numbers = RNG.permutation(rows.count)
        have = (rows.take(numbers) @ weight).transpose(1, 0, 2).reshape(rows.count, -1)
        np.testing.assert_allclose(have, want.reshape(rows.count, -1)[numbers], atol=1e-5)


@pytest.mark.parametrize(
    ("op", "attributes", "why"),
    [
        ("Gemm", {"transA": 1}, "transposed"),
        ("Gemm", {"alpha": 2.0}, "alpha"),
        ("ConvTranspose", {}, "transposed convolution"),
    ],
)
def test_what_is_no_product(op: str, attributes: dict[str, Any], why: str) -> None:
    weight = normal(4, 4, 1, 1) if op == "ConvTranspose" else normal(4, 4)
    model = one_node(op, attributes, (4, 4, 2, 2) if op == "ConvTranspose" else (4, 4), weight)
    found, [left] = find_products(Editor(LightModel(model, Path())), ["node"])
    assert not found
    assert "node" in left and why in left


def sampled(model: onnx.ModelProto, x: Any, size: int, limit: int, folder: Path, **more: Any) -> Any:
    light = LightModel(model, folder)
    products, _ = find_products(Editor(light), ["node"])

    def feeder() -> Iterator[dict[str, Any]]:
        for i in range(0, len(x), size):
            yield {"x": x[i : i + size]} | {n: a[i : i + size] for n, a in more.items()}

    def open_with_mask(path: Path) -> Any:
        run = open_session(path, threads=1).run
        return lambda feeds: run({"x": feeds["x"]})

    [samples] = sample_rows(light, products, feeder, open_with_mask, folder, limit=limit)
    return samples["node"]


def test_samples_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    x = normal(24, 3, 6, 6)
    model = one_node("Conv", {}, (1, 3, 6, 6), normal(4, 3, 3, 3))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    found = [sampled(model, x, size, 50, tmp_path) for size in (1, 5, 24)]
    for sample in found:
        assert sample.rows.shape == (1, 50, 27)
        np.testing.assert_array_equal(sample.high, x.max(axis=(0, 2, 3)))
        np.testing.assert_array_equal(sample.low, x.min(axis=(0, 2, 3)))
        np.testing.assert_array_equal(np.sort(sample.rows, axis=1), np.sort(found[0].rows, axis=1))
    # 24 samples of 16 windows each: all of the data are drawn from.
    assert len({row.tobytes() for row in found[0].rows[0]}) == 50


def test_padding_is_not_sampled(tmp_path: Path) -> None:
    x = normal(8, 5, 4)
    mask = np.ones((8, 5), np.int64)
    mask[:, 3:] = 0
    x[:, 3:] = 9
    model = one_node("MatMul", {}, (1, 5, 4), normal(4, 3))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    rows = sampled(model, x, 4, 1000, tmp_path, attention_mask=mask).rows
    assert rows.shape == (1, 24, 4)
    assert rows.max() < 9
    assert sampled(model, x, 4, 1000, tmp_path).rows.shape == (1, 40, 4)
    # Without a mask of the same positions, everything counts.
    assert sampled(model, x, 4, 1000, tmp_path, attention_mask=mask[:, :4]).rows.shape == (1, 40, 4)


def test_flattened_padding_is_not_sampled(tmp_path: Path) -> None:
    """The mask has a row a sample, the product a row a position."""
    x = np.concatenate([np.full((4, 1), 9, np.float32), normal(4, 3)], axis=1)
    mask = np.int64([[1, 0], [0, 1]])
    model = one_node("Gemm", {}, (4, 4), normal(4, 3))
    products, _ = find_products(Editor(LightModel(model, tmp_path)), ["node"])
    feeds = {"x": x, "attention_mask": mask}

    def open_with_mask(path: Path) -> Any:
        run = open_session(path, threads=1).run
        return lambda given: run({"x": given["x"]})

    light = LightModel(model, tmp_path)
    [samples] = sample_rows(light, products, lambda: iter([feeds]), open_with_mask, tmp_path, limit=9)
    rows = samples["node"].rows[0]
    np.testing.assert_array_equal(rows[np.argsort(rows[:, 1])], x[[0, 3]][np.argsort(x[[0, 3], 1])])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [8, 7])
def test_weights_are_rounded_as_in_the_file(
    digits: Any, tools: Any, tmp_path: Path, bits: int, per_channel: bool
) -> None:
    # Without SmoothQuant, which changes the weights first, where the net that this machine trained calls for it.
    config = StaticConfig(weight_bits=str(bits), per_channel=per_channel, smooth="off")
    path, _ = tools.quantized(digits.path, tmp_path, config, digits.calibration)
    made, source = onnx.load(path), onnx.load(digits.path)
    names = [n.name for n in source.graph.node]
    products, _ = find_products(Editor(LightModel(source, Path())), names)
    have = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    want = {t.name: numpy_helper.to_array(t) for t in source.graph.initializer}
    compared = 0
    for product in products:
        integers, scale = have[f"{product.weight}_quantized"], have[f"{product.weight}_scale"]
        shape = [1] * integers.ndim
        if per_channel:
            shape[0 if product.window or product.transposed else 1] = -1
        rounded = Scheme(bits, per_channel).rounded(product.matrix(want[product.weight]))
        np.testing.assert_allclose(
            product.weight_from(rounded), integers.astype(np.float32) * scale.reshape(shape), rtol=1e-5, atol=1e-7
        )
        compared += 1
    assert compared == 8


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-2.0, -0.5), (0.0, 0.0)])
def test_activations_are_rounded_as_onnxruntime_does(low: float, high: float) -> None:
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    zero, scale = compute_scale_zp(np.float32(low), np.float32(high), np.uint8(0), np.uint8(255))
    x = RNG.uniform(low - 0.5, high + 0.5, 1000).astype(np.float32)
    steps = np.clip(np.round(x / scale) + np.float32(zero), 0, 255)
    want = np.zeros_like(x) if low == high else (steps - np.float32(zero)) * scale
    np.testing.assert_allclose(rounded_activation(x, low, high), want, atol=1e-6)
