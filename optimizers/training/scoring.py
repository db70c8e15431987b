"""How a training is judged: handed down from where metrics live, because optimizers know none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deploykit.specs import Array

# A batch each: the judged output [n, ...] and the labels, as the dataset has them.
Pairs = Iterable[tuple[Array, Array]]


@dataclass(frozen=True, slots=True)
class Score:
    """A metric.

    Attributes:
        name: What it is called in histories and logs.
        higher_is_better: Which way is good.
        of: Scores all batches of a dataset; may keep what it needs of them, and nothing else.
    """

    name: str
    higher_is_better: bool
    of: Callable[[Pairs], float]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a module gave on a dataset.

    Attributes:
        samples: Rows that were run.
        metric: The score; None where none was asked for.
        loss: Mean loss a row; None where none was asked for.
    """

    samples: int
    metric: float | None
    loss: float | None
