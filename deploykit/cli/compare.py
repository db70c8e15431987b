"""`deploykit compare`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from deploykit.cli import common
from deploykit.errors import BenchmarkError

# Neither an error (1) nor wrong usage (2): the comparison was made, and says no.
FAILED = 3


@click.command()
@click.argument("old")
@click.argument("new")
@click.option(
    "--fail-if", "fail_if", multiple=True, metavar="CONDITION",
    help="End with 3 where a candidate's change meets it: METRIC, one of < <= > >=, and a number with %, pt, ms or MB. "
    "latency>5% means slower by more than 5 % with confidence. Metrics: latency, p90, p99, throughput, rate, size, "
    "memory, load, accuracy, f1, verdict. Repeatable.",
)  # fmt: skip
@click.option(
    "--match", "match", multiple=True, metavar="OLD=NEW",
    help="A model, or 'name on device', that is called differently in the new report. Repeatable.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Judge by the measured change alone, not by its interval.")
@click.option("--allow-missing", is_flag=True, help="Candidates may be gone, or out of the race.")
@click.option("--allow-different-machine", is_flag=True, help="Compare reports of different machines.")
@click.option("--allow-different-settings", is_flag=True, help="Compare reports measured in different ways.")
@common.markdown_option
@common.json_option
def command(
    old: str,
    new: str,
    fail_if: tuple[str, ...],
    match: tuple[str, ...],
    strict: bool,
    allow_missing: bool,
    allow_different_machine: bool,
    allow_different_settings: bool,
    markdown: str | None,
    as_json: bool,
) -> int:
    """Compare the report NEW with OLD, both written by `deploykit benchmark -o`.

    Ends with 0 where every condition holds, with 3 where one failed or a candidate is missing, and with 1 where the two
    cannot be compared.
    """
    from deploykit.benchmarks.page_drawing import clean
    from deploykit.cli.report import check_views, write_text
    from deploykit.pipeline import compare

    check_views(None, markdown)
    if as_json and markdown == "-":
        raise click.UsageError("--json and --markdown - both write to standard output.")
    found = compare(
        old, new, fail_if=fail_if, match=_parse_matches(match), strict=strict, allow_missing=allow_missing,
        allow_different_machine=allow_different_machine, allow_different_settings=allow_different_settings,
    )  # fmt: skip
    if as_json:
        common.show_json(found.as_dict())
    elif markdown != "-":
        header, rows = found.table()
        common.show_table(header, [[clean(cell) for cell in row] for row in rows])
        for line in (*found.lines(), found.headline()):
            click.echo(clean(line))
    if markdown is not None:
        write_text(markdown, found.to_markdown())
    return FAILED if found.failed else 0


def _parse_matches(texts: Sequence[str]) -> dict[str, str]:
    """Read `--match OLD=NEW`.

    Raises:
        BenchmarkError: Not of the form.
    """
    found = {}
    for text in texts:
        before, sep, after = text.partition("=")
        if not sep or not before or not after:
            raise BenchmarkError(f"cannot read --match {text!r}", expected="OLD=NEW, like fp32=baseline")
        found[before] = after
    return found
