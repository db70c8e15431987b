"""How far a model's own outputs move when its inputs move by their rounding.

Floating point promises no more: a graph that sums in another order is as right as the source where it stays that close.
A few values of a picture of logits, just where one of them is torn between two answers, can be further from the source
than any tolerance that would be worth having for the others. (Higham, Accuracy and Stability of Numerical Algorithms,
1.6: the forward error is the condition number times the backward error.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deploykit.benchmarks.differences import Outputs
from deploykit.specs import Array

_DRAWS = 4
# A graph rounds after every operator, not only its inputs.
_FACTOR = 4.0


def slack_of(
    feeds: Sequence[Mapping[str, Array]],
    outputs: Sequence[Outputs],
    run: Callable[[dict[str, Array]], Outputs | None],
) -> list[dict[str, Array]] | None:
    """What each value of the outputs may differ by, because the source itself moves about that far.

    Args:
        feeds: Inputs, one mapping a case.
        outputs: What the source gives for them.
        run: Runs the source; None where it cannot be asked.

    Returns:
        Four times the largest of four movements of each value, when every real input is moved up or down by the
        precision of its type (2**-23 of a float32); None where the source cannot be asked or has no real inputs.
    """
    rng = np.random.default_rng(0)
    found = []
    for case, given in zip(feeds, outputs, strict=True):
        real = [name for name, array in case.items() if array.dtype.kind == "f"]
        if not real:
            return None
        moved = {name: np.zeros(array.shape) for name, array in given.items() if array.dtype.kind == "f"}
        for _ in range(_DRAWS):
            nearby = {name: _moved(array, rng) if name in real else array for name, array in case.items()}
            made = run(nearby)
            if made is None:
                return None
            for name, furthest in moved.items():
                if made[name].shape != furthest.shape:
                    return None
                with np.errstate(invalid="ignore"):
                    step = np.abs(np.asarray(made[name], np.float64) - np.asarray(given[name], np.float64))
                moved[name] = np.maximum(furthest, np.where(np.isfinite(step), step, 0))
        found.append({name: _FACTOR * furthest for name, furthest in moved.items()})
    return found


def _moved(array: Array, rng: np.random.Generator) -> Array:
    eps = np.finfo(array.dtype).eps
    return np.asarray(array * (1 + rng.choice([-eps, eps], array.shape).astype(array.dtype))).astype(array.dtype)
