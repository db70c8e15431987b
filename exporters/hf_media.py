"""Pictures and sound for Hugging Face models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import ValueRange
from deploykit.errors import ExportError
from deploykit.exporters.hf_inputs import Draw, Inputs
from deploykit.pictures import make_pictures
from deploykit.specs import Array, Dim, TensorSpec

SAMPLE_RATE = 16000


def image_inputs(config: Any, path: Path) -> Inputs:
    """`pixel_values` [batch, channels, height, width]; only the batch is dynamic by default."""
    height, width = _image_size(config, path)
    channels = int(getattr(config, "num_channels", 3))
    plan = ((1, height, width), (3, 2 * height, width), (2, height, 2 * width), (5, height, width))
    return Inputs(
        (TensorSpec("pixel_values", "float32", ("batch", channels, "height", "width")),),
        _pictures(channels),
        {"batch": 2, "height": height, "width": width},
        tuple({"batch": b, "height": h, "width": w} for b, h, w in plan),
        fixed=frozenset({"height", "width"}),
    )


def _pictures(channels: int) -> Draw:
    """Pictures [batch, channels, height, width]; other ones at every call."""
    calls = itertools.count()

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        shape = (sizes["batch"], channels, sizes["height"], sizes["width"])
        return {"pixel_values": make_pictures(shape, np.random.default_rng(next(calls))).astype(np.float32)}

    return draw


def _image_size(config: Any, path: Path) -> tuple[int, int]:
    """Height and width: what the preprocessor makes, else the config's, else 224 x 224."""
    found = _preprocessor(path)
    for name in ("crop_size", "size"):
        size = found.get(name)
        if isinstance(size, int):
            return size, size
        if isinstance(size, dict) and isinstance(size.get("height"), int) and isinstance(size.get("width"), int):
            return size["height"], size["width"]
        if isinstance(size, dict) and isinstance(size.get("shortest_edge"), int):
            return size["shortest_edge"], size["shortest_edge"]
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _preprocessor(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "preprocessor_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def audio_inputs(config: Any, path: Path, main: str, parameters: Sequence[str]) -> Inputs:
    """Waveforms [batch, samples], or spectrograms of the shape that the model's front end makes."""
    mels = next((int(m) for n in ("num_mel_bins", "input_feat_per_channel") if (m := getattr(config, n, None))), None)
    if main == "input_features" and hasattr(config, "max_source_positions") and "whisper" in config.model_type:
        fixed = (mels or 80, 2 * int(config.max_source_positions))
        return _spectrograms(main, lambda batch: (batch, *fixed), ("batch", *fixed))
    if main == "input_values" and mels and hasattr(config, "max_length"):  # audio spectrogram transformers
        fixed = (int(config.max_length), mels)
        return _spectrograms(main, lambda batch: (batch, *fixed), ("batch", *fixed))
    if main == "input_values":
        return _waveforms(config, path, parameters)
    width = mels or int(getattr(config, "feature_projection_input_dim", 0) or 0)
    if not width:
        raise ExportError(
            f"the shape of {main!r} does not follow from a config of type {config.model_type}",
            hint="export a module of your own: file.py:factory",
        )
    spec = TensorSpec(main, "float32", ("batch", "frames", width))
    draw = _noise(main, lambda sizes: (sizes["batch"], sizes["frames"], width))
    check = tuple({"batch": b, "frames": f} for b, f in ((1, 64), (3, 128), (2, 50)))
    return Inputs((spec,), draw, {"batch": 2, "frames": 64}, check)


def _spectrograms(name: str, shape: Callable[[int], tuple[int, ...]], dims: tuple[Dim, ...]) -> Inputs:
    return Inputs(
        (TensorSpec(name, "float32", dims),),
        _noise(name, lambda sizes: shape(sizes["batch"])),
        {"batch": 2},
        ({"batch": 1}, {"batch": 3}),
    )


def _waveforms(config: Any, path: Path, parameters: Sequence[str]) -> Inputs:
    """Half a second and more at 16 kHz; a mask where the model was trained with one."""
    found = _preprocessor(path).get("return_attention_mask")
    masked = "attention_mask" in parameters and bool(
        found if found is not None else getattr(config, "feat_extract_norm", "layer") == "layer"
    )
    names = ("input_values", "attention_mask") if masked else ("input_values",)
    length = SAMPLE_RATE // 2
    noise = _noise("input_values", lambda sizes: (sizes["batch"], sizes["samples"]))

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        made = noise(sizes)
        mask = np.ones(made["input_values"].shape, np.int64)
        mask[1::2, -sizes["samples"] // 4 :] = 0
        if masked:
            made = {"input_values": made["input_values"] * mask.astype(np.float32), "attention_mask": mask}
        return made

    specs = [TensorSpec("input_values", "float32", ("batch", "samples"))]
    specs += [TensorSpec(n, "int64", ("batch", "samples")) for n in names[1:]]
    plan = ((1, length), (3, length * 2), (2, length - length // 3), (4, length + 1))
    return Inputs(
        tuple(specs),
        draw,
        {"batch": 2, "samples": length},
        tuple({"batch": b, "samples": n} for b, n in plan),
        {n: ValueRange(1, 1) for n in names[1:]},
    )


def _noise(name: str, shape: Callable[[Mapping[str, int]], tuple[int, ...]]) -> Draw:
    """Normally distributed values; other ones at every call."""
    calls = itertools.count()

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        rng = np.random.default_rng(next(calls))
        return {name: rng.standard_normal(shape(sizes)).astype(np.float32)}

    return draw
