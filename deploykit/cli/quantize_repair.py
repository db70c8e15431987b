"""`deploykit quantize repair`."""

from __future__ import annotations

import click

from deploykit.cli import common


@click.command("repair")
@common.model_option
@common.output_option
@click.option("--exact", is_flag=True, help="Only what changes no bit of a run without fusions.")
@common.data_option("Real inputs for the comparison with the model as it came:")
@common.dim_option
@click.option(
    "--min-cosine", type=click.FloatRange(-1, 1), default=0.95, show_default=True,
    help="Smallest accepted cosine between an output and the one of the model as it came.",
)  # fmt: skip
@common.contract_option
@common.json_option
@common.dry_run_option
def repair(
    model: str,
    output: str,
    exact: bool,
    data: str | None,
    dims: tuple[str, ...],
    min_cosine: float,
    contract: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
) -> None:
    """Make a model that another tool quantized with Q/DQ pairs run on integers, with the same numbers."""
    sizes = common.parse_dims(dims)
    if dry_run:
        params = {
            "model": model, "exact": exact, "data": data, "dims": sizes, "min_cosine": min_cosine,
            "contract": list(contract),
        }  # fmt: skip
        common.show_recipe("quantize-repair", params)
        return
    from deploykit.optimizers import RepairConfig
    from deploykit.pipeline import quantize_repair

    artifact = quantize_repair(
        model, output, config=RepairConfig(exact=exact), data=data, dims=sizes, min_cosine=min_cosine,
        contract=contract, progress=common.progress(),
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)
