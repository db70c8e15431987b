"""What runs in integers, and which layers lose most by it, read from real runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from deploykit import gating
from deploykit.data import Dataset
from deploykit.optimizers import DynamicConfig, StaticConfig, optimize
from deploykit.proof import count_layers, layers_of, prove_placement
from deploykit.ranking import rank_layers
from deploykit.runtimes import open_session, parse_device
from deploykit.runtimes.placement import ExecutedNode

F32 = np.float32
RNG = np.random.default_rng(0)
DEVICES = ["ort:cpu", "openvino:cpu"]


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (RNG.standard_normal(shape) * scale).astype(F32)


def opener(path: Path) -> Any:
    return open_session(path, threads=1).run


@pytest.fixture
def convolutions(build: Any) -> Any:
    """Three convolutions with a way round the second, and a Gemm; `huge` makes the first one's channel 0 huge."""

    def make(huge: float = 0.0, channels: int = 16) -> Any:
        w1, w2, b1 = (
            normal(channels, 3, 3, 3, scale=0.2),
            normal(channels, channels, 3, 3, scale=0.05),
            normal(channels),
        )
        b1[0], w2[:, 0] = (huge, 0) if huge else (b1[0], w2[:, 0])
        w3 = normal(channels, channels, 1, 1, scale=0.2)
        if huge:
            w3[:, 0] = 0
        return build(
            [
                helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="stem", pads=[1] * 4),
                helper.make_node("Relu", ["c1"], ["r1"], name="stem_relu"),
                helper.make_node("Conv", ["r1", "w2"], ["c2"], name="middle", pads=[1] * 4),
                helper.make_node("Relu", ["c2"], ["r2"], name="middle_relu"),
                helper.make_node("Conv", ["r2", "w3"], ["c3"], name="end"),
                helper.make_node("GlobalAveragePool", ["c3"], ["g"], name="pool"),
                helper.make_node("Flatten", ["g"], ["f"], name="flat"),
                helper.make_node("Gemm", ["f", "w4"], ["y"], name="head"),
            ],
            {"x": ["batch", 3, 12, 12]},
            {"y": ["batch", 5]},
            {"w1": w1, "b1": b1, "w2": w2, "w3": w3, "w4": normal(channels, 5)},
        )

    return make


IMAGES = {"x": normal(24, 3, 12, 12)}


def quantize(folder: Path, model: Any, config: Any, data: Any = IMAGES) -> tuple[Path, Path]:
    """The quantized model, and the float one that it was made from."""
    onnx.save(model, str(folder / "source.onnx"))
    optimize(
        folder / "source.onnx", config, folder / "q.onnx", check=lambda p: None, open_model=opener,
        data=Dataset.from_arrays(data), keep_float=folder / "float.onnx",
    )  # fmt: skip
    return folder / "q.onnx", folder / "float.onnx"


def rank(folder: Path, quantized: Path, floating: Path, feeds: Any = IMAGES) -> Any:
    (folder / "ranking").mkdir()
    return rank_layers(floating, quantized, [feeds], opener, folder / "ranking")


# --- proof -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_static_layers_run_in_integers(convolutions: Any, tmp_path: Path, device: str) -> None:
    quantized, _ = quantize(tmp_path, convolutions(), StaticConfig())
    proof = prove_placement(quantized, parse_device(device), {})
    assert proof["layers"] == {"Conv": {"int8": 3, "total": 3}, "Gemm": {"int8": 1, "total": 1}}
    assert proof["summary"] == "3 of 3 Conv int8, 1 of 1 Gemm int8"


def test_a_bias_that_is_the_copy_of_another_is_no_activation(convolutions: Any, tmp_path: Path) -> None:
    """TorchScript shares equal biases through Identity; the convolution has to run in integers all the same."""
    model = convolutions()
    model.graph.node.insert(0, helper.make_node("Identity", ["b1"], ["b2"], name="copy"))
    model.graph.node.insert(1, helper.make_node("Identity", ["b2"], ["b3"], name="copy_of_copy"))
    for node in model.graph.node:
        if node.name in ("middle", "end"):
            node.input.append("b2" if node.name == "middle" else "b3")
    quantized, _ = quantize(tmp_path, model, StaticConfig())
    assert prove_placement(quantized, parse_device("ort:cpu"), {})["layers"]["Conv"] == {"int8": 3, "total": 3}


