"""Benchmarks: what is right, how fast it is, and which one wins. One verb: `measure`."""

from __future__ import annotations

from deploykit.benchmarks.measure import measure
from deploykit.benchmarks.plan import Candidate, Settings
from deploykit.benchmarks.report import Report

__all__ = ["Candidate", "Report", "Settings", "measure"]
