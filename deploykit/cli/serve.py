"""`deploykit serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deploykit.cli import common

if TYPE_CHECKING:
    from deploykit.serving.servers import Bound

_PORT = click.IntRange(0, 65535)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option("--name", "names", multiple=True, help="What clients call it; the directory's name by default. One each.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--http-port", type=_PORT, default=8080, show_default=True, help="0 for any that is free.")
@click.option("--grpc-port", type=_PORT, default=8081, show_default=True, help="0 for any that is free.")
@click.option("--admin-port", type=_PORT, help="Metrics and repository control; there are none without it.")
@click.option("--device", metavar="DEVICE", help="As its settings say by default, else the CPU in ONNX Runtime.")
@click.option("--tuned", metavar="FILE", help="Settings of a tuner, in place of those that the artifact brings.")
@click.option("--instances", type=click.IntRange(1), help="Processes a model.  [default: as tuned, else 1]")
@click.option("--threads", type=click.IntRange(1), help="Threads in one request.  [default: as tuned, else all cores]")
@click.option("--max-batch", type=click.IntRange(1), help="Rows that are joined.  [default: as tuned, else 1]")
@click.option(
    "--force-batching", is_flag=True, help="With --max-batch: also where a request's numbers depend on others."
)
@click.option(
    "--max-delay-ms", type=click.FloatRange(0, 60_000), default=0.0, show_default=True, metavar="MS",
    help="How long a request may wait for others where it could run.",
)  # fmt: skip
@click.option(
    "--queue", type=click.IntRange(1), default=128, show_default=True,
    help="Requests that may wait for a model; more are refused with 429.",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", type=common.seconds, default="60s", show_default=True, metavar="TIME",
    help="That any request may take.",
)  # fmt: skip
@click.option(
    "--load-timeout", "load_timeout_s", type=common.seconds, default="30m", show_default=True, metavar="TIME",
    help="That a model may take to be loaded and warm.",
)  # fmt: skip
@click.option(
    "--worker-memory", type=click.IntRange(64), metavar="MIB",
    help="Most memory of a model's process on the CPU.  [default: the machine's]",
)  # fmt: skip
@click.option(
    "--versions", default="latest:1", show_default=True, metavar="WHICH",
    help="That answer, of a directory of versions: latest:N, all, or 1,3.",
)  # fmt: skip
@click.option("--token-file", metavar="FILE", help="Bearer tokens, one a line; clients need one of them.")
@click.option("--tls-cert", metavar="FILE", help="Certificate chain of the server, PEM.")
@click.option("--tls-key", metavar="FILE", help="Its private key, PEM.")
@click.option("--client-ca", metavar="FILE", help="Clients need a certificate that one of these has signed.")
@click.option("--repository-api", is_flag=True, help="Load and unload models over the admin port.")
def command(models: tuple[str, ...], **rest: object) -> int:
    """Serve models over HTTP and gRPC: Open Inference Protocol, version 2.

    ARTIFACT is an artifact's directory, a directory of versions 1/, 2/, ... of such, or an .onnx file. A new version
    directory, or SIGHUP, swaps a model without a failed request. SIGTERM answers what was accepted, and ends.
    """
    from deploykit.serving_models import say_on_stderr, serve

    say_on_stderr()

    def on_ready(bound: Bound) -> None:
        scheme = "https" if rest["tls_cert"] else "http"
        places = [f"{scheme}://{rest['host']}:{bound.http}"]
        places += [f"grpc {rest['host']}:{bound.grpc}"] if bound.grpc is not None else []
        places += [f"admin {scheme}://{rest['host']}:{bound.admin}"] if bound.admin is not None else []
        click.echo(f"ready: {', '.join(places)}")

    return serve(models, on_ready=on_ready, **rest)  # type: ignore[arg-type]