@pytest.mark.parametrize("device", DEVICES)
def test_a_float_layer_is_named_with_its_reason(convolutions: Any, tmp_path: Path, device: str) -> None:
    quantized, _ = quantize(tmp_path, convolutions(), StaticConfig(exclude=("middle",)))
    proof = prove_placement(quantized, parse_device(device), {"middle": "excluded"})
    assert {"name": "middle", "op": "Conv", "why": "excluded"} in proof["float"]
    assert proof["layers"]["Conv"]["int8"] < 3 and "middle (excluded)" in proof["summary"]


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_a_float_model_is_in_integers(convolutions: Any, tmp_path: Path, device: str) -> None:
    onnx.save(convolutions(), str(tmp_path / "m.onnx"))
    proof = prove_placement(tmp_path / "m.onnx", parse_device(device), {"Conv": "not asked for"})
    assert sum(n["int8"] for n in proof["layers"].values()) == 0
    assert [f["why"] for f in proof["float"]] == ["not asked for"] * 3 + ["left out by the quantizer"]


def test_dynamic_layers_are_integers_in_one_runtime_only(convolutions: Any, tmp_path: Path) -> None:
    quantized, _ = quantize(tmp_path, convolutions(), DynamicConfig())
    found = {d: prove_placement(quantized, parse_device(d), {})["layers"] for d in DEVICES}
    # onnxruntime's quantizer makes a MatMul of a Gemm without a bias.
    assert {d: n["MatMul"]["int8"] for d, n in found.items()} == {"ort:cpu": 1, "openvino:cpu": 0}
    assert all(n["Conv"] == {"int8": 0, "total": 3} for n in found.values())


def test_products_of_two_activations_are_named_as_such(build: Any) -> None:
    model = build([helper.make_node("MatMul", ["a", "b"], ["y"], name="mix")], {"a": [2, 3], "b": [3, 2]}, {"y": None})
    proof = count_layers(layers_of(model), [], parse_device("ort:cpu"), {})
    assert proof["summary"] == "0 of 1 MatMul int8, 1 float: mix (two activations)"


def test_pairs_that_no_fusion_takes_prove_nothing(convolutions: Any, tmp_path: Path) -> None:
    quantized, _ = quantize(tmp_path, convolutions(), StaticConfig())
    layers = layers_of(onnx.load(quantized))
    assert all(layer.quantized for layer in layers)
    executed = [
        ExecutedNode("stem", "Conv", "float32", frozenset({"stem"})),
        ExecutedNode("q", "QuantizeLinear", "int8", frozenset({"middle"})),
        ExecutedNode("e", "QLinearConv", "int8", frozenset({"end"})),
    ]
    proof = count_layers(layers, executed, parse_device("ort:cpu"), {})
    assert proof["layers"]["Conv"] == {"int8": 1, "total": 3}
    assert {f["why"] for f in proof["float"]} == {"int8 in the file, float in this runtime"}


def test_kernels_of_both_models_are_found_by_layer(convolutions: Any, tmp_path: Path) -> None:
    """Without which no layer could be called slow: ONNX Runtime renames what it fuses and lays out anew."""
    quantized, _ = quantize(tmp_path, convolutions(), StaticConfig())
    layers, device = layers_of(onnx.load(quantized)), parse_device("ort:cpu")
    feeds = {"x": IMAGES["x"][:1]}
    for path in (tmp_path / "source.onnx", quantized):
        assert set(gating._kernel_times(path, layers, device, feeds)) == {"stem", "middle", "end", "head"}


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_a_huge_channel_is_the_error_of_who_reads_it_and_of_who_writes_it(convolutions: Any, tmp_path: Path) -> None:
    """The writer alone loses nothing: next to the huge channel its error is small."""
    ranked = rank(tmp_path, *quantize(tmp_path, convolutions(huge=3e3), StaticConfig()))
    assert ranked[0].nodes[0] == "middle" and ranked[0].feeders == ("stem", "stem_relu")
    assert ranked[0].sqnr_db < 10 and all(layer.sqnr_db > 20 for layer in ranked[1:])
    assert ranked == sorted(ranked, key=lambda layer: layer.sqnr_db)


