"""What a training is told, and which of that contradicts itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from deploykit.errors import OptimizationError

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop")
SCHEDULES = ("cosine", "one-cycle", "step", "plateau", "constant")
LOSSES = ("cross-entropy", "focal", "mse", "cosine", "ctc")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# The metric that needs no labels beyond the loss's own.
LOSS = "loss"
# Shares of all steps in which the learning rate rises, where nobody asked for one.
_WARMUP = {"one-cycle": 0.3, "plateau": 0.0}
_DEFAULT_WARMUP = 0.05


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a training.

    Attributes:
        epochs: Times that all data are seen.
        batch_size: Samples in one step at most.
        optimizer: "adamw" (decoupled weight decay), "adam", "sgd" (with momentum) or "rmsprop".
        learning_rate: The highest one of the schedule.
        schedule: "cosine" (down to 0), "one-cycle" (up, and down to far below the start), "step" (a tenth after half of
            the steps, a hundredth after three quarters), "plateau" (halved when the metric has not been better for 2
            epochs) or "constant".
        warmup: Share of all steps in which the rate rises; None for 0.3 of one-cycle, 0 of plateau, 0.05 otherwise.
        weight_decay: Of matrices and kernels; biases and the weights of normalizations have none.
        momentum: Of sgd and rmsprop.
        loss: "cross-entropy", "focal", "mse", "cosine" or "ctc", between the first output and `labels`.
        label_smoothing: Share of the target that is spread over all classes, for cross-entropy.
        focal_gamma: How much less samples count that are right already, for focal.
        dropout: Rate of every dropout layer; None for their own.
        mixup: Alpha of the Beta distribution that pairs of samples are mixed by; 0 for none.
        ema: Decay of an exponential moving average of the weights, which is what is judged and kept; None for none.
        clip_norm: Largest norm of the gradient; None for any.
        patience: Epochs without a better metric after which the training ends; None for never.
        metric: What is better, on the evaluation data: the name of a metric, or "loss".
        precision: "fp32", "bf16", "fp16" (with a scaled loss; GPUs only) or "auto": mixed precision on GPUs.
        seed: Of all that is random. The same data, settings and machine give the same run.
        checkpoint_minutes: Minutes between two checkpoints within an epoch; there is one at the end of each as well.
        trim_padding: Whether batches end with their longest text and hold texts of like length, by `attention_mask`;
            for modules that take any length, and give the same with padding and without.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float | None = None
    weight_decay: float = 0.01
    momentum: float = 0.9
    loss: str = "cross-entropy"
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    dropout: float | None = None
    mixup: float = 0.0
    ema: float | None = None
    clip_norm: float | None = 1.0
    patience: int | None = None
    metric: str = "accuracy"
    precision: str = "auto"
    seed: int = 0
    checkpoint_minutes: float = 5.0
    trim_padding: bool = False

    @property
    def warmup_share(self) -> float:
        """Share of all steps in which the learning rate rises."""
        return _WARMUP.get(self.schedule, _DEFAULT_WARMUP) if self.warmup is None else self.warmup


_CHOICES = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "loss": LOSSES, "precision": PRECISIONS}
# Field: lowest value, highest, whether it is whole, whether the lowest itself is one.
_NUMBERS: dict[str, tuple[float, float, bool, bool]] = {
    "epochs": (1, math.inf, True, True),
    "batch_size": (1, math.inf, True, True),
    "learning_rate": (0, math.inf, False, False),
    "warmup": (0, 1, False, True),
    "weight_decay": (0, math.inf, False, True),
    "momentum": (0, 1, False, True),
    "label_smoothing": (0, 1, False, True),
    "focal_gamma": (0, math.inf, False, True),
    "dropout": (0, 1, False, True),
    "mixup": (0, math.inf, False, True),
    "ema": (0, 1, False, False),
    "clip_norm": (0, math.inf, False, False),
    "patience": (1, math.inf, True, True),
    "seed": (0, 2**32, True, True),
    "checkpoint_minutes": (0, math.inf, False, False),
}
# Settings that count for some choices only: field, the other field, its values.
_OWNED = (
    ("label_smoothing", "loss", ("cross-entropy",)),
    ("focal_gamma", "loss", ("focal",)),
    ("momentum", "optimizer", ("sgd", "rmsprop")),
    ("mixup", "loss", ("cross-entropy", "focal", "mse", "cosine")),
)
_DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}


def check_train_config(config: TrainConfig) -> None:
    """Refuse unknown names, numbers out of range, and settings that would be ignored beside the others.

    Raises:
        OptimizationError: One is wrong.
    """
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise OptimizationError(f"{_words(name)} {value!r}", expected=" or ".join(choices))
    for name, limits in _NUMBERS.items():
        value = getattr(config, name)
        if value is None and _DEFAULTS[name] is None or name == "clip_norm" and value is None:
            continue
        _check_number(_words(name), value, *limits)
    if not isinstance(config.trim_padding, bool):
        raise OptimizationError(f"trim padding {config.trim_padding!r}", expected="True or False")
    if not isinstance(config.metric, str) or not config.metric:
        raise OptimizationError(f"metric {config.metric!r}", expected="the name of a metric, or loss")
    for name, owner, values in _OWNED:
        chosen = getattr(config, owner)
        if getattr(config, name) != _DEFAULTS[name] and chosen not in values:
            raise OptimizationError(
                f"{_words(name)} does nothing with {_words(owner)} {chosen}",
                expected=f"{_words(owner)} {' or '.join(values)}",
                hint=f"leave {_words(name)} out",
            )
    _check_warmup(config)


def _check_warmup(config: TrainConfig) -> None:
    share = config.warmup_share
    if config.schedule == "plateau" and share:
        raise OptimizationError(
            "the schedule plateau has no warm-up", expected="a learning rate that can be taken from the start",
            hint="leave warmup out, or take the schedule cosine",
        )  # fmt: skip
    if config.schedule == "one-cycle" and not 0 < share < 1:
        raise OptimizationError(f"warmup {share:g} of one-cycle", expected="a share between 0 and 1, like 0.3")


def _check_number(name: str, value: Any, low: float, high: float, whole: bool, closed: bool) -> None:
    kinds = int if whole else int | float
    inside = (
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low <= value if closed else low < value)
        and value < high
    )
    if not inside:
        what = "an integer" if whole else "a number"
        bound = f"{'of' if closed else 'above'} {low:g}{' or more' if closed else ''}"
        top = f", below {high:g}" if math.isfinite(high) else ""
        raise OptimizationError(f"{name} {value!r}", expected=f"{what} {bound}{top}")


def _words(name: str) -> str:
    return name.replace("_", " ")
