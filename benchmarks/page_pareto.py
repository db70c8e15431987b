"""Accuracy, or likeness, over latency, with the size as a bubble and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.benchmarks.intervals import median_interval, wilson
from deploykit.benchmarks.page_candidates import medians_ms
from deploykit.benchmarks.page_drawing import color, short, shorten
from deploykit.benchmarks.page_plane import Bubble, Plane, draw_plane, front_of
from deploykit.benchmarks.report import Report
from deploykit.benchmarks.wording import cosine_of, in_race, label_of, timed


def pareto(report: Report) -> str:
    """Quality over latency, the size as a bubble; empty where nothing was timed."""
    measured = report.candidates[0]["accuracy"] is not None
    found = report.candidates
    tied = set(report.winner["candidates"]) if report.winner["verdict"] == "tie" else set()
    quality = {}
    for i, c in enumerate(found):
        accuracy = c["accuracy"]
        value = (accuracy or {}).get("accuracy") if measured else cosine_of(c, reference=i == 0)
        if value is not None:
            quality[i] = float(value)
    front = front_of({i: (c["median_ms"], quality[i]) for i, c in enumerate(found) if in_race(c) and i in quality})
    bubbles = [
        _bubble(i, found[i], y, front=i in front, tie=label_of(found[i]) in tied, measured=measured)
        for i, y in quality.items()
    ]
    title = "accuracy" if measured else "cosine of the outputs to the reference's"
    plane = Plane(
        label=f"{title} over median latency; the area of a bubble is the size",
        x_title="median latency, ms",
        y_title=f"{title} (higher is better)",
        limit=1.0,
    )
    return draw_plane(bubbles, plane, [n for n, b in enumerate(bubbles) if b.front])


def _bubble(index: int, c: Mapping[str, Any], y: float, *, front: bool, tie: bool, measured: bool) -> Bubble:
    out = c["status"] != "ok"
    x_ends = median_interval(medians_ms(c["rounds"])) if timed(c) else None
    y_ends = wilson(y, c["accuracy"]["samples"]) if measured else None
    tip = [label_of(c), f"{c['size_bytes'] / 1e6:.2f} MB"]
    if x_ends is not None:
        tip.insert(1, f"{short(c['median_ms'])} ms [{short(x_ends[0])}, {short(x_ends[1])}]")
    ends = f" [{y_ends[0]:.4f}, {y_ends[1]:.4f}]" if y_ends else ""
    tip.append(f"{'accuracy' if measured else 'cosine'} {y:.4f}{ends}")
    tip += ["on the Pareto front"] * front + ["ties with the fastest"] * tie + [c["status"]] * out
    number = str(index + 1)
    return Bubble(
        key=str(index),
        color=color(index),
        tip="; ".join(tip),
        labels=(shorten(f"{number} {c['name']} {c['device']}", 34), number),
        x=c["median_ms"] if timed(c) else None,
        y=y,
        size=c["size_bytes"],
        x_ends=x_ends,
        y_ends=y_ends,
        front=front,
        tie=tie,
        out=out,
    )
