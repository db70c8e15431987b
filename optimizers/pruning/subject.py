"""A module that is pruned, how it is run, and its channels that can only go together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
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
    """

    module: Any
    example: Mapping[str, Any]
    feed: Feed
    keep: tuple[str, ...] = ()

    def of(self, module: Any) -> Subject:
        """Another module that is run in the same way."""
        return Subject(module, self.example, self.feed, self.keep)

    def outputs(self, module: Any | None = None) -> list[Any]:
        """The floating-point tensors among what the module gives for the example."""
        torch = require("torch", extra="prune")
        with torch.no_grad():
            return tensors_in(self.feed(self.module if module is None else module, self.example))


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
    flags = [(p, p.requires_grad) for p in subject.module.parameters()]
    for p, _ in flags:
        p.requires_grad_(p.is_floating_point())
    graph = pruning.DependencyGraph()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return graph


def tensors_in(value: Any) -> list[Any]:
    """Floating-point tensors in a nest, in order."""
    torch = require("torch", extra="prune")
    return [t for t in flatten_outputs(value, ()).values() if isinstance(t, torch.Tensor) and t.is_floating_point()]


def names_of_parts(subject: Subject) -> dict[Any, str]:
    """The parts of a module with their names."""
    return {part: name for name, part in subject.module.named_modules()}
