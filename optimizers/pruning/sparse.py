"""Zeros in the weights: the smallest ones, or two of every four neighbours, held at zero while the rest is trained.

Sources: M. Zhu and S. Gupta, "To prune, or not to prune" (2017), https://arxiv.org/abs/1710.01878, for the cubic
schedule; A. Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), https://arxiv.org/abs/2104.08378, for
2:4. Exactly as many go as are asked for: of equal weights, the first. No runtime is faster by zeros alone on its own
account; `NOTE` says what is to be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deploykit.errors import OptimizationError
from deploykit.extras import require
from deploykit.optimizers.pruning.config import PruneConfig
from deploykit.optimizers.pruning.counting import layer_kinds
from deploykit.optimizers.pruning.groups import matches

NOTE = (
    "zeros in the weights make no model faster in ONNX Runtime or OpenVINO on a CPU: both compute with dense weights. "
    "OpenVINO can keep int8 weights of matrix products packed, and gain where memory is what limits them, on CPUs with "
    "AMX and with CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE set; TensorRT has kernels for 2:4 on NVIDIA GPUs from Ampere "
    "on. What they are good for everywhere: the files compress better"
)
# Trains a module in place after a step; told the step, and what has to be called after every optimizer step.
Recover = Callable[[Any, int, Callable[..., None]], None]
_OF, _GONE = 4, 2


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros that were counted in the weights of a module.

    Attributes:
        layers: Zeros and weights, by the name of the parameter that has a mask.
        parameters: Elements of all parameters, those without a mask included.
    """

    layers: Mapping[str, tuple[int, int]]
    parameters: int

    @property
    def count(self) -> int:
        """Zeros in the weights that have a mask."""
        return sum(zeros for zeros, _ in self.layers.values())

    @property
    def weights(self) -> int:
        """Weights that have a mask."""
        return sum(total for _, total in self.layers.values())


@dataclass(frozen=True, slots=True)
class Masks:
    """What is zero.

    Attributes:
        kept: Tensors of bool, by the name of the parameter: False where the weight is zero.
        left: Why the weights of other layers stay as they are, by the layer's name.
    """

    kept: Mapping[str, Any]
    left: Mapping[str, str]

    def apply(self, module: Any) -> None:
        """Set the weights to zero."""
        torch = require("torch", extra="prune")
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name, mask in self.kept.items():
                parameters[name].mul_(mask.to(parameters[name].device))

    @property
    def sparsity(self) -> float:
        """The share of zeros in the weights that have a mask."""
        total = sum(mask.numel() for mask in self.kept.values())
        return 1 - sum(int(mask.sum()) for mask in self.kept.values()) / total if total else 0.0

    def layers(self) -> dict[str, float]:
        """The share of zeros by parameter."""
        return {name: 1 - float(mask.double().mean()) for name, mask in self.kept.items()}


def make_sparse(
    module: Any,
    config: PruneConfig,
    recover: Recover | None = None,
    *,
    keep: Callable[[int, Masks], None] | None = None,
    begun: tuple[int, Mapping[str, Any]] | None = None,
) -> Masks:
    """Set weights of convolutions, linear, recurrent and attention layers to zero, in place, in steps.

    Args:
        module: The module.
        config: Which method, how many, in how many steps.
        recover: Trains it after each step; None to leave that out.
        keep: Told the step and its masks before each training.
        begun: The number of a step and its masks, as `keep` was told before an interrupt; the module has the weights of
            then, and goes on with the training of that step.

    Raises:
        OptimizationError: There is no weight that could lose anything.
    """
    weights, left = _weights(module, config)
    masks = Masks({}, left)
    for step in range(1 if begun is None else begun[0], config.steps + 1):
        if begun is not None and step == begun[0]:
            kept = dict(begun[1])
        elif config.method == "2:4":
            # One of four in the first half of the steps, and two from then on: nothing that went comes back.
            gone = math.ceil(_GONE * step / config.steps)
            kept = {name: pattern_mask(weight.detach(), gone) for name, weight in weights.items()}
        else:
            kept = smallest_masks(weights, scheduled(config.ratio or 0.0, step, config.steps), config)
        masks = Masks(kept, left)
        masks.apply(module)
        if keep is not None and (begun is None or step > begun[0]):
            keep(step, masks)
        if recover is not None:
            held = masks
            recover(module, step, lambda *_, held=held: held.apply(module))
            # Averaged and reloaded weights come from masked ones, and an optimizer's last words do not count.
            masks.apply(module)
    return masks


def scheduled(ratio: float, step: int, steps: int) -> float:
    """The sparsity after a step: much at first, little at the end."""
    return ratio * (1 - (1 - step / steps) ** 3)


def count_zeros(module: Any, masks: Masks) -> Zeros:
    """Count the zeros that are really in a module, after all that was done to it.

    Args:
        module: With the weights of the masks.
        masks: Which weights count.
    """
    parameters = dict(module.named_parameters())
    layers = {name: (int((parameters[name].detach() == 0).sum()), int(parameters[name].numel())) for name in masks.kept}
    return Zeros(layers, sum(p.numel() for p in parameters.values()))


