"""`deploykit verify`."""

from __future__ import annotations

import click

from deploykit.cli import common


@click.command()
@common.model_option
@click.option("--against", metavar="MODEL", help="The reference; without one, the artifact's own golden outputs.")
@common.data_option("Real inputs:")
@common.dim_option
@common.device_option
@click.option(
    "--min-cosine", type=click.FloatRange(-1, 1),
    help="Accept other values down to this cosine, as for quantized models; strict equality by default.",
)  # fmt: skip
@common.json_option
def command(
    model: str,
    against: str | None,
    data: str | None,
    dims: tuple[str, ...],
    devices: tuple[str, ...],
    min_cosine: float | None,
    as_json: bool,
) -> None:
    """Check a model's files and its outputs; exit code 1 where they are not the reference's."""
    from deploykit.errors import ParityError
    from deploykit.pipeline import verify

    records = verify(
        model, against=against, data=data, devices=devices, dims=common.parse_dims(dims), min_cosine=min_cosine,
        progress=common.progress(),
    )  # fmt: skip
    if as_json:
        common.show_json(records)
    else:
        for record in records:
            click.echo(common.parity_line(record))
    bad = next((r for r in records if r["verdict"] != "passed"), None)
    if bad is not None:
        raise ParityError(
            f"{model} is not verified: {bad['verdict']} on {bad['device']}",
            hint="give --min-cosine for a quantized model"
            if min_cosine is None and bad["verdict"] == "failed"
            else None,
        )
