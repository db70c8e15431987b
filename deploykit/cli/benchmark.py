"""`deploykit benchmark`."""

from __future__ import annotations

from pathlib import Path

import click

from deploykit.cli import common


@click.command()
@click.option(
    "-m", "--model", "models", multiple=True, required=True, metavar="MODEL",
    help="Artifact, .onnx or .xml; the first is the reference. Repeatable.",
)  # fmt: skip
@click.option("-o", "--output", metavar="FILE", help="Write the report as JSON; must not exist.")
@common.device_option
@common.data_option("Inputs, with 'labels' for accuracy:")
@click.option("--threads", type=click.IntRange(1), help="Threads in one request; all allowed cores by default.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples in one request.")
@click.option("--rounds", type=click.IntRange(3), default=5, show_default=True, help="Interleaved rounds.")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True, help="Timed, a round."
)
@click.option(
    "--warmup", "warmup_s", type=click.FloatRange(0), default=1.0, show_default=True, help="Seconds before, a round."
)
@click.option(
    "--precision", type=click.Choice(["fp32", "native"]), default="fp32", show_default=True,
    help="fp32: no silent bf16 or TF32; native: as the runtime likes.",
)  # fmt: skip
@click.option(
    "--max-drop", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Accuracy that a winner may lose."
)
@click.option(
    "--min-cosine", type=click.FloatRange(-1, 1), default=0.95, show_default=True, help="Below, outputs count as wrong."
)
@common.dim_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the candidates.")
@click.option("--explain", is_flag=True, help="Profile each candidate afterwards: where its time goes, and the cure.")
@common.json_option
@common.dry_run_option
def command(
    models: tuple[str, ...],
    output: str | None,
    devices: tuple[str, ...],
    data: str | None,
    threads: int | None,
    batch: int,
    rounds: int,
    seconds: float,
    warmup_s: float,
    precision: str,
    max_drop: float,
    min_cosine: float,
    dims: tuple[str, ...],
    seed: int,
    explain: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Measure models on devices: interleaved rounds, a fresh process each, and a verdict that may be a tie.

    Candidates whose outputs are not the reference's are reported and not timed.
    """
    settings = {
        "data": data, "threads": threads, "batch": batch, "rounds": rounds, "seconds": seconds, "warmup_s": warmup_s,
        "precision": precision, "max_drop": max_drop, "min_cosine": min_cosine, "dims": common.parse_dims(dims),
        "seed": seed, "explain": explain or None,
    }  # fmt: skip
    if dry_run:
        common.show_recipe("benchmark", {"models": list(models), "devices": list(devices), **settings})
        return
    from deploykit.pipeline import benchmark
    from deploykit.staging import check_free, check_writable, write_file

    if output is not None:
        check_free(Path(output))
        check_writable(Path(output).parent)
    report = benchmark(models, devices=devices, progress=common.progress(), **settings)  # type: ignore[arg-type]
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        show_report(report)
    if output is not None:
        write_file(Path(output), report.to_json().encode())
    if report.interrupted:
        raise KeyboardInterrupt


def show_report(report: object) -> None:
    """Print the table and the verdict."""
    from deploykit.benchmarks.report import Report, table

    assert isinstance(report, Report)
    common.show_table(*table(report))
    machine = report.data["environment"]["machine"]
    settings = report.data["settings"]
    click.echo(
        f"{settings['rounds']} rounds of {settings['seconds']:g} s, batch {settings['batch']}, "
        f"{settings['threads'] or machine['cores_allowed']} threads, inputs: {settings['inputs']}; "
        f"noise floor {report.data['noise_floor']:.1%} (the reference against itself)"
    )
    click.echo(report.headline())
    for found in report.data.get("explain", {}).values():
        from deploykit.benchmarks.explain import explanation_text

        click.echo("\n" + explanation_text(found), nl=False)
