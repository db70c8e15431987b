"""`deploykit quantize dynamic` and `deploykit quantize static`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import goal_arguments, goal_options

_bits: common.Decorator = click.option(
    "--weight-bits", type=click.Choice(["auto", "8", "7"]), default="auto", show_default=True,
    help="auto: 7 where this CPU lacks VNNI, because 8-bit products saturate there.",
)  # fmt: skip
_exclude: common.Decorator = click.option(
    "--exclude",
    multiple=True,
    metavar="NODE",
    help="A node's name or an operator type that stays in floating point. Repeatable.",
)
_cosine: common.Decorator = click.option(
    "--min-cosine", type=click.FloatRange(-1, 1), default=0.95, show_default=True,
    help="Smallest accepted cosine between an output and the parent's.",
)  # fmt: skip
_per_tensor: common.Decorator = click.option(
    "--per-tensor", is_flag=True, help="One scale a weight, instead of one an output channel."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Quantize to 8 bits: dynamic or static."""


@command.command("dynamic")
@common.model_option
@common.output_option
@common.data_option("Real inputs for the comparison with the parent:")
@common.dim_option
@_exclude
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
            "model": model, "data": data, "dims": sizes, "exclude": list(exclude), "weight_bits": weight_bits,
            "per_channel": not per_tensor, "min_cosine": min_cosine, "contract": list(contract),
            **goal_arguments(goal),
        }  # fmt: skip
        common.show_recipe("quantize-dynamic", params)
        return
    from deploykit.optimizers import DynamicConfig
    from deploykit.pipeline import quantize_dynamic

    config = DynamicConfig(per_channel=not per_tensor, exclude=exclude, weight_bits=weight_bits)
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
    "--calibration",
    type=click.Choice(["minmax"]),
    default="minmax",
    show_default=True,
    help="How ranges come from data.",
)
@click.option("--batch", "batch_size", type=click.IntRange(1), default=8, show_default=True, help="Samples in one run.")
@click.option("--max-samples", type=click.IntRange(1), help="Calibration samples used at most; all by default.")
@_exclude
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
    calibration: str,
    batch_size: int,
    max_samples: int | None,
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
            "model": model, "data": data, "calibration": calibration, "batch_size": batch_size,
            "max_samples": max_samples, "exclude": list(exclude), "weight_bits": weight_bits,
            "per_channel": not per_tensor, "min_cosine": min_cosine, "contract": list(contract),
            **goal_arguments(goal),
        }  # fmt: skip
        common.show_recipe("quantize-static", params)
        return
    from deploykit.optimizers import StaticConfig
    from deploykit.pipeline import quantize_static

    config = StaticConfig(
        calibration=calibration, per_channel=not per_tensor, exclude=exclude, batch_size=batch_size,
        max_samples=max_samples, weight_bits=weight_bits,
    )  # fmt: skip
    artifact = quantize_static(
        model, output, data=data, config=config, min_cosine=min_cosine, contract=contract,
        progress=common.progress(), **goal_arguments(goal),
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)
