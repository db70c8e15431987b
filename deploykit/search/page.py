"""A search as one HTML page; `deploykit.benchmarks.page_frame` says what makes it safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.benchmarks.page import measurement
from deploykit.benchmarks.page_details import heat_maps
from deploykit.benchmarks.page_drawing import color, escape, short, tag
from deploykit.benchmarks.page_frame import download, facts, page, scroll_table, section
from deploykit.benchmarks.report import Report, finite
from deploykit.benchmarks.wording import how_measured, machine_facts, plain, words
from deploykit.search.page_plots import funnel, phases, plane
from deploykit.search.views import COLUMNS, cells_of
from deploykit.search.wording import (
    Line,
    asked,
    lines_of,
    notes_of,
    quality_text,
    ratio_text,
    runtime_text,
    size_text,
    speed_of,
    spent,
    tied_with_winner,
)

_PARETO = (
    "The dashed line joins what no other beats in speed and exactness; some are kept because they are small. Bars are "
    "95% intervals. A dotted ring: ties with the fastest. Dim and hollow: dropped, for the reason in its tooltip and "
    "below; where it was dropped before anything was timed, it stands at the right."
)
_FUNNEL = "Pale: dropped in that phase. A seat is a variant on a device."
_TREE = "Each variant was made from the one that it is indented under."
_TABLE = (
    "Speeds are those of the decision; those that were dropped before it have the first look's, marked as screened, "
    "which is rougher."
)
_TIME = "Phases overlap where several jobs run side by side. The dashed line is the budget."
_HEAT = "★ the best; outlined: kept for the next stage. Rows are of different stages, so small differences mean little."
_RAW = (
    "optimize.json, which `deploykit report` shows again; the decision's raw samples are in benchmark.json beside it."
)
_DECISION = ("candidates", "toggles", "speed", "distributions", "timeline")
_FIGURES = (("median_ms", "ms at the median"), ("p99_ms", "ms at p99"), ("throughput_per_s", "per s"))
_WORDS = ("quality", "settings")
_BADGES = {"winner": "winner", "tie": "tie for first", "front": "front", "dropped": "dropped", "open": "open"}


def to_html(document: Mapping[str, Any], benchmark: Report | None = None, recipe: str | None = None) -> str:
    """The page.

    Args:
        document: A search's, as `read_document` gives it.
        benchmark: The measurement that decided.
        recipe: Text of the recipe that makes the winner again.

    Returns:
        A whole HTML document. Sections appear where there is something for them.
    """
    trials = {"trials": document.get("trials") or [], "objective": document["wish"]["objective"]}
    sections = [
        section("verdict", "What is kept", _front(document) + _machines(document)),
        section("pareto", "Speed, exactness and size", plane(document), _PARETO),
        section("funnel", "Where candidates were dropped", funnel(document), _FUNNEL),
        section("tree", "How they were made, and where each ended", _tree(document), _TREE),
        section("table", "Everything that was tried", _table(document), _TABLE),
        section("time", "Where the time went", phases(document), _TIME),
        section("tuning", "Tuner", heat_maps(trials), _HEAT),
        _decision(benchmark),
        section("recipe", "The winner without the search", _recipe(recipe)),
        section("failures", "Failures", _failures(document)),
        section("notes", "Notes", "".join(tag("p", escape(note)) for note in notes_of(document))),
        section("environment", "Environment and what was asked for", facts(_facts(document))),
        section("raw", "The search as JSON", download("optimize.json", _RAW)),
    ]
    header = [
        tag("header", tag("h1", escape(_origin(document))), tag("p", escape(document["headline"]), class_="headline")),
        tag("p", escape(f"Asked for: {asked(document)}. Took {spent(document)}."), class_="dim"),
    ]
    return page(f"DeployKit optimize: {document['headline']}", header, sections, finite(dict(document)))


def _origin(document: Mapping[str, Any]) -> str:
    state = "" if document["state"] == "done" else f", {document['state']}"
    wish, environment = document["wish"], document.get("environment")
    cpu = f", {environment['machine']['cpu']}" if environment else ""
    source = wish.get("source") or wish.get("model") or "a model"
    return f"DeployKit optimize, {source}{state}, {document['created']}{cpu}"


# --- verdict ---------------------------------------------------------------------------------------------------------


def _front(document: Mapping[str, Any]) -> str:
    rows = []
    for n, e in enumerate(document["front"]):
        wins = e["path"] == document.get("winner")
        badge = _badge("winner") if wins else _badge("tie") if e["seat"] in tied_with_winner(document) else ""
        cells = [
            tag("td", str(n + 1)),
            tag("td", escape(e["path"]), class_="name"),
            tag("td", escape(e["seat"]), class_="words"),
            tag("td", badge, escape(e["why"]), class_="verdict"),
            tag("td", escape(ratio_text(e) or "-")),
            tag("td", escape(size_text(e["size_bytes"]))),
            tag("td", escape(quality_text(e.get("quality")) or "-"), class_="words"),
            tag("td", escape(runtime_text(e.get("settings"))), class_="words"),
        ]
        rows.append(tag("tr", *cells, class_="best" if wins else None))
    header = ("#", "folder", "seat", "why it is kept", "vs reference", "size MB", "quality", "settings")
    shown = scroll_table(header, rows, "table of the results", ("seat", *_WORDS)) if rows else ""
    tied = tied_with_winner(document)
    said = f"No difference outside the noise to {document.get('winner_seat')}: {', '.join(tied)}."
    reference = document.get("reference")
    return "".join(
        [
            shown,
            tag("p", escape(said)) if tied else "",
            tag("p", escape(f"The reference is {reference}."), class_="dim") if reference and rows else "",
        ]
    )


def _machines(document: Mapping[str, Any]) -> str:
    rows = [
        tag("tr", tag("td", str(n + 1)), tag("td", escape(r["label"]), class_="name"),
            tag("td", escape(r.get("winner") or "-")), tag("td", escape(r["headline"]), class_="verdict"))
        for n, r in enumerate(document.get("machines") or ())
    ]  # fmt: skip
    if not rows:
        return ""
    header = ("#", "machine", "best", "verdict")
    return tag("h3", "Best per type of machine") + scroll_table(header, rows, "table of the machines")


def _badge(status: str) -> str:
    kind = {"winner": "badge", "front": "badge", "dropped": "badge bad"}.get(status, "badge tie")
    return tag("span", _BADGES[status], class_=kind)


# --- what was tried --------------------------------------------------------------------------------------------------


def _tree(document: Mapping[str, Any]) -> str:
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    for variant in document["tried"]:
        children.setdefault(variant.get("parent"), []).append(variant)
    lines: dict[str, list[Line]] = {}
    for line in lines_of(document):
        lines.setdefault(str(line.variant["name"]), []).append(line)
    return _branch(children, lines, None, document.get("reference"))


def _branch(
    children: Mapping[str | None, Sequence[Mapping[str, Any]]],
    lines: Mapping[str, Sequence[Line]],
    parent: str | None,
    reference: str | None,
) -> str:
    items = []
    for variant in children.get(parent, ()):
        name = str(variant["name"])
        told = [f"{size_text(variant['size_bytes'])} MB"] if variant.get("size_bytes") is not None else []
        told += [f"{variant['nodes']} nodes"] if variant.get("nodes") is not None else []
        seconds = variant.get("seconds")  # none of what was not made
        told += ["from the cache"] if variant.get("cached") else [f"took {seconds:.1f} s"] if seconds else []
        steps = variant.get("steps") or [{}]
        # What is empty is the default.
        told += [plain(step)] if (step := {k: v for k, v in steps[-1].items() if v not in (None, [], {})}) else []
        ends = [_end(line, reference) for line in lines[name]]
        items.append(
            tag(
                "li",
                tag("b", escape(name)),
                escape(f" {variant['about']} "),
                tag("small", escape(", ".join(told))),
                tag("ul", *ends, class_="seats"),
                _branch(children, lines, name, reference),
            )
        )
    return tag("ul", *items, class_="tree") if items else ""


def _end(line: Line, reference: str | None) -> str:
    speed = speed_of(line.seat)
    device = "" if line.seat is None else str(line.seat["device"])
    device += ", native precision" if line.seat is not None and line.seat.get("precision") == "native" else ""
    parts = [device, "" if speed is None else str(speed), "reference" if line.label == reference else ""]
    parts.append(_without_badge(line, line.outcome))
    proof = tag("small", escape(f" {told}")) if (told := _proof(line.seat or {})) else ""
    return tag("li", _badge(line.status), escape(", ".join(p for p in parts if p)), proof)


def _proof(seat: Mapping[str, Any]) -> str:
    """What was measured beside the ratio, and which layers ran on integers."""
    decision, placed = seat.get("decision") or {}, seat.get("placement") or {}
    parts = [f"{short(decision[key])} {unit}" for key, unit in _FIGURES if decision.get(key)]
    memory = decision.get("peak_memory_bytes")
    parts += [f"{memory / 1e6:.0f} MB of memory"] if memory else []
    return ", ".join([*parts, *([plain(placed["summary"])] if placed.get("summary") else [])])


def _table(document: Mapping[str, Any]) -> str:
    lines = lines_of(document)
    devices = list(dict.fromkeys(str(line.seat["device"]) for line in lines if line.seat is not None))
    rows = []
    for n, line in enumerate(lines):
        cells = cells_of(line, document)
        key = color(devices.index(str(line.seat["device"]))) if line.seat is not None else "twin"
        shown = [
            tag("td", tag("i", class_="dot"), str(n + 1), class_=key),
            tag("td", escape(cells[0]), class_="name"),
            tag("td", escape(cells[1] or "-")),
            tag("td", _badge(line.status), escape(_without_badge(line, cells[-1])), class_="verdict long"),
            *(tag("td", escape(cell or "-"), class_="words" if name in _WORDS else None)
              for name, cell in zip(COLUMNS[2:-1], cells[2:-1], strict=True)),
        ]  # fmt: skip
        classes = {"dropped": "out", "winner": "best"}.get(line.status)
        rows.append(tag("tr", *shown, class_=classes))
    header = ("#", *COLUMNS[:2], COLUMNS[-1], *COLUMNS[2:-1])
    return scroll_table(header, rows, "table of everything that was tried", _WORDS) if rows else ""


def _without_badge(line: Line, outcome: str) -> str:
    """The outcome, less what its badge says."""
    return outcome.replace("dropped in ", "in ", 1) if line.phase else outcome.removesuffix(line.outcome).rstrip(", ")


# --- the rest --------------------------------------------------------------------------------------------------------


def _decision(benchmark: Report | None) -> str:
    """The sections of the benchmark's page about its rounds; in one element, so that its boxes stay with them."""
    if benchmark is None:
        return ""
    found = measurement(benchmark)
    said = tag("p", escape(f"{benchmark.headline()}; {how_measured(benchmark)}"), class_="dim")
    return tag("div", section("decision", "The decision", said), *(found[name] for name in _DECISION))


def _recipe(recipe: str | None) -> str:
    if recipe is None:
        return ""
    shown = "\n".join(escape(line.expandtabs()) for line in recipe.splitlines())
    said = "recipe.toml, beside optimize.json, makes it again: deploykit run recipe.toml -o AGAIN"
    return tag("p", escape(said)) + tag("pre", shown, tabindex=0, role="region", aria_label="the recipe")


def _failures(document: Mapping[str, Any]) -> str:
    return "".join(
        tag("p", tag("b", escape(f"{f['label']}: ")), escape(f["error"])) for f in document.get("failures") or ()
    )


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    wish = [
        (words(key), plain({k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value))
        for key, value in document["wish"].items()
    ]
    origin = f"schema {document['schema_version']}, DeployKit {document['deploykit']}, {document['created']}"
    machine = machine_facts(document["environment"]) if document.get("environment") else []
    return [*wish, *machine, ("document", origin)]
