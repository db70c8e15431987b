"""Plots of what not every report holds: tuner trials, load curves, layers; and where the nodes ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploykit.benchmarks.page_drawing import (
    LETTER,
    NARROW,
    Rows,
    both,
    bottom_axis,
    clean,
    color,
    escape,
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
from deploykit.benchmarks.wording import label_of, objective_of, plain

MOST_LAYERS = 15
# Precisions in a fixed order, so that a colour means the same in every plot.
_PRECISIONS = ("float32", "int8", "bfloat16", "float16", "int4", "mixed", "")
# From the best to the worst: yellow to dark blue, even in lightness, told apart by any eye.
_RAMP = ((253, 231, 137), (144, 210, 137), (59, 160, 145), (50, 105, 142), (61, 56, 115), (52, 20, 80))


# --- tuner -----------------------------------------------------------------------------------------------------------


def heat_maps(tuning: Mapping[str, Any]) -> str:
    """Trials of the tuner, a map for each candidate; empty where nothing was tuned.

    Args:
        tuning: `objective` and `trials`.
    """
    trials = tuning.get("trials") or []
    throughput = tuning.get("objective") == "throughput"
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(_trial_label(trial), []).append(trial)
    return "".join(_heat_map(label, found, throughput) for label, found in groups.items())


def _trial_label(trial: Mapping[str, Any]) -> str:
    return f"{trial['model']} on {trial['device']}"


def _heat_map(label: str, trials: Sequence[Mapping[str, Any]], throughput: bool) -> str:
    """Rows are settings, columns threads.

    Of a cell that was tried in several stages the first trial counts, when its neighbours ran beside it.
    """
    throughput = throughput or all(t.get("median_ms") is None for t in trials)
    key, title = ("throughput_per_s", "per s") if throughput else ("median_ms", "ms")
    cells: dict[tuple[str, int], Mapping[str, Any]] = {}
    for trial in trials:
        place = _settings_text(trial), int(trial["threads"])
        if trial.get(key) is not None and trial.get("status", "ok") == "ok":
            earlier = cells.get(place, trial)
            cells[place] = {**earlier, "kept": earlier["kept"] or trial["kept"]}
    if not cells:
        return ""
    values = [float(t[key]) for t in cells.values()]
    best = max(values) if throughput else min(values)
    worst = min(values) if throughput else max(values)
    columns = sorted({threads for _, threads in cells})
    names = list(dict.fromkeys(name for name, _ in cells))

    def draw(width: int) -> str:
        rows = Rows(len(names), width, 30, label=min(380.0, 20 + LETTER * max(len(n) for n in names)))
        size = min(110.0, (width - rows.left - 8) / len(columns))
        parts = []
        for row, name in enumerate(names):
            parts.append(rows.name(row, name))
            for column, threads in enumerate(columns):
                trial = cells.get((name, threads))
                if trial is not None:
                    share = 0.0 if best == worst else abs(float(trial[key]) - best) / abs(worst - best)
                    x = rows.left + column * size
                    parts.append(_cell(trial, key, title, share, (x, rows.top(row), size, rows.height)))
        for column, threads in enumerate(columns):
            parts.append(text(rows.left + (column + 0.5) * size, rows.bottom + 16, str(threads), "tick", "middle"))
        parts.append(text(rows.left + len(columns) * size / 2, rows.bottom + 35, "threads", "title", "middle"))
        return svg(width, rows.bottom + 42, f"trials of the tuner for {shorten(label, 200)}, {title}", *parts)

    said = f"{label}: median latency, ms" if not throughput else f"{label}: samples per second"
    return tag("h3", escape(said)) + both(draw)


def _cell(trial: Mapping[str, Any], key: str, unit: str, share: float, box: tuple[float, float, float, float]) -> str:
    x, y, width, height = box
    fill, ink = ramp(share)
    value = float(trial[key])
    kept = bool(trial.get("kept"))
    best = share == 0
    tip = f"{_settings_text(trial)}, {trial['threads']} threads: {short(value)} {unit}, stage {trial.get('stage')}"
    tip += ("; the best" if best else "") + ("; kept" if kept else "; dropped")
    drawn = mark(
        "rect", tip, focus=True, x=x + 1, y=y, width=width - 2, height=height, rx=3, fill=fill,
        class_="kept" if kept else "dropped", data_value=value, data_threads=trial["threads"],
    )  # fmt: skip
    label = ("★ " if best else "") + short(value)
    return drawn + tag("text", escape(label), x=x + width / 2, y=y + height / 2 + 4, class_=f"cell {ink}")


def ramp(share: float) -> tuple[str, str]:
    """Fill of a cell, and the class of its ink: 0 is the best, 1 the worst."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    step = min(int(place), len(_RAMP) - 2)
    mixed = [a + (b - a) * (place - step) for a, b in zip(_RAMP[step], _RAMP[step + 1], strict=True)]
    light = sum(w * c for w, c in zip((0.299, 0.587, 0.114), mixed, strict=True)) > 130
    return "#" + "".join(f"{round(c):02x}" for c in mixed), "on-light" if light else "on-dark"


