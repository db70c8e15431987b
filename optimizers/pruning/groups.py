"""Channels that can only go together, found by Torch-Pruning's dependency graph, and taken out.

Source: G. Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023), https://arxiv.org/abs/2301.12900.

Only such groups are used whose loss is exact: taking channels out gives what the whole module gives when the weights
that read them are zero. A layer normalization over the channels, or an output of the module among their readers, breaks
that; so does everything that the graph has understood wrongly, such as a reshape that mixes channels up. It is tried.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from deploykit.errors import OptimizationError, first_line
from deploykit.extras import require
from deploykit.optimizers.pruning.attention import Attention, find_attention
from deploykit.optimizers.pruning.counting import layer_kinds

# Calls a module with inputs by name.
Feed = Callable[[Any, Mapping[str, Any]], Any]
# Float32 sums in another order; what a wrong channel does is far more.
_TOLERANCE = 1e-3
# Of each group, for a trial.
_TRIED = 0.25


@dataclass(frozen=True, slots=True)
class Subject:
    """A module, and how it is run.

    Attributes:
        module: In evaluation mode.
        example: Inputs by name.
        feed: Calls a module with them.
        prefix: Left out of the names of its parts.
        keep: Patterns of the names of parts that stay as they are.
    """

    module: Any
    example: Mapping[str, Any]
    feed: Feed
    prefix: str = ""
    keep: tuple[str, ...] = ()

    def of(self, module: Any) -> Subject:
        """Another module that is run in the same way."""
        return Subject(module, self.example, self.feed, self.prefix, self.keep)

    def outputs(self, module: Any | None = None) -> list[Any]:
        """The floating-point tensors among what the module gives for the example."""
        torch = require("torch", extra="prune")
        with torch.no_grad():
            return _tensors(self.feed(self.module if module is None else module, self.example))


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


@dataclass(frozen=True, slots=True)
class Structure:
    """What can be taken out of a module.

    Attributes:
        groups: By name.
        kept: Why the other layers stay as they are, by name.
    """

    groups: Mapping[str, Group]
    kept: Mapping[str, str]


def find_structure(subject: Subject, known_groups: Collection[str] | None = None) -> Structure:
    """Find the groups, and try whether their channels can go.

    Args:
        subject: The module.
        known_groups: Names of groups that were tried before, in the same module with more channels: no others are
            taken, and they are not tried again.

    Raises:
        OptimizationError: There is a recurrent layer, the module cannot be followed, or nothing of it can go.
    """
    _refuse_recurrent(subject)
    graph = _trace(subject)
    known = _names(subject)
    attention = find_attention(subject.module)
    shared = _shared(subject)
    groups: dict[str, Group] = {}
    kept: dict[str, str] = {}
    for found in graph.get_all_groups(root_module_types=list(layer_kinds())):
        root = found[0].dep.target.module
        why = _obstacle(graph, found, known, shared, subject.keep)
        group = None if why else _read(graph, found, known, attention)
        if isinstance(group, Group):
            groups[group.name] = group
        else:
            kept[known[root]] = why or str(group)
    if known_groups is not None:
        groups = {name: group for name, group in groups.items() if name in known_groups}
    elif groups and (broken := _broken(subject, groups)):
        kept |= broken
        groups = {name: group for name, group in groups.items() if name not in broken}
    if not groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:4])
        raise OptimizationError(
            f"nothing of it can be taken out{f' ({reasons})' if reasons else ''}",
            expected="convolutions or linear layers between others",
            hint="set weights to zero instead: --method magnitude",
        )
    return Structure(groups, kept)


def take_out(subject: Subject, groups: Mapping[str, Group], chosen: Mapping[str, Sequence[int]]) -> None:
    """Take units out of a module, in place.

    Args:
        subject: The module.
        groups: Its groups.
        chosen: Units by group.

    Raises:
        OptimizationError: They cannot go.
    """
    flags = {name: p.requires_grad for name, p in subject.module.named_parameters()}
    graph = _trace(subject)
    known = _names(subject)
    parts = {name: part for part, name in known.items()}
    attention = find_attention(subject.module)
    for name, units in chosen.items():
        part = parts[name]
        write = graph.get_pruner_of_module(part).prune_out_channels
        found = graph.get_pruning_group(part, write, groups[name].channels_of(units))
        if not graph.check_pruning_group(found):
            raise OptimizationError(f"{name} would lose all of its channels")
        found.prune(record_history=False)
        makers = (parts[m.name] for m in groups[name].members if not m.reads)
        if groups[name].heads:
            next(attention[p] for p in makers if p in attention).lose(len(units))
    for name, p in subject.module.named_parameters():
        p.requires_grad_(flags[name])


def take_out_checked(subject: Subject, groups: Mapping[str, Group], chosen: Mapping[str, Sequence[int]]) -> None:
    """As `take_out`, and then compare with the module as it was, with zeros for the weights that read the channels.

    Raises:
        OptimizationError: The outputs are others.
    """
    twin = copy.deepcopy(subject.module)
    silence(subject.of(twin), groups, chosen)
    expected = subject.outputs(twin)
    take_out(subject, groups, chosen)
    if not _same(expected, subject.outputs()):
        raise OptimizationError(
            f"without channels of {', '.join(list(chosen)[:4])} the module gives other outputs than with zeros there",
            hint=f"leave them as they are: --keep {next(iter(chosen))}, or report it",
        )


def silence(subject: Subject, groups: Mapping[str, Group], chosen: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Set the weights to zero that read some units, in place.

    Returns:
        The weights as they were, by the name of their layer; for `unsilence`.
    """
    torch = require("torch", extra="prune")
    parts = {name: part for part, name in _names(subject).items()}
    before: dict[str, Any] = {}
    with torch.no_grad():
        for name, units in chosen.items():
            gone = set(groups[name].channels_of(units))
            for member in groups[name].readers:
                weight = parts[member.name].weight
                before.setdefault(member.name, weight.detach().clone())
                columns = [c for c, root in zip(member.channels, member.roots, strict=True) if root in gone]
                for index in column_indices(parts[member.name], columns):
                    weight[index] = 0
    return before


