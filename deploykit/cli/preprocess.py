"""`deploykit preprocess image` and `audio`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from deploykit.cli import common

_HOW = ("data", "dims", "min_cosine", "contract")


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2
    """One number, or several with commas between them."""

    name = "NUMBER,…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Read them; anything else is wrong usage."""
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers, like 0.485,0.456,0.406", param, ctx)


def _choice(option: str, values: list[str], text: str) -> common.Decorator:
    return click.option(option, type=click.Choice(values), help=text)


def _shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """What both commands take."""
    decorators: list[common.Decorator] = [
        common.model_option,
        common.output_option,
        click.option("--input", "name", metavar="NAME", help="The input; needed where several could be meant."),
        click.option(
            "--from",
            "preset",
            metavar="FILE",
            help="A preprocessor_config.json of Hugging Face, or the directory of one; options go before it.",
        ),
        click.option("--mean", type=_Numbers(), help="Subtracted at the end; one number, or one each."),
        click.option("--std", type=_Numbers(), help="What is divided by after that."),
    ]
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def _checks(function: Callable[..., Any]) -> Callable[..., Any]:
    """How the result is compared and shown."""
    decorators: list[common.Decorator] = [
        common.data_option("Real inputs, as the result takes them, for the comparison with the parent:"),
        common.dim_option,
        click.option(
            "--min-cosine",
            type=click.FloatRange(-1, 1),
            help="Smallest accepted cosine between an output and the parent's. Default: equality; 0.99 where the "
            "parent is quantized.",
        ),
        common.contract_option,
        common.json_option,
        common.dry_run_option,
    ]
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Let a model take decoded images, or samples of sound: what prepares them becomes a part of its graph."""


@command.command("image")
@_shared
@click.option("--resize", metavar="SIZE", help="HEIGHTxWIDTH, or the length of the shorter edge.")
@click.option("--crop", metavar="SIZE", help="Cut out of the middle, after that: HEIGHTxWIDTH, or one number for both.")
@_choice("--resample", ["bilinear", "bicubic"], "How; bilinear by default.")
@click.option(
    "--antialias/--no-antialias", default=None,
    help="Whether what shrinks is filtered, as in Pillow and torchvision (the default).",
)  # fmt: skip
@click.option("--rescale", type=float, help="What levels are multiplied by; 1/255 by default.")
@_choice("--layout", ["nhwc", "nchw"], "Of the images given; nhwc by default, as they are decoded.")
@_choice("--color", ["rgb", "bgr"], "Order of the channels given; rgb by default.")
@_choice("--model-color", ["rgb", "bgr"], "Order of the channels that the model takes; rgb by default.")
@_choice("--model-layout", ["nhwc", "nchw"], "Of the model's input, where its shape does not tell.")
@click.option("--size", metavar="HEIGHTxWIDTH", help="Of all images given. Default: each batch has its own.")
@_checks
def image(**given: Any) -> None:
    """uint8 images of any size: resize, center crop, rescale, normalize."""
    _run("preprocess-image", given)


@command.command("audio")
@_shared
@click.option("--sample-rate", type=int, metavar="HZ", help="16000 by default.")
@click.option("--n-fft", type=int, metavar="SAMPLES", help="Of a Fourier transform; 400 by default.")
@click.option("--win", type=int, metavar="SAMPLES", help="Of the Hann window in its middle; all of it by default.")
@click.option("--hop", type=int, metavar="SAMPLES", help="From frame to frame; 160 by default.")
@click.option("--mels", type=int, metavar="NUMBER", help="Of mel filters; 80 by default.")
@click.option("--fmin", type=float, metavar="HZ", help="Where the lowest begins; 0 by default.")
@click.option("--fmax", type=float, metavar="HZ", help="Where the highest ends; half the sample rate by default.")
@_choice("--mel-scale", ["htk", "slaney"], "htk by default, as in torchaudio; slaney is librosa's and Whisper's.")
@_choice("--mel-norm", ["none", "slaney"], "slaney: filters of equal area.")
@click.option("--power", type=click.IntRange(1, 2), help="2: power (the default); 1: magnitude.")
@click.option("--center/--no-center", default=None, help="Whether frames are centered at their time (the default).")
@_choice("--pad-mode", ["reflect", "constant"], "What stands before and behind the sound then; reflect by default.")
@click.option("--drop-last/--keep-last", default=None, help="Leave the last frame out, as Whisper does.")
@_choice("--log", ["none", "ln", "log10", "db"], "ln by default.")
@click.option("--offset", type=float, help="Added before the logarithm.")
@click.option("--floor", type=float, help="Raise smaller values to this before the logarithm; 1e-10 by default.")
@click.option(
    "--top", type=float, help="Raise values further than this below a waveform's largest: 8 in Whisper, 80 dB."
)
@click.option(
    "--samples", type=int, metavar="NUMBER", help="Pad shorter waveforms with zeros to this, cut longer ones."
)
@_choice("--dtype", ["float32", "int16"], "Of the samples: float32 in -1 to 1 (the default), or int16.")
@click.option(
    "--feature-layout", "layout", type=click.Choice(["bmt", "btm", "b1mt", "b1tm", "bmt1", "btm1"]),
    help="Of the model's input (batch, mel filters, time, axes of size 1), where its shape does not tell.",
)  # fmt: skip
@_checks
def audio(**given: Any) -> None:
    """Waveforms: windowed Fourier transforms, mel filters, logarithm, as Whisper, torchaudio and librosa have them."""
    _run("preprocess-audio", given)


def _run(step: str, given: dict[str, Any]) -> None:
    model, output = given.pop("model"), given.pop("output")
    as_json, dry_run = given.pop("as_json"), given.pop("dry_run")
    how = {key: given.pop(key) for key in _HOW}
    how |= {"dims": common.parse_dims(how["dims"]), "contract": list(how["contract"])}
    given["input"] = given.pop("name")
    if dry_run:
        common.show_recipe(step, {"model": model, **given, **how})
        return
    from deploykit.optimizers import make_audio_config, make_image_config
    from deploykit.pipeline import preprocess

    make_config = make_image_config if step == "preprocess-image" else make_audio_config
    artifact = preprocess(model, output, config=make_config(**given), progress=common.progress(), **how)
    common.show_artifact(artifact, as_json=as_json)
