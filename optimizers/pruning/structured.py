"""Structured pruning: choose, take out, train, and again, until the share or the latency that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.errors import DeploykitError, OptimizationError, SpeedError, first_line
from deploykit.optimizers.pruning.allocation import Prospect, allocate, highest_ratio, least_important, sizes_of
from deploykit.optimizers.pruning.config import PruneConfig
from deploykit.optimizers.pruning.counting import Layer, count_layers, count_parameters
from deploykit.optimizers.pruning.groups import find_structure
from deploykit.optimizers.pruning.importance import Losses, losses_of, magnitudes, savings, sensitivities, taylor
from deploykit.optimizers.pruning.restoring import attributes_of, changed_attributes, restore_structure
from deploykit.optimizers.pruning.search import Found, Probe, find_ratio
from deploykit.optimizers.pruning.subject import Group, Subject
from deploykit.optimizers.pruning.surgery import take_out, take_out_checked
from deploykit.progress import Progress
from deploykit.specs import Array

# How often the search goes on after a careful measurement said otherwise.
_CORRECTIONS = 2


@dataclass(frozen=True, slots=True)
class Aim:
    """A latency that is asked for.

    Attributes:
        target_ms: Milliseconds.
        start_ms: Of the module as it is, by `measure`.
        measure: Times a pruned copy; for choices on the way.
        confirm: Times one as carefully as the result will be; None where `measure` does.
        tolerance: How far above the target still counts as met.
        probes: How many copies one search may time.
        required: Refuse a target that is out of reach, instead of coming as near as can be.
    """

    target_ms: float
    start_ms: float
    measure: Callable[[Any], float]
    confirm: Callable[[Any], float] | None = None
    tolerance: float = 0.05
    probes: int = 10
    required: bool = True

    def describe(self, ms: float) -> str:
        """A latency beside the one that was asked for."""
        return f"{ms:.3f} ms, {self.start_ms / ms:.2f}x; asked for: {self.target_ms:.3f} ms"


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far a pruning is: what a step took out, before the training after it.

    Attributes:
        step: Its number, from 1.
        ratio: That the last step comes to.
        changed: Of `changed_attributes`.
        weights: Tensors by name.
        sensitivity: See `Pruned`.
        probes: What was timed so far.
    """

    step: int
    ratio: float
    changed: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, Any]
    sensitivity: Mapping[str, float]
    probes: tuple[Probe, ...]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was done to a module.

    Attributes:
        ratio: Share of the channels in groups that is gone.
        channels: Channels before and after, by group.
        heads: The groups whose units are attention heads, with the number of heads before and after.
        layers: Layers before and after, by name.
        parameters: Before and after.
        kept: Why layers stay as they are, by name.
        importance: What told which channels go.
        sensitivity: What the outputs minded at first, by group; empty where nobody asked.
        probes: What was timed on the way.
    """

    ratio: float
    channels: Mapping[str, tuple[int, int]]
    heads: Mapping[str, tuple[int, int]]
    layers: Mapping[str, tuple[Layer, Layer]]
    parameters: tuple[int, int]
    kept: Mapping[str, str]
    importance: str
    sensitivity: Mapping[str, float]
    probes: tuple[Probe, ...]

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates of convolutions and linear layers for the example, before and after."""
        return sum(a.macs for a, _ in self.layers.values()), sum(b.macs for _, b in self.layers.values())


