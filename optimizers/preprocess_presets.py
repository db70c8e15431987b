"""Configs out of a Hugging Face `preprocessor_config.json`, and of what stands on a command line or in a recipe.

Only processors are read whose steps are known to be ours; of others, guessing would prepare images a little differently
from those that the model was trained on, which no error would ever show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploykit.errors import OptimizationError, first_line
from deploykit.optimizers.preprocess_config import AudioConfig, ImageConfig, PreprocessConfig

_LIMIT_BYTES = 32 * 2**20  # old ones of Whisper list their mel filters


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a processor does where its config says nothing; None where its versions differ, so that it has to be said.

    Attributes:
        size: What one number for a size means: "square", or "shorter" for the shorter edge.
        resample: As Pillow numbers it.
        crop: Whether it crops; False also where a size for that is there.
        normalizes: Whether it does, or else has no such step.
    """

    size: str | None
    resample: int | None
    crop: bool | None = False
    normalizes: bool = True


# Those of resize, center crop, rescale and normalize, in this order.
_STANDARD = {
    "ViT": _Kind("square", 2),
    "DeiT": _Kind("square", 3, crop=True),
    "Beit": _Kind("square", 3, crop=None),
    "Segformer": _Kind("square", 2),
    "Siglip": _Kind(None, 3),
    "EfficientNet": _Kind("square", None),
    "CLIP": _Kind("shorter", 3, crop=True),
    "ConvNext": _Kind("shorter", 3),
    "Bit": _Kind("shorter", 3, crop=True),
    "MobileNetV1": _Kind("shorter", 2, crop=True),
    "MobileNetV2": _Kind("shorter", 2, crop=True),
    "MobileViT": _Kind("shorter", None, crop=True, normalizes=False),
}
_NAMELESS = _Kind(None, None, crop=None)
_RESAMPLES = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
# Steps of ours, and what does not concern pictures of three channels or what comes after them.
_KNOWN_STEPS = frozenset(
    {
        "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_flip_channel_order", "do_convert_rgb",
        "do_reduce_labels",
    }
)  # fmt: skip
# From this size on, ConvNeXT's processor squeezes pictures into a square, and crops nothing.
_CONVNEXT_SQUARE = 384
_WHISPER = "Whisper"
_SIZE = re.compile(r"(\d{1,6})(?:\s*[x,]\s*(\d{1,6}))?")


def read_processor(path: str | Path) -> PreprocessConfig:
    """Read a `preprocessor_config.json`, or a `processor_config.json` with one in it.

    Args:
        path: The file, or its directory: a Hugging Face model, or the artifact that was exported from one.

    Raises:
        OptimizationError: It cannot be read, or means something that is not offered.
    """
    file = Path(path)
    if file.is_dir():
        names = ("preprocessor_config.json", "processor_config.json")
        found = [p for folder in (file, file / "assets") for n in names if (p := folder / n).is_file()]
        if not found:
            raise OptimizationError(f"{file} holds no preprocessor_config.json", hint="give the options one by one")
        file = found[0]
    table = _load(file)
    for nested in ("image_processor", "feature_extractor"):
        inner = table.get(nested)
        if isinstance(inner, dict):
            table = inner
            break
    kind = table.get("image_processor_type") or table.get("feature_extractor_type") or ""
    name = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", kind) if isinstance(kind, str) else ""
    if name == _WHISPER:
        return _whisper(_Table(file, table))
    if name in _STANDARD or (not name and "image_mean" in table):
        return _image(_Table(file, table), name)
    raise OptimizationError(
        f"{file} is of a {kind or 'nameless processor'}", expected=f"one of {', '.join([*_STANDARD, _WHISPER])}",
        hint="give its steps as options: --resize, --crop, --mean, --std; --n-fft, --hop, --mels",
    )  # fmt: skip


