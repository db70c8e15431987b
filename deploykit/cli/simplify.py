"""`deploykit simplify`."""

from __future__ import annotations

import click

from deploykit.cli import common


@click.command()
@common.model_option
@common.output_option
@click.option(
    "--timeout", "timeout_s", type=common.seconds, metavar="SECONDS", default=300.0, show_default=True,
    help="Seconds for one simplifier.",
)  # fmt: skip
@common.data_option("Real inputs for the comparison with the parent:")
@common.dim_option
@common.contract_option
@common.json_option
@common.dry_run_option
def command(
    model: str,
    output: str,
    timeout_s: float,
    data: str | None,
    dims: tuple[str, ...],
    contract: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
) -> None:
    """Simplify the graph with onnxsim, else onnxslim; the result is compared with its parent."""
    sizes = common.parse_dims(dims)
    if dry_run:
        asked: dict[str, object] = {
            "model": model,
            "timeout_s": timeout_s,
            "data": data,
            "dims": sizes,
            "contract": list(contract),
        }
        common.show_recipe("simplify", asked)
        return
    from deploykit.pipeline import simplify

    artifact = simplify(
        model, output, timeout_s=timeout_s, data=data, dims=sizes, contract=contract, progress=common.progress()
    )
    if not as_json:
        params = artifact.manifest.lineage[-1].params
        click.echo(f"{params['tool']}: {params['nodes_before']} nodes -> {params['nodes_after']}")
    common.show_artifact(artifact, as_json=as_json)