def smallest_masks(weights: Mapping[str, Any], ratio: float, config: PruneConfig) -> dict[str, Any]:
    """Masks without the smallest weights: of each layer, or of all, each scaled by its root mean square.

    Args:
        weights: Parameters by name.
        ratio: Share of all of them that goes.
        config: For the allocation, and for the most that one weight may lose.
    """
    sizes = {
        name: (w.detach().abs() / (w.detach().square().mean().sqrt() + 1e-30)).flatten() for name, w in weights.items()
    }
    most = {name: math.floor(config.max_ratio * size.numel() + 1e-9) for name, size in sizes.items()}
    if config.allocation == "uniform":
        counts = {name: min(round(ratio * size.numel()), most[name]) for name, size in sizes.items()}
    else:
        counts = _counts(sizes, round(ratio * sum(size.numel() for size in sizes.values())), most)
    return {name: _larger(size, counts[name]).reshape(weights[name].shape) for name, size in sizes.items()}


def _counts(sizes: Mapping[str, Any], wanted: int, most: Mapping[str, int]) -> dict[str, int]:
    """How many of the smallest of all are in each; what one may not lose, the others lose in its place."""
    torch = require("torch", extra="prune")
    full: dict[str, int] = {}
    while len(full) < len(sizes):
        waiting = {name: size for name, size in sizes.items() if name not in full}
        everything = torch.cat(list(waiting.values()))
        gone = ~_larger(everything, min(wanted - sum(full.values()), everything.numel()))
        pieces = gone.split([size.numel() for size in waiting.values()])
        counts = {name: int(piece.sum()) for name, piece in zip(waiting, pieces, strict=True)}
        over = {name: most[name] for name, count in counts.items() if count > most[name]}
        if not over:
            return full | counts
        full |= over
    return full


def pattern_mask(weight: Any, gone: int = _GONE) -> Any:
    """The larger ones of every four neighbours along the input channels, which a product sums over.

    Args:
        weight: Shape [out, in] or [out, in, ...]; `in` is a multiple of 4.
        gone: How many of four go.
    """
    torch = require("torch", extra="prune")
    size = weight.abs().movedim(1, -1)
    fours = size.reshape(-1, _OF)
    mask = torch.ones_like(fours, dtype=torch.bool)
    mask.scatter_(1, torch.argsort(fours, dim=1, stable=True)[:, :gone], False)
    return mask.reshape(size.shape).movedim(-1, 1)


def _larger(values: Any, count: int) -> Any:
    """All but the `count` smallest, as a mask; of equal ones the first go."""
    torch = require("torch", extra="prune")
    if count < 1:
        return torch.ones_like(values, dtype=torch.bool)
    cut = values.kthvalue(count).values
    mask = values >= cut
    equal = (values == cut).nonzero()[:, 0]
    mask[equal[: count - int((~mask).sum())]] = False
    return mask


def _weights(module: Any, config: PruneConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Weights that may lose something, by the parameter's name, and why the others may not."""
    found: dict[str, Any] = {}
    left: dict[str, str] = {}
    known = {id(p): name for name, p in module.named_parameters()}
    users: dict[int, list[tuple[str, Any]]] = {}
    for name, part in module.named_modules():
        for p in part._parameters.values():
            users.setdefault(id(p), []).append((name, part))
    for name, part in module.named_modules():
        names = _matrices(part)
        if not names and isinstance(part, layer_kinds()):
            left[name] = "its weight is computed from others"
        for leaf in names:
            weight = part._parameters[leaf]
            why = _reason(name, part, weight, users[id(weight)], config)
            if why:
                left[name] = why
            else:
                found[known[id(weight)]] = weight
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:4])
        raise OptimizationError(
            f"no weight can be set to zero{f' ({reasons})' if reasons else ''}",
            expected="a convolution, or a linear, recurrent or attention layer",
        )
    return found, left


def _matrices(part: Any) -> list[str]:
    """Names of a part's own weights that products are taken with."""
    nn = require("torch", extra="prune").nn
    own = [name for name, p in part._parameters.items() if p is not None]
    if isinstance(part, layer_kinds()):
        return [name for name in own if name == "weight"]
    if isinstance(part, nn.RNNBase | nn.RNNCellBase):
        return [name for name in own if name.startswith("weight_")]
    return [name for name in own if name.endswith("proj_weight")] if isinstance(part, nn.MultiheadAttention) else []


def _reason(name: str, part: Any, weight: Any, users: list[tuple[str, Any]], config: PruneConfig) -> str:
    """Why a weight stays as it is; empty where nothing speaks against zeros in it."""
    kept = next((user for user, _ in users if matches(user, config.keep)), None)
    if kept is not None:
        return "it stays as it is" if kept == name else f"{kept}, which stays as it is, has the same weight"
    other = next(((user, kind) for user, kind in users if not _matrices(kind)), None)
    if other is not None:
        return f"{other[0]} ({type(other[1]).__name__}) has the same weight"
    if getattr(part, "groups", 1) > 1 and part.groups == part.out_channels:
        return "depthwise: it has few weights, and each matters"
    if config.method == "2:4" and getattr(part, "transposed", False):
        return "2:4 is for the inputs of a product, and a transposed convolution has them along another axis"
    if config.method == "2:4" and weight.shape[1] % _OF:
        return f"its {weight.shape[1]} inputs are no multiple of {_OF}"
    return ""