def _settings_text(trial: Mapping[str, Any]) -> str:
    """All but the threads, which are the columns; what is as it is by default is left out."""
    usual = {"sessions": 1, "concurrency": 1, "batch": 1, "precision": "fp32", "optimize": True}
    found = {k: trial[k] for k, value in usual.items() if trial.get(k) not in (None, value)}
    found |= {str(k).rpartition(".")[2]: v for k, v in trial["settings"].items() if k != "threads" and v is not None}
    return ", ".join(f"{k}={plain(v)}" for k, v in found.items()) or "defaults"


# --- load curves -----------------------------------------------------------------------------------------------------


def sweep(report: Report) -> str:
    """Throughput over requests in flight; empty outside of the scenario "offline"."""
    found = [
        (i, label_of(c), [(float(p["concurrency"]), float(p["throughput_per_s"]), _knee(c, p)) for p in c["sweep"]])
        for i, c in enumerate(report.candidates)
        if c.get("sweep")
    ]
    if not found:
        return ""
    return _curves(found, "requests in flight", "samples per second", "throughput over concurrency", "the knee")


def _knee(c: Mapping[str, Any], point: Mapping[str, Any]) -> bool:
    return bool(c.get("knee") and c["knee"]["concurrency"] == point["concurrency"])


def rates(report: Report) -> str:
    """99th percentile over the rate of requests, with the objective; empty outside of the scenario "server"."""
    found = []
    for i, c in enumerate(report.candidates):
        points = [
            (float(p["rate_per_s"]), float(p["p99_ms"]), bool(p["met"]))
            for p in c.get("rates") or ()
            if p.get("p99_ms") is not None
        ]
        if points:
            found.append((i, label_of(c), points))
    if not found:
        return ""
    return _curves(
        found, "requests per second", "p99 latency, ms", "p99 over the rate of requests", "meets the objective",
        objective_of(report), log_y=None,
    )  # fmt: skip


def _curves(
    found: Sequence[tuple[int, str, Sequence[tuple[float, float, bool]]]],
    x_title: str,
    y_title: str,
    label: str,
    marked: str,
    objective: float | None = None,
    *,
    log_y: bool | None = False,
) -> str:
    """Lines with full marks where something holds, and hollow ones elsewhere."""

    def draw(width: int) -> str:
        phone = width <= NARROW
        height, bottom, right = (320, 268, width - 18) if phone else (360, 308, width - 24)
        xs = [x for _, _, points in found for x, _, _ in points]
        ys = [y for _, _, points in found for _, y, _ in points] + ([] if objective is None else [objective])
        axis = fit(xs, 62, right, log=None, pad=0.05)
        y_axis = fit(ys, bottom, 34, log=log_y, zero=log_y is False, pad=0.06)
        parts = [
            bottom_axis(axis, 34, bottom, x_title, 5 if phone else 10),
            left_axis(y_axis, 62, right, y_title, 6),
        ]
        if objective is not None:
            y = y_axis.at(objective)
            parts.append(tag("line", x1=62, x2=right, y1=y, y2=y, class_="objective", data_objective=objective))
            parts.append(text(66, y - 5, f"objective {short(objective)} ms", "small"))
        for index, name, points in found:
            parts.append(_curve(index, name, points, axis.at, y_axis.at, (x_title, y_title, marked)))
        return svg(width, height, label, *parts)

    return both(draw)


