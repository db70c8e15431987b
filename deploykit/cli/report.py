"""`deploykit report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploykit.cli import common

if TYPE_CHECKING:
    from deploykit.benchmarks import Report


@click.command()
@click.argument("report", required=False)
@common.html_option
@common.markdown_option
@click.option("--schema", is_flag=True, help="Print the JSON Schema of reports, and stop.")
def command(report: str | None, html: str | None, markdown: str | None, schema: bool) -> None:
    """Show REPORT, the JSON that `deploykit benchmark -o` wrote: a table, or what the options name."""
    if schema and (report is not None or html is not None or markdown is not None):
        raise click.UsageError("--schema stands alone.")
    if schema:
        from deploykit.benchmarks.schema import report_schema

        common.show_json(report_schema())
        return
    if report is None:
        raise click.UsageError("Missing argument 'REPORT'.")
    from deploykit.benchmarks.reading import read_report
    from deploykit.benchmarks.wording import visible
    from deploykit.cli.benchmark import show_report

    check_views(html, markdown)
    loaded = read_report(report)
    if html is None and markdown is None:
        show_report(visible(loaded))
    write_views(loaded, html, markdown)


def check_views(html: str | None, markdown: str | None, *others: str | None) -> None:
    """Refuse places that views cannot be written to, before any work is done.

    Args:
        html: Of the page.
        markdown: Of the Markdown; "-" is standard output.
        others: What the same command writes beside them.

    Raises:
        click.UsageError: Two outputs are one file.
        DeploykitError: Something is there, or the folder is not.
    """
    from deploykit.staging import check_free, check_writable

    files = [Path(name).absolute() for name in (html, markdown, *others) if name not in (None, "-")]
    if len(set(files)) < len(files):
        raise click.UsageError("Two outputs have the same name.")
    for name, option in ((html, "--html"), (markdown, "--markdown")):
        if name is not None and name != "-":
            check_free(Path(name), option)
            check_writable(Path(name).parent)
    if html == "-":
        raise click.UsageError("--html needs a file.")


def write_views(report: Report, html: str | None, markdown: str | None) -> None:
    """Write what was asked for."""
    if html is not None:
        from deploykit.benchmarks.page import to_html

        write_text(html, to_html(report))
    if markdown is not None:
        from deploykit.benchmarks.markdown import to_markdown

        write_text(markdown, to_markdown(report))


def write_text(name: str, text: str) -> None:
    """Write a file that is not there yet, or to standard output where the name is "-"."""
    if name == "-":
        click.echo(text, nl=False)
        return
    from deploykit.staging import write_file

    write_file(Path(name), text.encode())
