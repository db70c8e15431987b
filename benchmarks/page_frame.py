"""The frame of every page: one HTML file that needs nothing else, no network, no library, no file beside it.

What it shows is escaped, and the page's own security policy lets only its one script run, so that a name out of a file
cannot become code. Plots are SVG; without JavaScript they are all there, with the browser's own tooltips.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deploykit.benchmarks.page_drawing import escape, tag
from deploykit.benchmarks.page_style import SCRIPT, STYLE


def page(title: str, header: Sequence[str], sections: Sequence[str], embedded: Mapping[str, Any]) -> str:
    """A whole HTML document.

    Args:
        title: Of the window; escaped here.
        header: Markup above the sections.
        sections: Markup; see `section`.
        embedded: What the page shows, in JSON: finite numbers only. The script offers it for download.
    """
    head = [
        '<meta charset="utf-8"/>',
        tag("meta", http_equiv="Content-Security-Policy", content=_policy()),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", escape(title)),
        f"<style>{STYLE}</style>",
    ]
    body = [
        *header,
        tag("main", *sections),
        tag("div", id="tip", role="status", hidden="hidden"),
        f'<script type="application/json" id="report">{_inert(embedded)}</script>',
        f"<script>{SCRIPT}</script>",
    ]
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>\n<body>{"".join(body)}</body></html>\n'


def section(name: str, title: str, content: str, caption: str = "") -> str:
    """A section with its heading; empty where there is no content.

    Args:
        name: Its id.
        title: Its heading.
        content: Markup.
        caption: What a reader has to know about it; escaped here.
    """
    if not content:
        return ""
    below = tag("p", escape(caption), class_="dim") if caption else ""
    return tag("section", tag("h2", escape(title)), content, below, id=name)


def toggles(boxes: Iterable[tuple[str, str, str]], label: str) -> str:
    """Boxes that show and hide marks; where JavaScript does not work they are not shown.

    Args:
        boxes: Of each: the marks' `data-c`, the text, and the class that gives the colour.
        label: What the boxes are about.
    """
    made = [
        tag("label", tag("input", type="checkbox", checked="checked", data_toggle=key, autocomplete="off"),
            escape(text), class_=color)
        for key, text, color in boxes
    ]  # fmt: skip
    return tag("div", *made, class_="toggles", role="group", aria_label=label)


def scroll_table(header: Sequence[str], rows: Sequence[str], label: str, words: Sequence[str] = ()) -> str:
    """A table that scrolls sideways where it has no room.

    Args:
        header: Names of the columns; escaped here.
        rows: `<tr>` elements.
        label: What it is a table of.
        words: Columns of words among those of figures.
    """
    cells = (tag("th", escape(h), scope="col", class_="words" if h in words else None) for h in header)
    made = tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *rows))
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=label)


def facts(found: Iterable[tuple[str, str]]) -> str:
    """Names and texts."""
    return tag("dl", *(tag("dt", escape(name)) + tag("dd", escape(text)) for name, text in found))


def download(file: str, said: str) -> str:
    """A button for what is embedded, and a sentence about it."""
    return tag("p", escape(said)) + tag("button", "Download JSON", id="download", type="button", data_file=file)


def _inert(embedded: Mapping[str, Any]) -> str:
    """JSON that cannot end its script element, nor begin a comment in it."""
    text = json.dumps(embedded, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy() -> str:
    """Nothing is loaded from anywhere; this one script and this one style sheet count."""
    style, script = (base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (STYLE, SCRIPT))
    rest = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{rest}; style-src 'sha256-{style}'; script-src 'sha256-{script}'"
