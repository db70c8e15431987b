"""Optimizers and schedules of the learning rate.

Sources: decoupled weight decay, Loshchilov and Hutter 2019 (arXiv:1711.05101); cosine, the same 2017
(arXiv:1608.03983); linear warm-up, Goyal et al. 2017 (arXiv:1706.02677); one-cycle, Smith and Topin 2018
(arXiv:1708.07120); steps at 1/2 and 3/4, He et al. 2016 (arXiv:1512.03385).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from deploykit.errors import OptimizationError
from deploykit.extras import require
from deploykit.optimizers.training.config import TrainConfig

_STEPS = ((0.75, 0.01), (0.5, 0.1))
_PLATEAU_FACTOR, _PLATEAU_PATIENCE = 0.5, 2
# Of one-cycle: where it begins, and where it ends, as shares of the highest rate.
_FIRST, _FINAL = 1 / 25, 1 / 25e4


def make_optimizer(config: TrainConfig, modules: Iterable[Any]) -> Any:
    """An optimizer over all parameters that are not frozen.

    Raises:
        OptimizationError: All of them are.
    """
    optim = require("torch.optim", extra="train")
    groups = parameter_groups(modules, config.weight_decay)
    rate = config.learning_rate
    if config.optimizer == "sgd":
        return optim.SGD(groups, lr=rate, momentum=config.momentum)
    if config.optimizer == "rmsprop":
        return optim.RMSprop(groups, lr=rate, momentum=config.momentum)
    return (optim.Adam if config.optimizer == "adam" else optim.AdamW)(groups, lr=rate)


def parameter_groups(modules: Iterable[Any], decay: float) -> list[dict[str, Any]]:
    """Parameters that are pulled towards 0, and those that are not: biases, and scales of normalizations.

    Raises:
        OptimizationError: None can be trained.
    """
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values()
    if not found:
        raise OptimizationError("no parameter can be trained: all are frozen", hint="set requires_grad in the factory")
    pulled = [p for p in found if p.ndim > 1]
    others = [p for p in found if p.ndim <= 1]
    groups = [{"params": pulled, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_schedule(config: TrainConfig, optimizer: Any, steps: int, *, higher_is_better: bool) -> Any:
    """A scheduler of torch's: of steps, or for "plateau" of epochs.

    Args:
        config: Which one.
        optimizer: Whose learning rate is set.
        steps: Of the whole training.
        higher_is_better: Which way the watched metric is good.
    """
    schedulers = require("torch.optim.lr_scheduler", extra="train")
    if config.schedule == "plateau":
        return schedulers.ReduceLROnPlateau(
            optimizer, "max" if higher_is_better else "min", _PLATEAU_FACTOR, _PLATEAU_PATIENCE
        )
    return schedulers.LambdaLR(optimizer, lambda step: rate_factor(config, step, steps))


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Share of the highest learning rate in a step, for all schedules but "plateau".

    Args:
        config: Schedule and warm-up.
        step: From 0 on.
        steps: Of the whole training.
    """
    if config.schedule == "one-cycle":
        return _one_cycle(config.warmup_share, step, steps)
    rising = round(config.warmup_share * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising)))) / 2
    if config.schedule == "step":
        return next((factor for share, factor in _STEPS if step >= share * steps), 1.0)
    return 1.0


def _one_cycle(share: float, step: int, steps: int) -> float:
    """Up along half a cosine, and down along another; the momentum stays what the user asked for.

    One step has the highest rate: where there are too few to rise in, the first one.
    """
    top, end = max(0, round(share * steps) - 1), steps - 1
    if step < top:
        return _between(_FIRST, 1.0, step / top)
    return _between(1.0, _FINAL, min(1.0, (step - top) / (end - top))) if end > top else 1.0


def _between(first: float, last: float, way: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * way)) / 2
