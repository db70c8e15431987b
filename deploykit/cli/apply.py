"""`deploykit apply`."""

from __future__ import annotations

import click

from deploykit.cli import common


@click.command()
@click.argument("step")
@common.model_option
@common.output_option
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the step. Repeatable; a list is a,b,c."
)
@common.data_option("Real inputs for the comparison with the parent:")
@common.dim_option
@common.contract_option
@common.json_option
@common.dry_run_option
def command(
    step: str,
    model: str,
    output: str,
    settings: tuple[str, ...],
    data: str | None,
    dims: tuple[str, ...],
    contract: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
) -> None:
    """Apply STEP, which another distribution brings (`deploykit doctor` lists them); compared with its parent."""
    sizes, options = common.parse_dims(dims), _parse(settings)
    if dry_run:
        asked: dict[str, object] = {
            "name": step, "model": model, "options": options, "data": data, "dims": sizes, "contract": list(contract),
        }  # fmt: skip
        common.show_recipe("apply", asked)
        return
    from deploykit.pipeline import apply

    artifact = apply(
        step, model, output, options=options, data=data, dims=sizes, contract=contract, progress=common.progress()
    )
    if not as_json and not artifact.manifest.lineage[-1].params["changed"]:
        click.echo(f"{step} changed nothing")
    common.show_artifact(artifact, as_json=as_json)


def _parse(texts: tuple[str, ...]) -> dict[str, str]:
    """Read `--set KEY=VALUE`; what a value means is the step's matter.

    Raises:
        click.BadParameter: Not of the form, or twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, sep, value = text.partition("=")
        if not sep or not key.isidentifier():
            raise click.BadParameter(f"{text!r} is not KEY=VALUE.")
        if key in found:
            raise click.BadParameter(f"{key} is set twice.")
        found[key] = value
    return found
