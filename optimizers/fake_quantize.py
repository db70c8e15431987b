"""Quantization-aware training: a module that computes with 8-bit numbers forwards, and with real ones backwards.

Every convolution and every linear layer sees its input as a uint8 tensor with a zero point and one scale gives it, and
its weight as int8 with one scale an output channel: the scheme of `quantize_static`, which makes the model that is
deployed out of the trained weights. As there, what a convolution gives is rounded too, unless nothing but a Relu or
Clip reads it, which becomes a part of the rounding behind it. Rounding has the gradient of the identity where nothing
is clipped, and none where something is (straight-through estimator; Jacob et al., 2018, arXiv:1712.05877).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deploykit.errors import OptimizationError
from deploykit.extras import require
from deploykit.optimizers.scheme import Scheme

_STEPS = 255
_INPUT, _OUTPUT = "deploykit_input", "deploykit_output"
# On a tensor that comes out of a dropout in training: the share by which the values that are left were divided.
_KEPT = "deploykit_kept"
# What reads a convolution's output without its being rounded there: the rounding is that behind an activation, or that
# of the next layer's input.
_PASSED = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_",
    "clamp_max", "clamp_max_", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "linear",
}  # fmt: skip
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
        """Find the first ranges, as calibration does: nothing is rounded meanwhile, neither inputs nor weights.

        Args:
            runs: Runs the module at every step of the iteration.
        """
        torch = require("torch", extra="train")
        parts = self._parts()
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
            for name in (_INPUT, _OUTPUT):
                if hasattr(layer, name):
                    delattr(layer, name)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)

    def _parts(self) -> list[Any]:
        layers = self.layers.values()
        found = (getattr(layer, name, None) for layer in layers for name in (_INPUT, _OUTPUT))
        return [part for part in found if part is not None] + [layer.parametrizations.weight[0] for layer in layers]


def fake_quantize(module: Any, scheme: Scheme, run: Callable[[], Any] | None = None) -> FakeQuantization:
    """Make a module compute on rounded weights and activations, in training and in evaluation mode.

    Args:
        module: Changed in place, until `FakeQuantization.remove`.
        scheme: How weights are rounded.
        run: Runs it on examples, to see what reads the outputs of convolutions; without it they are not rounded.

    Raises:
        OptimizationError: It has no convolution and no linear layer.
    """
    torch = require("torch", extra="train")
    parametrize = require("torch.nn.utils.parametrize", extra="train")
    nn = torch.nn
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *transposed)
    kinds = (*convolutions, nn.Linear)
    # What torch's attention does with its projections goes past their forward.
    apart = {child for part in module.modules() if isinstance(part, nn.MultiheadAttention) for child in part.modules()}
    layers = {n: m for n, m in module.named_modules() if isinstance(m, kinds) and m not in apart}
    layers = {n: m for n, m in layers.items() if not parametrize.is_parametrized(m)}
    if not layers:
        raise OptimizationError(
            "nothing to quantize: the module has no convolution and no linear layer", hint="leave it in floating point"
        )
    some = [layer for layer in layers.values() if isinstance(layer, convolutions)]
    ends = [] if run is None else _read_as_they_are(some, run)
    made = FakeQuantization(module, layers)
    weight_type, input_type = _rounding_types()
    for layer in layers.values():
        layer.add_module(_INPUT, input_type().train(layer.training))
        made._hooks.append(layer.register_forward_pre_hook(_round_input, with_kwargs=True))
        if layer in ends:
            layer.add_module(_OUTPUT, input_type().train(layer.training))
            made._hooks.append(layer.register_forward_hook(_round_output))
        # The rounded weight has other values than the one that is registered.
        axis = 1 if isinstance(layer, transposed) else 0
        parametrize.register_parametrization(layer, "weight", weight_type(scheme, axis), unsafe=True)
    drops = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    made._hooks += [m.register_forward_hook(_mark_kept) for m in module.modules() if isinstance(m, drops)]
    return made


def _round_input(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    part = getattr(layer, _INPUT)
    if args:
        return (part(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": part(kwargs["input"])}


def _round_output(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    return getattr(layer, _OUTPUT)(output)


def _mark_kept(part: Any, args: tuple[Any, ...], output: Any) -> None:
    """In training, dropout makes what it leaves larger, which no deployed model sees: ranges are those without it."""
    if part.training and 0 < part.p < 1:
        setattr(output, _KEPT, 1 - part.p)


def _read_as_they_are(layers: list[Any], run: Callable[[], Any]) -> list[Any]:
    """The layers whose outputs something reads that does not round them itself."""
    torch = require("torch", extra="train")
    overrides = require("torch.overrides", extra="train")
    made: dict[int, tuple[Any, Any]] = {}  # outputs are kept, so that no other tensor gets their place
    activated: list[tuple[Any, Any]] = []
    passed: set[int] = set()
    others: set[int] = set()

    def note(name: str, tensor: Any, *, same: bool) -> None:
        if name in _PASSED:
            passed.add(id(tensor))
            if same:  # in place: who reads it now, reads what is behind the activation
                activated.append(made.pop(id(tensor)))
        elif not same or name.startswith("__i") or name.endswith("_"):
            others.add(id(tensor))  # and not a dropout that hands it on in evaluation mode

    class Watch(overrides.TorchFunctionMode):  # type: ignore[misc,name-defined]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            result = function(*args, **given)
            if any(isinstance(part, torch.Tensor) for part in _flat([result])):
                name = getattr(function, "__name__", "")
                for tensor in _flat((*args, *given.values())):
                    if id(tensor) in made:
                        note(name, tensor, same=result is tensor)
            return result

    def keep(layer: Any, args: Any, output: Any) -> None:
        made[id(output)] = layer, output

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.no_grad(), Watch():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [layer for place, (layer, _) in made.items() if place in others or place not in passed]


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _rounding_types() -> tuple[type[Any], type[Any]]:
    """The modules that round weights and inputs."""
    torch = require("torch", extra="train")

    class WeightRounding(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, scheme: Scheme, axis: int) -> None:
            super().__init__()
            self.scheme = scheme
            self.axis = axis if scheme.per_channel else None
            self.watching = False

        def forward(self, weight: Any) -> Any:
            if self.watching:
                return weight
            axes = tuple(a for a in range(weight.ndim) if a != self.axis)
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
            kept = getattr(values, _KEPT, 1.0)
            if self.watching or self.training:
                self._watch(values.detach(), kept)
            if self.watching:
                return values
            scale = ((self.high - self.low) / _STEPS).clamp_min(_TINY) / kept
            zero = (-self.low / kept / scale).round()
            clipped = values.clamp(-zero * scale, (_STEPS - zero) * scale)
            rounded = (clipped / scale).round() * scale
            return clipped + (rounded - clipped).detach()

        def _watch(self, values: Any, kept: float) -> None:
            low, high = values.amin().clamp_max(0) * kept, values.amax().clamp_min(0) * kept
            held = 1.0 if self.watching else 1 - _FORGOTTEN
            self.low.copy_(torch.minimum(held * self.low, low))
            self.high.copy_(torch.maximum(held * self.high, high))

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
        if layer is None or runs.count(layer) > 1 or runs.count(norm) > 1 or not _foldable(layer, norm, given):
            continue
        fuse = fusion.fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fusion.fuse_conv_bn_eval
        whole = fuse(layer, norm)
        layer.weight, layer.bias = whole.weight, whole.bias
        parent, name = places[norm]
        setattr(parent, name, nn.Identity())
        folded += 1
    with torch.no_grad():
        after = run()
    far = next((n for n, t in before.items() if not _near(t, after[n])), None)
    if far is not None:
        raise OptimizationError(
            f"with its batch normalizations folded the module gives another {far!r}",
            expected="a layer whose output nothing but its batch normalization reads",
            hint="fold them in the factory: torch.nn.utils.fusion.fuse_conv_bn_eval",
        )
    return folded


def _foldable(layer: Any, norm: Any, given: Any) -> bool:
    """Whether a normalization is over the very axis that holds the layer's outputs.

    Args:
        layer: A convolution or linear layer.
        norm: A batch normalization, which is over axis 1.
        given: What the layer gave and the normalization reads.
    """
    linear = hasattr(layer, "out_features")
    # Behind [batch, positions, features] a normalization is over the positions; without a batch, axis 1 is a position.
    axes = 2 if linear else len(layer.kernel_size) + 2
    width = layer.out_features if linear else layer.out_channels
    plain = "weight" in layer._parameters  # and not one that something else computes
    return given.ndim == axes and norm.num_features == width and norm.running_mean is not None and plain


def _near(one: Any, other: Any) -> bool:
    torch = require("torch", extra="train")
    return bool(torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-4, equal_nan=True))
