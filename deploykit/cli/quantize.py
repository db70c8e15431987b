"""`deploykit quantize`: `dynamic`, `static`, and the commands of the modules beside this one."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import exclude_option, goal_arguments, goal_options
from deploykit.cli.quantize_qat import qat
from deploykit.cli.quantize_repair import repair
from deploykit.cli.quantize_storing import half, weights
from deploykit.cli.quantize_sweep import sweep

_bits: common.Decorator = click.option(
    "--weight-bits", type=click.Choice(["auto", "8", "7"]), default="auto", show_default=True,
    help="auto: 7 where this CPU lacks VNNI, because 8-bit products saturate there.",
)  # fmt: skip
_cosine: common.Decorator = click.option(
    "--min-cosine", type=click.FloatRange(-1, 1), default=0.95, show_default=True,
    help="Smallest accepted cosine between an output and the parent's.",
)  # fmt: skip
_per_tensor: common.Decorator = click.option(
    "--per-tensor", is_flag=True, help="One scale a weight, instead of one an output channel."
)


class _Smooth(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2
    """ "off", "auto", or an alpha."""

    name = "off|auto|ALPHA"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        """Read it; anything else is wrong usage."""
        if value in ("off", "auto"):
            return str(value)
        try:
            alpha = float(str(value))
        except ValueError:
            alpha = -1.0
        if not 0 <= alpha <= 1:
            self.fail(f"{value!r} is not off, auto, or a number from 0 to 1", param, ctx)
        return alpha


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Make a model smaller and faster: fewer bits for weights, activations, or both; repair what others quantized."""


for _command in (weights, half, qat, sweep, repair):
    command.add_command(_command)


@command.command("dynamic")
@common.model_option
@common.output_option
@common.data_option("Real inputs for the comparison with the parent:")
@common.dim_option
@click.option(
    "--smooth", type=click.Choice(["auto", "off"]), default="auto", show_default=True,
    help="SmoothQuant of what layer normalizations give to products; needs no data.",
)  # fmt: skip
@exclude_option
@_bits
@_per_tensor
@_cosine
@goal_options
@common.contract_option
@common.json_option
@common.dry_run_option
def dynamic(
    model: str,
    output: str,
    data: str | None,
    dims: tuple[str, ...],
    smooth: str,
    exclude: tuple[str, ...],
    weight_bits: str,
    per_tensor: bool,
    min_cosine: float,
    contract: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **goal: Any,
) -> None:
    """int8 weights; activations are quantized while the model runs. Needs no data. For transformers and LSTMs."""
    sizes = common.parse_dims(dims)
    if dry_run:
        params = {
            "model": model, "data": data, "dims": sizes, "smooth": smooth, "exclude": list(exclude),
            "weight_bits": weight_bits,
            "per_channel": not per_tensor, "min_cosine": min_cosine, "contract": list(contract),
            **goal_arguments(goal),
        }  # fmt: skip
        common.show_recipe("quantize-dynamic", params)
        return
    from deploykit.optimizers import DynamicConfig
    from deploykit.pipeline import quantize_dynamic

    config = DynamicConfig(per_channel=not per_tensor, exclude=exclude, weight_bits=weight_bits, smooth=smooth)
    artifact = quantize_dynamic(
        model, output, config=config, data=data, dims=sizes, min_cosine=min_cosine, contract=contract,
        progress=common.progress(), **goal_arguments(goal),
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)


@command.command("static")
@common.model_option
@common.output_option
@common.data_option("Calibration data:", required=True)
@click.option(
    "--engine",
    type=click.Choice(["deploykit", "nncf", "both"]),
    default="deploykit",
    show_default=True,
    help="Who quantizes: DeployKit, NNCF with a repair behind it, or both, and the better model is kept.",
)
@click.option(
    "--calibration",
    type=click.Choice(["minmax", "percentile", "entropy", "mse", "auto"]),
    default="minmax",
    show_default=True,
    help="How ranges come from what the data show; auto: mse where that is much better than minmax.",
)
@click.option(
    "--percentile",
    type=click.FloatRange(50, 100, min_open=True),
    default=99.99,
    show_default=True,
    help="Share of values inside the range, for --calibration percentile.",
)
@click.option("--save-calibration", metavar="FILE", help="Keep what the data showed, for --merge in other runs.")
@click.option(
    "--merge",
    multiple=True,
    metavar="FILE",
    help="What another run with --save-calibration was shown counts too; in any order. Repeatable.",
)
@click.option("--batch", "batch_size", type=click.IntRange(1), default=8, show_default=True, help="Samples in one run.")
@click.option("--max-samples", type=click.IntRange(1), help="Calibration samples used at most; all by default.")
@click.option(
    "--smooth",
    type=_Smooth(),
    default="auto",
    show_default=True,
    metavar="off|auto|ALPHA",
    help="SmoothQuant: move outliers of activations into weights; auto searches alpha for each activation.",
)
@click.option("--equalize", is_flag=True, help="Cross-layer equalization of neighbouring convolutions.")
@click.option(
    "--bias-correction",
    type=click.Choice(["auto", "off", "fast", "full"]),
    default="auto",
    show_default=True,
    help="Take the mean of the rounding errors out: of each layer alone (fast; auto: for transformers), or of the "
    "quantized model up to it (full).",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "adaround"]),
    default="nearest",
    show_default=True,
    help="adaround: learn whether each weight is rounded up or down (minutes).",
)
@exclude_option
@_bits
@_per_tensor
@_cosine
@goal_options
@common.contract_option
@common.json_option
@common.dry_run_option
def static(
    model: str,
    output: str,
    data: str,
    engine: str,
    calibration: str,
    percentile: float,
    save_calibration: str | None,
    merge: tuple[str, ...],
    batch_size: int,
    max_samples: int | None,
    smooth: str | float,
    equalize: bool,
    bias_correction: str,
    rounding: str,
    exclude: tuple[str, ...],
    weight_bits: str,
    per_tensor: bool,
    min_cosine: float,
    contract: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **goal: Any,
) -> None:
    """uint8 activations and int8 weights, ranges from calibration data. For convolutional nets and transformers."""
    if dry_run:
        params = {
            "model": model, "data": data, "engine": engine, "calibration": calibration, "percentile": percentile,
            "save_calibration": save_calibration, "merge": list(merge), "batch_size": batch_size,
            "max_samples": max_samples, "smooth": smooth, "equalize": equalize, "bias_correction": bias_correction,
            "rounding": rounding, "exclude": list(exclude), "weight_bits": weight_bits,
            "per_channel": not per_tensor, "min_cosine": min_cosine, "contract": list(contract),
            **goal_arguments(goal),
        }  # fmt: skip
        common.show_recipe("quantize-static", params)
        return
    from deploykit.optimizers import StaticConfig
    from deploykit.pipeline import quantize_static

    config = StaticConfig(
        calibration=calibration, percentile=percentile, save_calibration=save_calibration, merge=merge,
        per_channel=not per_tensor, exclude=exclude, batch_size=batch_size,
        max_samples=max_samples, weight_bits=weight_bits, smooth=smooth, equalize=equalize,
        bias_correction=bias_correction, rounding=rounding, engine=engine,
    )  # fmt: skip
    artifact = quantize_static(
        model, output, data=data, config=config, min_cosine=min_cosine, contract=contract,
        progress=common.progress(), **goal_arguments(goal),
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)
