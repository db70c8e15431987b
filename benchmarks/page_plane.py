"""Bubbles on a plane: one figure over another, the size as an area, and the Pareto front; for every page."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from deploykit.benchmarks.page_drawing import (
    LETTER,
    NARROW,
    Axis,
    both,
    bottom_axis,
    fit,
    left_axis,
    mark,
    svg,
    tag,
    text,
)

_SMALLEST, _LARGEST = 5.0, 22.0
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Bubble:
    """One thing on the plane.

    Attributes:
        key: The `data-c` of its marks, which toggles name.
        color: The class that gives its colour.
        tip: All that is said about it.
        labels: Of the first of these that finds room beside it; the earlier, the longer.
        x: None where it was not measured: it stands in a strip beside the plane.
        y: Its other figure.
        size: That its area is to show.
        x_ends: Interval of `x`.
        y_ends: Interval of `y`.
        front: Whether it is on the front; those are labelled first.
        tie: Whether it ties with the best.
        out: Whether it is out of the race; it is drawn hollow, and cannot crush the axis of the others.
        faint: Whether it is drawn dim.
    """

    key: str
    color: str
    tip: str
    labels: Sequence[str]
    x: float | None
    y: float
    size: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None
    front: bool = False
    tie: bool = False
    out: bool = False
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Plane:
    """What the axes are.

    Attributes:
        label: Of the picture, for who cannot see it.
        x_title: Of the axis below.
        y_title: Of the other.
        unmeasured: Over the strip of those without `x`.
        down: Whether less of `y` is better; then the axis goes down, so that up is better on every plane.
        limit: Nothing of `y` above is labelled.
        line: A value of `y` that has to be kept, and its text.
    """

    label: str
    x_title: str
    y_title: str
    unmeasured: str = "not timed"
    down: bool = False
    limit: float = math.inf
    line: tuple[float, str] | None = None


def front_of(points: Mapping[Hashable, tuple[float, float]]) -> set[Hashable]:
    """Those that no other beats in one of two figures, less of the first and more of the second, without losing."""
    return {
        i
        for i, (x, y) in points.items()
        if not any(a <= x and b >= y and (a < x or b > y) for j, (a, b) in points.items() if j != i)
    }


def draw_plane(bubbles: Sequence[Bubble], plane: Plane, joined: Sequence[int]) -> str:
    """The picture, for a desk and for a phone; empty where nothing was measured.

    Args:
        bubbles: In order of importance.
        plane: Its axes.
        joined: Which of them a dashed line joins.
    """
    if not any(b.x is not None for b in bubbles):
        return ""
    return both(lambda width: _draw(bubbles, plane, joined, width))


def _draw(bubbles: Sequence[Bubble], plane: Plane, joined: Sequence[int], width: int) -> str:
    phone = width <= NARROW
    height, bottom = (340, 292) if phone else (430, 380)
    unmeasured = any(b.x is None for b in bubbles)
    right = width - (64 if unmeasured else 16)
    xs = [v for b in bubbles if b.x is not None for v in (b.x, *(b.x_ends or ()))]
    x_axis = fit(xs, 58, right, log=None, pad=0.1)
    values = _worth_showing(bubbles, down=plane.down) + ([] if plane.line is None else [plane.line[0]])
    y_axis = fit(values, *((34, bottom) if plane.down else (bottom, 34)), pad=0.15 if plane.down else 0.1)
    parts = [
        bottom_axis(x_axis, 34, bottom, plane.x_title, 5 if phone else 9),
        left_axis(y_axis, 58, right, plane.y_title, 6, limit=plane.limit),
    ]
    taken: list[Box] = []
    if plane.line is not None:
        y = y_axis.at(plane.line[0])
        taken.append((right - 4 - len(plane.line[1]) * LETTER, y + 2, right - 4, y + 18))
        parts.append(tag("line", x1=58, x2=right, y1=y, y2=y, class_="objective", data_objective=plane.line[0]))
        parts.append(text(right - 4, y + 14, plane.line[1], "small", "end"))
    largest = max(1.0, *(b.size for b in bubbles))
    radii = [max(_SMALLEST, _LARGEST * math.sqrt(b.size / largest)) for b in bubbles]
    # What is far worse than the rest stands at the lower edge, with its value.
    low = {n for n, b in enumerate(bubbles) if (b.y > y_axis.high if plane.down else b.y < y_axis.low)}
    places = [
        (x_axis.at(b.x) if b.x is not None else right + 32, bottom - radii[n] if n in low else y_axis.at(b.y))
        for n, b in enumerate(bubbles)
    ]
    if unmeasured:
        parts.append(tag("line", x1=right, x2=right, y1=34, y2=bottom, class_="edge"))
        parts.append(text(right + 32, 26, plane.unmeasured, "tick", "middle"))
    if len(joined) > 1:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(places[n] for n in joined))
        parts.append(tag("polyline", points=line, class_="front"))
    for n in sorted(range(len(bubbles)), key=lambda n: (not bubbles[n].faint, -radii[n])):
        parts.append(_bubble(bubbles[n], places[n], radii[n], x_axis, None if n in low else y_axis))
    parts += _labels(bubbles, places, radii, (width, bottom), low, taken, phone=phone)
    return svg(width, height, plane.label, *parts)


def _worth_showing(bubbles: Sequence[Bubble], *, down: bool) -> list[float]:
    """Figures that the axis covers: of all in the race, and of others that do not crush it."""

    def ends(b: Bubble) -> tuple[float, ...]:
        return (b.y, *(b.y_ends or ()))

    racing = [v for b in bubbles if not b.out for v in ends(b)] or [v for b in bubbles for v in ends(b)]
    room = max(1.5 * (max(racing) - min(racing)), 0.02)
    return racing + [
        v for b in bubbles for v in ends(b) if (b.y <= max(racing) + room if down else min(racing) - room <= b.y)
    ]


def _bubble(b: Bubble, place: tuple[float, float], radius: float, x_axis: Axis, y_axis: Axis | None) -> str:
    """A bubble with its whiskers; without a vertical axis it stands at the edge and has none there."""
    x, y = place
    whiskers = ""
    if b.x_ends is not None:
        ends = (min(max(x_axis.at(e), x_axis.start), x_axis.end) for e in b.x_ends)
        left, right = ends
        whiskers += tag("line", x1=left, x2=right, y1=y, y2=y, class_="whisker")
    if b.y_ends is not None and y_axis is not None:
        whiskers += tag("line", x1=x, x2=x, y1=y_axis.at(b.y_ends[0]), y2=y_axis.at(b.y_ends[1]), class_="whisker")
    ring = tag("circle", cx=x, cy=y, r=radius + 4, class_="tie-ring") if b.tie else ""
    dot = mark(
        "circle", b.tip, focus=True, cx=x, cy=y, r=radius, class_="hollow" if b.out else "bubble",
        data_x=b.x, data_y=b.y, data_front="yes" if b.front else None, data_tie="yes" if b.tie else None,
    )  # fmt: skip
    return tag("g", whiskers, ring, dot, class_=f"{b.color} faint" if b.faint else b.color, data_c=b.key)


def _labels(
    bubbles: Sequence[Bubble],
    places: Sequence[tuple[float, float]],
    radii: Sequence[float],
    room: tuple[float, float],
    low: set[int],
    taken: list[Box],
    *,
    phone: bool,
) -> list[str]:
    """Names beside bubbles, where they cover no other name; the shorter one where the longer finds no room."""
    circles = [(*place, radius) for place, radius in zip(places, radii, strict=True)]
    # A name may cover what is dim where its own bubble is not.
    bright = [circle for circle, b in zip(circles, bubbles, strict=True) if not b.faint]
    parts = []
    for n in sorted(range(len(bubbles)), key=lambda n: (not bubbles[n].front, n)):
        b, (x, y) = bubbles[n], places[n]
        fallen = f" ▾ {b.y:.3g}" if n in low else ""
        for content in b.labels[1 if phone and len(b.labels) > 1 else 0 :]:
            box = _free(x, y, radii[n] + 6, len(content + fallen) * LETTER, room, taken, circles if b.faint else bright)
            if box is not None:
                taken.append(box)
                name = text(box[0], box[3] - 3, content + fallen, "name")
                parts.append(tag("g", name, data_c=b.key, class_="faint" if b.faint else None))
                break
    return parts


def _free(
    x: float,
    y: float,
    away: float,
    size: float,
    room: tuple[float, float],
    taken: Sequence[Box],
    circles: Sequence[tuple[float, float, float]],
) -> Box | None:
    near = away * 0.75
    # Beside the whiskers first: a line through a name is hard to read.
    spots = [
        (x + near, y - near - 14), (x + near, y + near - 2), (x - near - size, y - near - 14),
        (x - near - size, y + near - 2), (x - size / 2, y - away - 15), (x - size / 2, y + away), (x + away, y - 8),
        (x - away - size, y - 8), (x - size / 2, y - away - 32), (x - size / 2, y + away + 16),
    ]  # fmt: skip
    for left, top in spots:
        box = (left, top, left + size, top + 15)
        inside = left >= 60 and box[2] <= room[0] - 2 and top >= 30 and box[3] <= room[1]
        covers = any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
        over = any(
            math.hypot(min(max(cx, box[0]), box[2]) - cx, min(max(cy, box[1]), box[3]) - cy) < r - 1
            for cx, cy, r in circles
        )
        if inside and not covers and not over:
            return box
    return None
