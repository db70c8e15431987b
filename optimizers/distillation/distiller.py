"""The student with what is learned beside it, and the loss of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from deploykit.data import LABELS
from deploykit.errors import OptimizationError, first_line
from deploykit.extras import require
from deploykit.optimizers.distillation import losses
from deploykit.optimizers.distillation.config import DistillConfig
from deploykit.optimizers.distillation.networks import Network, Seen, first_tensor, showing_attention, watched
from deploykit.optimizers.distillation.plan import MASK, Plan
from deploykit.optimizers.training.config import TrainConfig
from deploykit.optimizers.training.losses import Supervised

# The teacher's answers in a batch, where they were kept.
ANSWERS = "deploykit.teacher"
# Losses on labels that take scores of classes.
_OF_SCORES = ("cross-entropy", "focal", "ctc")


def make_distiller(student: Network, plan: Plan, seed: int) -> Any:
    """A module that gives the judged output, and has the student's and the projections' parameters.

    Args:
        student: What is trained.
        plan: Which projections there have to be.
        seed: Of the projections' first weights.
    """
    torch = require("torch", extra="train")

    class Distiller(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.student = student.module
            self.features = torch.nn.ModuleList(
                torch.nn.Linear(*pair.widths) if pair.widths[0] != pair.widths[1] else torch.nn.Identity()
                for pair in plan.pairs
            )
            self.embedding = torch.nn.Linear(*plan.widths) if plan.projects else torch.nn.Identity()

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            # Dropout inside of an attention would tear holes into the distributions that are compared.
            for _, (name, _) in plan.attention:
                student.inner(name).eval()
            return self

        def forward(self, batch: Mapping[str, Any]) -> Any:
            return student.outputs(self.student, batch)[plan.student_output]

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Distiller()


class Distillation:
    """The loss of a batch: an `Objective` of the training engine.

    Use inside `looking`, which watches the modules that are compared.

    Args:
        teacher: In evaluation mode; no gradient and no statistic of it changes.
        student: What the distiller holds.
        plan: What is compared.
        config: Temperature and the like.
        training: The loss on labels.
    """

    def __init__(
        self, teacher: Network, student: Network, plan: Plan, config: DistillConfig, training: TrainConfig
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._plan = plan
        self._config = config
        self._loss = training.loss
        self._supervised = Supervised(training)
        self._theirs: Seen = {}
        self._ours: Seen = {}

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Watch what is compared; the models' own way of attention is back afterwards."""
        plan = self._plan
        teacher = [pair.teacher for pair in plan.pairs] + [name for (name, _), _ in plan.attention]
        student = [pair.student for pair in plan.pairs] + [name for _, (name, _) in plan.attention]
        with contextlib.ExitStack() as stack:
            if plan.attention:
                stack.enter_context(showing_attention(self._teacher))
                stack.enter_context(showing_attention(self._student))
            self._theirs = stack.enter_context(watched(self._teacher, teacher))
            self._ours = stack.enter_context(watched(self._student, student))
            yield

    def feed(self, module: Any, batch: Mapping[str, Any]) -> Any:
        """The judged output of the distiller for a batch."""
        return module(batch)

    def check(self, module: Any, batch: Mapping[str, Any]) -> None:
        """Compute the loss of a few rows, so that what does not fit is said before anything is trained.

        Args:
            module: The distiller; in evaluation mode afterwards.
            batch: The rows.

        Raises:
            DataError: The labels do not fit the loss.
            OptimizationError: The loss cannot be computed, or is not finite.
        """
        torch = require("torch", extra="train")
        module.eval()
        try:
            with torch.no_grad():
                parts = self(module, batch)
        except RuntimeError as exc:
            raise OptimizationError(f"{self._student.label} has no loss on the first rows ({first_line(exc)})") from exc
        wrong = next((name for name, part in parts.items() if not bool(part.isfinite())), None)
        if wrong is not None:
            raise OptimizationError(
                f"the part {wrong} of the loss is {float(parts[wrong])} on the first rows", expected="a finite number"
            )

    def __call__(self, module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of the loss by name, and their weighted sum as "loss"."""
        plan, mask = self._plan, _mask(batch)
        output = self.feed(module, batch)
        answers = self._answers(batch)
        found: dict[str, Any] = {}
        if "logits" in plan.weights:
            own = losses.class_scores(output, probabilities=plan.student_probabilities)
            other = losses.class_scores(answers, probabilities=plan.teacher_probabilities)
            found["logits"] = losses.soft_divergence(own, other, self._config.temperature, mask)
        if "embedding" in plan.weights:
            own = module.embedding(losses.pooled(output, mask))
            found["embedding"] = losses.embedding_distance(own, losses.pooled(answers, mask), plan.embedding_loss)
        if "features" in plan.weights:
            found["features"] = self._features(module, mask)
        if "attention" in plan.weights:
            found["attention"] = self._attention(mask)
        if "task" in plan.weights:
            found["task"] = self._task(output, batch[LABELS])
        return {**found, "loss": sum(plan.weights[name] * part for name, part in found.items())}

    def _answers(self, batch: Mapping[str, Any]) -> Any:
        """The teacher's judged output, kept or computed."""
        if ANSWERS in batch and not self._plan.looks_inside:
            return batch[ANSWERS]
        return self._teacher.run(batch)[self._plan.teacher_output]

    def _features(self, module: Any, mask: Any) -> Any:
        parts = []
        for pair, projection in zip(self._plan.pairs, module.features, strict=True):
            own, other = first_tensor(self._ours[pair.student]), first_tensor(self._theirs[pair.teacher])
            projected = projection(own.movedim(pair.axis, -1)).movedim(-1, pair.axis)
            parts.append(losses.feature_distance(projected, other, mask))
        return sum(parts) / len(parts)

    def _attention(self, mask: Any) -> Any:
        parts = [
            losses.attention_divergence(self._ours[own][place], self._theirs[other][there], mask)
            for (other, there), (own, place) in self._plan.attention
        ]
        return sum(parts) / len(parts)

    def _task(self, output: Any, labels: Any) -> Any:
        if self._loss in _OF_SCORES:
            output = losses.class_scores(output, probabilities=self._plan.student_probabilities)
        return self._supervised.loss(output, labels)


def _mask(batch: Mapping[str, Any]) -> Any:
    """Which positions are real; None where nothing says so."""
    mask = batch.get(MASK)
    return mask if mask is not None and mask.ndim == 2 else None
