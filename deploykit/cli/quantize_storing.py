"""`deploykit quantize weights` and `half`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import exclude_option, goal_arguments, goal_options, plain_goal_options

_SIZES = ["16", "32", "64", "128", "256"]


def _cosine(default: float) -> common.Decorator:
    return click.option(
        "--min-cosine", type=click.FloatRange(-1, 1), default=default, show_default=True,
        help="Smallest accepted cosine between an output and the parent's.",
    )  # fmt: skip


@click.command("weights")
@common.model_option
@common.output_option
@click.option("--bits", type=click.Choice(["8", "4"]), default="8", show_default=True, help="Of a weight.")
@click.option(
    "--block", type=click.Choice(_SIZES), help="Inputs that share a scale; 128 with 8 bits, 32 with 4 by default."
)
@click.option(
    "--form", type=click.Choice(["qdq", "nbits"]), default="qdq", show_default=True,
    help="qdq: ONNX's own operators, opset 21; nbits: ONNX Runtime's MatMulNBits.",
)  # fmt: skip
@click.option("--no-embeddings", is_flag=True, help="Leave embedding tables in floating point.")
@exclude_option
@common.data_option("Real inputs for the comparison with the parent:")
@common.dim_option
@_cosine(0.95)
@goal_options
@common.contract_option
@common.json_option
@common.dry_run_option
def weights(
    model: str,
    output: str,
    bits: str,
    block: str | None,
    form: str,
    no_embeddings: bool,
    exclude: tuple[str, ...],
    data: str | None,
    dims: tuple[str, ...],
    min_cosine: float,
    contract: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **goal: Any,
) -> None:
    """Weights of products in blocks of 8 or 4 bits; activations stay float. Needs no data. For language models."""
    sizes = common.parse_dims(dims)
    size = None if block is None else int(block)
    if dry_run:
        params = {
            "model": model, "data": data, "dims": sizes, "bits": int(bits), "block": size, "form": form,
            "embeddings": not no_embeddings, "exclude": list(exclude), "min_cosine": min_cosine,
            "contract": list(contract), **goal_arguments(goal),
        }  # fmt: skip
        common.show_recipe("quantize-weights", params)
        return
    from deploykit.optimizers import WeightsConfig
    from deploykit.pipeline import quantize_weights

    config = WeightsConfig(int(bits), size, form, exclude, not no_embeddings)
    artifact = quantize_weights(
        model, output, config=config, data=data, dims=sizes, min_cosine=min_cosine, contract=contract,
        progress=common.progress(), **goal_arguments(goal),
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)


@click.command("half")
@common.model_option
@common.output_option
@click.option(
    "--precision", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True,
    help="bf16: the range of float32, and fewer digits.",
)  # fmt: skip
@click.option(
    "--compute", type=click.Choice(["auto", "storage", "native"]), default="auto", show_default=True,
    help="storage: smaller file, computed in as before; native: float16 throughout; auto: native if a --device can.",
)  # fmt: skip
@exclude_option
@common.data_option("Real inputs for the comparison with the parent:")
@common.dim_option
@_cosine(0.999)
@plain_goal_options
@common.contract_option
@common.json_option
@common.dry_run_option
def half(
    model: str,
    output: str,
    precision: str,
    compute: str,
    exclude: tuple[str, ...],
    data: str | None,
    dims: tuple[str, ...],
    min_cosine: float,
    contract: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **goal: Any,
) -> None:
    """Weights in 16-bit floating point: half the size. Needs no data."""
    sizes = common.parse_dims(dims)
    if dry_run:
        params = {
            "model": model, "data": data, "dims": sizes, "precision": precision, "compute": compute,
            "exclude": list(exclude), "min_cosine": min_cosine, "contract": list(contract), **goal_arguments(goal),
        }  # fmt: skip
        common.show_recipe("quantize-half", params)
        return
    from deploykit.optimizers import HalfConfig
    from deploykit.pipeline import quantize_half

    artifact = quantize_half(
        model, output, config=HalfConfig(precision, compute, exclude), data=data, dims=sizes, min_cosine=min_cosine,
        contract=contract, progress=common.progress(), **goal_arguments(goal),
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)
