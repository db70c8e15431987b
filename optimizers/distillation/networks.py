"""A teacher or a student: how a batch is given to it, and how one looks into it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.errors import OptimizationError, first_line
from deploykit.extras import require
from deploykit.nesting import flatten_outputs

# What a hook saw, by the name of the module.
Seen = dict[str, Any]
_EAGER = "eager"


@dataclass(frozen=True, slots=True)
class Network:
    """A module, and where its inputs stand in a batch.

    Attributes:
        module: The user's.
        keys: Names of the arrays in a batch, by the name of the input.
        feed: Runs a module like it on its inputs by name, and gives what it returns.
        label: What the user called it.
    """

    module: Any
    keys: Mapping[str, str]
    feed: Callable[[Any, Mapping[str, Any]], Any]
    label: str

    def outputs(self, module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors that a module returns for a batch, by name."""
        value = self.feed(module, {name: batch[key] for name, key in self.keys.items()})
        return flatten_outputs(value, tuple(self.keys))

    def run(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs of this module, without gradients, on the device that the batch is on."""
        torch = require("torch", extra="train")
        move(self.module, next(iter(batch.values())).device)
        with torch.no_grad():
            return self.outputs(self.module, batch)

    @property
    def parameters(self) -> int:
        """Numbers that are learned, shared ones once."""
        return sum(p.numel() for p in self.module.parameters())

    def inner(self, name: str) -> Any:
        """One of the modules inside by its name.

        Raises:
            OptimizationError: There is none.
        """
        found = dict(self.module.named_modules())
        if not name or name not in found:
            some = ", ".join([n for n in found if n][:12])
            expected = f"a name like {some}" if some else "a module with others inside"
            raise OptimizationError(f"{self.label} has no module {name!r}", expected=expected)
        return found[name]


def move(module: Any, device: Any) -> None:
    """Bring a module to a device, where it is not there yet."""
    first = next(iter(module.parameters()), None)
    if first is not None and first.device != device:
        module.to(device)


@contextlib.contextmanager
def watched(network: Network, names: Sequence[str]) -> Iterator[Seen]:
    """What inner modules return, by name, at every run inside the block.

    Raises:
        OptimizationError: There is no module of such a name, or it takes no hook.
    """
    seen: Seen = {}

    def keeping(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[name] = output

        return hook

    handles = []
    try:
        for name in dict.fromkeys(names):
            try:
                handles.append(network.inner(name).register_forward_hook(keeping(name)))
            except RuntimeError as exc:
                raise OptimizationError(f"{name} of {network.label} cannot be watched ({first_line(exc)})") from exc
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Any:
    """The first tensor in what a module returned; None where there is none."""
    torch = require("torch", extra="train")
    if isinstance(output, torch.Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


@contextlib.contextmanager
def showing_attention(network: Network) -> Iterator[None]:
    """Have a model of transformers compute its attention step by step: fused kernels keep the distributions inside."""
    model = network.module
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if own in (None, _EAGER) or not hasattr(model, "set_attn_implementation"):
        yield
        return
    try:
        model.set_attn_implementation(_EAGER)
    except Exception as exc:
        raise OptimizationError(f"{network.label} has no attention that can be looked at ({first_line(exc)})") from exc
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def attention_modules(network: Network, batch: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Modules that return attention distributions, in the order in which they run.

    Args:
        network: In evaluation mode, for dropout would disturb the sums.
        batch: What it is run on.

    Returns:
        The name of each, and the place of the distributions among what it returns.
    """
    names = [name for name, _ in network.module.named_modules() if name]
    with watched(network, names) as seen:
        network.run(batch)
    found = {name: place for name, output in seen.items() if (place := _attention_place(output)) is not None}
    # A module that hands on what one inside of it returned is the same attention again.
    return [(n, place) for n, place in found.items() if not any(other.startswith(f"{n}.") for other in found)]


def _attention_place(output: Any) -> int | None:
    """Where among a module's outputs distributions [batch, (heads,) positions, positions] stand."""
    torch = require("torch", extra="train")
    for place, part in enumerate(output if isinstance(output, list | tuple) else ()):
        if not isinstance(part, torch.Tensor) or part.ndim not in (3, 4) or part.shape[-1] != part.shape[-2]:
            continue
        if not part.is_floating_point() or part.shape[-1] < 2 or bool((part < 0).any()):
            continue
        sums = part.sum(-1)
        if bool((sums - 1).abs().max() < 1e-3):
            return place
    return None


def blocks(network: Network) -> list[str]:
    """Names of the repeated blocks: the members of the list of equal modules that holds the most parameters."""
    torch = require("torch", extra="train")
    best: tuple[int, list[str]] = (0, [])
    for name, module in network.module.named_modules():
        children = list(module.named_children())
        several = isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)
        if not several or len({type(child) for _, child in children}) != 1:
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > best[0]:
            best = size, [f"{name}.{child}" if name else child for child, _ in children]
    return best[1]