def _curve(
    index: int,
    name: str,
    points: Sequence[tuple[float, float, bool]],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    words: tuple[str, str, str],
) -> str:
    x_title, y_title, marked = words
    line = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y, _ in sorted(points))
    drawn = [tag("polyline", points=line, class_="series")]
    for x, y, full in points:
        tip = f"{name}: {short(x)} {x_title}, {short(y)} {y_title}" + (f"; {marked}" if full else "")
        drawn.append(
            mark(
                "circle",
                tip,
                cx=place_x(x),
                cy=place_y(y),
                r=6 if full else 4.5,
                class_="solid" if full else "hollow",
                data_x=x,
                data_y=y,
                data_marked="yes" if full else None,
            )
        )
    return tag("g", *drawn, class_=color(index), data_c=index)


# --- layers ----------------------------------------------------------------------------------------------------------


def layers(report: Report) -> str:
    """The slowest layers of every candidate that was explained, and what was found; empty where none was."""
    return "".join(
        _explained(label, told, first=n == 0)
        for n, (label, told) in enumerate((report.data.get("explain") or {}).items())
    )


def _explained(label: str, told: Mapping[str, Any], *, first: bool) -> str:
    found = sorted(told["layers"], key=lambda layer: -layer["time_us"])
    top = found[:MOST_LAYERS]
    rest = sum(layer["share"] for layer in found[MOST_LAYERS:])
    parts = [both(lambda width: _draw_layers(label, top, width))] if top else []
    if len(found) > len(top):
        parts.append(tag("p", f"{len(found) - len(top)} more layers take {rest:.0%} of the time.", class_="dim"))
    used = list(dict.fromkeys(precision_of(layer) for layer in top))
    parts += [tag("p", *(_swatch(p) for p in used), class_="legend")] if used else []
    if told.get("total_us") is not None:
        parts.append(tag("p", escape(_whole(told)), class_="dim"))
    parts += [_finding(f) for f in told["findings"]]
    parts += [tag("p", escape(f"Note: {note}"), class_="dim") for note in told.get("notes") or ()]
    return tag("details", tag("summary", escape(label)), *parts, open="open" if first else None)


def _whole(told: Mapping[str, Any]) -> str:
    """One sentence about a whole run: its time, and how near the machine's limits it comes."""
    roof, parts = told["roofline"], [f"One run takes {short(told['total_us'] / 1000)} ms"]
    for key, unit, share in (("gflops", "GFLOP/s", "of_compute_peak"), ("gbytes_per_s", "GB/s", "of_memory_peak")):
        if roof.get(key):
            peak = f" ({roof[share]:.0%} of what this machine can)" if roof.get(share) is not None else ""
            parts.append(f"{short(roof[key])} {unit}{peak}")
    return ", ".join(parts) + "."


def precision_of(layer: Mapping[str, Any]) -> str:
    """The precision of a layer, by one of the names that have a colour."""
    name = str(layer.get("precision") or "")
    alias = {"f32": "float32", "i8": "int8", "u8": "int8", "uint8": "int8", "bf16": "bfloat16", "f16": "float16"}
    return alias.get(name, name)


def precision_class(name: str) -> str:
    """The class that gives a precision its colour."""
    return f"p{_PRECISIONS.index(name) if name in _PRECISIONS else len(_PRECISIONS) - 1}"


def _swatch(name: str) -> str:
    return tag("span", tag("i", class_=f"box {precision_class(name)}"), escape(name or "unknown"), class_="key")