def prune_structured(
    subject: Subject,
    config: PruneConfig,
    *,
    aim: Aim | None = None,
    losses: Losses | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
    recover: Callable[[Any, int], None] | None = None,
    keep: Callable[[Progressed], None] | None = None,
    begun: Progressed | None = None,
    told: Progress | None = None,
) -> Pruned:
    """Take channels, heads and neurons out of a module, in place.

    Args:
        subject: The module.
        config: How; its ratio is not minded where there is an aim.
        aim: The latency that is asked for.
        losses: Labelled batches, for importance by Taylor expansion.
        batches: Inputs that the sensitivity of the groups is measured on; by default the example alone.
        recover: Trains the module after each step, in place; told the number of the step.
        keep: Told how far it is before each training.
        begun: What `keep` was told before an interrupt, of the same module: goes on with the training of that step.
        told: Steps and notes.

    Raises:
        OptimizationError: It has a recurrent layer, nothing of it can go, or the ratio is out of reach.
        SpeedError: The latency is out of reach.
    """
    work = _Work(subject, config, losses, batches, told or Progress())
    if begun is None:
        work.survey()
        work.tell_whole_groups()
        sensitivity, ratio = dict(work.sensitivity), config.ratio
    else:
        work.go_on(begun)
        sensitivity, ratio = dict(begun.sensitivity), begun.ratio
    if aim is not None and begun is None:
        if aim.start_ms <= aim.target_ms:
            raise OptimizationError(
                f"nothing has to go: the module as it is takes {aim.describe(aim.start_ms)}",
                expected="a latency below that",
            )
        ratio = work.search(aim, Probe(0.0, aim.start_ms), None)
    if ratio is None:
        raise OptimizationError("neither a ratio nor a latency is asked for", expected="one of them")
    if begun is None:
        work.check_reachable(ratio)
    for step in range(1 if begun is None else begun.step, config.steps + 1):
        last = step == config.steps
        if begun is None or step > begun.step:
            if step > 1:
                work.survey()
            if aim is not None and last and step > 1:
                # Training has moved the importance, so that the same ratio would be other channels, of another latency.
                ratio = work.search(aim, Probe(work.gone, aim.measure(subject.module)), ratio)
            work.take(ratio if last else ratio * step / config.steps)
            if keep is not None:
                keep(work.progressed(step, ratio, sensitivity))
        if recover is not None:
            recover(subject.module, step)
            subject.module.eval()
    return work.result(sensitivity)


