"""Preprocessing before an input: against Pillow, torch and transformers, and in both runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.data import Dataset
from deploykit.errors import OptimizationError
from deploykit.modelfile import signature_of
from deploykit.optimizers import (
    AudioConfig,
    DynamicConfig,
    HalfConfig,
    ImageConfig,
    StaticConfig,
    WeightsConfig,
    add_preprocessing,
    make_audio_config,
    make_image_config,
    optimize,
    plan_preprocessing,
    read_processor,
)
from deploykit.optimizers.mel import log_mel, mel_filters
from deploykit.optimizers.preprocess_config import PreprocessConfig
from deploykit.optimizers.resampling import crop_start, resize_matrix, resized
from deploykit.pictures import make_pictures
from deploykit.runtimes import open_session
from deploykit.specs import Signature, TensorSpec

DEVICES = ("ort:cpu", "openvino:cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(*shape: int, seed: int = 0) -> Any:
    """uint8 [n, height, width, channels]."""
    made = make_pictures(shape, np.random.default_rng(seed))
    return np.clip(np.rint(made * 48 + 128), 0, 255).astype(np.uint8)


def sound(*shape: int, seed: int = 0) -> Any:
    rng, time = np.random.default_rng(seed), np.arange(shape[-1]) / 16000
    tones = sum(np.sin(2 * np.pi * f * time * (1 + time)) for f in (220, 900, 3100))
    return (0.2 * tones + rng.standard_normal(shape) * 0.02).astype(np.float32)


def echo(folder: Path, shape: list[int | str], opset: int = 17, kind: int = TensorProto.FLOAT) -> Path:
    """A model that gives what it is given."""
    node = helper.make_node("Identity", ["x"], ["y"])
    values = [helper.make_tensor_value_info(n, kind, shape) for n in ("x", "y")]
    graph = helper.make_graph([node], "echo", values[:1], values[1:])
    path = folder / "echo.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def prepared(model: Path, config: PreprocessConfig) -> tuple[Path, Any]:
    plan = plan_preprocessing(signature_of(onnx.load(model)), config)
    target = model.with_name("prepared.onnx")
    add_preprocessing(model, plan, target)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    return target, plan


def run(path: Path, device: str, **feeds: Any) -> Any:
    with open_session(path, device) as session:
        return next(iter(session.run(feeds).values()))


# --- resizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "target"), [((97, 131), (32, 48)), ((20, 33), (51, 64)), ((64, 50), (64, 21))])
def test_matrices_are_pillows(resample: str, size: tuple[int, int], target: tuple[int, int]) -> None:
    from PIL import Image

    image = pictures(1, *size, 3)[0] // 2 + 64  # Pillow cuts off beyond black and white after its first pass
    how = Image.Resampling.BILINEAR if resample == "bilinear" else Image.Resampling.BICUBIC
    theirs = np.asarray(Image.fromarray(image).resize(target[::-1], how), np.float64)
    rows, columns = (resize_matrix(n, m, resample) for n, m in zip(size, target, strict=True))
    ours = np.einsum("hH,HWc,wW->hwc", rows, image, columns)
    # Pillow rounds to whole levels twice.
    assert np.abs(ours - theirs).max() <= 1.01
    assert np.abs(ours - theirs).mean() < 0.4
    assert abs((ours - theirs).mean()) < 0.03


@pytest.mark.parametrize(("resample", "antialias"), [("bilinear", True), ("bicubic", True), ("bilinear", False)])
@pytest.mark.parametrize("target", [(21, 40), (150, 77)])
def test_matrices_are_torchs(resample: str, antialias: bool, target: tuple[int, int]) -> None:
    import torch

    image = np.random.default_rng(0).standard_normal((1, 2, 60, 75))
    theirs = torch.nn.functional.interpolate(
        torch.tensor(image), target, mode=resample, antialias=antialias, align_corners=False
    )
    rows, columns = (resize_matrix(n, m, resample, antialias=antialias) for n, m in zip((60, 75), target, strict=True))
    np.testing.assert_allclose(rows @ image @ columns.T, theirs.numpy(), atol=1e-9)


def test_a_crop_is_a_part_of_the_matrix() -> None:
    whole = resize_matrix(100, 37, "bicubic")
    start = crop_start(37, 16)
    np.testing.assert_array_equal(resize_matrix(100, 37, "bicubic", start=start, rows=16), whole[start : start + 16])
    assert (start, crop_start(16, 16)) == (10, 0)
    assert [resized(480, 641, 256), resized(641, 480, 256), resized(9, 9, (4, 5))] == [(256, 341), (341, 256), (4, 5)]


# --- images in the graph ---------------------------------------------------------------------------------------------

IMAGES = {
    "any size": (ImageConfig(resize=(24, 32), mean=MEAN, std=STD), ["n", 3, 24, 32], [(50, 41), (17, 90)]),
    "shorter edge": (ImageConfig(resize=28, crop=(24, 24), resample="bicubic"), ["n", 3, 24, 24], [(50, 41), (31, 77)]),
    "one size": (
        ImageConfig(resize=28, crop=(24, 20), size=(45, 61), color="bgr", std=(0.5,)), ["n", 3, 24, 20], [(45, 61)],
    ),
    "channels first": (
        ImageConfig(resize=(16, 24), layout="nchw", resample="bicubic", size=(40, 30)), [2, 3, "h", "w"], [(40, 30)],
    ),
    "channels first, any size": (
        ImageConfig(resize=(16, 24), layout="nchw", antialias=False), ["n", 1, 16, 24], [(40, 30), (9, 13)],
    ),
    "channels last": (ImageConfig(resize=(16, 24), mean=MEAN, color="bgr"), ["n", 16, 24, 3], [(40, 30)]),
    "crop alone": (ImageConfig(crop=(16, 11), size=(20, 14)), ["n", 3, 16, 11], [(20, 14)]),
    "no resize": (ImageConfig(mean=MEAN, std=STD), ["n", 3, "h", "w"], [(12, 14), (9, 31)]),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_images(case: str, tmp_path: Path) -> None:
    config, shape, sizes = IMAGES[case]
    path, plan = prepared(echo(tmp_path, shape, opset=18 if "any" in case else 13), config)
    for device in DEVICES:
        with open_session(path, device) as session:
            assert session.signature.inputs[0].dtype == "uint8"
            for number, size in enumerate(sizes):
                images = pictures(2, *size, plan.channels, seed=number)
                images = images if config.layout == "nhwc" else images.transpose(0, 3, 1, 2).copy()
                wanted = plan.reference(images)
                np.testing.assert_allclose(session.run({"x": images})["y"], wanted, atol=2e-5)


def test_normalization_is_exact_for_every_level(tmp_path: Path) -> None:
    path, _ = prepared(echo(tmp_path, ["n", 3, "h", "w"]), ImageConfig(mean=MEAN, std=STD, color="bgr"))
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), (1, 16, 16, 3)).copy()
    levels[..., 0] //= 2
    wanted = (levels[..., ::-1] / 255 - MEAN) / STD
    for device in DEVICES:
        made = run(path, device, x=levels)
        np.testing.assert_allclose(made, wanted.transpose(0, 3, 1, 2), rtol=1e-6, atol=1e-6)


def test_what_a_branch_reads_is_prepared_too(tmp_path: Path) -> None:
    branches = []
    for name in ("then", "else"):
        node = helper.make_node("Neg" if name == "then" else "Abs", ["x"], [name])
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        branches.append(helper.make_graph([node], name, [], [out]))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 8, 8])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [out]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, tmp_path / "if.onnx")
    path, plan = prepared(tmp_path / "if.onnx", ImageConfig())
    images = pictures(1, 8, 8, 3)
    np.testing.assert_allclose(run(path, "ort:cpu", x=images, c=np.array(True)), -plan.reference(images), atol=1e-6)


def test_float16_models_get_float16(tmp_path: Path) -> None:
    path, plan = prepared(echo(tmp_path, [1, 3, 8, 8], kind=TensorProto.FLOAT16), ImageConfig(resize=(8, 8), std=STD))
    images = pictures(1, 30, 21, 3)
    made = run(path, "ort:cpu", x=images)
    assert made.dtype == np.float16
    np.testing.assert_allclose(made, plan.reference(images), rtol=2e-3)


def test_sizes_that_hung_on_the_old_input_are_known(tmp_path: Path) -> None:
    path, plan = prepared(echo(tmp_path, ["n", 3, "height", "width"]), ImageConfig(resize=(8, 10)))
    signature = signature_of(onnx.load(path))
    assert signature.inputs[0].shape == ("n", "height_2", "width_2", 3)
    assert signature.outputs[0].shape == ("n", 3, 8, 10)
    assert run(path, "ort:cpu", x=pictures(2, 20, 30, 3)).shape == (2, 3, 8, 10)
    assert plan.wanted.shape == ("n", 3, 8, 10)


# --- transformers' image processors ----------------------------------------------------------------------------------


def processors() -> dict[str, Any]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
    from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    crop = {"height": 32, "width": 32}
    return {
        "vit": ViTImageProcessorPil(size={"height": 32, "width": 32}),
        "clip": CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size=crop),
        "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
        "efficientnet": EfficientNetImageProcessorPil(size={"height": 32, "width": 32}, rescale_offset=True),
        "mobilevit": MobileViTImageProcessorPil(size={"shortest_edge": 37}, crop_size=crop, resample=2),
    }


@pytest.mark.parametrize("name", ["vit", "clip", "convnext", "efficientnet", "mobilevit"])
def test_presets_do_what_transformers_does(name: str, tmp_path: Path) -> None:
    processor = processors()[name]
    processor.save_pretrained(tmp_path)
    config = read_processor(tmp_path)
    assert isinstance(config, ImageConfig)
    path, _ = prepared(echo(tmp_path, ["n", 3, 32, 32]), config)
    for size in ((61, 87), (90, 40)):
        image = pictures(1, *size, 3, seed=size[0])
        theirs = processor(image[0], return_tensors="np", input_data_format="channels_last")["pixel_values"]
        ours = run(path, "ort:cpu", x=image)
        level = 1 / 255 / min(config.std or (1.0,))
        # Pillow rounds to levels twice, and cuts off what a cubic kernel throws beyond 0 and 255 twice.
        assert np.abs(ours - theirs).mean() < 0.45 * level
        assert np.quantile(np.abs(ours - theirs), 0.99) < 1.1 * level


def preset(folder: Path, kind: str, **table: Any) -> Path:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({"feature_extractor_type": f"{kind}FeatureExtractor", "size": 32, **table}))
    return file


def test_mobilevit_flips_the_channels_and_does_not_normalize(tmp_path: Path) -> None:
    """As the files on the hub have it; newer ones may list a mean that the processor never reads."""
    table = {"crop_size": 32, "do_center_crop": True, "do_flip_channel_order": True, "do_resize": True, "resample": 2}
    wanted = ImageConfig(resize=36, crop=(32, 32), model_color="bgr")
    assert read_processor(preset(tmp_path, "MobileViT", **table | {"size": 36})) == wanted
    table |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": None, "size": {"shortest_edge": 36}}
    assert read_processor(preset(tmp_path, "MobileViT", **table)) == wanted
    with pytest.raises(OptimizationError, match="do_normalize is True"):
        read_processor(preset(tmp_path, "MobileViT", **table | {"do_normalize": True}))


def test_what_a_preset_leaves_out_is_what_its_processor_does(tmp_path: Path) -> None:
    scale = {"image_mean": [0.5], "image_std": [0.5]}
    made = read_processor(preset(tmp_path, "CLIP", crop_size=32, **scale))
    assert isinstance(made, ImageConfig)
    assert (made.resample, made.resize, made.crop) == ("bicubic", 32, (32, 32))
    made = read_processor(preset(tmp_path, "ViT", crop_size=24, **scale))
    assert isinstance(made, ImageConfig)
    assert (made.resample, made.resize, made.crop) == ("bilinear", (32, 32), None)
    made = read_processor(preset(tmp_path, "EfficientNet", resample=3, do_rescale=False, rescale_offset=True, **scale))
    assert isinstance(made, ImageConfig)
    assert (made.rescale, made.mean, made.std) == (
        1.0,
        (0.5,),
        (0.25,),
    )  # nothing is subtracted where nothing is scaled


@pytest.mark.parametrize(
    ("kind", "table", "word"),
    [
        ("EfficientNet", {}, "does not say resample"),
        ("MobileViT", {"crop_size": 32}, "does not say resample"),
        ("Beit", {"crop_size": 32}, "does not say do_center_crop"),
        ("DeiT", {}, "crop_size is None"),
        ("ViT", {"do_flip_channel_order": True}, "do_flip_channel_order"),
        ("ViT", {"rescale_offset": True}, "rescale_offset"),
        ("CLIP", {"max_size": 99, "crop_size": 32}, "max_size"),
        ("Siglip", {}, "size is 32"),
        ("ConvNext", {"size": {"height": 32, "width": 32}}, "size is"),
        ("ConvNext", {"do_center_crop": True, "crop_size": 30}, "crop_size is 30"),
        ("Whisper", {"padding_value": 1.0}, "padding_value"),
        ("Whisper", {"padding_side": "left"}, "padding_side"),
    ],
)
def test_presets_that_do_not_tell_are_refused(kind: str, table: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(OptimizationError, match=word):
        read_processor(preset(tmp_path, kind, image_mean=[0.5], image_std=[0.5], **table))


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ("[1]", "no table"),
        ("{", "not JSON"),
        ({"image_processor_type": "DonutImageProcessor"}, "DonutImageProcessor"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}, "image_mean": [0]}, "size"),
        ({"image_processor_type": "ViTImageProcessor", "size": 224, "do_thumbnail": True}, "do_thumbnail"),
        ({"image_processor_type": "ViTImageProcessor", "size": 224, "do_pad": True}, "do_pad"),
        ({"image_processor_type": "ViTImageProcessor", "size": 224, "resample": 0}, "resample"),
        ({"image_processor_type": "ViTImageProcessor", "size": 224, "image_mean": ["a"]}, "image_mean"),
        ({"image_processor_type": "ViTImageProcessor", "size": 224, "do_resize": 3}, "do_resize"),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "dither": 0.1}, "dither"),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "n_fft": "many"}, "n_fft"),
    ],
)
def test_presets_that_mean_something_else_are_refused(table: Any, word: str, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(OptimizationError, match=word):
        read_processor(file)


def test_options_go_before_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "do_normalize": False}))
    made = make_image_config(file, resize="256", crop="224", mean=[0.5], size="480x640")
    assert made == ImageConfig(resize=256, crop=(224, 224), mean=(0.5,), size=(480, 640))
    assert make_image_config(resize=256, crop=(20, 30), std=2.0) == ImageConfig(resize=256, crop=(20, 30), std=(2.0,))
    for preset, text in ((file, "for images"), (tmp_path / "nowhere.json", "cannot read"), (tmp_path.parent, "no pre")):
        with pytest.raises(OptimizationError, match=text):
            make_audio_config(preset)
    with pytest.raises(OptimizationError, match="HEIGHTxWIDTH"):
        make_image_config(crop="large")


# --- sound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "norm", "fmin", "fmax"),
    [("htk", "none", 0, None), ("slaney", "slaney", 0, 8000), ("slaney", "none", 90, 7600)],
)
def test_mel_filters_are_those_of_transformers(scale: str, norm: str, fmin: float, fmax: float | None) -> None:
    from transformers.audio_utils import mel_filter_bank

    made = mel_filters(AudioConfig(mels=40, fmin=fmin, fmax=fmax, mel_scale=scale, mel_norm=norm))
    theirs = mel_filter_bank(201, 40, fmin, fmax or 8000.0, 16000, None if norm == "none" else norm, scale)
    np.testing.assert_allclose(made, theirs.T, atol=1e-12)


@pytest.mark.parametrize("power", [1, 2])
def test_reference_is_the_spectrogram_of_transformers(power: int) -> None:
    from transformers.audio_utils import spectrogram, window_function

    config = AudioConfig(n_fft=256, hop=100, mels=32, power=power, log="db", top=50, floor=1e-10, pad_mode="constant")
    wave = sound(4000)
    theirs = spectrogram(
        wave, window_function(256, "hann"), 256, 100, power=float(power), mel_filters=mel_filters(config).T,
        log_mel="dB", min_value=1e-10, db_range=50.0, pad_mode="constant",
    )  # fmt: skip
    np.testing.assert_allclose(log_mel(config, wave), theirs, atol=2e-3)  # complex64 there, in dB


def test_whisper(tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(chunk_length=2)
    extractor.save_pretrained(tmp_path)
    path, plan = prepared(echo(tmp_path, ["n", 80, 200]), read_processor(tmp_path))
    assert plan.given.shape == ("n", "samples")
    for samples in (20000, 32000, 40001):
        waves = sound(2, samples, seed=samples)
        waves[1] *= 0.01
        theirs = extractor(list(waves), sampling_rate=16000, return_tensors="np")["input_features"]
        np.testing.assert_allclose(plan.reference(waves), theirs, atol=2e-4)
        for device in DEVICES:
            np.testing.assert_allclose(run(path, device, x=waves), theirs, atol=5e-4)


SOUNDS = {
    "keywords": (AudioConfig(n_fft=512, win=480, hop=160, mels=40, mean=(-3.0,), std=(2.5,)), ["n", 1, 40, 51]),
    "magnitude": (AudioConfig(n_fft=255, hop=100, mels=20, power=1, center=False, log="log10"), ["n", "t", 20]),
    "int16": (AudioConfig(mels=64, dtype="int16", log="db", top=60, pad_mode="constant"), ["n", 64, "t", 1]),
    "plain": (AudioConfig(mels=24, log="none", drop_last=True, std=tuple(range(1, 25))), ["n", "t", 24, 1]),
    "offset": (AudioConfig(mels=30, offset=1e-3, floor=0, mel_scale="slaney", samples=9000), ["n", 1, "t", 30]),
}  # fmt: skip


@pytest.mark.parametrize("case", SOUNDS)
def test_sound(case: str, tmp_path: Path) -> None:
    config, shape = SOUNDS[case]
    path, plan = prepared(echo(tmp_path, shape, opset=13 if case == "int16" else 20), config)
    samples = plan.given.shape[1]
    lengths = (samples,) if isinstance(samples, int) else (8000, 11111)
    for device in DEVICES:
        with open_session(path, device) as session:
            for length in lengths:
                waves = sound(2, length, seed=length)
                if config.dtype == "int16":
                    waves = np.rint(waves * 20000).astype(np.int16)
                wanted = plan.reference(waves)
                made = session.run({"x": waves})["y"]
                assert made.shape == wanted.shape
                np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-3 * max(1.0, float(wanted.std())))
                assert np.linalg.norm(made - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_empty_filters_are_said(tmp_path: Path) -> None:
    model = echo(tmp_path, ["n", 100, "t"])
    plan = plan_preprocessing(signature_of(onnx.load(model)), AudioConfig(n_fft=128, hop=64, mels=100))
    [note] = add_preprocessing(model, plan, tmp_path / "out.onnx").notes
    assert "mel filters lie between two bins" in note


# --- what cannot be --------------------------------------------------------------------------------------------------

_PLAIN: list[int | str] = ["n", 3, 24, 24]


@pytest.mark.parametrize(
    ("config", "shape", "word"),
    [
        (ImageConfig(input="z"), _PLAIN, "no input 'z'"),
        (ImageConfig(), ["n", 24], "float16 of 4 axes"),
        (ImageConfig(input="x"), ["n", 24], "cannot hold images"),
        (ImageConfig(), ["n", 5, 24, 24], "--model-layout"),
        (ImageConfig(), ["n", 3, 24, 3], "--model-layout"),
        (ImageConfig(model_layout="nchw"), ["n", "c", 24, 24], "its channels are not a number"),
        (ImageConfig(resize=(20, 24)), _PLAIN, "come out as 20x24"),
        (ImageConfig(resize=32), _PLAIN, "--crop 32"),
        (ImageConfig(resize=20, crop=(24, 24)), _PLAIN, "crop of 24x24"),
        (ImageConfig(crop=(24, 24)), _PLAIN, "too small"),
        (ImageConfig(size=(30, 30)), _PLAIN, "--resize 24x24"),
        (ImageConfig(resize=(24, 0)), _PLAIN, "1 to 16384 pixels"),
        (ImageConfig(resize=99999, crop=(24, 24)), _PLAIN, "1 to 16384 pixels"),
        (ImageConfig(resize=(24, 24), resample="lanczos"), _PLAIN, "bilinear, bicubic"),
        (ImageConfig(resize=(24, 24), resample="bicubic", antialias=False), _PLAIN, "--no-antialias"),
        (ImageConfig(mean=(1, 2)), _PLAIN, "one for each channel"),
        (ImageConfig(std=(1, 0, 1)), _PLAIN, "other than 0"),
        (ImageConfig(rescale=0), _PLAIN, "rescale"),
        (ImageConfig(color="bgr"), ["n", 1, 24, 24], "leave --color out"),
        (AudioConfig(), ["n", 40, 100], "no axis of 80"),
        (AudioConfig(), ["n", 80, 80], "--feature-layout"),
        (AudioConfig(layout="b1mt"), ["n", 80, 100], "feature layout"),
        (AudioConfig(samples=16000), ["n", 80, 100], "--samples 15840"),
        (AudioConfig(n_fft=4000), ["n", 80, 10], "smaller --n-fft"),
        (AudioConfig(win=500), ["n", 80, 100], "window"),
        (AudioConfig(fmax=9000), ["n", 80, 100], "half the sample rate"),
        (AudioConfig(floor=0), ["n", 80, 100], "logarithm of silence"),
        (AudioConfig(floor=1e-50), ["n", 80, 100], "logarithm of silence"),
        (AudioConfig(samples=1 << 40), ["n", 80, 100], "samples"),
        (AudioConfig(hop=0), ["n", 80, 100], "hop"),
        (AudioConfig(power=3), ["n", 80, 100], "power"),
        (AudioConfig(top=-1), ["n", 80, 100], "top"),
    ],
)
def test_refused(config: PreprocessConfig, shape: list[int | str], word: str, tmp_path: Path) -> None:
    with pytest.raises(OptimizationError) as caught:
        plan_preprocessing(signature_of(onnx.load(echo(tmp_path, shape))), config)
    assert word in str(caught.value)


def test_one_of_two_inputs_has_to_be_named() -> None:
    pair = Signature(tuple(TensorSpec(n, "float32", ("n", 3, 8, 8)) for n in ("left", "right")), ())
    with pytest.raises(OptimizationError, match=r"2 of the model's inputs .* --input NAME"):
        plan_preprocessing(pair, ImageConfig())
    assert plan_preprocessing(pair, ImageConfig(input="right")).given == TensorSpec("right", "uint8", ("n", 8, 8, 3))


# --- quantizers ------------------------------------------------------------------------------------------------------


def network(folder: Path, shape: list[int | str]) -> Path:
    """A convolution over the frames or rows, and a matrix product."""
    rng = np.random.default_rng(0)
    kernel = (16, shape[1], *([3] * (len(shape) - 2)))
    weights = {
        "w": rng.standard_normal(kernel) / 4, "v": rng.standard_normal((16, 64)) / 4,
        "u": rng.standard_normal((64, 64)) / 8,
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "v"], ["m"], name="first"),
        helper.make_node("MatMul", ["m", "u"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 64])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()],
    )  # fmt: skip
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Two networks that prepare their inputs, and inputs."""
    found = {}
    images = ImageConfig(resize=(24, 24), size=(40, 50), mean=MEAN, std=STD)
    for kind, shape, config, x in (
        ("image", ["n", 3, 24, 24], images, pictures(16, 40, 50, 3)),
        ("audio", ["n", 80, "t"], AudioConfig(mean=(-5.0,), std=(3.0,)), sound(16, 8000)),
    ):
        path, _ = prepared(network(tmp_path_factory.mktemp(kind), shape), config)
        found[kind] = path, x
    return found


