"""A module that is pruned, how it is run, and its channels that can only go together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deploykit.errors import OptimizationError, first_line
from deploykit.extras import require
from deploykit.nesting import flatten_outputs

# Calls a module with inputs by name.
Feed = Callable[[Any, Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """A module, and how it is run.

    Attributes:
        module: In evaluation mode.
        example: Inputs by name.
        feed: Calls a module with them.
        keep: Patterns of the names of parts that stay as they are.
        others: More inputs, of other values: what is compared is compared on these too, because an example is often
            all zeros, of which every module makes the same.
    """

    module: Any
    example: Mapping[str, Any]
    feed: Feed
    keep: tuple[str, ...] = ()
    others: tuple[Mapping[str, Any], ...] = ()

    def of(self, module: Any) -> Subject:
        """Another module that is run in the same way."""
        return Subject(module, self.example, self.feed, self.keep, self.others)

    def outputs(self, batches: Sequence[Mapping[str, Any]] | None = None) -> list[Any]:
        """The floating-point tensors among what the module gives for batches; by default the example and the others."""
        torch = require("torch", extra="prune")
        wanted = (self.example, *self.others) if batches is None else batches
        with untouched(self.module), torch.no_grad():
            return [tensor for batch in wanted for tensor in tensors_in(self.feed(self.module, batch))]

    def copied(self) -> Subject:
        """The same with a copy of the module.

        Raises:
            OptimizationError: It cannot be copied.
        """
        try:
            return self.of(copy.deepcopy(self.module))
        except Exception as exc:
            raise OptimizationError(
                f"the module cannot be copied, to be tried out ({first_line(exc)})",
                expected="a module without open files, locks or generators among its attributes",
            ) from exc


@dataclass(frozen=True, slots=True)
class Member:
    """A layer whose channels are the group's.

    Attributes:
        name: Of the layer.
        reads: Whether it reads them (its input channels go) or makes them (its output channels go).
        channels: Its channels, in the order of `roots`.
        roots: The group's channel that each of them belongs to.
    """

    name: str
    reads: bool
    channels: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that can only go together.

    Attributes:
        name: Of the layer whose output channels are counted.
        channels: How many there are.
        units: How many pieces they go in.
        width: Neighbouring channels in a unit: those of an attention head.
        blocks: In how many blocks they lie that have to stay equally large, because a grouped convolution is among the
            members.
        members: Convolutions and linear layers.
    """

    name: str
    channels: int
    units: int
    width: int
    blocks: int
    members: tuple[Member, ...]

    @property
    def heads(self) -> bool:
        """Whether its units are attention heads."""
        return self.width > 1

    @property
    def readers(self) -> tuple[Member, ...]:
        """The layers that read the channels."""
        return tuple(m for m in self.members if m.reads)

    def channels_of(self, units: Sequence[int]) -> list[int]:
        """The channels of some units."""
        if self.width > 1:
            return [unit * self.width + i for unit in units for i in range(self.width)]
        return sorted(unit + block * self.units for unit in units for block in range(self.blocks))


def trace(subject: Subject) -> Any:
    """Torch-Pruning's graph of a module; it follows autograd, so that every weight has to take part."""
    torch = require("torch", extra="prune")
    pruning = require("torch_pruning", extra="prune")
    graph = pruning.DependencyGraph()
    try:
        with untouched(subject.module), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for p in subject.module.parameters():
                p.requires_grad_(p.is_floating_point())
            graph.build_dependency(
                subject.module,
                example_inputs=dict(subject.example),
                # The copies are what nothing reads: who makes them makes an output of the module.
                forward_fn=lambda module, example: [
                    t.clone() for t in tensors_in(subject.feed(module, example)) if t.requires_grad
                ],
                verbose=False,
            )
    except Exception as exc:
        raise OptimizationError(
            f"the module's structure cannot be followed ({first_line(exc)})",
            expected="a forward through which gradients flow, without torch.no_grad()",
            hint="set weights to zero instead: --method magnitude",
        ) from exc
    return graph


@contextmanager
def untouched(module: Any) -> Iterator[None]:
    """Leave a module as it was after a run, also one that fails: modes, hooks, buffers, and which weights learn.

    Torch-Pruning leaves its hooks where the forward fails, and switches to evaluation mode. What forward keeps in plain
    attributes, such as an attention map, loses its history, with which no module could be copied.
    """
    torch = require("torch", extra="prune")
    parts = list(module.modules())
    modes = [(part, part.training) for part in parts]
    hooks = [(part, set(part._forward_hooks)) for part in parts]
    flags = [(p, p.requires_grad) for p in module.parameters()]
    buffers = [
        (part, name, value, value.detach().clone())
        for part in parts
        for name, value in part._buffers.items()
        if value is not None
    ]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for part, known in hooks:
            for key in set(part._forward_hooks) - known:
                del part._forward_hooks[key]
        for p, flag in flags:
            p.requires_grad_(flag)
        with torch.no_grad():
            for part, name, tensor, value in buffers:
                part._buffers[name] = tensor
                tensor.copy_(value)
        for part in parts:
            held = {k: v for k, v in vars(part).items() if isinstance(v, torch.Tensor) and v.grad_fn is not None}
            vars(part).update({name: value.detach() for name, value in held.items()})


def tensors_in(value: Any) -> list[Any]:
    """Floating-point tensors in a nest, in order."""
    torch = require("torch", extra="prune")
    return [t for t in flatten_outputs(value, ()).values() if isinstance(t, torch.Tensor) and t.is_floating_point()]


def names_of_parts(subject: Subject) -> dict[Any, str]:
    """The parts of a module with their names."""
    return {part: name for name, part in subject.module.named_modules()}