def test_huge_weights_are_the_error_of_one_layer(convolutions: Any, tmp_path: Path) -> None:
    model = convolutions()
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[:, 0] *= 300
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, "w2"))
        elif tensor.name == "b1":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[0] = -1e3  # the channel is 0 behind the Relu
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, "b1"))
    ranked = rank(tmp_path, *quantize(tmp_path, model, StaticConfig()))
    assert ranked[0].nodes[0] == "middle" and ranked[0].feeders == () and ranked[0].sqnr_db < 15
    assert all(layer.sqnr_db > 20 for layer in ranked[1:])


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
def test_onnxruntime_does_not_quantize_what_was_left_in_float(build: Any, tmp_path: Path, op: str) -> None:
    """It would round the weights by itself, with one scale for all channels."""
    layer = (
        helper.make_node("Conv", ["r", "w2"], ["c2"], name="kept", pads=[1] * 4)
        if op == "Conv"
        else helper.make_node("Gemm", ["f", "w2"], ["c2"], name="kept")
    )
    flat = [helper.make_node("Flatten", ["r"], ["f"], name="flat")] if op == "Gemm" else []
    w2 = normal(8, 8, 3, 3) if op == "Conv" else normal(128, 8)
    last = (
        helper.make_node("Conv", ["s", "w3"], ["y"]) if op == "Conv" else helper.make_node("Gemm", ["s", "w3"], ["y"])
    )
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], name="first"),
        helper.make_node("Relu", ["c"], ["r"]),
        *flat, layer, helper.make_node("Relu", ["c2"], ["s"]), last,
    ]  # fmt: skip
    w3 = normal(8, 8, 1, 1) if op == "Conv" else normal(8, 4)
    model = build(nodes, {"x": ["batch", 3, 4, 4]}, {"y": None}, {"w1": normal(8, 3, 1, 1), "w2": w2, "w3": w3})
    data = {"x": normal(24, 3, 4, 4)}
    quantized, _ = quantize(tmp_path, model, StaticConfig(exclude=("kept",)), data)
    proof = prove_placement(quantized, parse_device("ort:cpu"), {})
    assert [f["name"] for f in proof["float"]] == ["kept"]
    onnx.checker.check_model(onnx.load(quantized), full_check=True)


def test_the_error_is_that_of_the_layer_alone(convolutions: Any, tmp_path: Path) -> None:
    """Against numpy, for the last layer: the float input through its own rounding only."""
    quantized, floating = quantize(tmp_path, convolutions(), DynamicConfig(weight_bits="7"))
    (found,) = rank(tmp_path, quantized, floating)
    assert found.nodes == ("head",)
    model = onnx.load(floating)
    model.graph.output.append(helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, None))
    onnx.save(model, str(tmp_path / "exposed.onnx"))
    outputs = opener(tmp_path / "exposed.onnx")(IMAGES)
    weight = next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "w4").astype(np.float64)
    scale = np.abs(weight).max(0) / 64  # 7 bits are the same on every CPU
    rounded = np.clip(np.round(weight / scale), -64, 64) * scale
    x = outputs["f"].astype(np.float64)
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / 255
    zero = np.round(-low / step)
    x8 = (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
    want = 10 * np.log10(np.square(x @ weight).sum() / np.square(x @ weight - x8 @ rounded).sum())
    assert found.sqnr_db == pytest.approx(want, abs=0.5)


def test_excluded_layers_are_not_ranked(convolutions: Any, tmp_path: Path) -> None:
    ranked = rank(tmp_path, *quantize(tmp_path, convolutions(), StaticConfig(exclude=("end", "head"))))
    names = {name for layer in ranked for name in layer.nodes}
    assert {"stem", "middle"} <= names and not {"end", "head"} & names


def test_large_weights_stay_on_disk(convolutions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deploykit.weights as weights

    paths = quantize(tmp_path, convolutions(), StaticConfig())
    want = rank(tmp_path, *paths)
    monkeypatch.setattr(weights, "WHOLE_LIMIT_BYTES", 0)
    monkeypatch.setattr(weights, "LARGE_BYTES", 1024)
    (tmp_path / "again").mkdir()
    folder = tmp_path / "again"
    (folder / "ranking").mkdir()
    found = rank_layers(paths[1], paths[0], [IMAGES], opener, folder / "ranking")
    assert (folder / "ranking" / "both.onnx.data").stat().st_size > 4096
    assert [(f.nodes, round(f.sqnr_db, 3)) for f in found] == [(w.nodes, round(w.sqnr_db, 3)) for w in want]
