"""How good a module is on a dataset, in evaluation mode and full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError
from deploykit.extras import require
from deploykit.optimizers.training.losses import Objective
from deploykit.optimizers.training.outputs import Feed, feed_by_name, first_output, tensors_of
from deploykit.optimizers.training.scoring import Measured, Score
from deploykit.specs import Array


def evaluate(
    module: Any,
    data: Dataset,
    *,
    feed: Feed | None = None,
    score: Score | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    objective: Objective | None = None,
    batch_size: int = 64,
) -> Measured:
    """Run a module on a dataset; its mode, its weights and torch's gradients stay as they are.

    Args:
        module: On any device.
        data: Inputs, and `labels` where `score` or `loss` is given.
        feed: How a batch is given to the module; by name or position by default.
        score: The metric.
        loss: Of an output and labels, a mean over rows.
        objective: A loss that runs the module itself, in place of `loss`.
        batch_size: Rows of a run.

    Raises:
        DataError: There are no rows, or no labels.
    """
    torch = require("torch", extra="train")
    run = feed or feed_by_name
    device = device_of(module)
    rows, total = 0, 0.0

    def pairs() -> Iterator[tuple[Array, Array]]:
        nonlocal rows, total
        for batch in data.batches(batch_size):
            tensors = tensors_of(batch, device)
            count = len(next(iter(batch.values())))
            rows += count
            if (score or loss) and LABELS not in batch:
                raise DataError(f"{data.source} has no {LABELS!r}", hint="add them, or judge by the metric loss")
            if objective is not None:
                total += float(objective(module, tensors)["loss"]) * count
            if score is None and loss is None:
                continue
            output = first_output(run(module, tensors))
            if loss is not None:
                total += float(loss(output, tensors[LABELS])) * count
            yield output.float().cpu().numpy() if output.is_floating_point() else output.cpu().numpy(), batch[LABELS]

    with evaluating(module), torch.no_grad():
        metric = score.of(pairs()) if score is not None else None
        if score is None:
            for _ in pairs():
                pass
    if not rows:
        raise DataError(f"{data.source} holds no samples")
    has_loss = loss is not None or objective is not None
    return Measured(rows, None if metric is None else float(metric), total / rows if has_loss else None)


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """A module in evaluation mode; every part of it is in its own mode again afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def device_of(module: Any) -> Any:
    """Where a module's weights are."""
    torch = require("torch", extra="train")
    tensor = next(iter(module.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is measured after every epoch.

    Attributes:
        data: What on.
        score: The metric; None for the loss.
        loss: Of an output and labels; None where the objective is the user's.
        objective: The user's, where it is what is watched.
        feed: How a batch is given to the module.
        batch_size: Rows of a run.
    """

    data: Dataset
    score: Score | None
    loss: Callable[[Any, Any], Any] | None
    objective: Objective | None
    feed: Feed
    batch_size: int

    @property
    def name(self) -> str:
        """What the watched number is called."""
        return "eval_loss" if self.score is None else self.score.name

    @property
    def higher_is_better(self) -> bool:
        """Which way it is good."""
        return self.score is not None and self.score.higher_is_better

    def measure(self, module: Any) -> Measured:
        """Run the module on the data."""
        return evaluate(
            module, self.data, feed=self.feed, score=self.score, loss=self.loss, objective=self.objective,
            batch_size=self.batch_size,
        )  # fmt: skip

    def watched(self, found: Measured) -> float:
        """The number that is better or worse."""
        value = found.loss if self.score is None else found.metric
        return float("nan") if value is None else value
