"""`deploykit smoke`."""

from __future__ import annotations

import os

import click

from deploykit.cli import common


@click.command()
@click.argument("directory", metavar="DIR")
@click.option("--url", metavar="URL", help="A server that has the model; without one, it runs in this process.")
@click.option(
    "--wire", type=click.Choice(["binary", "json"]), default="binary", show_default=True,
    help="How tensors travel in the Open Inference Protocol.",
)  # fmt: skip
@click.option("--wait", "wait_s", type=common.seconds, metavar="SECONDS", help="Wait until the server is ready.")
@click.option(
    "--timeout", "timeout_s", type=common.seconds, metavar="SECONDS", default=60.0, show_default=True,
    help="Seconds for one request.",
)  # fmt: skip
@click.option("--token-env", metavar="NAME", help="Environment variable that holds the server's bearer token.")
@click.option("--ca", metavar="FILE", help="Certificates that the server's is checked with.")
@common.json_option
def command(
    directory: str,
    url: str | None,
    wire: str,
    wait_s: float | None,
    timeout_s: float,
    token_env: str | None,
    ca: str | None,
    as_json: bool,
) -> None:
    """Ask the golden requests of a bundle, or of an artifact; exit code 1 where the answers are not the golden ones."""
    from deploykit.errors import PackageError, ParityError
    from deploykit.serving.smoke import smoke

    headers = {}
    if token_env is not None:
        token = os.environ.get(token_env)
        if not token:
            raise PackageError(f"the environment variable {token_env} is not set", expected="the bearer token")
        headers["Authorization"] = f"Bearer {token}"
    record = smoke(directory, url, wire=wire, wait_s=wait_s or 0.0, timeout_s=timeout_s, headers=headers, ca=ca)
    if as_json:
        common.show_json(record)
    else:
        for name in record["edited"]:
            click.echo(f"note: {name} was changed since it was packaged", err=True)
        worst = "" if record["max_abs"] is None else f", max deviation {record['max_abs']:.3e}"
        click.echo(f"{record['verdict']}: {record['cases']} golden requests, {record['against']}{worst}")
    if not record["passed"]:
        raise ParityError(f"{directory} does not answer its golden requests: {record.get('reason', 'unverifiable')}")