def unsilence(subject: Subject, before: Mapping[str, Any]) -> None:
    """Undo `silence`."""
    torch = require("torch", extra="prune")
    parts = {name: part for part, name in _names(subject).items()}
    with torch.no_grad():
        for name, weight in before.items():
            parts[name].weight.copy_(weight)


def column_indices(layer: Any, channels: Sequence[int]) -> list[Any]:
    """Where the weights stand that read some input channels, as indices of the layer's weight.

    A linear layer's weight is [out, in], a convolution's [out, in / groups, ...], a transposed one's [in, ...].
    """
    if not channels:
        return []
    if getattr(layer, "transposed", False):
        return [list(channels)]
    blocks = getattr(layer, "groups", 1)
    if blocks == 1:
        return [(slice(None), list(channels))]
    inputs, outputs = layer.in_channels // blocks, layer.out_channels // blocks
    return [
        (slice(block * outputs, (block + 1) * outputs), here)
        for block in range(blocks)
        if (here := [c % inputs for c in channels if c // inputs == block])
    ]


# --- what the dependency graph is asked -------------------------------------------------------------------------------


def _trace(subject: Subject) -> Any:
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
                forward_fn=lambda module, example: [t.clone() for t in _tensors(subject.feed(module, example))],
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


def _tensors(value: Any) -> list[Any]:
    """Floating-point tensors in a nest, in order."""
    torch = require("torch", extra="prune")
    from torch.utils._pytree import tree_leaves

    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _names(subject: Subject) -> dict[Any, str]:
    return {part: name.removeprefix(subject.prefix) for name, part in subject.module.named_modules()}


def _refuse_recurrent(subject: Subject) -> None:
    torch = require("torch", extra="prune")
    kinds = (torch.nn.RNNBase, torch.nn.RNNCellBase)
    for part, name in _names(subject).items():
        if isinstance(part, kinds) and not matches(name, subject.keep):
            raise OptimizationError(
                f"{name or 'the module itself'} is a {type(part).__name__}, whose state cannot lose channels",
                expected="convolutions, linear layers and attention",
                hint=f"leave it as it is, with the layers around it: --keep {name}; or --method magnitude",
            )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a part of a module, or what it is in, is named by one of the patterns."""
    pieces = name.split(".")
    whole = [".".join(pieces[: i + 1]) for i in range(len(pieces))]
    return any(fnmatchcase(above, pattern) for pattern in patterns for above in whole)


def _shared(subject: Subject) -> set[Any]:
    """Parts of which a parameter stands in another part as well, or is computed from others."""
    torch = require("torch", extra="prune")
    owners: dict[int, list[Any]] = {}
    found: set[Any] = set()
    for part in subject.module.modules():
        if torch.nn.utils.parametrize.is_parametrized(part) or any(n.endswith("_g") for n in part._parameters):
            found.add(part)
        for p in part._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(part)
    return found | {part for parts in owners.values() if len(parts) > 1 for part in parts}


def _obstacle(graph: Any, found: Any, known: Mapping[Any, str], shared: set[Any], keep: Sequence[str]) -> str:
    """Why a group of Torch-Pruning's stays as it is; empty where nothing speaks against it."""
    torch = require("torch", extra="prune")
    nn = torch.nn
    plain = (*layer_kinds(), nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
    for item in found:
        node, part = item.dep.target, item.dep.target.module
        if isinstance(part, nn.Parameter):
            return "a parameter of its own is added to its channels, or multiplied with them"
        name = known.get(part, "")
        if name and matches(name, keep):
            return f"{name} stays as it is"
        if part in shared:
            return f"{name} shares its weight, or computes it"
        if name and not isinstance(part, plain):
            return f"{name} ({type(part).__name__}) needs all of its channels"
        if not name and not node.outputs:
            return "its channels are an output of the module"
    return ""


def _read(graph: Any, found: Any, known: Mapping[Any, str], attention: Mapping[Any, Attention]) -> Group | str:
    """A group of Torch-Pruning's as one of ours, or why it stays as it is."""
    root = found[0].dep.target.module
    channels = int(graph.get_out_channels(root))
    members: list[Member] = []
    blocks, heads = 1, set[Attention]()
    for item in found:
        part, indices, roots = item.dep.target.module, list(item.idxs), list(item.root_idxs or [])
        if not isinstance(part, layer_kinds()):
            continue
        if len(indices) != len(roots) or any(r is None for r in roots):
            return f"which channels {known[part]} reads cannot be followed"
        reads = not graph.is_out_channel_pruning_fn(item.dep.handler)
        heads |= {attention[part]} if part in attention and not reads else set()
        members.append(Member(known[part], reads, tuple(indices), tuple(roots)))
        groups = getattr(part, "groups", 1)
        if groups > 1 and groups != part.out_channels:
            blocks = math.lcm(blocks, groups)
    if not any(m.reads for m in members):
        return "nothing reads its channels"
    if len(heads) > 1 or (heads and blocks > 1) or channels % blocks:
        return "its channels are shared between layers that cut them up differently"
    width = heads.pop().width if heads else 1
    if channels % width:
        return "its channels are no whole heads"
    return Group(known[root], channels, channels // (width * blocks), width, blocks, tuple(members))


# --- trying it out ----------------------------------------------------------------------------------------------------


def _broken(subject: Subject, groups: Mapping[str, Group]) -> dict[str, str]:
    """Groups that cannot be taken out after all, with the reason: first all at once, then one by one."""
    if not _why_wrong(subject, groups, list(groups)):
        return {}
    found = {name: why for name in groups if (why := _why_wrong(subject, groups, [name]))}
    rest = [name for name in groups if name not in found]
    if rest and _why_wrong(subject, groups, rest):
        # Each can go alone and not with the others: none of them is trusted.
        found |= dict.fromkeys(rest, "it cannot go together with the others")
    return found


def _why_wrong(subject: Subject, groups: Mapping[str, Group], names: Sequence[str]) -> str:
    """Why some units of these groups cannot be taken out; empty where they can."""
    torch = require("torch", extra="prune")
    draw = torch.Generator().manual_seed(0)
    chosen = {}
    for name in names:
        units = groups[name].units
        count = min(max(1, int(units * _TRIED)), units - 1)
        if count:
            chosen[name] = sorted(torch.randperm(units, generator=draw)[:count].tolist())
    trial = subject.of(copy.deepcopy(subject.module))
    try:
        take_out_checked(trial, groups, chosen)
    except OptimizationError:
        return "without channels it gives other outputs than with zeros there"
    except Exception as exc:  # noqa: BLE001 - the user's forward minds the number of channels, whatever it says
        return f"it does not run without them ({first_line(exc, 120)})"
    return ""


def _same(expected: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether outputs agree, as far as sums in another order do."""
    if len(expected) != len(found):
        return False
    for want, have in zip(expected, found, strict=True):
        if want.shape != have.shape:
            return False
        scale = float(want.abs().max()) if want.numel() else 0.0
        if want.numel() and not float((want - have).abs().max()) <= _TOLERANCE * scale + 1e-6:
            return False
    return True
