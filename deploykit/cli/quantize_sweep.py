"""`deploykit quantize sweep`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import target_options


@click.command("sweep")
@common.model_option
@click.option("-o", "--output", required=True, metavar="DIR", help="Receives an artifact a scheme, and sweep.json.")
@common.data_option("Calibration data; without them, static schemes are left out:")
@click.option(
    "--scheme", "schemes", multiple=True, metavar="NAME",
    help="What to try: fp16, bf16, weights8, weights4, dynamic, static, static-auto, static-nncf, static-equalize, "
    "static-full, static-adaround. Repeatable; the quick ones by default.",
)  # fmt: skip
@target_options
@common.device_option
@common.dim_option
@click.option(
    "--min-cosine", type=click.FloatRange(-1, 1), default=0.95, show_default=True,
    help="Smallest accepted cosine between an output and the parent's.",
)  # fmt: skip
@common.contract_option
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples in a timed request.")
@click.option("--rounds", type=click.IntRange(3), default=5, show_default=True, help="Interleaved rounds.")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
    help="Timed seconds a model, device and round.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on where an interrupted sweep of the same model and data stopped.")
@common.json_option
def sweep(as_json: bool, dims: tuple[str, ...], **given: Any) -> None:
    """Try every scheme on one model: accuracy, speed in each runtime, size, and what really runs on integers."""
    from deploykit.pipeline import quantize_sweep
    from deploykit.sweeping import table

    model, output = given.pop("model"), given.pop("output")
    found = quantize_sweep(model, output, dims=common.parse_dims(dims), progress=common.progress(), **given)
    if as_json:
        click.echo(found.to_json(), nl=False)
    else:
        common.show_table(*table(found))
        for note in found.data["notes"]:
            click.echo(note)
    if found.interrupted:
        raise KeyboardInterrupt
