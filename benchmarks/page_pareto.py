"""Accuracy, or likeness, over latency, with the size as a bubble and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.benchmarks.intervals import median_interval, wilson
from deploykit.benchmarks.page_candidates import medians_ms
from deploykit.benchmarks.page_drawing import (
    LETTER,
    NARROW,
    Axis,
    both,
    bottom_axis,
    color,
    fit,
    left_axis,
    mark,
    short,
    shorten,
    svg,
    tag,
    text,
)
from deploykit.benchmarks.report import Report
from deploykit.benchmarks.wording import cosine_of, in_race, label_of, timed

_SMALLEST, _LARGEST = 5.0, 22.0


@dataclass(frozen=True, slots=True)
class _Point:
    """A candidate among accuracy and latency; `x` is None where it was not timed."""

    index: int
    candidate: Mapping[str, Any]
    x: float | None
    x_ends: tuple[float, float] | None
    y: float
    y_ends: tuple[float, float] | None
    radius: float
    front: bool
    tie: bool


def pareto(report: Report) -> str:
    """Quality over latency, the size as a bubble; empty where nothing was timed."""
    measured = report.candidates[0]["accuracy"] is not None
    points = _points(report, measured=measured)
    if not any(p.x is not None for p in points):
        return ""
    return both(lambda width: _draw_pareto(points, width, measured=measured))


def _points(report: Report, *, measured: bool) -> list[_Point]:
    found = report.candidates
    largest = max(max(c["size_bytes"] for c in found), 1)
    tied = set(report.winner["candidates"]) if report.winner["verdict"] == "tie" else set()
    quality = {}
    for i, c in enumerate(found):
        accuracy = c["accuracy"]
        value = (accuracy or {}).get("accuracy") if measured else cosine_of(c, reference=i == 0)
        if value is not None:
            quality[i] = float(value)
    front = _front({i: (c["median_ms"], quality[i]) for i, c in enumerate(found) if in_race(c) and i in quality})
    return [
        _Point(
            i,
            found[i],
            found[i]["median_ms"] if timed(found[i]) else None,
            median_interval(medians_ms(found[i]["rounds"])) if timed(found[i]) else None,
            y,
            wilson(y, found[i]["accuracy"]["samples"]) if measured else None,
            max(_SMALLEST, _LARGEST * math.sqrt(found[i]["size_bytes"] / largest)),
            i in front,
            label_of(found[i]) in tied,
        )
        for i, y in quality.items()
    ]


def _front(points: Mapping[int, tuple[float, float]]) -> set[int]:
    """Those that no other beats in one of latency and quality without losing in the other."""
    return {
        i
        for i, (x, y) in points.items()
        if not any(a <= x and b >= y and (a < x or b > y) for j, (a, b) in points.items() if j != i)
    }


def _draw_pareto(points: Sequence[_Point], width: int, *, measured: bool) -> str:
    phone = width <= NARROW
    height, bottom = (340, 292) if phone else (430, 380)
    untimed = [p for p in points if p.x is None]
    right = width - (64 if untimed else 16)
    xs = [v for p in points if p.x is not None for v in (p.x, *(p.x_ends or ()))]
    x_axis = fit(xs, 58, right, log=None, pad=0.1)
    y_axis = fit(_worth_showing(points), bottom, 34, pad=0.1)
    title = "accuracy" if measured else "cosine of the outputs to the reference's"
    parts = [
        bottom_axis(x_axis, 34, bottom, "median latency, ms", 5 if phone else 9),
        left_axis(y_axis, 58, right, f"{title} (higher is better)", 6, limit=1.0),
    ]
    # What lies far below stands at the lower edge, with its value.
    low = {p.index for p in points if p.y < y_axis.low}
    places = {
        p.index: (
            x_axis.at(p.x) if p.x is not None else right + 32,
            bottom - p.radius if p.index in low else y_axis.at(p.y),
        )
        for p in points
    }
    if untimed:
        parts.append(tag("line", x1=right, x2=right, y1=34, y2=bottom, class_="edge"))
        parts.append(text(right + 32, 26, "not timed", "tick", "middle"))
    front = sorted((p for p in points if p.front), key=lambda p: places[p.index])
    if len(front) > 1:
        line = " ".join(f"{places[p.index][0]:.1f},{places[p.index][1]:.1f}" for p in front)
        parts.append(tag("polyline", points=line, class_="front"))
    for p in sorted(points, key=lambda p: -p.radius):
        parts.append(_bubble(p, *places[p.index], x_axis, None if p.index in low else y_axis, measured=measured))
    parts += _labels(points, places, width, low, phone=phone)
    return svg(width, height, f"{title} over median latency; the area of a bubble is the size", *parts)


def _worth_showing(points: Sequence[_Point]) -> list[float]:
    """Qualities that the axis covers: of all in the race, and of others that do not crush it."""

    def ends(p: _Point) -> tuple[float, ...]:
        return (p.y, *(p.y_ends or ()))

    racing = [v for p in points if p.candidate["status"] == "ok" for v in ends(p)] or [
        v for p in points for v in ends(p)
    ]
    room = max(1.5 * (max(racing) - min(racing)), 0.02)
    return racing + [v for p in points for v in ends(p) if min(racing) - room <= p.y]


def _bubble(p: _Point, x: float, y: float, x_axis: Axis, y_axis: Axis | None, *, measured: bool) -> str:
    """A bubble with its whiskers; without a vertical axis it stands at the edge and has none there."""
    c, key = p.candidate, color(p.index)
    out = c["status"] != "ok"
    whiskers = ""
    if p.x_ends is not None:
        whiskers += tag("line", x1=x_axis.at(p.x_ends[0]), x2=x_axis.at(p.x_ends[1]), y1=y, y2=y, class_="whisker")
    if p.y_ends is not None and y_axis is not None:
        whiskers += tag("line", x1=x, x2=x, y1=y_axis.at(p.y_ends[0]), y2=y_axis.at(p.y_ends[1]), class_="whisker")
    tip = [label_of(c), f"{c['size_bytes'] / 1e6:.2f} MB"]
    if p.x is not None and p.x_ends is not None:
        tip.insert(1, f"{short(p.x)} ms [{short(p.x_ends[0])}, {short(p.x_ends[1])}]")
    ends = f" [{p.y_ends[0]:.4f}, {p.y_ends[1]:.4f}]" if p.y_ends else ""
    tip.append(f"{'accuracy' if measured else 'cosine'} {p.y:.4f}{ends}")
    tip += ["on the Pareto front"] * p.front + ["ties with the fastest"] * p.tie + [c["status"]] * out
    ring = tag("circle", cx=x, cy=y, r=p.radius + 4, class_="tie-ring") if p.tie else ""
    dot = mark(
        "circle", "; ".join(tip), focus=True, cx=x, cy=y, r=p.radius, class_="hollow" if out else "bubble",
        data_x=p.x, data_y=p.y, data_front="yes" if p.front else None, data_tie="yes" if p.tie else None,
    )  # fmt: skip
    return tag("g", whiskers, ring, dot, class_=key, data_c=p.index)


def _labels(
    points: Sequence[_Point], places: Mapping[int, tuple[float, float]], width: int, low: set[int], *, phone: bool
) -> list[str]:
    """Names beside bubbles, where they cover no other name; the number alone where the name finds no room."""
    taken: list[tuple[float, float, float, float]] = []
    bubbles = [(*places[p.index], p.radius) for p in points]
    parts = []
    for p in sorted(points, key=lambda p: (not p.front, p.index)):
        x, y = places[p.index]
        full = f"{p.index + 1} {p.candidate['name']} {p.candidate['device']}"
        fallen = f" ▾ {p.y:.3g}" if p.index in low else ""
        for content in ([] if phone else [shorten(full, 34) + fallen]) + [f"{p.index + 1}{fallen}"]:
            box = _free(x, y, p.radius + 6, len(content) * LETTER, width, taken, bubbles)
            if box is not None:
                taken.append(box)
                parts.append(tag("g", text(box[0], box[3] - 3, content, "name"), data_c=p.index))
                break
    return parts


def _free(
    x: float,
    y: float,
    away: float,
    size: float,
    width: int,
    taken: Sequence[tuple[float, float, float, float]],
    bubbles: Sequence[tuple[float, float, float]],
) -> tuple[float, float, float, float] | None:
    near = away * 0.75
    # Beside the whiskers first: a line through a name is hard to read.
    spots = [
        (x + near, y - near - 14), (x + near, y + near - 2), (x - near - size, y - near - 14),
        (x - near - size, y + near - 2), (x - size / 2, y - away - 15), (x - size / 2, y + away), (x + away, y - 8),
        (x - away - size, y - 8), (x - size / 2, y - away - 32), (x - size / 2, y + away + 16),
    ]  # fmt: skip
    for left, top in spots:
        box = (left, top, left + size, top + 15)
        inside = left >= 60 and box[2] <= width - 2 and top >= 20
        covers = any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
        over = any(
            math.hypot(min(max(cx, box[0]), box[2]) - cx, min(max(cy, box[1]), box[3]) - cy) < r - 1
            for cx, cy, r in bubbles
        )
        if inside and not covers and not over:
            return box
    return None
