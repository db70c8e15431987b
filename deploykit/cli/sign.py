"""`deploykit sign`."""

from __future__ import annotations

import click


@click.command()
@click.argument("artifact")
@click.option("--key", required=True, metavar="FILE", help="Private elliptic-curve key, PEM.")
@click.option("-o", "--output", metavar="FILE", help="The signature; by default ARTIFACT.sig. Must not exist.")
@click.option(
    "--password-env", metavar="NAME", help="Environment variable with the key's password, where it is encrypted."
)
def command(artifact: str, key: str, output: str | None, password_env: str | None) -> None:
    """Sign an artifact with a key of your own; `verify --public-key` checks it."""
    import os

    from deploykit.errors import DataError
    from deploykit.pipeline import sign

    if password_env is not None and password_env not in os.environ:
        raise DataError(f"there is no environment variable {password_env}", expected="the key's password in it")
    made = sign(artifact, key=key, output=output, password=os.environ[password_env] if password_env else None)
    click.echo(f"signed: {made}")
