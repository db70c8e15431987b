"""Reading a report from a file: validated, of any version that is known, or an error that says what it is instead."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.benchmarks.report import Report
from deploykit.benchmarks.schema import VERSIONS, what_is_wrong
from deploykit.errors import BenchmarkError, DeploykitError, first_line

# A million latencies take 8 MB; what is far larger was never written by a benchmark.
LIMIT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file is read as, for errors.

    Attributes:
        expected: What it should have been.
        hint: What to do instead.
        noun: What it is called.
        error: What is raised.
    """

    expected: str
    hint: str
    noun: str
    error: type[DeploykitError] = BenchmarkError


REPORT = Kind(
    "a report in JSON, as `deploykit benchmark -o FILE` writes it",
    "measure anew: deploykit benchmark -m MODEL -o REPORT.json",
    "report",
)


def read_report(path: str | Path) -> Report:
    """Read and validate a report.

    Args:
        path: What `deploykit benchmark -o` wrote, of schema version 1 or 2.

    Raises:
        BenchmarkError: There is no such file, or it holds anything else.
    """
    return parse_report(read_text(Path(path), REPORT), str(path))


def parse_report(text: str, name: str) -> Report:
    """The same for text.

    Args:
        text: JSON.
        name: What errors call it.

    Raises:
        BenchmarkError: It is no report.
    """
    return as_report(load_json(text, name, REPORT), name)


def as_report(data: Any, name: str) -> Report:
    """The same for what JSON held.

    Raises:
        BenchmarkError: It is no report.
    """
    check_document(data, name, REPORT, "candidates", VERSIONS, what_is_wrong)
    return Report(_normal(data))


def check_document(
    data: Any, name: str, kind: Kind, key: str, versions: Sequence[int], what_is_wrong: Callable[[Any], str | None]
) -> None:
    """Refuse what is no document of a kind.

    Args:
        data: What JSON held.
        name: What errors call it.
        kind: Which kind.
        key: That only this kind of document has.
        versions: Of its schema that are known.
        what_is_wrong: Tells a fault of a document of these versions.

    Raises:
        DeploykitError: It is something else, of an unknown version, or damaged.
    """
    expected, hint = kind.expected, kind.hint
    if not isinstance(data, dict) or "schema_version" not in data or key not in data:
        raise kind.error(f"{name} holds JSON, but no {kind.noun}", expected=expected, hint=hint)
    version = data["schema_version"]
    if isinstance(version, bool) or version not in versions:
        known = " or ".join(str(v) for v in versions)
        newer = isinstance(version, int) and version > max(versions)
        hint = f"update DeployKit, or make a new {kind.noun} with this one" if newer else hint
        raise kind.error(f"{name} is of schema version {version!r:.40}", expected=known, hint=hint)
    wrong = what_is_wrong(data)
    if wrong is not None:
        raise kind.error(f"{name} is a damaged {kind.noun}: {wrong}", expected=expected, hint=hint)


def load_json(text: str, name: str, kind: Kind) -> Any:
    """What JSON holds.

    Raises:
        DeploykitError: It is none.
    """
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise kind.error(f"{name} is nested too deeply", expected=kind.expected, hint=kind.hint) from exc
    except ValueError as exc:
        raise kind.error(
            f"{name} is no JSON, or only part of it ({first_line(exc)})", expected=kind.expected, hint=kind.hint
        ) from exc


def read_text(path: Path, kind: Kind) -> str:
    """The text of a regular file of a reasonable size.

    Raises:
        DeploykitError: It is none.
    """
    try:
        if path.is_dir():
            raise kind.error(f"{path} is a directory", expected=kind.expected)
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise kind.error(f"{path} {what}", expected=kind.expected, hint=kind.hint)
        size = path.stat().st_size
        if size > LIMIT_BYTES:
            raise kind.error(
                f"{path} has {size / 1e9:.1f} GB", expected=f"a {kind.noun} of at most {LIMIT_BYTES / 1e9:.1f} GB"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise kind.error(f"{path} cannot be read ({first_line(exc)})", expected=kind.expected, hint=kind.hint) from exc


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