class _Work:
    """A module on its way, and what is known about it now."""

    def __init__(
        self,
        subject: Subject,
        config: PruneConfig,
        losses: Losses | None,
        batches: Sequence[Mapping[str, Any]],
        told: Progress,
    ) -> None:
        self._subject, self._config, self._losses, self._batches, self._told = subject, config, losses, batches, told
        self.importance = config.importance
        if config.importance == "auto":
            self.importance = "taylor" if losses is not None else "magnitude"
        if self.importance == "taylor" and losses is None:
            raise OptimizationError(
                "importance by Taylor expansion needs labelled data", hint="give --data, or --importance magnitude"
            )
        subject.module.eval()
        with told.step("find what can be pruned"):
            self._structure = find_structure(subject)
        self._original, self._left = dict(self._structure.groups), dict(self._structure.kept)
        self._layers, self._attributes = self._count(), attributes_of(subject.module)
        self._parameters = count_parameters(subject.module)
        self._total = sum(g.channels for g in self._original.values())
        self._prospects: list[Prospect] = []
        self._values: dict[str, Array] = {}
        self._timed: dict[tuple[int, ...], float] = {}
        self._probes: list[Probe] = []
        self.sensitivity: dict[str, float] = {}
        for name, why in self._left.items():
            told.note(f"{name} stays as it is: {why}")

    def _count(self) -> dict[str, Layer]:
        s = self._subject
        return count_layers(s.module, s.example, s.feed)

    @property
    def _groups(self) -> Mapping[str, Group]:
        return self._structure.groups

    @property
    def gone(self) -> float:
        """Share of the channels that is gone already."""
        return 1 - sum(g.channels for g in self._groups.values()) / self._total

    def survey(self) -> None:
        """Judge the channels of the module as it is now."""
        subject, config = self._subject, self._config
        groups, layers = self._groups, self._count()
        with self._told.step(f"judge {len(groups)} groups of channels by {self.importance}"):
            if self._losses is not None and self.importance == "taylor":
                self._values = taylor(subject, groups, self._losses)
            else:
                self._values = magnitudes(subject, groups)
            if config.allocation == "sensitivity":
                self.sensitivity = sensitivities(subject, groups, self._values, self._batches)
        self._timed = {}
        self._prospects = [
            Prospect(
                name, group.units, self._original[name].units, group.width * group.blocks,
                1 if group.heads else config.round_to // math.gcd(config.round_to, group.blocks),
                losses_of(self._values[name], self.sensitivity.get(name)), savings(group, layers),
                # With one channel a block, a grouped convolution would be a depthwise one, of other groups.
                least=2 if group.blocks > 1 else 1,
            )
            for name, group in groups.items()
        ]  # fmt: skip

    def progressed(self, step: int, ratio: float, sensitivity: Mapping[str, float]) -> Progressed:
        """How far it is."""
        module = self._subject.module
        changed = changed_attributes(self._attributes, module)
        return Progressed(step, ratio, changed, module.state_dict(), sensitivity, tuple(self._probes))

    def go_on(self, begun: Progressed) -> None:
        """Take over what was taken out before an interrupt."""
        restore_structure(self._subject.module, begun.changed, begun.weights)
        self._structure = find_structure(self._subject, self._original)
        self._probes = list(begun.probes)

    def tell_whole_groups(self) -> None:
        """Say which groups can lose nothing, because channels come in multiples.

        Raises:
            OptimizationError: None can.
        """
        config = self._config
        whole = {p.name: p.original * p.width for p in self._prospects if len(sizes_of(p, config.max_ratio)) == 1}
        if len(whole) == len(self._prospects):
            raise OptimizationError(
                f"nothing can be taken out in multiples of {config.round_to}, and at most {config.max_ratio:g} of each "
                f"group (the largest has {max(whole.values())} channels)",
                hint=self._finer(),
            )
        for name, channels in whole.items():
            self._left[name] = (
                f"nothing of its {channels} channels can go in multiples of {config.round_to}, and at most "
                f"{config.max_ratio:g} of them"
            )
            self._told.note(f"{name} stays as it is: {self._left[name]}")

    def _finer(self) -> str:
        """What lets more channels go."""
        return f"smaller multiples (--round-to {max(1, self._config.round_to // 2)}), or a larger --max-ratio"

    def check_reachable(self, ratio: float) -> None:
        """Refuse a ratio that the multiples and the largest share of a group do not allow.

        Raises:
            OptimizationError: They do not.
        """
        highest = highest_ratio(self._prospects, self._config.max_ratio)
        # Channels come in multiples, so that no ratio is met exactly.
        if ratio > highest + 0.02:
            raise OptimizationError(
                f"a ratio of {ratio:g} is out of reach: {highest:.2f} of the channels can go at most",
                expected=f"a ratio up to {highest:.2f}",
                hint=self._finer(),
            )
        if not least_important(self._values, self._kept(ratio)):
            raise OptimizationError(
                f"a ratio of {ratio:g} takes nothing out: channels are kept in multiples of {self._config.round_to}",
                hint=f"smaller multiples (--round-to {max(1, self._config.round_to // 2)}), or a larger ratio",
            )

    def _kept(self, ratio: float) -> dict[str, int]:
        config = self._config
        return allocate(self._prospects, ratio, config.max_ratio, uniform=config.allocation == "uniform")

    def _copy(self, ratio: float) -> Any:
        """A copy of the module, pruned by a ratio."""
        made = self._subject.copied()
        take_out(made, self._groups, least_important(self._values, self._kept(ratio)))
        return made.module

    def take(self, ratio: float) -> None:
        """Prune the module itself, up to a ratio."""
        chosen = least_important(self._values, self._kept(ratio))
        with self._told.step(f"take channels out of {len(chosen)} groups"):
            try:
                take_out_checked(self._subject, self._groups, chosen)
            except DeploykitError:
                raise
            except Exception as exc:
                # The trial took other channels: a forward may mind how many are left.
                raise OptimizationError(
                    f"the module does not run with fewer channels in {', '.join(list(chosen)[:4])} ({first_line(exc)})",
                    hint=f"leave them as they are: --keep {next(iter(chosen))}, or take other multiples: --round-to",
                ) from exc
        self._structure = find_structure(self._subject, self._original)
        lost = next((name for name in self._original if name not in self._groups), None)
        if lost is not None:
            raise OptimizationError(
                f"with fewer channels, those of {lost} cannot be followed any more", hint=f"leave it out: --keep {lost}"
            )

    def search(self, aim: Aim, start: Probe, guess: float | None) -> float:
        """The ratio that meets a latency.

        Raises:
            SpeedError: None does, and that is required.
        """
        wanted, best = aim.target_ms, None
        highest = highest_ratio(self._prospects, self._config.max_ratio)
        tried: set[tuple[int, ...]] = set()
        for _ in range(_CORRECTIONS + 1):
            with self._told.step(f"search the pruning ratio for {aim.target_ms:.3f} ms"):
                found = find_ratio(
                    lambda ratio: self._latency(aim, ratio), wanted, start=start, highest=highest, guess=guess,
                    tolerance=aim.tolerance, limit=aim.probes,
                )  # fmt: skip
                kept = tuple(self._kept(found.ratio).values())
                if kept in tried:
                    break  # channels come in steps: there is nothing nearer
                tried.add(kept)
                careful = aim.confirm(self._copy(found.ratio)) if aim.confirm else found.ms
            if best is None or _distance(careful, aim) < _distance(best.ms, aim):
                best = Found(found.ratio, careful, careful <= aim.target_ms * (1 + aim.tolerance), found.probes)
            # Half of what is allowed: the proof after the export will differ by noise again.
            if abs(math.log(careful / aim.target_ms)) <= math.log1p(aim.tolerance) / 2:
                break
            if found.ratio >= highest and careful > aim.target_ms:
                break
            wanted, guess = found.ms * aim.target_ms / careful, found.ratio
        assert best is not None
        if not best.met:
            text = f"pruning comes to {aim.describe(best.ms)}, with {best.ratio:.0%} of the channels gone"
            if aim.required:
                raise SpeedError(
                    f"the latency is out of reach: {text}",
                    hint=f"ask for less, {self._finer()}, or distil into a smaller model",
                )
            self._told.note(f"target missed: {text}")
        elif best.ms * (1 + aim.tolerance) < aim.target_ms:
            self._told.note(f"faster than asked for, because channels come in steps: {aim.describe(best.ms)}")
        return best.ratio

    def _latency(self, aim: Aim, ratio: float) -> float:
        kept = tuple(self._kept(ratio).values())
        if kept not in self._timed:
            self._timed[kept] = aim.measure(self._copy(ratio))
            self._probes.append(Probe(ratio, self._timed[kept]))
        return self._timed[kept]

    def result(self, sensitivity: Mapping[str, float]) -> Pruned:
        """What was done so far."""
        after, groups = self._count(), self._groups
        return Pruned(
            ratio=self.gone,
            channels={name: (g.channels, groups[name].channels) for name, g in self._original.items()},
            heads={name: (g.units, groups[name].units) for name, g in self._original.items() if g.heads},
            layers={name: (layer, after[name]) for name, layer in self._layers.items()},
            parameters=(self._parameters, count_parameters(self._subject.module)),
            kept=self._left,
            importance=self.importance,
            sensitivity=sensitivity,
            probes=tuple(self._probes),
        )


def _distance(ms: float, aim: Aim) -> float:
    """How far a latency is from the target; above it counts most."""
    off = math.log(ms / aim.target_ms)
    return abs(off) + (10 if off > math.log1p(aim.tolerance) else 0)
