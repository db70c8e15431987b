"""Losses between a module's first output and the labels, and mixup.

Labels below 0 are padding and count nowhere, as in the metrics; the loss of a batch of nothing else is 0. A single
score a row, [n] or [n, 1], is the logit of class 1 against class 0. Outputs that are probabilities already are taken by
their logarithm.

Sources: label smoothing, Szegedy et al. 2016 (arXiv:1512.00567); focal loss, Lin et al. 2017 (arXiv:1708.02002);
mixup, Zhang et al. 2018 (arXiv:1710.09412); CTC, Graves et al. 2006.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from deploykit.data import LABELS
from deploykit.errors import DataError
from deploykit.extras import require
from deploykit.optimizers.training.config import TrainConfig
from deploykit.optimizers.training.outputs import Feed, feed_by_name, first_output

_IGNORED = -100
_TINY = 1e-12
CLASSIFIERS = ("cross-entropy", "focal")


class Objective(Protocol):
    """What is minimised."""

    def __call__(self, module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Named parts of a batch's loss, each a tensor without dimensions: "loss" is minimised, all are logged.

        Args:
            module: In training mode, on the device of the batch.
            batch: The inputs by name and, where there are any, `labels`.
        """


class Supervised:
    """The loss that a config names, between the first output and the labels.

    Args:
        config: The loss, its settings, and mixup.
        feed: How a batch is given to the module.
    """

    def __init__(self, config: TrainConfig, feed: Feed = feed_by_name) -> None:
        self._config = config
        self._feed = feed
        self.probabilities = False  # whether the module ends in a softmax

    def __call__(self, module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `Objective`; samples are mixed where the module is in training mode."""
        if not self._config.mixup or not module.training:
            return {"loss": self.loss(first_output(self._feed(module, batch)), batch[LABELS])}
        mixed, order, share = mix(batch, self._config.mixup)
        output = first_output(self._feed(module, mixed))
        labels = batch[LABELS]
        # Mixing the losses has the same gradient as mixing the targets, where a loss is linear in them or squared.
        return {"loss": share * self.loss(output, labels) + (1 - share) * self.loss(output, labels[order])}

    def loss(self, output: Any, labels: Any) -> Any:
        """The mean loss of a batch.

        Args:
            output: What the module gave, [n, ...].
            labels: Classes [n] or [n, positions]; symbols [n, symbols] for ctc; for mse and cosine targets in the
                output's shape.

        Raises:
            DataError: The labels do not fit the output.
        """
        config = self._config
        output = output.float()  # a loss in 16 bits would stall early
        if config.loss == "mse":
            return squared_error(output, labels)
        if config.loss == "cosine":
            return cosine_distance(output, labels)
        if self.probabilities:
            output = output.clamp_min(_TINY).log()
        if config.loss == "ctc":
            return ctc(output, labels)
        if config.loss == "focal":
            return focal(output, labels, config.focal_gamma)
        return cross_entropy(output, labels, config.label_smoothing)


def cross_entropy(output: Any, labels: Any, smoothing: float = 0.0) -> Any:
    """Mean negative log-likelihood of the labels.

    Args:
        output: Logits [n, classes] or [n, positions, classes], or single scores.
        labels: Classes.
        smoothing: Share of the target that is spread evenly over all classes.
    """
    functional = require("torch.nn.functional", extra="train")
    logits, target = _classes(output, labels)
    total = functional.cross_entropy(
        logits, target, ignore_index=_IGNORED, label_smoothing=smoothing, reduction="sum"
    )  # fmt: skip
    return total / (target != _IGNORED).sum().clamp_min(1)


def focal(output: Any, labels: Any, gamma: float) -> Any:
    """Mean of (1 - p)^gamma * -log p, where p is what the module gives the right class.

    Args:
        output: As for `cross_entropy`.
        labels: Classes.
        gamma: 0 for cross-entropy; the larger, the less count samples that are right already.
    """
    logits, target = _classes(output, labels)
    real = target != _IGNORED
    likely = logits.log_softmax(-1).gather(-1, target.clamp_min(0)[:, None])[:, 0][real]
    # Never 0, where a root has no gradient.
    return ((-likely.expm1()).clamp_min(_TINY) ** gamma * -likely).sum() / real.sum().clamp_min(1)


def squared_error(output: Any, labels: Any) -> Any:
    """Mean squared difference."""
    functional = require("torch.nn.functional", extra="train")
    return functional.mse_loss(output, _target(output, labels))


def cosine_distance(output: Any, labels: Any) -> Any:
    """1 minus the cosine between vectors along the last axis, in the mean."""
    functional = require("torch.nn.functional", extra="train")
    return (1 - functional.cosine_similarity(output, _target(output, labels), dim=-1)).mean()


def ctc(output: Any, labels: Any) -> Any:
    """Connectionist temporal classification; class 0 is the blank, and every frame of the output counts.

    Args:
        output: Logits [n, frames, classes].
        labels: Symbols [n, symbols], filled up with negative numbers at the end.
    """
    functional = require("torch.nn.functional", extra="train")
    torch = require("torch", extra="train")
    if output.ndim != 3 or labels.ndim != 2 or labels.is_floating_point():
        raise DataError(
            f"output {list(output.shape)} and labels {labels.dtype} {list(labels.shape)} for ctc",
            expected="an output [n, frames, classes] and integer labels [n, symbols]",
        )
    frames = torch.full((len(output),), output.shape[1], dtype=torch.int64)
    symbols = (labels >= 0).sum(1).cpu()
    likely = output.log_softmax(-1).transpose(0, 1)
    return functional.ctc_loss(likely, labels.clamp_min(0), frames, symbols, blank=0)


def mix(batch: Mapping[str, Any], alpha: float) -> tuple[dict[str, Any], Any, float]:
    """Mix every sample with another one of its batch.

    Args:
        batch: Floating-point inputs by name; labels stay as they are.
        alpha: Of the symmetric Beta distribution of the shares.

    Returns:
        The batch, the order of the other samples, and the share of the first ones.
    """
    torch = require("torch", extra="train")
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    some = next(iter(batch.values()))
    order = torch.randperm(len(some)).to(some.device)
    mixed = {n: t if n == LABELS else share * t + (1 - share) * t[order] for n, t in batch.items()}
    return mixed, order, share


def are_probabilities(output: Any) -> bool:
    """Whether the rows of an output are distributions over classes: none below 0, and the sum is 1."""
    if output.ndim < 2 or output.shape[-1] < 2:
        return False
    return bool((output >= 0).all()) and bool(((output.float().sum(-1) - 1).abs() < 1e-3).all())


def _classes(output: Any, labels: Any) -> tuple[Any, Any]:
    """Logits [rows, classes] and classes [rows] with the padding marked.

    Raises:
        DataError: The shapes do not fit, or the labels are no integers.
    """
    if labels.is_floating_point():
        raise DataError(
            f"labels are {labels.dtype}", expected="integer classes", hint="for real targets take the loss mse"
        )
    if output.ndim == labels.ndim + 1 and output.shape[-1] == 1:
        output = output[..., 0]
    if output.shape == labels.shape:
        # softmax over (0, z) is the sigmoid of z.
        torch = require("torch", extra="train")
        output = torch.stack([torch.zeros_like(output), output], -1)
    if output.shape[:-1] != labels.shape:
        raise DataError(
            f"labels of shape {list(labels.shape)} for an output of shape {list(output.shape)}",
            expected=f"labels of shape {list(output.shape[:-1])}",
        )
    target = labels.reshape(-1)
    return output.reshape(-1, output.shape[-1]), target.masked_fill(target < 0, _IGNORED)


def _target(output: Any, labels: Any) -> Any:
    """Real targets in the output's shape.

    Raises:
        DataError: They have another.
    """
    if labels.shape != output.shape and labels.numel() == output.numel() and labels.ndim + 1 == output.ndim:
        labels = labels.reshape(output.shape)  # [n] for [n, 1]
    if labels.shape != output.shape:
        raise DataError(
            f"labels of shape {list(labels.shape)} for an output of shape {list(output.shape)}",
            expected="a target for every number of the output",
        )
    return labels.to(output.dtype)
