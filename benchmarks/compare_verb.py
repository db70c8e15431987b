"""The verb `compare`: two files or reports, conditions as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deploykit.benchmarks.compare_reports import CompareOptions, ReportComparison, compare_reports
from deploykit.benchmarks.compare_rules import parse_rule
from deploykit.benchmarks.reading import read_report
from deploykit.benchmarks.report import Report


def compare(
    old: str | Path | Report,
    new: str | Path | Report,
    *,
    fail_if: Sequence[str] = (),
    match: Mapping[str, str] | None = None,
    strict: bool = False,
    allow_missing: bool = False,
    allow_different_machine: bool = False,
    allow_different_settings: bool = False,
) -> ReportComparison:
    """Compare two reports of `benchmark`, candidate by candidate.

    Args:
        old: A report, or its file.
        new: The one in question.
        fail_if: Conditions on the change, such as "latency>5%" or "accuracy<-0.5pt". One fails where the whole 95 %
            interval of the change lies beyond its limit.
        match: Old name (or "name on device") to new one, where a candidate is called differently now.
        strict: The measured change decides, without its interval.
        allow_missing: Candidates may be gone or out of the race.
        allow_different_machine: The reports may come from different machines.
        allow_different_settings: They may be measured in different ways.

    Returns:
        What changed; `failed` says whether a condition did.

    Raises:
        BenchmarkError: A file is no report, a condition cannot be read, or the two cannot be compared.
    """
    options = CompareOptions(
        tuple(parse_rule(text) for text in fail_if), dict(match or {}), strict, allow_missing,
        allow_different_machine, allow_different_settings,
    )  # fmt: skip
    reports = [read_report(r) if isinstance(r, str | Path) else r for r in (old, new)]
    return compare_reports(reports[0], reports[1], options)
