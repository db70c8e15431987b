"""Quantization-aware training: a module that computes with 8-bit numbers forwards, and with real ones backwards.

Every convolution and every linear layer sees its input as a uint8 tensor with a zero point and one scale gives it, and
its weight as int8 with one scale an output channel: the scheme of `quantize_static`, which makes the model that is
deployed out of the trained weights. Rounding has the gradient of the identity where nothing is clipped, and none where
something is (straight-through estimator; Jacob et al., 2018, arXiv:1712.05877).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deploykit.errors import OptimizationError
from deploykit.extras import require
from deploykit.optimizers.scheme import Scheme

_STEPS = 255
_INPUT = "deploykit_input"
# How much of an input's extremes is forgotten in a step: they are those of some fifty batches, as calibration over
# many rows will find them. An average of the batches' extremes would lie below.
_FORGOTTEN = 0.02
_TINY = 1e-12


@dataclass(slots=True)
class FakeQuantization:
    """What was put into a module, to be taken out again.

    Attributes:
        module: Where.
        layers: The layers that compute on rounded numbers, by name.
    """

    module: Any
    layers: dict[str, Any]
    _hooks: list[Any] = field(default_factory=list)

    def observe(self, runs: Iterable[Any]) -> None:
        """Find the first ranges of the inputs; nothing is rounded meanwhile.

        Args:
            runs: Runs the module at every step of the iteration.
        """
        torch = require("torch", extra="train")
        parts = [getattr(layer, _INPUT) for layer in self.layers.values()]
        for part in parts:
            part.watching = True
        with torch.no_grad():
            for _ in runs:
                pass
        for part in parts:
            part.watching = False

    def remove(self) -> None:
        """Leave the trained real-valued weights, and nothing else."""
        parametrize = require("torch.nn.utils.parametrize", extra="train")
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            delattr(layer, _INPUT)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def fake_quantize(module: Any, scheme: Scheme) -> FakeQuantization:
    """Make a module compute on rounded weights and inputs, in training and in evaluation mode.

    Args:
        module: Changed in place, until `FakeQuantization.remove`.
        scheme: How weights are rounded.

    Raises:
        OptimizationError: It has no convolution and no linear layer.
    """
    torch = require("torch", extra="train")
    parametrize = require("torch.nn.utils.parametrize", extra="train")
    nn = torch.nn
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    # What torch's attention does with its projections goes past their forward.
    apart = {child for part in module.modules() if isinstance(part, nn.MultiheadAttention) for child in part.modules()}
    layers = {n: m for n, m in module.named_modules() if isinstance(m, kinds) and m not in apart}
    layers = {n: m for n, m in layers.items() if not parametrize.is_parametrized(m)}
    if not layers:
        raise OptimizationError(
            "nothing to quantize: the module has no convolution and no linear layer", hint="leave it in floating point"
        )
    made = FakeQuantization(module, layers)
    weight_type, input_type = _rounding_types()
    for layer in layers.values():
        layer.add_module(_INPUT, input_type())
        made._hooks.append(layer.register_forward_pre_hook(_round_input))
        # The rounded weight has other values than the one that is registered.
        parametrize.register_parametrization(layer, "weight", weight_type(scheme), unsafe=True)
    return made


def _round_input(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(layer, _INPUT)(args[0]), *args[1:])


def _rounding_types() -> tuple[type[Any], type[Any]]:
    """The modules that round weights and inputs."""
    torch = require("torch", extra="train")

    class WeightRounding(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, scheme: Scheme) -> None:
            super().__init__()
            self.scheme = scheme

        def forward(self, weight: Any) -> Any:
            axes = tuple(range(1 if self.scheme.per_channel else 0, weight.ndim))
            steps = weight.detach().abs().amax(axes, keepdim=True) / self.scheme.limit
            steps = torch.where(steps < _TINY, torch.ones_like(steps), steps)
            rounded = (weight / steps).round().clamp(-self.scheme.limit, self.scheme.limit) * steps
            # Nothing is clipped: the steps reach the largest weight.
            return weight + (rounded - weight).detach()

    class InputRounding(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.watching = False
            self.register_buffer("low", torch.zeros(()))
            self.register_buffer("high", torch.zeros(()))

        def forward(self, values: Any) -> Any:
            if self.watching or self.training:
                self._watch(values.detach())
            if self.watching:
                return values
            scale = ((self.high - self.low) / _STEPS).clamp_min(_TINY)
            zero = (-self.low / scale).round()
            clipped = values.clamp(-zero * scale, (_STEPS - zero) * scale)
            rounded = (clipped / scale).round() * scale
            return clipped + (rounded - clipped).detach()

        def _watch(self, values: Any) -> None:
            low, high = values.amin().clamp_max(0), values.amax().clamp_min(0)
            kept = 1.0 if self.watching else 1 - _FORGOTTEN
            self.low.copy_(torch.minimum(kept * self.low, low))
            self.high.copy_(torch.maximum(kept * self.high, high))

    return WeightRounding, InputRounding


def fold_batch_norms(module: Any, run: Callable[[], Mapping[str, Any]]) -> int:
    """Fold batch normalizations into the convolutions and linear layers before them, as runtimes do.

    Rounding has to see the weights that are deployed. Which layer feeds a normalization is seen in a run.

    Args:
        module: In evaluation mode; changed in place.
        run: Runs it on examples, and gives its outputs by name.

    Returns:
        How many were folded.

    Raises:
        OptimizationError: The folded module gives other numbers.
    """
    torch = require("torch", extra="train")
    fusion = require("torch.nn.utils.fusion", extra="train")
    nn = torch.nn
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    made: list[tuple[Any, Any]] = []  # outputs of layers; kept, so that no other tensor gets their place
    read: list[tuple[Any, Any]] = []
    hooks = []
    for part in module.modules():
        if type(part) in kinds:
            hooks.append(part.register_forward_hook(lambda layer, _, out: made.append((layer, out))))
        elif type(part) in norms:
            hooks.append(part.register_forward_pre_hook(lambda norm, args: read.append((norm, args[0]))))
    try:
        with torch.no_grad():
            before = run()
    finally:
        for hook in hooks:
            hook.remove()
    runs = [m for m, _ in made] + [m for m, _ in read]
    places = {m: (parent, name) for parent in module.modules() for name, m in parent.named_children()}
    folded = 0
    for norm, given in read:
        layer = next((m for m, out in made if out is given), None)
        if layer is None or runs.count(layer) > 1 or runs.count(norm) > 1 or norm.running_mean is None:
            continue
        fuse = fusion.fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fusion.fuse_conv_bn_eval
        whole = fuse(layer, norm)
        layer.weight, layer.bias = whole.weight, whole.bias
        parent, name = places[norm]
        setattr(parent, name, nn.Identity())
        folded += 1
    with torch.no_grad():
        after = run()
    far = next((n for n, t in before.items() if not torch.allclose(t, after[n], rtol=1e-3, atol=1e-4)), None)
    if far is not None:
        raise OptimizationError(
            f"with its batch normalizations folded the module gives another {far!r}",
            expected="a layer whose output nothing but its batch normalization reads",
            hint="fold them in the factory: torch.nn.utils.fusion.fuse_conv_bn_eval",
        )
    return folded
