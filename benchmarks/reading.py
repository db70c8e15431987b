"""Reading a report from a file: validated, of any version that is known, or an error that says what it is instead."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from deploykit.benchmarks.report import Report
from deploykit.benchmarks.schema import VERSIONS, what_is_wrong
from deploykit.errors import BenchmarkError, first_line

# A million latencies take 8 MB; what is far larger was never written by a benchmark.
LIMIT_BYTES = 1 << 30
_EXPECTED = "a report in JSON, as `deploykit benchmark -o FILE` writes it"
_AGAIN = "measure anew: deploykit benchmark -m MODEL -o REPORT.json"


def read_report(path: str | Path) -> Report:
    """Read and validate a report.

    Args:
        path: What `deploykit benchmark -o` wrote, of schema version 1 or 2.

    Raises:
        BenchmarkError: There is no such file, or it holds anything else.
    """
    return parse_report(_read(Path(path)), str(path))


def parse_report(text: str, name: str) -> Report:
    """The same for text.

    Args:
        text: JSON.
        name: What errors call it.

    Raises:
        BenchmarkError: It is no report.
    """
    try:
        data = json.loads(text)
    except RecursionError as exc:
        raise BenchmarkError(f"{name} is nested too deeply", expected=_EXPECTED, hint=_AGAIN) from exc
    except ValueError as exc:
        raise BenchmarkError(
            f"{name} is no JSON, or only part of it ({first_line(exc)})", expected=_EXPECTED, hint=_AGAIN
        ) from exc
    if not isinstance(data, dict) or "schema_version" not in data or "candidates" not in data:
        raise BenchmarkError(f"{name} holds JSON, but no report", expected=_EXPECTED, hint=_AGAIN)
    version = data["schema_version"]
    if isinstance(version, bool) or version not in VERSIONS:
        known = " or ".join(str(v) for v in VERSIONS)
        newer = isinstance(version, int) and version > max(VERSIONS)
        hint = "update DeployKit, or measure anew with this one" if newer else _AGAIN
        raise BenchmarkError(f"{name} is of schema version {version!r:.40}", expected=known, hint=hint)
    wrong = what_is_wrong(data)
    if wrong is not None:
        raise BenchmarkError(f"{name} is a damaged report: {wrong}", expected=_EXPECTED, hint=_AGAIN)
    return Report(_normal(data))


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise BenchmarkError(f"{path} is a directory", expected=_EXPECTED)
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise BenchmarkError(f"{path} {what}", expected=_EXPECTED, hint=_AGAIN)
        size = path.stat().st_size
        if size > LIMIT_BYTES:
            raise BenchmarkError(
                f"{path} has {size / 1e9:.1f} GB", expected=f"a report of at most {LIMIT_BYTES / 1e9:.1f} GB"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise BenchmarkError(f"{path} cannot be read ({first_line(exc)})", expected=_EXPECTED, hint=_AGAIN) from exc


def _normal(data: dict[str, Any]) -> dict[str, Any]:
    """Null figures stand for a candidate that was not timed, as absent ones do; version 1 knew one scenario."""
    if data.get("scenario") is None:
        data["scenario"] = data["settings"].get("scenario") or "latency"
    for key in ("explain", "tuning"):
        if data.get(key) is None:
            data.pop(key, None)
    for candidate in data["candidates"]:
        if candidate.get("median_ms") is None or not candidate.get("rounds"):
            for key in ("median_ms", "rounds"):
                candidate.pop(key, None)
        else:
            candidate.setdefault("peak_memory_bytes", None)
        outputs = candidate["outputs"]
        if outputs is not None and outputs.get("cosine") is None:
            outputs["cosine"] = math.nan
        if candidate.get("drift") is None:
            candidate.pop("drift", None)
    return data