def _load(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LIMIT_BYTES:
            raise OptimizationError(f"{file} is larger than {_LIMIT_BYTES} bytes", hint="give the options one by one")
        table = json.loads(file.read_bytes())
    except OSError as exc:
        raise OptimizationError(
            f"cannot read {file}: {exc.strerror or exc}", expected="a preprocessor_config.json"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise OptimizationError(f"{file} is not JSON ({first_line(exc)})", hint="fetch it again") from exc
    if not isinstance(table, dict):
        raise OptimizationError(f"{file} holds no table", expected="a preprocessor_config.json")
    return table


class _Table:
    """A config whose values are checked as they are read; a default of None means that it has to be there."""

    def __init__(self, file: Path, table: dict[str, Any]) -> None:
        self.file = file
        self.table = table

    def truth(self, key: str, default: bool | None) -> bool:
        found: bool = self._of(key, default, bool, "true or false")
        return found

    def whole(self, key: str, default: int | None) -> int:
        found: int = self._of(key, default, int, "a whole number")
        return found

    def number(self, key: str, default: float) -> float:
        return float(self._of(key, default, (int, float), "a number"))

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.table.get(key)
        values: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise self.wrong(key, "numbers")
        return tuple(float(v) for v in values)

    def pair(self, key: str) -> tuple[int, int]:
        """A height and a width."""
        value = self.table.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value, value
        if isinstance(value, dict) and set(value) == {"height", "width"} and _are_whole(value):
            return value["height"], value["width"]
        raise self.wrong(key, '{"height": …, "width": …}')

    def wrong(self, key: str, expected: str) -> OptimizationError:
        value = str(self.table.get(key))
        return OptimizationError(
            f"{self.file}: {key} is {value:.80}", expected=expected, hint="give the options one by one"
        )

    def _of(self, key: str, default: Any, kind: Any, expected: str) -> Any:
        value = self.table.get(key, default)
        value = default if value is None else value
        if value is None:
            raise OptimizationError(
                f"{self.file} does not say {key}, and versions of its processor differ in that",
                expected=expected, hint="write it there, or give the options one by one",
            )  # fmt: skip
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(key, expected)
        return value


def _are_whole(table: Mapping[str, Any]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) for v in table.values())


def _image(table: _Table, name: str) -> ImageConfig:
    kind = _STANDARD.get(name, _NAMELESS)
    _refuse_odd(table, name, kind)
    resize, crop = None, None
    resample = "bilinear"
    if table.truth("do_resize", True):
        resize, crop = _resize(table, name, kind)
        found = _RESAMPLES.get(table.whole("resample", kind.resample))
        if found is None:
            raise table.wrong("resample", "2 (bilinear) or 3 (bicubic)")
        resample = found
    cropped = table.table.get("crop_size") is not None
    if table.truth("do_center_crop", kind.crop if cropped or kind.crop else False):
        own = table.pair("crop_size")
        if crop not in (None, own):  # a crop of a crop may begin a pixel beside that of the whole
            raise table.wrong("crop_size", f"{crop[0]}x{crop[1]}, to which the resize crops already")
        crop = own
    rescales = table.truth("do_rescale", True)
    rescale = table.number("rescale_factor", 1 / 255) if rescales else 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if kind.normalizes and table.truth("do_normalize", True):
        mean, std = table.numbers("image_mean"), table.numbers("image_std")
    if rescales and table.truth("rescale_offset", False):  # one is subtracted before the mean
        mean = tuple(m + 1 for m in mean or (0.0,))
    if name == "EfficientNet" and table.truth("include_top", True):  # divided by the deviation once more
        std = tuple(s * s for s in std) or table.numbers("image_std")
    flipped = table.truth("do_flip_channel_order", name == "MobileViT")
    return ImageConfig(
        resize=resize, crop=crop, resample=resample, rescale=rescale, mean=mean, std=std,
        model_color="bgr" if flipped else "rgb",
    )  # fmt: skip


def _refuse_odd(table: _Table, name: str, kind: _Kind) -> None:
    """Refuse steps that are not ours, and those that this processor has not got: what was meant by them is not known.

    Raises:
        OptimizationError: There is one.
    """
    given = {k for k, v in table.table.items() if v not in (None, False)}
    odd = sorted(k for k in given if k.startswith("do_") and k not in _KNOWN_STEPS)
    # An old config's limit of the longer edge.
    odd += [k for k in ("crop_pct", "max_size") if k in given and (k, name) != ("crop_pct", "ConvNext")]
    if name != "EfficientNet":
        odd += [k for k in ("rescale_offset",) if k in given]
    if name not in ("MobileViT", ""):
        odd += [k for k in ("do_flip_channel_order",) if k in given]
    if not kind.normalizes:
        odd += [k for k in ("do_normalize",) if k in given]
    if odd:
        raise table.wrong(odd[0], "a step that is offered: resize, center crop, rescale, normalize")


def _resize(table: _Table, name: str, kind: _Kind) -> tuple[tuple[int, int] | int, tuple[int, int] | None]:
    """What an image is resized to, and what that crops by itself."""
    size = table.table.get("size")
    shorter: Any = size.get("shortest_edge") if isinstance(size, dict) and set(size) == {"shortest_edge"} else None
    if isinstance(size, int) and kind.size == "shorter":
        shorter = size
    if shorter is None:
        if (isinstance(size, int) and kind.size is None) or name == "ConvNext":
            raise table.wrong("size", '{"height": …, "width": …} or {"shortest_edge": …}, as the processor takes it')
        return table.pair("size"), None
    if not isinstance(shorter, int) or isinstance(shorter, bool) or shorter < 1:
        raise table.wrong("size", "whole numbers")
    if name != "ConvNext":
        return shorter, None
    if shorter >= _CONVNEXT_SQUARE:
        return (shorter, shorter), None
    share = table.number("crop_pct", 224 / 256)
    if not 0 < share <= 1:
        raise table.wrong("crop_pct", "a share of 0 to 1")
    return int(shorter / share), (shorter, shorter)


def _whisper(table: _Table) -> AudioConfig:
    if table.number("dither", 0.0):
        raise table.wrong("dither", "0: random numbers have no place in a graph")
    if table.truth("do_normalize", False):
        raise table.wrong("do_normalize", "false")
    if table.number("padding_value", 0.0):
        raise table.wrong("padding_value", "0: silence")
    if table.table.get("padding_side") not in (None, "right"):
        raise table.wrong("padding_side", "right")
    rate = table.whole("sampling_rate", 16000)
    return AudioConfig(
        sample_rate=rate, n_fft=table.whole("n_fft", 400), hop=table.whole("hop_length", 160),
        mels=table.whole("feature_size", 80), fmin=0.0, fmax=8000.0, mel_scale="slaney", mel_norm="slaney",
        drop_last=True, log="log10", floor=1e-10, top=8.0, mean=(-4.0,), std=(4.0,),
        samples=table.whole("chunk_length", 30) * rate,
    )  # fmt: skip


def make_image_config(preset: str | Path | None = None, **given: Any) -> ImageConfig:
    """A config out of a preset and what is given beside it, which goes before the preset.

    Args:
        preset: As for `read_processor`.
        **given: Fields of `ImageConfig`; sizes also as "HEIGHTxWIDTH", the resize as "EDGE". None means not given.

    Raises:
        OptimizationError: The preset is none for images, or a size cannot be read.
    """
    base = ImageConfig() if preset is None else read_processor(preset)
    if not isinstance(base, ImageConfig):
        raise OptimizationError(f"{preset} is for sound", hint="use: deploykit preprocess audio")
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("resize", "crop", "size"):
        if key in given:
            size = given[key]
            text = "x".join(map(str, size)) if isinstance(size, list | tuple) else str(size)
            given[key] = read_size(key, text, edge=key == "resize")
    return replace(base, **_with_tuples(given))


def make_audio_config(preset: str | Path | None = None, **given: Any) -> AudioConfig:
    """A config out of a preset and what is given beside it, which goes before the preset.

    Args:
        preset: As for `read_processor`.
        **given: Fields of `AudioConfig`. None means not given.

    Raises:
        OptimizationError: The preset is none for sound.
    """
    base = AudioConfig() if preset is None else read_processor(preset)
    if not isinstance(base, AudioConfig):
        raise OptimizationError(f"{preset} is for images", hint="use: deploykit preprocess image")
    return replace(base, **_with_tuples({key: value for key, value in given.items() if value is not None}))


def _with_tuples(given: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as tuples, and one mean or deviation for all as such, too."""
    one = {key: (value,) for key, value in given.items() if key in ("mean", "std") and isinstance(value, int | float)}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()} | one


def read_size(name: str, text: str, *, edge: bool = False) -> tuple[int, int] | int:
    """Read "HEIGHTxWIDTH"; one number is a square, or the shorter edge.

    Raises:
        OptimizationError: It is neither.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise OptimizationError(f"{name} {text!r}", expected="HEIGHTxWIDTH in pixels, or one number")
    if match[2] is None:
        return int(match[1]) if edge else (int(match[1]), int(match[1]))
    return int(match[1]), int(match[2])
