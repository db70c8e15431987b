"""A teacher's answers, computed once for all epochs.

The training engine reads a dataset once and keeps its rows, on disk where they are large; the answers are rows like any
others. No epoch changes a row, so that an answer holds for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from deploykit.data import Dataset
from deploykit.errors import OptimizationError
from deploykit.extras import require
from deploykit.optimizers.distillation.distiller import ANSWERS
from deploykit.optimizers.distillation.networks import Network
from deploykit.optimizers.distillation.plan import Plan
from deploykit.optimizers.training.padding import cut, lengths_of
from deploykit.specs import Array

# More than this is not kept unless it is asked for: scores over a vocabulary at every position grow large.
_LIMIT_BYTES = 1 << 30


def why_not_kept(data: Dataset, plan: Plan, asked: str) -> str | None:
    """Why a teacher's answers are not kept; None where they are.

    Args:
        data: What it would answer on.
        plan: What is compared.
        asked: "auto", "on" or "off".

    Raises:
        OptimizationError: They are to be kept, and cannot be.
    """
    if asked == "off":
        return "it was asked for"
    if plan.looks_inside:
        reason = "what the teacher computes inside is compared too"
        if asked == "on":
            raise OptimizationError(f"the teacher's answers cannot be kept: {reason}", hint="leave --cache out")
        return reason
    size = math.prod(plan.answer) * 4 * (data.length or 0)
    return f"they take {size / 2**30:.1f} GiB" if asked == "auto" and size > _LIMIT_BYTES else None


def with_answers(
    data: Dataset,
    teacher: Network,
    plan: Plan,
    batch: int,
    advance: Callable[[int], None] | None = None,
    *,
    trim: bool = False,
) -> Dataset:
    """The same data with the teacher's answers beside them, under the name `ANSWERS`: asked whenever they are read.

    Args:
        data: Rows as the teacher takes them.
        teacher: In evaluation mode.
        plan: Which output.
        batch: Rows in a run of the teacher at most.
        advance: Told how many rows were answered.
        trim: Whether rows of like length are asked together, without their padding; not where each position has an
            answer.
    """
    torch = require("torch", extra="train")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def ask(inputs: dict[str, Array]) -> Array:
        tensors = {teacher.keys[name]: torch.from_numpy(np.array(array)).to(device) for name, array in inputs.items()}
        return np.asarray(teacher.run(tensors)[plan.teacher_output].float().cpu().numpy(), np.float32)

    def answers(rows: dict[str, Array], count: int) -> Array:
        inputs = {name: rows[key] for name, key in teacher.keys.items()}
        starts = range(0, count, batch)
        if not trim or len(plan.answer) != 1:
            return np.concatenate([ask({n: a[start : start + batch] for n, a in inputs.items()}) for start in starts])
        lengths = lengths_of(inputs, data.source)
        order = np.argsort(lengths, kind="stable")
        parts = [order[start : start + batch] for start in starts]
        found = [ask(cut({n: a[index] for n, a in inputs.items()}, int(lengths[index].max()))) for index in parts]
        return np.asarray(np.concatenate(found)[np.argsort(order)])

    def batches(size: int) -> Iterator[dict[str, Array]]:
        done = 0
        for rows in data.batches(size):
            count = len(next(iter(rows.values())))
            done += count
            yield {**rows, ANSWERS: answers(rows, count)}
            if advance is not None:
                advance(done)

    names = None if data.names is None else (*data.names, ANSWERS)
    return Dataset(data.source, batches, length=data.length, names=names)