def floats_of(path: Path) -> tuple[set[str], set[str]]:
    """Kernels that read and give plain float32: those that prepare the input, and the others."""
    model = onnx.load(path)
    made = {o: n for n in model.graph.node for o in n.output}
    stored = {t.name: t.data_type for t in model.graph.initializer}
    inner, outer = set(), set()
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        before = [made[i].op_type for i in node.input if i in made]
        if "DequantizeLinear" in before or "Cast" in before or any(stored.get(i) == 10 for i in node.input):
            continue
        (inner if node.name.startswith("preprocess/") else outer).add(node.name)
    return inner, outer


QUANTIZERS = [
    StaticConfig(),
    DynamicConfig(),
    WeightsConfig(block=16),
    HalfConfig("fp16", "storage"),
    HalfConfig("fp16", "native"),
]


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("config", QUANTIZERS, ids=lambda c: type(c).__name__)
def test_quantizers_leave_the_preprocessing_in_float(
    ready: dict[str, tuple[Path, Any]], kind: str, config: Any, tmp_path: Path, tools: Any
) -> None:
    path, x = ready[kind]
    before = onnx.load(path)
    kernels = [n for n in before.graph.node if n.name.startswith("preprocess/") and n.op_type in ("Conv", "MatMul")]
    target = tmp_path / "small.onnx"
    data = Dataset.from_arrays({"x": x}) if isinstance(config, StaticConfig) else None
    optimize(path, config, target, check=lambda _: None, open_model=tools.opener, data=data)
    inner, outer = floats_of(target)
    assert len(inner) == len(kernels) == 2
    assert not outer & {"first", "second"}
    want, have = tools.outputs_of(path, {"x": x}), tools.outputs_of(target, {"x": x})
    assert tools.sqnr(have, want) > 20
