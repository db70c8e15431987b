"""`deploykit report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploykit.cli import common

if TYPE_CHECKING:
    from deploykit.benchmarks import Report
    from deploykit.search.reading import Beside


@click.command()
@click.argument("report", required=False)
@common.html_option
@common.markdown_option
@click.option(
    "--schema", type=click.Choice(["benchmark", "optimize"]), is_flag=False, flag_value="benchmark",
    help="Print the JSON Schema of reports, or of what `optimize` writes, and stop.",
)  # fmt: skip
def command(report: str | None, html: str | None, markdown: str | None, schema: str | None) -> None:
    """Show REPORT: a table, or what the options name.

    It is the JSON that `deploykit benchmark -o` wrote, or the directory that `deploykit optimize -o` wrote.
    """
    if schema is not None and (report is not None or html is not None or markdown is not None):
        raise click.UsageError("--schema stands alone.")
    if schema is not None:
        _show_schema(schema)
        return
    if report is None:
        raise click.UsageError("Missing argument 'REPORT'.")
    from deploykit.benchmarks.reading import as_report
    from deploykit.benchmarks.wording import visible
    from deploykit.search.reading import as_document, is_search, load_any, read_beside

    check_views(html, markdown)
    data, name = load_any(report)
    if is_search(data):
        document, beside = as_document(data, name), read_beside(name)
        if html is None and markdown is None:
            show_search(document)
        write_search_views(document, beside, html, markdown)
        return
    from deploykit.cli.benchmark import show_report

    loaded = as_report(data, name)
    if html is None and markdown is None:
        show_report(visible(loaded))
    write_views(loaded, html, markdown)


def _show_schema(name: str) -> None:
    from deploykit.benchmarks.schema import report_schema
    from deploykit.search.schema import search_schema

    common.show_json(report_schema() if name == "benchmark" else search_schema())


def show_search(document: Mapping[str, Any]) -> None:
    """Print the table of a search and what came of it."""
    from deploykit.search.views import summary, table

    if document["tried"]:
        common.show_table(*table(document))
    for line in summary(document):
        click.echo(line)


def write_search_views(document: Mapping[str, Any], beside: Beside, html: str | None, markdown: str | None) -> None:
    """Write what was asked for of a search."""
    if html is not None:
        from deploykit.search.page import to_html

        write_text(html, to_html(document, beside.benchmark, beside.recipe))
    if markdown is not None:
        from deploykit.search.views import markdown as to_markdown

        write_text(markdown, to_markdown(document))


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
