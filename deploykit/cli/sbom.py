"""`deploykit sbom`."""

from __future__ import annotations

import click


@click.command()
@click.argument("artifact")
@click.option("-o", "--output", metavar="FILE", help="Where it is written; must not exist. Standard output by default.")
@click.option("--name", help="The model's name; the directory's by default.")
def command(artifact: str, output: str | None, name: str | None) -> None:
    """Write what an artifact is made of and by: CycloneDX 1.6, with a model card."""
    from deploykit.pipeline import sbom

    document = sbom(artifact, output, name=name)
    click.echo(document.decode() if output is None else f"written: {output}", nl=output is not None)
