"""Zeros in the weights: the smallest ones, or two of every four neighbours, held at zero while the rest is trained.

Sources: M. Zhu and S. Gupta, "To prune, or not to prune" (2017), https://arxiv.org/abs/1710.01878, for the cubic
schedule; A. Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), https://arxiv.org/abs/2104.08378, for
2:4. No runtime is faster by zeros alone on its own account; `NOTE` says what is to be known.
"""

from __future__ import annotations

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


def make_sparse(module: Any, config: PruneConfig, recover: Recover | None = None) -> Masks:
    """Set weights of convolutions and linear layers to zero, in place, in steps.

    Args:
        module: The module.
        config: Which method, how many, in how many steps.
        recover: Trains it after each step; None to leave that out.

    Raises:
        OptimizationError: There is no weight that could lose anything.
    """
    weights, left = _weights(module, config)
    masks = Masks({}, left)
    for step in range(1, config.steps + 1):
        if config.method == "2:4":
            # The pattern is all or nothing: the steps are rounds of choosing anew and training.
            kept = {name: pattern_mask(weight.detach()) for name, weight in weights.items()}
        else:
            kept = smallest_masks(weights, scheduled(config.ratio or 0.0, step, config.steps), config)
        masks = Masks(kept, left)
        masks.apply(module)
        if recover is not None:
            held = masks
            recover(module, step, lambda *_, held=held: held.apply(module))
            # Averaged and reloaded weights come from masked ones, and an optimizer's last words do not count.
            masks.apply(module)
    return masks


def scheduled(ratio: float, step: int, steps: int) -> float:
    """The sparsity after a step: much at first, little at the end."""
    return ratio * (1 - (1 - step / steps) ** 3)


def smallest_masks(weights: Mapping[str, Any], ratio: float, config: PruneConfig) -> dict[str, Any]:
    """Masks without the smallest weights: of each layer, or of all, each scaled by its root mean square.

    Args:
        weights: Parameters by name.
        ratio: Share of all of them that goes.
        config: For the allocation, and for the most that one weight may lose.
    """
    torch = require("torch", extra="prune")
    sizes = {name: w.detach().abs() / (w.detach().square().mean().sqrt() + 1e-30) for name, w in weights.items()}
    limit = None
    if config.allocation != "uniform":
        everything = torch.cat([s.flatten() for s in sizes.values()])
        limit = _nth_smallest(everything, int(ratio * everything.numel()))
    found = {}
    for name, size in sizes.items():
        count = int(ratio * size.numel()) if limit is None else int((size <= limit).sum())
        most = int(config.max_ratio * size.numel())
        cut = _nth_smallest(size.flatten(), min(count, most))
        found[name] = size > cut
    return found


def pattern_mask(weight: Any) -> Any:
    """The larger two of every four neighbours along the input channels.

    Args:
        weight: Shape [out, in] or [out, in, ...]; `in` is a multiple of 4.
    """
    torch = require("torch", extra="prune")
    size = weight.abs().movedim(1, -1)
    fours = size.reshape(-1, _OF)
    mask = torch.ones_like(fours, dtype=torch.bool)
    mask.scatter_(1, torch.argsort(fours, dim=1, stable=True)[:, :_GONE], False)
    return mask.reshape(size.shape).movedim(-1, 1)


def _nth_smallest(values: Any, count: int) -> float:
    """The largest of the `count` smallest; below all of them for 0."""
    return float(values.kthvalue(count).values) if count > 0 else -1.0


def _weights(module: Any, config: PruneConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Weights that may lose something, by the parameter's name, and why the others may not."""
    torch = require("torch", extra="prune")
    found: dict[str, Any] = {}
    left: dict[str, str] = {}
    known = {id(p): name for name, p in module.named_parameters()}
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(part, layer_kinds()) or not isinstance(weight, torch.nn.Parameter):
            continue
        if matches(name, config.keep):
            left[name] = "it stays as it is"
        elif getattr(part, "groups", 1) > 1 and part.groups == part.out_channels:
            left[name] = "depthwise: it has few weights, and each matters"
        elif config.method == "2:4" and (weight.shape[1] % _OF or getattr(part, "transposed", False)):
            left[name] = f"its {weight.shape[1]} inputs are no multiple of {_OF}"
        else:
            found[known[id(weight)]] = weight
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:4])
        raise OptimizationError(
            f"no weight can be set to zero{f' ({reasons})' if reasons else ''}",
            expected="a convolution or a linear layer",
        )
    return found, left
