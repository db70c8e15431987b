"""The report as one HTML page; `page_frame.py` says what makes it safe."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploykit.benchmarks.page_candidates import distributions, speed, timeline
from deploykit.benchmarks.page_details import heat_maps, layers, placement, rates, sweep
from deploykit.benchmarks.page_drawing import color, escape, tag
from deploykit.benchmarks.page_frame import download, facts, page, scroll_table, section, toggles
from deploykit.benchmarks.page_pareto import pareto
from deploykit.benchmarks.report import Report, finite, table
from deploykit.benchmarks.wording import environment_facts, how_measured, label_of, notes_of, out_of_race, scenario_of

# Latencies of a round that stay in the page's copy of the report.
KEPT_SAMPLES = 101

_PARETO = (
    "The dashed line joins the candidates that no other beats in both (of medians, whatever the intervals say). Bars "
    "are 95% intervals: of the median, by bootstrap over rounds; of an accuracy, Wilson's. A dotted ring: ties with "
    "the fastest. Hollow: out of the race, for the reason named above."
)
_SPEED = (
    "Intervals over rounds, each candidate against the reference of the same round; of those that were measured anew, "
    "over the new rounds. The grey band is the noise: how far the reference strays from itself. Hollow: a tie, no "
    "difference outside the noise."
)
_DISTRIBUTION = (
    "Every latency of every round but those that confirm, each row as high as its own mode. Percentiles stand where "
    "there are samples enough for them."
)
_TIMELINE = (
    "What all candidates show at the same time came from the machine; what one shows alone is its own. The grey band "
    "is the noise floor; dashed: the reference, measured twice a round."
)
_HEAT = (
    "★ the best; outlined: kept for the next stage. A cell that was tried in several stages shows the first. Rows are "
    "of different stages, so small differences between them mean little."
)
_SWEEP = "The full mark is the knee: from there on, more requests in flight buy little but latency."
_RATES = "Full marks meet the objective; hollow ones do not. Latency counts from the intended start of a request."
_LAYERS = "By the runtime's own profile; colours are the precisions that the kernels computed in."
_RAW = f"At most {KEPT_SAMPLES} latencies a round, evenly spaced among the sorted ones; -o writes all of them."
_PLACEMENT = (
    "Nodes that compute (convolutions, matrix products, recurrences), by the precision that their kernels ran in."
)


def to_html(report: Report) -> str:
    """The page.

    Args:
        report: Of any schema version that `read_report` reads.

    Returns:
        A whole HTML document. Sections appear where the report holds their data.
    """
    sections = [
        *measurement(report).values(),
        section("tuning", "Tuner", heat_maps(report.data.get("tuning") or {}) + _budget(report), _HEAT),
        section("sweep", "Throughput over concurrency", sweep(report), _SWEEP),
        section("rates", "Latency over the rate of requests", rates(report), _RATES),
        section("layers", "Slowest layers", layers(report), _LAYERS),
        section("placement", "Placement and precisions", placement(report), _PLACEMENT),
        section("notes", "Notes", "".join(tag("p", escape(note)) for note in notes_of(report))),
        section("environment", "Environment and settings", facts(environment_facts(report))),
        section("raw", "The report as JSON", download("report-thinned.json", _RAW)),
    ]
    header = [
        tag("header", tag("h1", _origin(report)), tag("p", escape(report.headline()), class_="headline")),
        tag("p", escape(how_measured(report)), class_="dim"),
    ]
    return page(f"DeployKit benchmark: {report.headline()}", header, sections, thinned(report))


def measurement(report: Report) -> dict[str, str]:
    """The sections about the candidates and their rounds, by their ids, in order; for other pages too."""
    return {
        "candidates": section("candidates", "Candidates", _table(report) + _reasons(report)),
        "toggles": toggles(
            ((str(i), f"{i + 1} {label_of(c)}", color(i)) for i, c in enumerate(report.candidates)),
            "candidates shown in the plots",
        ),
        "pareto": section("pareto", _pareto_title(report), pareto(report), _PARETO),
        "speed": section("speed", "Speed against the reference", speed(report), _SPEED),
        "distributions": section(
            "distributions", "Distributions of the latencies", distributions(report), _DISTRIBUTION
        ),
        "timeline": section("timeline", "Rounds in time", timeline(report), _TIMELINE),
    }


def thinned(report: Report) -> dict[str, Any]:
    """The report with at most `KEPT_SAMPLES` latencies a round, evenly spaced among the sorted ones; finite numbers.

    The result is a report too, and says in `thinned` what it is.
    """
    found: dict[str, Any] = finite(report.data)
    for candidate in found["candidates"]:
        for key in ("rounds", "rounds_again"):
            if candidate.get(key):
                candidate[key] = [_thin(r) for r in candidate[key]]
    for key in ("reference_again", "reference_again_anew"):
        if found.get(key):
            found[key] = [_thin(r) for r in found[key]]
    return found | {"thinned": {"samples_per_round": KEPT_SAMPLES}}


def _thin(found: dict[str, Any]) -> dict[str, Any]:
    samples = np.sort(np.asarray(found["samples_ns"], np.int64))
    if samples.size <= KEPT_SAMPLES:
        return found
    places = np.linspace(0, samples.size - 1, KEPT_SAMPLES).round().astype(np.int64)
    # Blocks are of the samples in their order, which is lost.
    kept = {k: v for k, v in found.items() if not k.startswith("block_")}
    return kept | {"samples_ns": samples[places].tolist(), "samples": int(samples.size)}


def _origin(report: Report) -> str:
    machine = report.data["environment"]["machine"]
    return escape(f"DeployKit benchmark, {scenario_of(report)}, {report.data['created']}, {machine['cpu']}")


def _pareto_title(report: Report) -> str:
    measured = report.candidates[0]["accuracy"] is not None
    return f"{'Accuracy' if measured else 'Likeness to the reference'}, latency and size"


def _table(report: Report) -> str:
    header, rows = table(report)
    best = set(report.winner["candidates"])
    # The verdict is what a phone has to show without scrolling, so it comes before the figures.
    header, rows = _verdict_first(header), [_verdict_first(cells) for cells in rows]
    body = []
    for index, (cells, c) in enumerate(zip(rows, report.candidates, strict=True)):
        wins = label_of(c) in best
        badge = ""
        if wins:
            tie = report.winner["verdict"] == "tie"
            badge = tag("span", "tie for first" if tie else "winner", class_="badge tie" if tie else "badge")
        elif c["status"] != "ok":
            badge = tag("span", "out", class_="badge bad")
        first = tag("td", tag("i", class_="dot"), str(index + 1), class_=color(index))
        names = [tag("td", escape(cells[0]), class_="name"), tag("td", escape(cells[1]))]
        names.append(tag("td", badge, escape(cells[2]), class_="verdict"))
        figures = [tag("td", escape(text)) for text in cells[3:]]
        classes = "out" if c["status"] != "ok" else "best" if wins and len(best) == 1 else None
        body.append(tag("tr", first, *names, *figures, class_=classes))
    return scroll_table(("#", *header), body, "table of the candidates")


def _verdict_first(cells: tuple[str, ...]) -> tuple[str, ...]:
    return (*cells[:2], cells[-1], *cells[2:-1])


def _reasons(report: Report) -> str:
    return "".join(
        tag("p", tag("b", escape(f"{label} is out of the race: ")), escape(reason))
        for label, reason in out_of_race(report)
    )


def _budget(report: Report) -> str:
    tuning = report.data.get("tuning") or {}
    if not tuning:
        return ""
    budget = f" of {tuning['budget_s']:.0f} s" if tuning.get("budget_s") is not None else ""
    return tag("p", f"The search took {tuning['spent_s']:.0f} s{budget}.", class_="dim")
