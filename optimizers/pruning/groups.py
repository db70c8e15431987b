"""Channels that can only go together, found by Torch-Pruning's dependency graph, and taken out.

Source: G. Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023), https://arxiv.org/abs/2301.12900.

Only such groups are used whose loss is exact: taking channels out gives what the whole module gives when the weights
that read them are zero. A layer normalization over the channels, or an output of the module among their readers, breaks
that; so does everything that the graph has understood wrongly, such as a reshape that mixes channels up. It is tried.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from deploykit.errors import OptimizationError, first_line
from deploykit.extras import require
from deploykit.optimizers.pruning.attention import Attention, find_attention
from deploykit.optimizers.pruning.counting import layer_kinds
from deploykit.optimizers.pruning.subject import Group, Member, Subject, names_of_parts, trace
from deploykit.optimizers.pruning.surgery import take_out_checked

# How often a group may come by each operator, in the mean.
_VISITS = 5
# Of each group, for a trial.
_TRIED = 0.25


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
    refuse_recurrent(subject.module, subject.keep)
    graph = trace(subject)
    known = names_of_parts(subject)
    attention = find_attention(subject.module)
    shared = _shared(subject)
    groups: dict[str, Group] = {}
    kept: dict[str, str] = {}
    for root, found in _all_groups(graph):
        if found is None:
            kept[known[root]] = "its channels cannot be followed"
            continue
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


# --- what the dependency graph is asked -------------------------------------------------------------------------------


def refuse_recurrent(module: Any, keep: Sequence[str]) -> None:
    """Refuse recurrent layers, unless they stay as they are.

    Raises:
        OptimizationError: There is one.
    """
    torch = require("torch", extra="prune")
    kinds = (torch.nn.RNNBase, torch.nn.RNNCellBase)
    for name, part in module.named_modules():
        if isinstance(part, kinds) and not matches(name, keep):
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


def check_keep(module: Any, keep: Sequence[str]) -> None:
    """Refuse a pattern that names no part of a module: what it was to protect would be pruned.

    Raises:
        OptimizationError: One does.
    """
    names = [name for name, _ in module.named_modules()]
    for pattern in keep:
        if not any(matches(name, (pattern,)) for name in names):
            near = get_close_matches(pattern, names, 3) or [n for n, _ in module.named_children()][:6]
            raise OptimizationError(
                f"--keep {pattern} names no part of the module",
                expected=f"a part of it, like {', '.join(near)}" if near else None,
            )


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


def _all_groups(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Every layer whose output channels begin a group, with the group of Torch-Pruning's; None where it has no end."""
    seen: set[Any] = set()
    for root in list(graph.module2node):
        if not isinstance(root, layer_kinds()) or root in seen:
            continue
        channels = list(range(graph.get_out_channels(root)))
        try:
            with _bounded(graph):
                found = graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, channels)
        except _EndlessError:
            yield root, None
            continue
        makers = (item.dep.target.module for item in found if graph.is_out_channel_pruning_fn(item.dep.handler))
        seen |= {part for part in makers if isinstance(part, layer_kinds())}
        yield root, found


class _EndlessError(Exception):
    """A group that grows and grows."""


@contextmanager
def _bounded(graph: Any) -> Iterator[None]:
    """Stop Torch-Pruning where it goes round in circles.

    Rotary positions cut channels into halves and put them together the other way round; each time through a shortcut,
    its graph finds indices that it has not seen yet.
    """
    group = require("torch_pruning.dependency.group", extra="prune").Group
    original, most = group.add_dep, _VISITS * len(graph.module2node) + 100

    def add_dep(self: Any, dep: Any, idxs: Any) -> None:
        if len(self) > most:
            raise _EndlessError
        original(self, dep, idxs)

    group.add_dep = add_dep
    try:
        yield
    finally:
        group.add_dep = original


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
    trial = subject.copied()
    try:
        take_out_checked(trial, groups, chosen)
    except OptimizationError:
        return "without channels it gives other outputs than with zeros there"
    except Exception as exc:  # noqa: BLE001 - the user's forward minds the number of channels, whatever it says
        return f"it does not run without them ({first_line(exc, 120)})"
    return ""
