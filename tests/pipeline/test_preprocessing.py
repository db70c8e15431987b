"""`preprocess` as a verb: what is compared, what stands in the artifact, and what later steps make of it."""

from __future__ import annotations

import json
import signal
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import deploykit
from deploykit.artifact import Artifact
from deploykit.data import ValueRange, generate
from deploykit.errors import DataError, OptimizationError, ParityError
from deploykit.models import load_model
from deploykit.optimizers import AudioConfig, ImageConfig, StaticConfig
from deploykit.optimizers.preprocess_image import ImagePlan
from deploykit.recipe import Recipe
from deploykit.specs import TensorSpec

IMAGES = ImageConfig(resize=(12, 12), mean=(0.5,), std=(0.25,))


def save(path: Path, text: str, **weights: Any) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items())
    onnx.save(model, path)
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    text = """g (float[batch,3,12,12] image) => (float[batch,10] y) {
        c = Conv<pads = [1, 1, 1, 1]>(image, w0) r = Relu(c) d = Conv(r, w1) s = Relu(d) g = GlobalAveragePool(s)
        f = Flatten(g) y = MatMul(f, w2)
    }"""
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3), "w2": (8, 10)}
    return save(tmp_path / "net.onnx", text, **{n: rng.standard_normal(s) / 3 for n, s in shapes.items()})


def test_artifact(net: Path, tmp_path: Path) -> None:
    parent = deploykit.export(net, tmp_path / "parent")
    made = deploykit.preprocess(parent.path, tmp_path / "made", config=IMAGES, contract=["ort:1.18"])
    assert str(made.signature.inputs[0]) == "image: uint8[batch, height, width, 3]"
    step = made.manifest.lineage[-1]
    assert (step.step, step.parent, step.params["resize"]) == ("preprocess-image", parent.digest, [12, 12])
    records = made.manifest.evidence.parity
    assert [r["verdict"] for r in records] == ["passed"] * 4
    assert [r.get("part") for r in records] == [None, None, "preprocessing", "preprocessing"]
    golden = Artifact.open(made.path).golden()
    assert {case["image"].dtype.name for case, _ in golden} == {"uint8"}
    assert len({case["image"].shape for case, _ in golden}) == len(golden) >= 3
    assert made.ranges == {"image": ValueRange(0, 255)}
    assert [r["verdict"] for r in deploykit.verify(made.path)] == ["passed", "passed"]


def test_then_simplify_and_int8_on_bytes(net: Path, tmp_path: Path) -> None:
    config = ImageConfig(resize=(12, 12), mean=(0.5,), std=(0.25,), size=(20, 31))
    deploykit.preprocess(net, tmp_path / "ready", config=config)
    deploykit.simplify(tmp_path / "ready", tmp_path / "simple")
    images = generate(
        [TensorSpec("image", "uint8", (24, 20, 31, 3))], {}, ranges={"image": ValueRange(0, 255)}, seed=5
    )["image"]
    np.savez(tmp_path / "calib.npz", image=images)
    made = deploykit.quantize_static(
        tmp_path / "simple", tmp_path / "int8", data=tmp_path / "calib.npz", config=StaticConfig(), gate_seconds=0,
        check_rows=8,
    )  # fmt: skip
    assert made.signature.inputs[0].dtype == "uint8"
    [ort, *_] = made.manifest.evidence.placement
    assert ort["layers"]["Conv"] == {"int8": 2, "total": 2}
    why = {f["name"]: f["why"] for f in ort["float"]}
    assert set(why.values()) == {"prepares the input"} and len(why) == 2
    assert load_model(made.path).quantized


