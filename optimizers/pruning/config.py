"""What may be asked of a pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from deploykit.errors import OptimizationError

METHODS = ("structured", "magnitude", "2:4")
IMPORTANCES = ("auto", "magnitude", "taylor")
ALLOCATIONS = ("sensitivity", "uniform")


@dataclass(frozen=True, slots=True)
class PruneConfig:
    """How a module is pruned.

    Attributes:
        method: "structured" takes channels, heads and neurons out, so that every runtime gains; "magnitude" sets the
            smallest weights to zero; "2:4" sets two of four neighbours to zero.
        ratio: Share of the channels that can go (structured), or of the weights that are set to zero (magnitude), out
            of those that may be. None where a latency is asked for, and for 2:4, which is one half.
        steps: In how many steps, with a recovery by training after each.
        round_to: Channels are kept in multiples of this; the registers and tiles of a CPU hold 8, 16 or 32.
        importance: What tells which channels go: "magnitude" of the weights, "taylor" (what their loss costs, by the
            gradient on labelled data), or "auto" for the second where there are labels.
        allocation: "sensitivity" takes more from where the outputs mind it less, per multiply-accumulate saved; of
            weights, the smallest over all layers, each scaled by its root mean square. "uniform" takes the same share
            everywhere.
        max_ratio: The most that one group of channels, or one weight, may lose.
        keep: Patterns of the names of modules that stay as they are ("encoder.layer.0.*").
    """

    method: str = "structured"
    ratio: float | None = None
    steps: int = 1
    round_to: int = 16
    importance: str = "auto"
    allocation: str = "sensitivity"
    max_ratio: float = 0.9
    keep: tuple[str, ...] = ()


# Settings that count for some methods only.
_OWNED = {
    "round_to": ("structured",),
    "importance": ("structured",),
    "allocation": ("structured", "magnitude"),
    "max_ratio": ("structured", "magnitude"),
}
_DEFAULTS = {field.name: field.default for field in fields(PruneConfig)}


def check_prune_config(config: PruneConfig) -> None:
    """Refuse what cannot be done, before anything is loaded.

    Raises:
        OptimizationError: A choice is unknown, or a number is out of range.
    """
    choices = (
        ("method", config.method, METHODS),
        ("importance", config.importance, IMPORTANCES),
        ("allocation", config.allocation, ALLOCATIONS),
    )
    for name, value, known in choices:
        if value not in known:
            raise OptimizationError(f"{name} {value!r}", expected=f"one of {', '.join(known)}")
    if config.ratio is not None and not 0 < config.ratio < 1:
        raise OptimizationError(f"a pruning ratio of {config.ratio:g}", expected="a share between 0 and 1")
    if not (0 < config.max_ratio < 1 and math.isfinite(config.max_ratio)):
        raise OptimizationError(f"at most {config.max_ratio:g} of one group", expected="a share between 0 and 1")
    if config.steps < 1:
        raise OptimizationError(f"{config.steps} pruning steps", expected="1 or more")
    if config.round_to < 1:
        raise OptimizationError(f"channels in multiples of {config.round_to}", expected="1 or more")
    if config.method == "magnitude" and config.ratio is not None and config.ratio > config.max_ratio:
        raise OptimizationError(
            f"{config.ratio:g} of all weights, and at most {config.max_ratio:g} of each",
            expected=f"a ratio up to {config.max_ratio:g}",
            hint=f"allow more of each: --max-ratio {(1 + config.ratio) / 2:g}",
        )
    if config.method == "2:4" and config.ratio is not None:
        raise OptimizationError("a ratio with 2:4, which is one half", hint="leave --ratio out, or use magnitude")
    for name, methods in _OWNED.items():
        if config.method not in methods and getattr(config, name) != _DEFAULTS[name]:
            words = name.replace("_", "-")
            raise OptimizationError(
                f"{words} does nothing with the method {config.method}",
                expected=f"{words} with {' or '.join(methods)}",
                hint=f"leave --{words} out",
            )
