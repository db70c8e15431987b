"""Reach an accuracy target: first with other settings, then with as few layers in floating point as it takes.

Settings are tried from cheap to costly. If none reaches the target, the layers of the best one are ranked by their own
error, and the shortest prefix of that ranking which reaches it is found by doubling and bisection; then those of the
prefix that turn out not to be needed go back to integers. Each trial is one quantization and one evaluation; for n
layers there are at most `evaluation_limit(n)` of them, which grows with log2(n).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from deploykit.errors import AccuracyError, OptimizationError
from deploykit.goals import Score
from deploykit.ranking import LayerError

C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)


class Bench(Protocol[C_contra]):
    """What the search asks for; a test hands in a fake."""

    def judge(self, config: C_contra, floats: Sequence[LayerError]) -> Score:
        """Quantize with these layers in float, and judge the result.

        Raises:
            OptimizationError: It cannot be quantized so.
        """

    def rank(self, config: C_contra) -> list[LayerError]:
        """The quantized layers, the one that loses most first; none where layers cannot stay in float one by one."""


@dataclass(frozen=True, slots=True)
class Reached(Generic[C]):
    """A configuration that reaches the target.

    Attributes:
        config: The settings.
        floats: Layers that stay in floating point, as small a set as was found.
        score: What it reaches.
        evaluations: How many models were quantized and judged.
        ranked: How many layers there were to choose from; 0 where nothing had to be chosen.
    """

    config: C
    floats: tuple[LayerError, ...]
    score: Score
    evaluations: int
    ranked: int = 0


def evaluation_limit(layers: int) -> int:
    """Trials that the choice of float layers takes at most."""
    return 4 * max(1, layers).bit_length() + 2


def reach(bench: Bench[C], configs: Iterable[C], describe: Callable[[Score], str]) -> Reached[C]:
    """Find the cheapest way to the target.

    Args:
        bench: Quantizes, judges and ranks.
        configs: Settings, from cheap to costly; later ones are made only where the earlier ones failed.
        describe: A score in words.

    Raises:
        AccuracyError: No setting reaches the target, whatever is left in float.
        OptimizationError: No setting can be quantized at all.
    """
    best: tuple[C, Score] | None = None
    problem: OptimizationError | None = None
    tried = 0
    for config in configs:
        try:
            score = bench.judge(config, ())
        except OptimizationError as exc:
            problem = problem or exc
            continue
        finally:
            tried += 1
        if score.met:
            return Reached(config, (), score, tried)
        if best is None or (bool(score.collapsed), score.shortfall) < (bool(best[1].collapsed), best[1].shortfall):
            best = config, score
    if best is None:
        raise problem or OptimizationError("there was nothing to try")
    config, score = best
    ranked = bench.rank(config)
    if not ranked:
        raise AccuracyError(
            f"the target cannot be met: {describe(score)} ({tried} models judged)",
            hint="allow more, or keep the model in floating point",
        )
    trials = _Trials(bench, config, ranked)
    found = trials.shortest_prefix()
    if found is None:
        raise AccuracyError(
            f"the target cannot be met: {describe(score)} with all layers quantized, "
            f"{describe(trials.last) if trials.last else 'missed'} with only the least sensitive ones "
            f"({tried + trials.count} models judged)",
            hint="allow more, give more calibration data, or keep the model in floating point",
        )
    floats = tuple(trials.without_idle(found))
    reached = trials.scores[floats]
    assert reached is not None
    return Reached(config, floats, reached, tried + trials.count, len(ranked))


class _Trials(Generic[C]):
    """Trials with float layers, counted; none is made twice."""

    def __init__(self, bench: Bench[C], config: C, ranked: Sequence[LayerError]) -> None:
        self.bench = bench
        self.config = config
        self.ranked = list(ranked)
        self.scores: dict[tuple[LayerError, ...], Score | None] = {}
        self.last: Score | None = None

    @property
    def count(self) -> int:
        return len(self.scores)

    def meets(self, floats: Sequence[LayerError]) -> bool:
        key = tuple(floats)
        if key not in self.scores:
            try:
                self.scores[key] = self.last = self.bench.judge(self.config, key)
            except OptimizationError:  # nothing is left to quantize
                self.scores[key] = None
        score = self.scores[key]
        return score is not None and score.met

    def shortest_prefix(self) -> list[LayerError] | None:
        """The shortest prefix of the ranking that reaches the target, if more layers in float are never worse."""
        total = len(self.ranked)
        low, high = 0, 1  # a prefix of `low` misses it
        while high < total and not self.meets(self.ranked[:high]):
            low, high = high, min(2 * high, total)
        if high >= total:  # all in float is no quantized model
            high = total - 1
            if high < 1 or (high > low and not self.meets(self.ranked[:high])) or high == low:
                # What the ranking takes for harmless does not go in integers: it is the guilty one, or nothing helps.
                last = self.ranked[-1:]
                return last if total > 1 and self.meets(last) else None
        while high - low > 1:
            middle = (low + high) // 2
            if self.meets(self.ranked[:middle]):
                high = middle
            else:
                low = middle
        return self.ranked[:high]

    def without_idle(self, prefix: list[LayerError]) -> list[LayerError]:
        """Drop those of a shortest prefix that the target does not need.

        The last one is needed, or the prefix would be shorter. With it, the shortest prefix of the others is sought,
        whose last one is needed too, and so on, until those that are needed are enough, or the trials are used up.
        """
        needed, others = [prefix[-1]], prefix[:-1]
        limit = evaluation_limit(len(self.ranked))
        while others and self.count < limit:
            if self.meets(self._ordered(needed)):
                return self._ordered(needed)
            low, high = 0, len(others)
            while high - low > 1 and self.count < limit:
                middle = (low + high) // 2
                if self.meets(self._ordered([*others[:middle], *needed])):
                    high = middle
                else:
                    low = middle
            needed, others = [others[high - 1], *needed], others[: high - 1]
        return self._ordered([*others, *needed])

    def _ordered(self, floats: Sequence[LayerError]) -> list[LayerError]:
        return [layer for layer in self.ranked if layer in floats]
