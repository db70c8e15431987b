"""Training of torch modules on Lightning. One verb: `train`; `evaluate` measures.

Verbs that change a module (fine-tuning, pruning, distillation) hand it in with data, settings and, where the loss is
their own, an objective. What a metric is they bring along (`Score`).
"""

from __future__ import annotations

from deploykit.optimizers.training.config import TrainConfig, check_train_config
from deploykit.optimizers.training.engine import Trained, train
from deploykit.optimizers.training.evaluating import evaluate
from deploykit.optimizers.training.losses import Objective, Supervised
from deploykit.optimizers.training.outputs import feed_by_name, first_output
from deploykit.optimizers.training.scoring import Measured, Score

__all__ = [
    "Measured",
    "Objective",
    "Score",
    "Supervised",
    "TrainConfig",
    "Trained",
    "check_train_config",
    "evaluate",
    "feed_by_name",
    "first_output",
    "train",
]