def test_real_images(net: Path, tmp_path: Path) -> None:
    images = generate([TensorSpec("image", "uint8", (5, 9, 14, 3))], {}, ranges={"image": ValueRange(0, 255)}, seed=1)
    np.savez(tmp_path / "real.npz", **images)
    np.savez(tmp_path / "floats.npz", image=images["image"] / 255)
    made = deploykit.preprocess(net, tmp_path / "made", config=IMAGES, data=tmp_path / "real.npz")
    assert {case["image"].shape[1:] for case, _ in made.golden()} == {(9, 14, 3)}
    assert made.manifest.evidence.parity[0]["data"] == str(tmp_path / "real.npz")
    with pytest.raises(DataError, match="uint8"):
        deploykit.preprocess(net, tmp_path / "other", config=IMAGES, data=tmp_path / "floats.npz")
    with pytest.raises(DataError, match="no dynamic dimension"):
        deploykit.preprocess(net, tmp_path / "other", config=IMAGES, dims={"depth": 3})
    sized = deploykit.preprocess(net, tmp_path / "sized", config=IMAGES, dims={"height": 40})
    assert {case["image"].shape[1] for case, _ in sized.golden()} == {40}


def test_wrong_preprocessing_leaves_nothing(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ImagePlan._affine
    monkeypatch.setattr(ImagePlan, "_affine", lambda plan: tuple(part * 1.01 for part in right(plan)))
    with pytest.raises(ParityError, match="in ort:cpu the preprocessing is not its reference"):
        deploykit.preprocess(net, tmp_path / "made", config=IMAGES)
    assert not list(tmp_path.glob("*made*"))


def test_sound_beside_another_input(tmp_path: Path) -> None:
    text = """g (float[batch,40,frames] features, float[batch,8] speaker) => (float[batch,6] y) {
        c = Conv(features, w0) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) a = Add(f, speaker) y = MatMul(a, w1)
    }"""
    rng = np.random.default_rng(0)
    path = save(tmp_path / "net.onnx", text, w0=rng.standard_normal((8, 40, 3)) / 9, w1=rng.standard_normal((8, 6)) / 2)
    made = deploykit.preprocess(path, tmp_path / "made", config=AudioConfig(mels=40, dtype="int16"))
    assert [str(s) for s in made.signature.inputs] == ["features: int16[batch, samples]", "speaker: float32[batch, 8]"]
    assert [r["verdict"] for r in made.manifest.evidence.parity] == ["passed"] * 4
    assert made.manifest.lineage[-1].step == "preprocess-audio"


def test_quantized_parent_is_held_to_a_cosine(net: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    np.savez(tmp_path / "calib.npz", image=rng.standard_normal((24, 3, 12, 12)).astype(np.float32))
    deploykit.quantize_static(
        net, tmp_path / "int8", data=tmp_path / "calib.npz", config=StaticConfig(), gate_seconds=0, check_rows=8
    )
    made = deploykit.preprocess(tmp_path / "int8", tmp_path / "made", config=IMAGES)
    assert made.manifest.evidence.parity[0]["tolerance"] is None
    assert made.manifest.evidence.parity[2]["tolerance"] is not None


def test_command_recipe_and_preset(net: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit.cli import main

    preset = {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 14, "crop_size": 12, "resample": 3,
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preset))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    args = ["preprocess", "image", "-m", "net.onnx", "-o", "made", "--from", ".", "--std", "0.25", "--no-antialias"]
    args += ["--resample", "bilinear"]
    with pytest.raises(SystemExit) as ended:
        main([*args, "--dry-run"])
    assert ended.value.code == 0
    tables = tomllib.loads(capfd.readouterr().out)
    deploykit.run(Recipe.from_tables(tables, tmp_path), tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 0
    shown = capfd.readouterr().out
    assert "parity  preprocessing passed on ort:cpu" in shown
    made = [Artifact.open(tmp_path / name).manifest.lineage[-1].params for name in ("made", "out/preprocess-image")]
    assert made[0] == made[1]
    assert (made[0]["resize"], made[0]["crop"], made[0]["std"]) == (14, [12, 12], [0.25])


def test_openvino_ir_is_refused(net: Path, tmp_path: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(str(net)), str(tmp_path / "ir.xml"), compress_to_fp16=False)
    with pytest.raises(OptimizationError, match="OpenVINO IR"):
        deploykit.preprocess(tmp_path / "ir.xml", tmp_path / "made", config=IMAGES)
