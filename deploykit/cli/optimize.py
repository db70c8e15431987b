"""`deploykit optimize`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import target_options


@click.command()
@click.argument("source")
@click.option(
    "-o", "--output", required=True, metavar="DIR",
    help="Receives the winner, the front and the evidence; stands for the winner wherever a MODEL is taken.",
)  # fmt: skip
@common.data_option("Calibration data; without them, static schemes are left out:")
@target_options
@click.option(
    "--objective", type=click.Choice(["latency", "throughput", "size", "cost"]), default="latency", show_default=True,
    help="One request in flight; samples a second; bytes; or the time of a core that a sample takes.",
)  # fmt: skip
@click.option(
    "--max-latency-ms", type=click.FloatRange(0, min_open=True), metavar="MS",
    help="Most that a request may take, p50; for the objectives latency and size.",
)  # fmt: skip
@click.option(
    "--max-memory-mb", type=click.FloatRange(0, min_open=True), metavar="MB",
    help="Most memory of a process that serves it, in 10^6 bytes.",
)  # fmt: skip
@click.option("--max-size-mb", type=click.FloatRange(0, min_open=True), metavar="MB", help="Most of model and weights.")
@click.option(
    "--budget", "budget_s", type=common.seconds, default="10m", show_default=True, metavar="TIME",
    help="For all of it: 90s, 10m, 1h; only the export takes as long as it takes.",
)  # fmt: skip
@common.device_option
@click.option(
    "--batch", type=click.IntRange(1),
    help="Samples in one request. By default 1; for throughput and cost what is found best, where the model takes any.",
)  # fmt: skip
@common.dim_option
@common.contract_option
@click.option(
    "--scheme", "schemes", multiple=True, metavar="NAME",
    help="What to try, as for quantize sweep. Repeatable; the usual ones by default.",
)  # fmt: skip
@click.option("--native/--no-native", default=True, show_default=True, help="Accept bfloat16 where the CPU has it.")
@click.option("--tune/--no-tune", default=True, show_default=True, help="Search the runtimes' settings too.")
@click.option(
    "--min-cosine", type=click.FloatRange(-1, 1), default=0.95, show_default=True,
    help="Below, outputs count as wrong, whatever the target. The default lets one request of several get down to 0.9 "
    "where real data judge accuracy.",
)  # fmt: skip
@click.option("--dynamic", multiple=True, metavar="SPEC", help="Of the export; see deploykit export. Repeatable.")
@click.option("--input", "inputs", multiple=True, metavar="SPEC", help="Of the export. Repeatable.")
@click.option("--opset", type=int, help="Of the export.")
@click.option("--exporter", type=click.Choice(["auto", "torch.export", "torchscript"]), help="Of the export.")
@click.option("--task", metavar="TASK", help="Of the export of a Hugging Face model.")
@click.option("--part", metavar="PART", help="Of the export: one graph of a model that becomes several.")
@click.option(
    "--executor", default="local", show_default=True, metavar="WHERE",
    help="local, ray (a cluster of this machine), or ray://HOST:PORT.",
)  # fmt: skip
@click.option(
    "--shards", type=click.IntRange(1), help="Parts that calibration is spread over; as many as there are machines."
)
@click.option("--workers", type=click.IntRange(1), help="Jobs side by side; half as many as cores by default.")
@click.option("--cache", metavar="DIR", help="Where results of steps are kept; see deploykit cache dir.")
@click.option("--no-cache", is_flag=True, help="Keep no results of steps, and use none.")
@click.option("--fresh", is_flag=True, help="Measure anew what was measured earlier.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted search left in --output.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of orders and bootstraps.")
@common.json_option
def command(
    source: str,
    output: str,
    dims: tuple[str, ...],
    cache: str | None,
    no_cache: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Find the best deployment of a model on this machine: exported, quantized, tuned, measured, proven.

    SOURCE is what deploykit export takes, or an artifact. Every candidate is compared with the exported model, judged
    on real data where there are some, and timed beside the others; within --budget the best that keeps the target
    wins. DIR holds the Pareto front as artifacts, report.html with all that was tried and why it was dropped, and
    recipe.toml, which makes the winner again without the search.
    """
    if cache is not None and no_cache:
        raise click.UsageError("--cache does not go with --no-cache.")
    from deploykit.pipeline import optimize
    from deploykit.search.views import summary, table

    export = {k: given.pop(k) for k in ("dynamic", "inputs", "opset", "exporter", "task", "part")}
    export = {k: list(v) if isinstance(v, tuple) else v for k, v in export.items()}
    result = optimize(
        source, output, dims=common.parse_dims(dims), export_options=export,
        cache=False if no_cache else cache if cache is not None else True, progress=common.progress(), **given,
    )  # fmt: skip
    if as_json:
        common.show_json(result.document)
    else:
        common.show_table(*table(result.document))
        for line in summary(result.document):
            click.echo(line)
    if result.interrupted:
        raise KeyboardInterrupt
