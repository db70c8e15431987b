"""A search for a person, on a terminal or in Markdown; `page.py` is its page. Pure functions of `optimize.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.benchmarks.markdown import escape, pipe_table, sentence
from deploykit.benchmarks.page_drawing import clean
from deploykit.benchmarks.wording import environment_line
from deploykit.search.wording import (
    Line,
    asked,
    front_line,
    lines_of,
    notes_of,
    quality_text,
    ratio_text,
    runtime_text,
    settings_text,
    size_text,
    speed_of,
    spent,
    tied_with_winner,
)

COLUMNS = ("model", "device", "size MB", "quality", "vs reference", "settings", "outcome")
_FRONT = ("path", "seat", "why", "vs reference", "size MB", "quality", "settings")
# The front of a search is a handful; more lines than that hide the verdict.
_MOST = 8


def table(document: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: one a variant on a device, and one a variant that could not be made.

    Args:
        document: A search's.

    Returns:
        Texts in which everything is visible.
    """
    return COLUMNS, [tuple(clean(cell) or "-" for cell in cells_of(line, document)) for line in lines_of(document)]


def cells_of(line: Line, document: Mapping[str, Any]) -> tuple[str, ...]:
    """Texts of a row, as they are; empty where there is nothing to say."""
    seat, variant = line.seat, line.variant
    speed = speed_of(seat)
    is_reference = seat is not None and seat["label"] == document.get("reference")
    outcome = f"reference, {line.outcome}" if is_reference else line.outcome
    return (
        str(variant["name"]),
        "" if seat is None else str(seat["device"]),
        size_text(variant.get("size_bytes")),
        quality_text((seat or {}).get("quality")),
        "1.00x" if is_reference and speed is None else "" if speed is None else str(speed),
        settings_text(seat),
        outcome,
    )


def summary(document: Mapping[str, Any]) -> list[str]:
    """Lines below the table on a terminal: the verdict, what is left, what it took, and notes."""
    front = document["front"]
    lines = [document["headline"]]
    lines += [f"  {front_line(entry)}" for entry in front[:_MOST]]
    lines += [f"  and {len(front) - _MOST} more on the front"] if len(front) > _MOST else []
    tied = tied_with_winner(document)
    lines += [f"no difference outside the noise: {', '.join(tied)}"] if tied else []
    lines += [f"{row['label']}: {row['headline']}" for row in document.get("machines") or ()]
    lines += [f"asked for: {asked(document)}", f"took {spent(document)}"]
    lines += [f"failed: {f['label']}: {f['error']}" for f in document.get("failures") or ()]
    return [clean(line) for line in [*lines, *(f"note: {note}" for note in notes_of(document))]]


def markdown(document: Mapping[str, Any]) -> str:
    """Verdict, front, everything that was tried, where, and notes."""
    front = [
        (e["path"], e["seat"], e["why"], ratio_text(e), size_text(e["size_bytes"]), quality_text(e.get("quality")),
         runtime_text(e.get("settings")))
        for e in document["front"]
    ]  # fmt: skip
    lines = [f"**{escape(document['headline'])}**", ""]
    lines += [*pipe_table(_FRONT, front, left=3), ""] if front else []
    machines = [(r["label"], r.get("winner") or "", r["headline"]) for r in document.get("machines") or ()]
    lines += [*pipe_table(("machine", "best", "verdict"), machines), ""] if machines else []
    lines += [f"Asked for: {escape(asked(document))}.  ", f"Took {escape(spent(document))}.  "]
    lines += [sentence(environment_line(document["environment"]))] if document.get("environment") else []
    lines += [""]
    lines += [*pipe_table(*table(document)), ""] if document["tried"] else []
    notes = [f"failed: {f['label']}: {f['error']}" for f in document.get("failures") or ()] + notes_of(document)
    lines += [f"- {escape(note)}" for note in notes] + ([""] if notes else [])
    origin = f"DeployKit {document['deploykit']}, {document['created']}"
    return "\n".join([*lines, f"<sub>{escape(origin)}</sub>"]) + "\n"
