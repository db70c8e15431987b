"""Options of commands that train, and the config that they amount to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from deploykit.cli import common

if TYPE_CHECKING:
    from deploykit.optimizers.training import TrainConfig

_OPTIONS: tuple[common.Decorator, ...] = (
    click.option("--epochs", type=click.IntRange(1), default=10, show_default=True, help="Passes over the data."),
    click.option("--batch", "batch_size", type=click.IntRange(1), default=64, show_default=True, help="Rows a step."),
    click.option(
        "--optimizer", type=click.Choice(["adamw", "adam", "sgd", "rmsprop"]), default="adamw", show_default=True,
        help="Weight decay is for matrices only.",
    ),
    click.option(
        "--learning-rate", type=float, default=1e-3, show_default=True, help="The highest one of the schedule."
    ),
    click.option(
        "--schedule", type=click.Choice(["cosine", "one-cycle", "step", "plateau", "constant"]), default="cosine",
        show_default=True, help="How the learning rate changes.",
    ),
    click.option(
        "--warmup", type=float, metavar="SHARE",
        help="Share of the steps in which the learning rate rises; 0.05, 0.3 of one-cycle, 0 of plateau.",
    ),
    click.option("--weight-decay", type=float, default=0.01, show_default=True, help="Of matrices and kernels."),
    click.option("--momentum", type=float, default=0.9, show_default=True, help="Of sgd and rmsprop."),
    click.option(
        "--loss", type=click.Choice(["cross-entropy", "focal", "mse", "cosine", "ctc"]), default="cross-entropy",
        show_default=True, help="Between the first output and the labels.",
    ),
    click.option(
        "--label-smoothing", type=float, default=0.0, show_default=True,
        help="Share of the target that all classes share, for cross-entropy.",
    ),
    click.option("--focal-gamma", type=float, default=2.0, show_default=True, help="For focal: 0 is cross-entropy."),
    click.option("--dropout", type=float, metavar="RATE", help="Of every dropout layer, in place of its own."),
    click.option("--mixup", type=float, default=0.0, show_default=True, metavar="ALPHA", help="Mix pairs of samples."),
    click.option(
        "--ema", type=float, metavar="DECAY", help="Judge and keep a moving average of the weights, such as 0.999."
    ),
    click.option(
        "--clip-norm", type=float, default=1.0, show_default=True, help="Largest norm of the gradient; 0: any."
    ),
    click.option(
        "--patience", type=click.IntRange(1), metavar="EPOCHS", help="Stop after so many epochs that were no better."
    ),
    click.option(
        "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True,
        help="auto: mixed precision on GPUs, fp32 elsewhere.",
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed, the same run."),
    click.option(
        "--checkpoint-minutes", type=float, default=5.0, show_default=True,
        help="Minutes between checkpoints within an epoch; there is one after each.",
    ),
    click.option(
        "--trim-padding", is_flag=True,
        help="End each batch with its longest text, by attention_mask, and let texts of like length share one.",
    ),
)  # fmt: skip
_NAMES = (
    "epochs", "batch_size", "optimizer", "learning_rate", "schedule", "warmup", "weight_decay", "momentum", "loss",
    "label_smoothing", "focal_gamma", "dropout", "mixup", "ema", "clip_norm", "patience", "precision", "seed",
    "checkpoint_minutes", "trim_padding",
)  # fmt: skip


resume_option: common.Decorator = click.option(
    "--resume", is_flag=True, help="Go on with the training in DIR.training, where there is one."
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the settings of a training to a command, which gets them as keyword arguments."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def training_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings among a command's arguments, which are taken out of there, as keys of a recipe."""
    found = {name: given.pop(name) for name in _NAMES}
    return found


def training_config(settings: dict[str, Any], **metric: Any) -> TrainConfig:
    """The config of those settings, and of a metric where the verb does not choose it."""
    from deploykit.optimizers.training import TrainConfig

    return TrainConfig(**settings | {"clip_norm": settings["clip_norm"] or None}, **metric)
