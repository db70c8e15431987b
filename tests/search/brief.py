"""The deeds of a search, with fewer turns in its screening: for tests of what is found, not of how well it is timed."""

from __future__ import annotations

from deploykit.benchmarks import screening
from deploykit.search.deeds import decide, judge, make, screen, tune

__all__ = ["decide", "judge", "make", "screen", "tune"]

screening._MOST_TURNS = screening._FIRST_TURNS
