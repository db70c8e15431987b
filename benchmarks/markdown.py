"""The report in Markdown, for a README or a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deploykit.benchmarks.page_drawing import clean
from deploykit.benchmarks.report import Report, table
from deploykit.benchmarks.wording import environment_line, how_measured, notes_of, out_of_race

# What Markdown, or the HTML in it, would read as something else than text.
_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&$])")


def to_markdown(report: Report) -> str:
    """Headline, table, how and where it was measured, and notes.

    Args:
        report: Of any schema version that `read_report` reads.
    """
    header, rows = table(report)
    lines = [f"**{escape(report.headline())}**", "", *pipe_table(header, rows), ""]
    lines += [f"{sentence(how_measured(report))}  ", sentence(environment_line(report.data["environment"])), ""]
    notes = [f"{label}: {reason}" for label, reason in out_of_race(report)] + notes_of(report)
    lines += [f"- {escape(note)}" for note in notes]
    origin = f"DeployKit {report.data['deploykit']}, {report.data['created']}"
    return "\n".join([*lines, *([""] if notes else []), f"<sub>{escape(origin)}</sub>"]) + "\n"


def escape(text: str) -> str:
    """Text out of a report, shown as it is."""
    return _SPECIAL.sub(r"\\\1", clean(text))


def pipe_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 2) -> list[str]:
    """Lines of a table: the first columns, and the last, are words and stand to the left.

    Args:
        header: Names of the columns.
        rows: Cells, not escaped.
        left: How many columns at the left are words.
    """
    last = len(header) - 1
    rule = ["---" if n < left or n == last else "---:" for n in range(len(header))]
    lines = [[escape(h) for h in header], rule, *([escape(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def sentence(text: str) -> str:
    """Text as a sentence, escaped."""
    return escape(text[:1].upper() + text[1:]) + "."
