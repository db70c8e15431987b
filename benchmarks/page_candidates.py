"""Plots with every candidate in them: speed with intervals, distributions, rounds in time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deploykit.benchmarks.page_drawing import (
    NARROW,
    Axis,
    Rows,
    both,
    bottom_axis,
    color,
    fit,
    left_axis,
    mark,
    short,
    svg,
    tag,
    text,
)
from deploykit.benchmarks.report import Report, verdict_of
from deploykit.benchmarks.wording import label_of, timed
from deploykit.specs import Array

_BINS = 80
_PERCENTILES = ((50, "p50_ms"), (90, "p90_ms"), (99, "p99_ms"))


def medians_ms(rounds: Iterable[Mapping[str, Any]]) -> list[float]:
    """Median latency of each round."""
    return [float(np.median(r["samples_ns"])) / 1e6 for r in rounds]


# --- speed against the reference -------------------------------------------------------------------------------------


def speed(report: Report) -> str:
    """Ratio to the reference with its interval, and the noise around 1; empty where nothing was compared."""
    found = [(i, c) for i, c in enumerate(report.candidates) if verdict_of(c)]
    floor = max(report.data["noise_floor"], report.data.get("noise_floor_again") or 0.0)
    return both(lambda width: _draw_speed(found, floor, width)) if found else ""


def _draw_speed(found: Sequence[tuple[int, Mapping[str, Any]]], floor: float, width: int) -> str:
    rows = Rows(len(found), width, 22)
    verdicts = [verdict_of(c) or {} for _, c in found]
    # An interval of hardly any rounds may reach anywhere; the ratios themselves belong on the axis.
    usable = [v[k] for v in verdicts for k in ("low", "high") if 0.01 < v[k] < 100] + [v["ratio"] for v in verdicts]
    axis = fit(
        [*usable, 1 / (1 + floor), 1 + floor], rows.left, width - (16 if rows.phone else 180), log=True, pad=0.08
    )
    left, right = axis.at(1 / (1 + floor)), axis.at(1 + floor)
    parts = [
        bottom_axis(axis, 0, rows.bottom, "times as fast as the reference", 5 if rows.phone else 9),
        tag("rect", x=left, y=0, width=right - left, height=rows.bottom, class_="noise"),
        tag("line", x1=axis.at(1), x2=axis.at(1), y1=0, y2=rows.bottom, class_="edge"),
    ]
    for row, ((index, c), told) in enumerate(zip(found, verdicts, strict=True)):
        y = rows.top(row) + rows.height / 2
        low, high = (min(max(axis.at(told[k]), axis.start), axis.end) for k in ("low", "high"))
        said = f"{told['verdict']} {told['ratio']:.2f}x [{told['low']:.2f}, {told['high']:.2f}]"
        tied = told["verdict"] == "tie"
        dot = mark(
            "circle", f"{label_of(c)}: {said}", focus=True, cx=axis.at(told["ratio"]), cy=y, r=6,
            class_="hollow" if tied else "solid", data_x=told["ratio"], data_low=told["low"], data_high=told["high"],
            data_verdict=told["verdict"],
        )  # fmt: skip
        line = tag("line", x1=low, x2=high, y1=y, y2=y, class_="interval")
        x, below = (width - 8, rows.top(row) - 6) if rows.phone else (axis.end + 12, y + 4)
        words = f"{told['verdict']} {told['ratio']:.2f}x" if rows.phone else said
        parts.append(
            tag(
                "g",
                rows.name(row, f"{index + 1} {c['name']} {c['device']}"),
                line,
                dot,
                text(x, below, words, "value", "end" if rows.phone else None),
                class_=color(index),
                data_c=index,
            )
        )
    return svg(width, rows.bottom + 42, "speed against the reference with 95 % intervals", *parts)


# --- distributions ---------------------------------------------------------------------------------------------------


def distributions(report: Report) -> str:
    """One histogram of latencies a candidate, on one axis; empty where there are no samples."""
    found = [(i, c, samples_ms(c)) for i, c in enumerate(report.candidates) if timed(c)]
    return both(lambda width: _draw_distributions(found, width)) if found else ""


def samples_ms(candidate: Mapping[str, Any]) -> Array:
    """All latencies of all rounds."""
    return np.concatenate([np.asarray(r["samples_ns"], np.float64) for r in candidate["rounds"]]) / 1e6


def _draw_distributions(found: Sequence[tuple[int, Mapping[str, Any], Array]], width: int) -> str:
    rows = Rows(len(found), width, 48)
    # The slowest thousandth of the samples would take most of the axis.
    ends = [float(v) for _, _, s in found for v in np.quantile(s, [0.001, 0.999], method="nearest")]
    told = [c[key] for _, c, _ in found for _, key in _PERCENTILES if c.get(key)]
    axis = fit([max(v, 1e-6) for v in (*ends, *told)], rows.left, width - 16, log=None, pad=0.02)
    parts = [bottom_axis(axis, 0, rows.bottom, "latency, ms", 5 if rows.phone else 9)]
    space = np.geomspace if axis.log else np.linspace
    edges = space(axis.low, axis.high, _BINS + 1)
    for row, (index, c, samples) in enumerate(found):
        base = rows.top(row) + rows.height
        counts, _ = np.histogram(samples, edges)
        beyond = int(samples.size - counts.sum())
        tip = f"{label_of(c)}: {samples.size} samples" + (f", {beyond} of them beyond this axis" if beyond else "")
        drawn = mark(
            "path", tip, focus=True, d=_outline(counts, edges, axis, base, rows.height - 15), class_="area",
            data_counts=" ".join(str(n) for n in counts), data_beyond=beyond,
        )  # fmt: skip
        label = rows.name(row, f"{index + 1} {c['name']} {c['device']}")
        parts.append(
            tag("g", label, drawn, _percentiles(c, axis, base, rows.height), class_=color(index), data_c=index)
        )
    return svg(width, rows.bottom + 42, "distributions of the latencies", *parts)


def _outline(counts: Array, edges: Array, axis: Axis, base: float, height: float) -> str:
    top = max(int(counts.max()), 1)
    path = [f"M{axis.at(float(edges[0])):.1f} {base:.1f}"]
    for n, left, right in zip(counts, edges, edges[1:], strict=False):
        y = base - height * int(n) / top
        path.append(f"L{axis.at(float(left)):.1f} {y:.1f}H{axis.at(float(right)):.1f}")
    return "".join(path) + f"V{base:.1f}Z"


def _percentiles(c: Mapping[str, Any], axis: Axis, base: float, height: float) -> str:
    """A line for each percentile that there are samples enough for; names only where they do not touch."""
    parts, last = [], -math.inf
    for number, key in _PERCENTILES:
        value = c.get(key)
        if not value:
            continue
        x = axis.at(value)
        parts.append(
            mark(
                "line",
                f"{label_of(c)}: p{number} {short(value)} ms",
                x1=x,
                x2=x,
                y1=base - height + 13,
                y2=base,
                class_="percentile",
                data_x=value,
                data_p=number,
            )
        )
        if x - last > 26:
            parts.append(text(x, base - height + 10, f"p{number}", "small", "middle"))
            last = x
    return "".join(parts)


# --- rounds in time --------------------------------------------------------------------------------------------------


def timeline(report: Report) -> str:
    """How far each round's median lay from the candidate's own, in the order of time; empty below two rounds."""
    found = [
        (i, label_of(c), [*c["rounds"], *(c.get("rounds_again") or ())])
        for i, c in enumerate(report.candidates)
        if timed(c)
    ]
    if not found or len(found[0][2]) < 2:
        return ""
    twin = report.data.get("reference_again") or []
    if twin:
        found.append((-1, f"{label_of(report.candidates[0])}, measured again", twin))
    return both(lambda width: _draw_timeline(found, report.data["noise_floor"], width))


def _draw_timeline(found: Sequence[tuple[int, str, Sequence[Mapping[str, Any]]]], floor: float, width: int) -> str:
    phone = width <= NARROW
    height, bottom, right = (320, 268, width - 14) if phone else (360, 308, width - 20)
    clock = all(r.get("started_s") is not None for _, _, rounds in found for r in rounds)
    most = max(r.get("position") or 0 for _, _, rounds in found for r in rounds) + 1
    lines = []
    for index, label, rounds in found:
        medians = medians_ms(rounds)
        own = float(np.median(medians))
        # Without a clock: the place of the round, and within it.
        times = [r["started_s"] if clock else n + 1 + (r.get("position") or 0) / most for n, r in enumerate(rounds)]
        lines.append((index, label, times, medians, [100 * (m / own - 1) for m in medians]))
    axis = fit([t for line in lines for t in line[2]], 58, right, pad=0.03)
    values = [v for line in lines for v in line[4]]
    # A noise far above all that is drawn would make lines of everything.
    noise = min(100 * floor, 2 * max(1.0, *(abs(v) for v in values)))
    y_axis = fit([*values, -noise, noise], bottom, 34, pad=0.08)
    title = "seconds since the measurement began" if clock else "round"
    top, low = y_axis.at(noise), y_axis.at(-noise)
    parts = [
        bottom_axis(axis, 34, bottom, title, 5 if phone else 10),
        left_axis(y_axis, 58, right, "round's median against the candidate's own, %", 7),
        tag("rect", x=58, y=top, width=right - 58, height=low - top, class_="noise"),
        tag("line", x1=58, x2=right, y1=y_axis.at(0), y2=y_axis.at(0), class_="edge"),
    ]
    for index, label, times, medians, offs in lines:
        places = [(axis.at(t), y_axis.at(v)) for t, v in zip(times, offs, strict=True)]
        order = sorted(range(len(places)), key=lambda n: times[n])
        drawn = [
            tag("polyline", points=" ".join(f"{places[n][0]:.1f},{places[n][1]:.1f}" for n in order), class_="series")
        ]
        for n in order:
            tip = f"{label}, round {n + 1}: {short(medians[n])} ms ({offs[n]:+.1f} %)"
            drawn.append(
                mark(
                    "circle",
                    tip,
                    cx=places[n][0],
                    cy=places[n][1],
                    r=4,
                    class_="solid",
                    data_x=times[n],
                    data_y=medians[n],
                )
            )
        parts.append(
            tag("g", *drawn, class_=color(index) if index >= 0 else "twin", data_c=index if index >= 0 else None)
        )
    return svg(width, height, "medians of the rounds in the order of time", *parts)
