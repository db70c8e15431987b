"""Markup for the page: escaped elements, axes, and plots that are drawn once for a desk and once for a phone."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDE, NARROW = 900, 340
COLORS = 8
# Pixels of a letter of 12 px, in a wide font.
LETTER = 7.3
_STEPS = (1.0, 2.0, 5.0)
_LOG_FROM = 6.0


def clean(text: object) -> str:
    """Text out of a report, with everything visible: control characters and turned writing are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def escape(text: object) -> str:
    """Text out of a report, for HTML; safe in attributes too."""
    return html.escape(clean(text), quote=True)


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element.

    Args:
        name: Its name.
        children: Markup; text has to be escaped already.
        attributes: Values are escaped; None leaves one out. `class_` stands for class, `_` for a hyphen.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    # Elements of SVG may close themselves; of HTML only these may.
    if not children and name in ("rect", "line", "circle", "path", "polyline", "input", "meta"):
        return f"<{name}{written}/>"
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else escape(value)


def color(index: int) -> str:
    """The class that gives a candidate its colour."""
    return f"k{index % COLORS}"


def short(value: float) -> str:
    """A number for a person: three digits, no exponent where it can be helped."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "n/a"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.2e}"
    return f"{value:.3g}"


def shorten(text: str, limit: int) -> str:
    """A text that has to fit, with what is left out marked."""
    found = clean(text)
    return found if len(found) <= limit else found[: max(1, limit - 1)] + "…"


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to places.

    Attributes:
        low: The value at `start`.
        high: The value at `end`.
        start: A place, in pixels.
        end: Another; below `start` where values grow upwards.
        log: Whether the scale is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value,
        )  # fmt: skip
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """Round values to label, at most about so many."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in (_STEPS, (1.0, 3.0), (1.0,)):
                found = [v for d in decades for s in steps if self.low <= (v := s * 10.0**d) <= self.high]
                if 3 <= len(found) <= most:
                    return found
        return self._even(most)

    def _even(self, most: int) -> list[float]:
        step = tick_step(self.high - self.low, most)
        first = math.ceil(self.low / step - 1e-9)
        found = [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [v for v in found if v > 0] if self.log else found


def tick_step(span: float, most: int) -> float:
    """1, 2 or 5 times a power of ten, so that at most about so many fit."""
    rough = span / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    return next((s * power for s in (*_STEPS, 10.0) if s * power >= rough * 0.999), 10 * power)


def fit(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    log: bool | None = False,
    zero: bool = False,
    pad: float = 0.06,
) -> Axis:
    """An axis that shows all values, with some room.

    Args:
        values: At least one.
        start: Place of the low end.
        end: Place of the high end.
        log: Logarithmic or not; None: where the values are far apart.
        zero: Whether 0 has to be on it.
        pad: Room at both ends, as a share.
    """
    low, high = min(values), max(values)
    if log is None:
        log = low > 0 and high / low > _LOG_FROM
    if log:
        room = max((high / low) ** pad, 1.02)
        return Axis(low / room, high * room, start, end, log=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    # Equal values, and values that differ by less than floating point can label.
    span = max(high - low, abs(high) * 1e-4, 1e-9)
    middle = (high + low) / 2
    low, high = (low, high) if high - low >= span * 0.99 else (middle - span / 2, middle + span / 2)
    return Axis(low if zero and low == 0 else low - pad * span, high + pad * span, start, end)


def labels_of(ticks: Sequence[float]) -> list[str]:
    """Labels of ticks, with as many digits as tell them apart."""
    if len(ticks) < 2:
        return [short(t) for t in ticks]
    step = min(b - a for a, b in itertools.pairwise(ticks))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if max(abs(t) for t in ticks) >= 1e6 or digits > 6:
        return [f"{t:.4g}" for t in ticks]
    if digits or min(ticks) >= 1000:
        return [f"{t:,.{digits}f}" for t in ticks]
    return [f"{t:,.0f}" if abs(t) >= 1000 or t == int(t) else f"{t:.6g}" for t in ticks]


def text(x: float, y: float, content: str, class_: str = "", anchor: str | None = None) -> str:
    """Text at a place; escaped here."""
    return tag("text", escape(content), x=x, y=y, class_=class_ or None, text_anchor=anchor)


def mark(name: str, tip: str, *, focus: bool = False, **attributes: object) -> str:
    """A drawn thing that says what it is, to pointers and screen readers; to a keyboard where ``focus`` is set."""
    classes = f"m {attributes.pop('class_', '')}".strip()
    return tag(name, tag("title", escape(tip)), class_=classes, role="img", tabindex=0 if focus else None, **attributes)


def svg(width: float, height: float, label: str, *parts: str) -> str:
    """A picture."""
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="group", aria_label=label)


def both(draw: Callable[[int], str]) -> str:
    """A picture drawn for a desk and for a phone; the style sheet shows one of them."""
    return tag("div", draw(WIDE), class_="wide") + tag("div", draw(NARROW), class_="narrow")


def bottom_axis(axis: Axis, top: float, bottom: float, title: str, most: int) -> str:
    """Grid, labels and title of a horizontal axis."""
    ticks = axis.ticks(most)
    parts = []
    for value, label in zip(ticks, labels_of(ticks), strict=True):
        x = axis.at(value)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        parts.append(text(x, bottom + 16, label, "tick", "middle"))
    middle = (axis.start + axis.end) / 2
    return "".join(parts) + text(middle, bottom + 35, title + (", logarithmic" if axis.log else ""), "title", "middle")


def left_axis(axis: Axis, left: float, right: float, title: str, most: int, limit: float = math.inf) -> str:
    """Grid, labels and title of a vertical axis; nothing above ``limit`` is labelled."""
    ticks = [t for t in axis.ticks(most) if t <= limit + 1e-12]
    parts = []
    for value, label in zip(ticks, labels_of(ticks), strict=True):
        y = axis.at(value)
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(text(left - 7, y + 4, label, "tick", "end"))
    return "".join(parts) + text(
        4, min(axis.start, axis.end) - 8, title + (", logarithmic" if axis.log else ""), "title"
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """Places of a plot with one row a candidate: the label to the left at a desk, above the row on a phone.

    Attributes:
        count: Rows.
        width: Of the picture.
        height: Of what is drawn in a row.
        label: Pixels for the labels at a desk.
    """

    count: int
    width: int
    height: float
    label: float = 230.0

    @property
    def phone(self) -> bool:
        """Whether labels stand above their rows."""
        return self.width <= NARROW

    @property
    def room(self) -> int:
        """Letters that a label may have, also in a wide font."""
        return int((self.width - 16 if self.phone else self.label - 16) / LETTER)

    @property
    def left(self) -> float:
        """Where rows begin."""
        return 8.0 if self.phone else self.label

    @property
    def pitch(self) -> float:
        """From row to row."""
        return self.height + (24 if self.phone else 8)

    @property
    def bottom(self) -> float:
        """Under the last row."""
        return self.count * self.pitch + 6

    def top(self, row: int) -> float:
        """The upper edge of what is drawn in a row."""
        return row * self.pitch + (20 if self.phone else 4)

    def name(self, row: int, content: str, class_: str = "name") -> str:
        """A row's label."""
        if self.phone:
            return text(8, self.top(row) - 6, shorten(content, self.room), class_)
        return text(self.left - 12, self.top(row) + self.height / 2 + 4, shorten(content, self.room), class_, "end")
