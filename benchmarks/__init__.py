"""Benchmarks: what is right, how fast it is, and which one wins. One verb: `measure`.

The names are loaded on first use: a worker process, started anew in every round, needs none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploykit.benchmarks.measurement import measure
    from deploykit.benchmarks.plan import Candidate, Settings
    from deploykit.benchmarks.report import Report

__all__ = ["Candidate", "Report", "Settings", "measure"]

_EXPORTS = {"Candidate": "plan", "Report": "report", "Settings": "plan", "measure": "measurement"}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'deploykit.benchmarks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deploykit.benchmarks.{_EXPORTS[name]}"), name)
