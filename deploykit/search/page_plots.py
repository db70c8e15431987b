"""Pictures of a search: what is fast, small and exact; where candidates ended; where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deploykit.benchmarks.page_drawing import (
    Rows,
    both,
    bottom_axis,
    color,
    escape,
    fit,
    mark,
    short,
    shorten,
    svg,
    tag,
    text,
)
from deploykit.benchmarks.page_frame import toggles
from deploykit.benchmarks.page_plane import Bubble, Plane, draw_plane, front_of
from deploykit.search.wording import (
    PHASES,
    Line,
    lines_of,
    number,
    quality_text,
    settings_text,
    size_text,
    speed_of,
    tied_with_winner,
    was_made,
)

# Decibels beyond which an error is none, or all there is.
_DECIBELS = 300.0
_SAID_REASONS = 6
# More names than that hide what they name; those of what was dropped stay in the tooltips then.
_MOST_NAMES = 24
_RANKS = {"winner": 0, "tie": 1, "front": 2}


def plane(document: Mapping[str, Any]) -> str:
    """Quality lost over speed, the size as a bubble; empty where nothing was timed or judged."""
    lines = lines_of(document)
    loss = _loss_of(document, lines)
    found = [(line, lost) for line in lines if line.seat is not None and (lost := loss.of(line)) is not None]
    devices = list(dict.fromkeys(str(line.seat["device"]) for line, _ in found if line.seat is not None))
    # The first are labelled first.
    found.sort(key=lambda pair: _RANKS.get(pair[0].status, len(_RANKS)))
    bubbles = [_bubble(line, lost, loss, devices, document) for line, lost in found]
    if len(bubbles) > _MOST_NAMES:
        bubbles = [replace(b, labels=()) if b.faint else b for b in bubbles]
    front = front_of({n: (-b.x, -b.y) for n, b in enumerate(bubbles) if b.front and b.x is not None})
    drawn = draw_plane(
        bubbles,
        Plane(
            label=f"{loss.title} over speed; the area of a bubble is the size",
            x_title="times as fast as the reference",
            y_title=f"{loss.title} (up is better)",
            down=True,
            line=loss.line,
        ),
        [n for n in range(len(bubbles)) if n in front],
    )
    if not drawn:
        return ""
    left = sum(line.seat is not None for line in lines) - len(found)
    more = tag("p", f"Not drawn, because they were not judged: {left}.", class_="dim") if left else ""
    legend = [tag("span", tag("i", class_=f"dot {color(n)}"), escape(d)) for n, d in enumerate(devices)]
    return _groups(found) + drawn + tag("p", *legend, class_="legend") + more


def _groups(found: Sequence[tuple[Line, float]]) -> str:
    """Boxes for what was kept, and for every phase that dropped something."""
    counts = Counter(_group(line) for line, _ in found)
    names = {"kept": "kept", **{phase: f"dropped in {said}" for phase, said in PHASES.items()}}
    boxes = [(f"end-{key}", f"{names[key]} ({counts[key]})", "twin") for key in names if counts[key]]
    return toggles(boxes, "what the plot shows") if len(boxes) > 1 else ""


def _group(line: Line) -> str:
    return line.phase or "kept"


@dataclass(frozen=True, slots=True)
class _Loss:
    """What is lost against the parent.

    Attributes:
        title: In words.
        key: "value", "agreement" or "sqnr_db".
        line: What may be lost, and its text.
        reference: Label of the seat that loses nothing, judged or not.
    """

    title: str
    key: str
    line: tuple[float, str] | None
    reference: str | None

    def of(self, line: Line) -> float | None:
        """Of a seat; None where it was not judged by this."""
        assert line.seat is not None
        quality = line.seat.get("quality")
        if not quality:
            return 0.0 if line.label == self.reference else None
        found = number(quality.get(self.key))
        if self.key == "sqnr_db":
            return 0.0 if found is None else _error(found)
        if found is None:
            return None
        if self.key == "agreement":
            return 1.0 - found
        parent = number(quality.get("parent"))
        return None if parent is None else parent - found


def _error(decibels: float) -> float:
    return float(100 * 10 ** (-min(max(decibels, -_DECIBELS), _DECIBELS) / 20))


def _loss_of(document: Mapping[str, Any], lines: Sequence[Line]) -> _Loss:
    goal, reference = document["wish"]["goal"], document.get("reference")
    judged = [q for line in lines if line.seat is not None and (q := line.seat.get("quality"))]
    parents = [v for q in judged if (v := number(q.get("parent"))) is not None and number(q.get("value")) is not None]
    if parents:
        drop = goal.get("drop") if goal.get("metric") else None
        may = None if drop is None else drop * (parents[0] if goal.get("relative") else 1.0)
        line = None if may is None else (float(may), f"at most {short(may)} may be lost")
        name = next((str(q["metric"]) for q in judged if q.get("metric")), "metric")
        return _Loss(f"{shorten(name, 30)} lost", "value", line, reference)
    least = goal.get("min_agreement")
    if least is not None and any(number(q.get("agreement")) is not None for q in judged):
        told = (1.0 - least, f"agreement of at least {least:g}")
        return _Loss("share of changed classes", "agreement", told, reference)
    least = goal.get("min_sqnr_db")
    line = None if least is None else (_error(least), f"SQNR of at least {least:g} dB")
    return _Loss("error of the output, % of its size", "sqnr_db", line, reference)


def _bubble(line: Line, lost: float, loss: _Loss, devices: Sequence[str], document: Mapping[str, Any]) -> Bubble:
    assert line.seat is not None
    speed = speed_of(line.seat)
    is_reference = line.label == document.get("reference")
    kept = not line.phase
    facts = [line.label, "" if speed is None else str(speed), quality_text(line.seat.get("quality"))]
    size = line.variant.get("size_bytes") or 0
    facts += [f"{size_text(size)} MB" if size else "", settings_text(line.seat)]
    facts += ["the reference" if is_reference else "", line.outcome]
    name = str(line.variant["name"])
    ratio = speed.ratio if speed else 1.0 if is_reference else None
    # An interval of hardly any turns may reach anywhere.
    ends = (max(speed.low, speed.ratio / 10), min(speed.high, speed.ratio * 10)) if speed else None
    return Bubble(
        key=f"end-{_group(line)}",
        color=color(devices.index(str(line.seat["device"]))),
        tip="; ".join(f for f in facts if f),
        labels=(shorten(f"{'★ ' if line.status == 'winner' else ''}{line.label}", 38), shorten(name, 20))
        if kept or is_reference
        else (shorten(name, 20),),
        x=ratio,
        y=lost,
        size=float(size),
        x_ends=ends,
        front=kept,
        tie=line.status == "tie" or (line.status == "winner" and bool(tied_with_winner(document))),
        out=not kept,
        faint=not kept and not is_reference,
    )


# --- where candidates ended ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    kept: int
    dropped: int
    tip: str
    color: str


def funnel(document: Mapping[str, Any]) -> str:
    """How many were left after every phase; empty where nothing was tried."""
    stages = _stages(document)
    return both(lambda width: _draw_funnel(stages, width)) if stages else ""


def _stages(document: Mapping[str, Any]) -> list[_Stage]:
    variants, lines = document["tried"], lines_of(document)
    if not variants:
        return []
    made = [v for v in variants if was_made(v)]
    seats = [line for line in lines if line.seat is not None]
    lost = [line for line in lines if line.seat is None and line.phase]
    stages = [
        _stage("variants made", len(made), [n for n in lost if n.phase == "make"], "variants", 6),
        _stage("variants on devices", sum(bool(v.get("seats")) for v in made), [n for n in lost if n.phase != "make"],
               "variants", 6),
    ]  # fmt: skip
    left = len(seats)
    passed = {
        "judge": "seats that are accurate", "screen": "fast when screened", "tune": "fast when tuned",
        "limits": "within the limits", "decide": "kept by the decision",
    }  # fmt: skip
    for phase, name in passed.items():
        gone = [n for n in seats if n.phase == phase]
        left -= len(gone)
        if gone or phase in ("judge", "screen", "decide"):
            stages.append(_stage(name, left, gone, "seats", 0))
    return stages


def _stage(name: str, kept: int, gone: Sequence[Line], unit: str, key: int) -> _Stage:
    tip = f"{kept} {unit}: {name}"
    if gone:
        tip += f"; {len(gone)} dropped: " + "; ".join(f"{n.label}: {n.reason}" for n in gone[:_SAID_REASONS])
        tip += f"; and {len(gone) - _SAID_REASONS} more" if len(gone) > _SAID_REASONS else ""
    return _Stage(name, kept, len(gone), tip, color(key))


def _draw_funnel(stages: Sequence[_Stage], width: int) -> str:
    rows = Rows(len(stages), width, 22)
    room = width - rows.left - (16 if rows.phone else 150)
    most = max(1, *(s.kept + s.dropped for s in stages))
    parts = []
    for row, stage in enumerate(stages):
        kept, gone = (room * n / most for n in (stage.kept, stage.dropped))
        drawn = [
            mark("rect", stage.tip, focus=True, x=rows.left, y=rows.top(row), width=max(kept, 1.0), height=rows.height,
                 class_="bar", data_value=stage.kept, data_dropped=stage.dropped)
        ]  # fmt: skip
        if stage.dropped:
            drawn.append(
                tag("rect", x=rows.left + kept, y=rows.top(row), width=gone, height=rows.height, class_="bar faint")
            )
        said = str(stage.kept) + (f", {stage.dropped} dropped" if stage.dropped else "")
        x, y = (width - 8, rows.top(row) - 6) if rows.phone else (rows.left + kept + gone + 8, rows.top(row) + 15)
        drawn.append(text(x, y, said, "value", "end" if rows.phone else None))
        parts.append(tag("g", rows.name(row, stage.name), *drawn, class_=stage.color))
    return svg(width, rows.bottom, "how many were left after every phase", *parts)


# --- time ------------------------------------------------------------------------------------------------------------


def phases(document: Mapping[str, Any]) -> str:
    """What the time went into, against the budget; empty where nothing was recorded."""
    found = document.get("phases") or []
    return both(lambda width: _draw_phases(document, found, width)) if found else ""


def _draw_phases(document: Mapping[str, Any], found: Sequence[Mapping[str, Any]], width: int) -> str:
    rows = Rows(len(found), width, 20, label=110.0)
    budget = document["wish"].get("budget_s")
    ends = [p["began_s"] + p["seconds"] for p in found]
    axis = fit(
        [float(v) for v in (0.0, document["spent_s"], *ends, *([] if budget is None else [budget]))],
        rows.left, width - (16 if rows.phone else 230), zero=True,
    )  # fmt: skip
    parts = [bottom_axis(axis, 0, rows.bottom, "seconds since the search began", 5 if rows.phone else 9)]
    if budget is not None:
        x = axis.at(budget)
        parts.append(tag("line", x1=x, x2=x, y1=0, y2=rows.bottom, class_="objective", data_objective=budget))
    for row, (phase, end) in enumerate(zip(found, ends, strict=True)):
        start = axis.at(phase["began_s"])
        said = _phase_text(phase)
        bar = mark(
            "rect", f"{phase['name']}: {said}, from {phase['began_s']:.1f} s on", focus=True, x=start,
            y=rows.top(row), width=max(axis.at(end) - start, 1.5), height=rows.height, class_="bar",
            data_value=phase["seconds"],
        )  # fmt: skip
        x, y = (width - 8, rows.top(row) - 6) if rows.phone else (axis.end + 10, rows.top(row) + 14)
        value = text(x, y, said, "value", "end" if rows.phone else None)
        parts.append(tag("g", rows.name(row, str(phase["name"])), bar, value, class_=color(row)))
    return svg(width, rows.bottom + 42, "phases of the search in time", *parts)


def _phase_text(phase: Mapping[str, Any]) -> str:
    jobs, cached = phase.get("jobs") or 0, phase.get("cached") or 0
    parts = [f"{short(phase['seconds'])} s"]
    parts += [f"{jobs} {'job' if jobs == 1 else 'jobs'}"] if jobs else []
    return ", ".join(parts + ([f"{cached} cached"] if cached else []))