def _draw_layers(label: str, found: Sequence[Mapping[str, Any]], width: int) -> str:
    rows = Rows(len(found), width, 18, label=290.0)
    axis = fit([float(layer["time_us"]) for layer in found], rows.left, width - (84 if rows.phone else 150), zero=True)
    parts = [bottom_axis(axis, 0, rows.bottom, "microseconds in one run", 4 if rows.phone else 7)]
    for row, layer in enumerate(found):
        time = float(layer["time_us"])
        precision = precision_of(layer)
        share = layer["share"]
        facts = [f"{layer['name']} ({layer['op']})", f"{short(time)} µs", precision or "precision unknown"]
        facts.append(f"{share:.1%} of the time")
        facts += [f"{key.replace('_', ' ')} {plain(layer[key])}" for key in _LAYER_FACTS if layer.get(key) is not None]
        start = axis.at(0)
        bar = mark(
            "rect", "; ".join(facts), focus=True, x=start, y=rows.top(row), width=max(axis.at(time) - start, 1.0),
            height=rows.height, class_="bar", data_value=time,
        )  # fmt: skip
        words = f"{short(time)} µs {share:.0%}"
        value = text(axis.at(time) + 6, rows.top(row) + rows.height / 2 + 4, words, "value")
        name = rows.name(row, _layer_name(layer, rows))
        parts.append(tag("g", name, bar, value, class_=precision_class(precision)))
    return svg(width, rows.bottom + 42, f"slowest layers of {shorten(label, 200)}", *parts)


_LAYER_FACTS = ("on", "kernel", "macs", "gflops", "bytes", "gbytes_per_s", "bound", "of_peak")


def _layer_name(layer: Mapping[str, Any], rows: Rows) -> str:
    """The operator and the end of the name, which tells layers apart."""
    name, room = clean(layer["name"]), rows.room - len(clean(layer["op"])) - 1
    return f"{layer['op']} " + (name if len(name) <= room else "…" + name[-max(room - 1, 1) :])


def _finding(found: Mapping[str, Any]) -> str:
    severity, cost, nodes = found["severity"], found["cost_us"], found["nodes"]
    extra = ([f"costs up to {short(cost)} µs of a run"] if cost else []) + (
        [f"nodes: {plain(nodes[:8])}"] if nodes else []
    )
    return tag(
        "div",
        tag("b", escape(f"{severity}: {found['what']}")),
        tag("span", escape(f": {found['cure']}")),
        tag("small", escape(" " + "; ".join(extra))) if extra else "",
        class_="finding severe" if severity == "high" else "finding",
    )


# --- placement -------------------------------------------------------------------------------------------------------


def placement(report: Report) -> str:
    """How many computing nodes ran in which precision, and the share on the device asked for; empty where unknown."""
    found = [(i, c) for i, c in enumerate(report.candidates) if (c["placement"] or {}).get("compute_precisions")]
    if not found:
        return ""
    used = list(
        dict.fromkeys(precision_of({"precision": p}) for _, c in found for p in c["placement"]["compute_precisions"])
    )
    legend = tag("p", *(_swatch(p) for p in used), class_="legend")
    return both(lambda width: _draw_placement(found, width)) + legend


def _draw_placement(found: Sequence[tuple[int, Mapping[str, Any]]], width: int) -> str:
    rows = Rows(len(found), width, 20)
    right = width - (16 if rows.phone else 250)
    parts = []
    for row, (index, c) in enumerate(found):
        told = c["placement"]
        counts = told["compute_precisions"]
        total = sum(counts.values()) or 1
        x, drawn = rows.left, [rows.name(row, f"{index + 1} {c['name']} {c['device']}")]
        for name, count in counts.items():
            size = (right - rows.left) * count / total
            shown = precision_of({"precision": name})
            bar = mark(
                "rect",
                f"{label_of(c)}: {count} of {total} computing nodes in {name or 'an unknown precision'}",
                focus=True,
                x=x,
                y=rows.top(row),
                width=size,
                height=rows.height,
                class_="bar",
                data_value=count,
            )
            inside = text(x + size / 2, rows.top(row) + 14, str(count), "on-bar", "middle") if size > 18 else ""
            drawn.append(tag("g", bar, inside, class_=precision_class(shown)))
            x += size
        share = f"{told['share_of_nodes']:.0%} of nodes, {told['share_of_time']:.0%} of time on {told['asked']}"
        end, below = (width - 8, rows.top(row) - 6) if rows.phone else (right + 12, rows.top(row) + 14)
        words = (
            f"{told['share_of_time']:.0%} of time"
            if rows.phone
            else shorten(share.removesuffix("ExecutionProvider"), 38)
        )
        drawn.append(text(end, below, words, "value", "end" if rows.phone else None))
        parts.append(tag("g", *drawn, data_c=index))
    return svg(width, rows.bottom, "precisions of the nodes that compute", *parts)
