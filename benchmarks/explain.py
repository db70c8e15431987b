"""What `--explain` found, for a person: as text for the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOP = 10
_COLUMNS = ("layer", "op", "kernel", "type", "us", "share", "GFLOP/s", "GB/s", "bound", "of peak")
_NUMBERS = 4


def explanation_text(found: Mapping[str, Any]) -> str:
    """The dearest layers and the findings, for the terminal."""
    lines = _head(found)
    if found["layers"]:
        rows = [_COLUMNS, *(_cells(layer) for layer in found["layers"][:_TOP])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        for row in rows:
            cells = [
                cell.ljust(width) if i < _NUMBERS or i == len(row) - 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  " + "  ".join(cells).rstrip())
        lines += [f"  {_rest(found)}"] if _rest(found) else []
    lines += [""] if found["layers"] else []
    for finding in found["findings"]:
        cost = f" (up to {finding['cost_us'] / 1e3:.3f} ms of a run)" if finding["cost_us"] else ""
        lines += [f"  {finding['severity']:6} {finding['kind']}{cost}", f"         {finding['what']}"]
        lines.append(f"         cure: {finding['cure']}")
    if not found["findings"]:
        lines.append("  nothing stands out: the time is where the arithmetic is")
    lines += [f"  note: {note}" for note in found.get("notes", ())]
    return "\n".join(_printable(line).rstrip() for line in lines) + "\n"


def explanation_markdown(found: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    first, *rest = _head(found)
    lines = [f"### {first.removesuffix(':')}", "", *(line.strip() for line in rest), ""]
    if found["layers"]:
        lines += [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * _NUMBERS + "---:|" * (len(_COLUMNS) - _NUMBERS)]
        for layer in found["layers"][:_TOP]:
            lines.append(f"| {' | '.join(_escaped(cell) for cell in _cells(layer))} |")
        lines += ["", _rest(found), ""] if _rest(found) else [""]
    for finding in found["findings"]:
        cost = f", up to {finding['cost_us'] / 1e3:.3f} ms of a run" if finding["cost_us"] else ""
        lines.append(f"- **{finding['kind']}** ({finding['severity']}{cost}): {_escaped(finding['what'])}.")
        lines.append(f"  Cure: {_escaped(finding['cure'])}")
    if not found["findings"]:
        lines.append("Nothing stands out: the time is where the arithmetic is.")
    lines += [f"- Note: {note}" for note in found.get("notes", ())]
    return "\n".join(_printable(line) for line in lines).rstrip() + "\n"


def _printable(text: str) -> str:
    """Names from files may hold anything, terminal escapes included."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _escaped(text: str) -> str:
    """Text that a Markdown table takes as it is; names of nodes may hold anything."""
    for mark in "\\|<>*_`":
        text = text.replace(mark, "\\" + mark)
    return text


def _head(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{found.get('label') or found['device']}:"]
    if found.get("total_us") is None:
        return lines
    parts = [
        f"{found['total_us'] / 1e3:.3f} ms a run, {found['profiled_us'] / 1e3:.3f} ms in kernels with the profiler"
    ]
    roof = found["roofline"]
    if roof["gflops"]:
        parts.append(f"{roof['gflops']:.1f} GFLOP/s")
        if roof["of_compute_peak"] is not None:
            parts[-1] += f" ({roof['of_compute_peak']:.0%} of the peak)"
    if roof["gbytes_per_s"]:
        parts.append(f"{roof['gbytes_per_s']:.1f} GB/s")
        if roof["of_memory_peak"] is not None:
            parts[-1] += f" ({roof['of_memory_peak']:.0%})"
    lines.append(f"  {', '.join(parts)}")
    peak = found["peak"]
    roofs = [
        f"{peak[key]:.0f} {unit} {name}"
        for key, unit, name in (
            ("fp32_gflops", "GFLOP/s", "float32"), ("int8_gops", "Gop/s", "int8"),
            ("native_gflops", "GFLOP/s", "16 bits"),
        )
        if peak.get(key)
    ]  # fmt: skip
    if peak.get("bytes_per_s"):
        roofs.append(f"{peak['bytes_per_s'] / 1e9:.1f} GB/s")
    loaded = ", while the machine was busy with other work" if peak.get("loaded") else ""
    lines.append(f"  peaks with {peak['threads']} threads{loaded}: {', '.join(roofs) or 'not measured'}")
    return lines


def _cells(layer: Mapping[str, Any]) -> tuple[str, ...]:
    kernel = layer["kernel"] + (f" +{len(layer['kernels']) - 1}" if len(layer["kernels"]) > 1 else "")

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        _short(layer["name"]), layer["op"], kernel, layer["precision"] or "-", f"{layer['time_us']:.0f}",
        f"{layer['share']:.1%}", number(layer["gflops"], ".1f"), number(layer["gbytes_per_s"], ".1f"),
        layer["bound"] or "-", number(layer["of_peak"], ".0%"),
    )  # fmt: skip


def _short(name: str, width: int = 44) -> str:
    """The end of a long name tells more than its beginning."""
    return name if len(name) <= width else "..." + name[-(width - 3) :]


def _rest(found: Mapping[str, Any]) -> str:
    others = found["layers"][_TOP:]
    parts = [f"and {len(others)} more layers, {sum(o['share'] for o in others):.1%} of the time"] if others else []
    if found["unattributed_us"]:
        parts.append(f"{found['unattributed_us']:.0f} us in kernels that the runtime added by itself")
    return "; ".join(parts)
