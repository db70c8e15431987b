"""What processes of a measurement hand each other, and whether a candidate's outputs are the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.benchmarks.parity import Outputs, Verdict, compare, compare_lossy, without_padding
from deploykit.specs import Array, Feeds


def write_feeds(path: Path, feeds: Sequence[Feeds]) -> None:
    """Write the inputs of some runs, or their outputs."""
    arrays = {f"{i}/{k}": v for i, f in enumerate(feeds) for k, v in f.items()}
    # Object arrays would need pickle; strings are stored as numpy's own.
    plain = {k: v.astype(str) if v.dtype.kind == "O" else v for k, v in arrays.items()}
    np.savez(path, **plain)  # type: ignore[arg-type]


def read_outputs(path: Path) -> list[dict[str, Array]]:
    """Read what `write_feeds` wrote, one mapping a run."""
    with np.load(path, allow_pickle=False) as archive:
        found: dict[int, dict[str, Array]] = {}
        for key in archive.files:
            number, _, name = key.partition("/")
            found.setdefault(int(number), {})[name] = archive[key]
    return [found[n] for n in sorted(found)]


def judge_outputs(
    expected: Sequence[Outputs], actual: Sequence[Outputs], feeds: Sequence[Feeds], min_cosine: float
) -> tuple[dict[str, Any], str]:
    """A parity record, and why the outputs are wrong; empty where they are the reference's, or near enough."""
    strict = compare(expected, actual)
    if strict.verdict is Verdict.PASSED:
        return {"kind": "equal", **strict.as_dict(), "cosine": strict.cosine}, ""
    lossy = compare_lossy(without_padding(expected, feeds), without_padding(actual, feeds), min_cosine)
    return {"kind": "near", **lossy.as_dict(), "cosine": lossy.cosine}, lossy.reason
