"""What example inputs and outputs tell about an interface: legal values, sizes that may change, ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploykit.data import ValueRange
from deploykit.exporters.base import Case
from deploykit.exporters.shapes import example_sizes, vary
from deploykit.specs import Array, Feeds, TensorSpec


def export_feeds(specs: Sequence[TensorSpec], examples: Feeds) -> dict[str, Array]:
    """The example with every dynamic dimension at least 2: torch.export takes 0 and 1 for constants."""
    rng = np.random.default_rng(1)
    sizes = {k: max(2, v) for k, v in example_sizes(specs, examples).items()}
    made = {}
    for spec in specs:
        shape = spec.concrete(sizes)
        example = examples[spec.name]
        if shape == example.shape:
            made[spec.name] = example
        else:
            made[spec.name] = vary(example, shape, rng)
    return made


def rank_notes(cases: Sequence[Case]) -> list[str]:
    """Outputs whose rank hangs on the sizes, in words."""
    ranks = {name: {case.outputs[name].ndim for case in cases} for name in cases[0].outputs}
    return [
        f"output {name!r} has {' or '.join(map(str, sorted(found)))} dimensions, which depends on the sizes; the graph "
        f"declares {cases[0].outputs[name].ndim}"
        for name, found in ranks.items()
        if len(found) > 1
    ]


def widen(array: Array) -> Array:
    """float32 for bfloat16."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def observed_range(example: Array) -> ValueRange | None:
    """What an example tells about legal values: the extremes of integers, mean and spread of reals."""
    if example.size == 0 or example.dtype.kind not in "iuf":
        return None
    if example.dtype.kind in "iu":
        return ValueRange(float(example.min()), float(example.max()))
    mean, spread = float(np.mean(example, dtype=np.float64)), float(np.std(example, dtype=np.float64)) or 1.0
    return ValueRange(mean - spread, mean + spread)
