"""What happens in a training, step by step and epoch by epoch; Lightning calls it (see `trainee`).

All that is random in a step follows from the seed and the number of the step, and the order of an epoch from the seed
and the number of the epoch. So a training that goes on from a checkpoint is the one that was interrupted.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deploykit.data import user_frame
from deploykit.errors import DeploykitError, OptimizationError, first_line
from deploykit.extras import require
from deploykit.optimizers.training.config import LOSS, TrainConfig
from deploykit.optimizers.training.evaluating import Evaluation
from deploykit.optimizers.training.folder import TrainingFolder, save_tensors, weights_of
from deploykit.optimizers.training.losses import Objective
from deploykit.optimizers.training.rows import Batches, Rows
from deploykit.optimizers.training.scoring import Measured
from deploykit.progress import Progress

# Steps between two looks at the loss, which wait for a GPU, and between two points in the logs.
_LOOK_EVERY = 16
_LOG_EVERY = 10


class Stopped(Exception):
    """No error: somebody asked for it, and the checkpoint is written."""


class Course:
    """The state of a training and what it does with it.

    Args:
        module: What is trained.
        rows: What on.
        config: How.
        objective: What is minimised.
        evaluation: What tells the better weights; None where the last ones are kept.
        folder: Where checkpoints and logs go.
        after_step: Called with the module and the number of steps after every step of the optimizer.
        told: Told how far it is.
        asked_to_stop: Whether somebody did.
    """

    def __init__(
        self,
        module: Any,
        rows: Rows,
        config: TrainConfig,
        objective: Objective,
        evaluation: Evaluation | None,
        folder: TrainingFolder,
        after_step: Callable[[Any, int], None] | None,
        told: Progress,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.module = module
        self.objective = objective
        self.config = config
        self.average = _averaged(module, config.ema)
        self.batches = Batches(rows, config.batch_size, config.seed, lambda: (self.epoch, self.batch))
        self.steps = config.epochs * len(self.batches)
        self.epoch = self.batch = self.step = 0
        self.history: list[dict[str, float]] = []
        self.before: float | None = None
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.stopped = ""
        self._worse_epochs = 0
        self._sums: dict[str, Any] = {}
        self._seen = 0
        self._seconds = 0.0
        self._evaluation = evaluation
        self._folder = folder
        self._after_step = after_step
        self._told = told
        self._asked_to_stop = asked_to_stop
        self._since = self._saved = time.monotonic()
        self._begun_at = 0

    @property
    def higher_is_better(self) -> bool:
        """Which way the watched number is good."""
        return self._evaluation is not None and self._evaluation.higher_is_better

    def begin(self) -> None:
        """Before the first step of this process."""
        self.module.train()
        self._since = self._saved = time.monotonic()
        self._begun_at = self.step

    def seed_step(self) -> None:
        """Before every step."""
        torch = require("torch", extra="train")
        seed = int(np.random.SeedSequence((self.config.seed, self.step)).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)  # the user's module may use these
        random.seed(seed)

    def run_step(self, batch: Mapping[str, Any]) -> Any:
        """The loss of a batch, to be minimised.

        Raises:
            OptimizationError: The module, or the objective, failed.
        """
        try:
            parts = self.objective(self.module, batch)
        except (DeploykitError, MemoryError):
            raise
        except Exception as exc:
            if type(exc).__name__ == "OutOfMemoryError":
                raise
            raise OptimizationError(
                f"step {self.step + 1} failed ({first_line(exc)}{user_frame(exc)})",
                expected="a module that trains on the data",
                hint="mend the module, or the objective",
            ) from exc
        count = len(next(iter(batch.values())))
        torch = require("torch", extra="train")
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + torch.as_tensor(value).detach().float() * count
        self._seen += count
        return parts[LOSS]

    def end_step(self, save: Callable[[], None], log: Callable[[dict[str, float], int], None], rate: float) -> None:
        """After every step of the optimizer.

        Args:
            save: Writes the checkpoint.
            log: Writes a point of the logs.
            rate: The learning rate.

        Raises:
            OptimizationError: The loss is not finite any more.
            Stopped: Somebody asked for it.
        """
        self.step += 1
        self.batch += 1
        if self._after_step is not None:
            self._after_step(self.module, self.step)
        if self.average is not None:
            self.average.update_parameters(self.module)
        whole = self.batch == len(self.batches)
        on_cpu = self._sums[LOSS].device.type == "cpu"
        if on_cpu or whole or self.step % _LOOK_EVERY == 0:
            self._check_loss()
        done, ahead = self.step - self._begun_at, self.steps - self._begun_at
        self._told.advance(done, ahead, f"steps, epoch {self.epoch + 1} of {self.config.epochs}")
        if self.step % _LOG_EVERY == 0:
            log({f"train/{n}": v for n, v in self._means().items()} | {"learning_rate": rate}, self.step)
        if whole:
            return
        stop = self._asked_to_stop()
        if stop or time.monotonic() - self._saved >= 60 * self.config.checkpoint_minutes:
            self._check_loss()
            save()
            self._saved = time.monotonic()
        if stop:
            raise Stopped

    def end_epoch(self, rate: float, plateau: Any, log: Callable[[dict[str, float], int], None]) -> None:
        """After the last step of an epoch: measure, remember the best weights, and decide whether to go on.

        Args:
            rate: The learning rate of the last step.
            plateau: A scheduler that waits for the metric; None where there is none.
            log: Writes a point of the logs.
        """
        now = time.monotonic()
        self._seconds += now - self._since
        self._since = now
        self.epoch += 1
        self.batch = 0
        entry = {"epoch": float(self.epoch), "step": float(self.step), "learning_rate": rate, **self._means()}
        self._sums, self._seen = {}, 0
        watched = entry[LOSS]
        if self._evaluation is not None:
            found = self._evaluation.measure(self.judged)
            entry |= _named(found, self._evaluation.name)
            watched = self._evaluation.watched(found)
            if not math.isfinite(watched):
                raise OptimizationError(
                    f"the evaluation gave {watched} after epoch {self.epoch}",
                    hint=self._cure("lower the learning rate"),
                )
            self._remember(watched)
        if plateau is not None:
            plateau.step(watched)
        entry["seconds"] = round(self._seconds + time.monotonic() - self._since, 3)
        self.history.append(entry)
        log({f"epoch/{n}": v for n, v in entry.items() if n not in ("epoch", "step")}, self.step)
        patience = self.config.patience
        if self.epoch == self.config.epochs:
            self.stopped = "epochs"
        elif patience is not None and self._worse_epochs >= patience:
            self.stopped = "patience"
        self._told.say(self._line(entry))
        self.module.train()

    def check_weights(self) -> None:
        """Before a checkpoint, which has to be one to go on from.

        Raises:
            OptimizationError: A weight is not finite any more.
        """
        wrong = next((n for n, p in self.module.named_parameters() if not bool(p.detach().isfinite().all())), None)
        if wrong is not None:
            raise OptimizationError(
                f"the weights of {wrong} are not finite any more, by step {self.step}",
                expected="finite weights",
                hint=self._cure(
                    f"lower the learning rate (it was {self.config.learning_rate:g}), or clip the gradient"
                ),
            )

    def saved_epoch(self) -> None:
        """After the checkpoint of an epoch.

        Raises:
            Stopped: Somebody asked for it.
        """
        self._folder.write_history(self.history)
        self._saved = time.monotonic()
        if self._asked_to_stop():
            raise Stopped

    @property
    def judged(self) -> Any:
        """The module whose weights are judged and kept."""
        return self.module if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and optimizer; numbers and strings only."""
        elapsed = self._seconds + time.monotonic() - self._since
        return {
            "epoch": self.epoch, "batch": self.batch, "step": self.step, "history": copy.deepcopy(self.history),
            "before": self.before, "best": self.best, "best_epoch": self.best_epoch,
            "worse_epochs": self._worse_epochs, "stopped": self.stopped, "seconds": elapsed,
            "sums": {name: float(value) for name, value in self._sums.items()}, "seen": self._seen,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        torch = require("torch", extra="train")
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.history = [dict(entry) for entry in state["history"]]
        self.before, self.best, self.best_epoch = state["before"], state["best"], state["best_epoch"]
        self._worse_epochs, self.stopped = state["worse_epochs"], state["stopped"]
        self._sums = {name: torch.tensor(value) for name, value in state["sums"].items()}
        self._seen, self._seconds = state["seen"], state["seconds"]

    def _remember(self, watched: float) -> None:
        """Keep the weights where they are the best ones so far."""
        better = self.best is None or (watched > self.best if self.higher_is_better else watched < self.best)
        self._worse_epochs = 0 if better else self._worse_epochs + 1
        if better:
            self.best, self.best_epoch = watched, self.epoch
            save_tensors(weights_of(self.judged), self._folder.best(self.epoch))

    def _means(self) -> dict[str, float]:
        return {name: float(value) / max(1, self._seen) for name, value in self._sums.items()}

    def _check_loss(self) -> None:
        total = float(self._sums[LOSS])
        if not math.isfinite(total):
            raise OptimizationError(
                f"the loss became {total} in epoch {self.epoch + 1}, by step {self.step}",
                expected="a finite loss",
                hint=self._cure(
                    f"lower the learning rate (it was {self.config.learning_rate:g}), or clip the gradient"
                ),
            )

    def _cure(self, text: str) -> str:
        kept = f"; the last good checkpoint is {self._folder.last}" if self._folder.last.exists() else ""
        return text + kept

    def _line(self, entry: Mapping[str, float]) -> str:
        parts = [f"{n} {v:.4f}" for n, v in entry.items() if n not in ("epoch", "step", "learning_rate", "seconds")]
        return f"epoch {self.epoch} of {self.config.epochs}: {', '.join(parts)}, {entry['seconds']:.1f} s"


def _named(found: Measured, name: str) -> dict[str, float]:
    entry = {} if found.loss is None else {"eval_loss": found.loss}
    return entry if found.metric is None else {**entry, name: found.metric}


def _averaged(module: Any, decay: float | None) -> Any:
    """A copy of the module whose weights follow as an exponential moving average; faster at first.

    Raises:
        OptimizationError: The module cannot be copied.
    """
    if decay is None:
        return None
    swa = require("torch.optim.swa_utils", extra="train")

    def follow(average: Any, new: Any, count: Any) -> Any:
        if not average.is_floating_point():
            return new
        # Else a short training would keep its first weights: 1 of 10 at the start, as in TensorFlow's average.
        share = min(decay, (1 + int(count)) / (10 + int(count)))
        return average.lerp(new.to(average.dtype), 1 - share)

    try:
        return swa.AveragedModel(module, avg_fn=follow, use_buffers=True)
    except Exception as exc:
        raise OptimizationError(
            f"the module cannot be copied for an average of its weights ({first_line(exc)})", hint="leave ema out"
        ) from exc
