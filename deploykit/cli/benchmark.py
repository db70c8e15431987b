"""`deploykit benchmark`."""

from __future__ import annotations

from pathlib import Path

import click

from deploykit.cli import common


@click.command()
@click.option(
    "-m", "--model", "models", multiple=True, required=True, metavar="MODEL",
    help="Artifact, .onnx, .xml, or a .pt2 program for torch devices; the first is the reference. Repeatable.",
)  # fmt: skip
@click.option("-o", "--output", metavar="FILE", help="Write the report as JSON; must not exist.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run left beside --output.")
@common.device_option
@common.data_option("Inputs, with 'labels' for accuracy:")
@click.option(
    "--scenario", type=click.Choice(["latency", "offline", "server"]), default="latency", show_default=True,
    help="One request in flight; as many as pay; or requests at random times.",
)  # fmt: skip
@click.option(
    "--slo-p99-ms", type=click.FloatRange(0, min_open=True), metavar="MS",
    help="Server: find the highest rate whose p99 stays within.",
)  # fmt: skip
@click.option(
    "--concurrency", type=click.IntRange(1), help="Offline, server: requests in flight; found out by default."
)
@click.option("--threads", type=click.IntRange(1), help="Threads in one request; all allowed cores by default.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples in one request.")
@click.option("--rounds", type=click.IntRange(3), help="Interleaved rounds.  [default: 5]")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Timed, a round.  [default: 2]")
@click.option(
    "--screening", "preset", flag_value="screening", help="3 rounds of 3 s: enough to drop what is far behind."
)
@click.option("--decision", "preset", flag_value="decision", help="10 rounds of 10 s: enough to decide on 3 %.")
@click.option("--mlperf", "preset", flag_value="mlperf", help="10 rounds of 60 s: MLPerf's 600 s of a scenario.")
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
@click.option(
    "--confirm/--no-confirm", default=True, show_default=True,
    help="Measure the best three of three or more anew, to decide; not with --tune.",
)  # fmt: skip
@click.option("--tune", is_flag=True, help="Search the runtimes' settings first; with offline, for throughput.")
@click.option(
    "--budget",
    "budget_s",
    type=common.seconds,
    metavar="TIME",
    default="120s",
    show_default=True,
    help="For all of it, with --tune.",
)
@click.option(
    "--tuned", multiple=True, metavar="FILE", help="Measure with these settings too (--save-settings). Repeatable."
)
@click.option("--save-settings", metavar="FILE", help="Write the winner's settings, for open_session and serving.")
@common.dim_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the candidates.")
@click.option("--explain", is_flag=True, help="Profile each candidate afterwards: where its time goes, and the cure.")
@common.html_option
@common.markdown_option
@common.json_option
@common.dry_run_option
def command(
    models: tuple[str, ...],
    output: str | None,
    resume: bool,
    devices: tuple[str, ...],
    data: str | None,
    rounds: int | None,
    seconds: float | None,
    preset: str | None,
    dims: tuple[str, ...],
    html: str | None,
    markdown: str | None,
    as_json: bool,
    dry_run: bool,
    **rest: object,
) -> None:
    """Measure models on devices: interleaved rounds, a fresh process each, and a verdict that may be a tie.

    Candidates whose outputs are not the reference's are reported and not timed.
    """
    from deploykit.benchmarks.plan import DURATIONS

    _check_tuning(tune=bool(rest["tune"]))
    usual = DURATIONS[preset] if preset else (5, 2.0)
    settings = {
        "data": data, "rounds": rounds or usual[0], "seconds": seconds or usual[1], "dims": common.parse_dims(dims),
        **rest, "tuned": list(rest["tuned"]),  # type: ignore[call-overload]
    }  # fmt: skip
    if dry_run:
        common.show_recipe("benchmark", {"models": list(models), "devices": list(devices), **settings})
        return
    from deploykit.cli.report import check_views, write_views
    from deploykit.pipeline import benchmark
    from deploykit.staging import write_file

    check_views(html, markdown, output)
    if as_json and markdown == "-":
        raise click.UsageError("--json and --markdown - both write to standard output.")
    file = Path(output) if output is not None else None
    replace = _check_output(file, resume=resume)
    journal = _journal(file, resume=resume, keeps=not rest["tune"])
    report = benchmark(
        models, devices=devices, progress=common.progress(), journal=journal, resume=resume, **settings
    )  # fmt: skip
    # First what cannot be measured again in a moment; then the journal may go; the rest can be made from the report.
    if file is not None:
        write_file(file, report.to_json().encode(), replace=replace)
    if journal is not None and not report.interrupted:
        journal.unlink(missing_ok=True)
    if as_json:
        click.echo(report.to_json(), nl=False)
    elif markdown != "-" or report.interrupted:
        show_report(report)
    if report.interrupted:
        raise KeyboardInterrupt
    write_views(report, html, markdown)


def _check_tuning(*, tune: bool) -> None:
    """Refuse options that would be ignored.

    Raises:
        click.UsageError: There is one.
    """
    context = click.get_current_context()

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    if given("budget_s") and not tune:
        raise click.UsageError("--budget needs --tune.")
    if given("confirm") and context.params["confirm"] and tune:
        raise click.UsageError("--confirm does not go with --tune.")


def _check_output(file: Path | None, *, resume: bool) -> bool:
    """Refuse an output that is there; the report of an interrupted run may give way to the one that goes on."""
    import json

    from deploykit.errors import BenchmarkError
    from deploykit.staging import check_free, check_writable

    if file is None:
        if resume:
            raise BenchmarkError("--resume without --output", hint="name the report of the interrupted run: -o FILE")
        return False
    check_writable(file.parent)
    if resume and file.is_file():
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = None
        if isinstance(kept, dict) and kept.get("interrupted") is True:
            return True
        raise BenchmarkError(f"{file} is not the report of an interrupted run", hint="leave --resume out")
    check_free(file)
    return False


def _journal(file: Path | None, *, resume: bool, keeps: bool) -> Path | None:
    from deploykit.benchmarks.journal import Journal
    from deploykit.errors import BenchmarkError

    if file is None:
        return None
    if not keeps:
        if resume:
            raise BenchmarkError("--resume with --tune", expected="a measurement without a search")
        return None
    journal = Journal.beside(file)
    if resume and not journal.exists():
        raise BenchmarkError(f"there is nothing to resume: {journal} does not exist", hint="leave --resume out")
    if not resume and journal.exists():
        raise BenchmarkError(
            f"{journal} holds rounds of an interrupted run", hint="go on with it: --resume, or remove it"
        )
    return journal


def show_report(report: object) -> None:
    """Print the table and the verdict."""
    from deploykit.benchmarks.report import Report, table
    from deploykit.benchmarks.wording import summary

    assert isinstance(report, Report)
    common.show_table(*table(report))
    for line in summary(report):
        click.echo(line)
    for found in report.data.get("explain", {}).values():
        from deploykit.benchmarks.explain import explanation_text

        click.echo("\n" + explanation_text(found), nl=False)
