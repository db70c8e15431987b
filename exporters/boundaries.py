"""Sizes at which `forward` takes another path: a graph follows one, and has to be compared on both sides.

`if x.shape[1] > 64: x = x[:, :64]` is right in a graph up to 64, whatever the declared shapes say. torch.export knows
the range in which its graph holds; in a trace, what a size was compared with is written down.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.exporters.base import Case
from deploykit.exporters.shapes import vary
from deploykit.extras import require
from deploykit.specs import Array, Feeds, TensorSpec

# Sizes, and elements of all inputs, beyond which the source is not run once more.
_MAX_SIZE = 4096
_MAX_ELEMENTS = 1 << 20
# Sizes of one symbol that are added, at most.
_MAX_ADDED = 6
# Stands for every symbol, where it is not known which one was compared.
ANY = ""

Edges = Mapping[str, Sequence[int]]


class Boundaries:
    """What the ways of an export found, and the cases that follow from it.

    Args:
        specs: The inputs.
        examples: One set of inputs.
        reference: Runs the source.
        draw: Makes inputs for given sizes; by default variations of the example.
        limits: Sizes that the source allows, by symbol.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        examples: Feeds,
        reference: Callable[[Feeds], dict[str, Array]],
        draw: Callable[[dict[str, int]], dict[str, Array]] | None,
        limits: Mapping[str, tuple[int, int]] | None,
    ) -> None:
        self._specs = specs
        self._examples = examples
        self._reference = reference
        self._draw = draw
        self._limits = limits or {}
        self._tried: dict[tuple[str, int], Case | None] = {}
        self.notes: list[str] = []

    def learn(self, edges: Edges, cases: Sequence[Case]) -> None:
        """Run the source at sizes beside the edges, as far as it runs there.

        Args:
            edges: By symbol, or `ANY`, the sizes on both sides of which the outputs may follow other rules.
            cases: The cases that there are.
        """
        base = min(cases, key=lambda case: math.prod(case.sizes.values())).sizes
        for symbol in base:
            known = {case.sizes[symbol] for case in cases}
            wanted = _wanted((*edges.get(symbol, ()), *edges.get(ANY, ())), known)
            for size in wanted[:_MAX_ADDED]:
                if (symbol, size) not in self._tried:
                    self._tried[symbol, size] = self._run(symbol, {**base, symbol: size})

    @property
    def cases(self) -> tuple[Case, ...]:
        """All cases that were added so far."""
        return tuple(case for case in self._tried.values() if case is not None)

    def _run(self, symbol: str, sizes: dict[str, int]) -> Case | None:
        low, high = self._limits.get(symbol, (1, 1 << 30))
        if not low <= sizes[symbol] <= high:
            return None
        elements = sum(math.prod(spec.concrete(sizes)) for spec in self._specs)
        if sizes[symbol] > _MAX_SIZE or elements > _MAX_ELEMENTS:
            self.notes.append(
                f"forward decides on a size, which may be {symbol}; not compared at {symbol}={sizes[symbol]}, which is "
                "too large to try"
            )
            return None
        try:
            feeds = self._made(sizes)
            return Case(sizes, feeds, self._reference(feeds))
        except Exception:  # noqa: BLE001 - what the source does not run at needs no graph
            return None

    def _made(self, sizes: dict[str, int]) -> dict[str, Array]:
        if self._draw is not None:
            return self._draw(sizes)
        rng = np.random.default_rng(sum(sizes.values()))
        return {s.name: vary(self._examples[s.name], s.concrete(sizes), rng) for s in self._specs}


def _wanted(edges: Sequence[int], known: set[int]) -> list[int]:
    """Sizes to try: beyond the edges that all cases are on one side of, the nearest first, and the edges themselves."""
    above = sorted(e + 1 for e in edges if e > max(known))
    below = sorted((e - 1 for e in edges if e < min(known)), reverse=True)
    beyond = [size for pair in itertools.zip_longest(above, below) for size in pair if size is not None]
    return [size for size in dict.fromkeys((*beyond, *edges)) if size >= 1 and size not in known]


def edges_of(program: Any, specs: Sequence[TensorSpec]) -> dict[str, list[int]]:
    """Ends of the ranges in which a program of torch.export holds, by symbol.

    Args:
        program: Whose inputs are ``specs``, in order.
        specs: With their symbols.
    """
    from torch.export.graph_signature import InputKind

    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = [s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    found: dict[str, list[int]] = {}
    for spec, name in zip(specs, names, strict=False):
        for dim, size in zip(spec.shape or (), getattr(values.get(name), "shape", ()), strict=False):
            expression = getattr(getattr(size, "node", None), "expr", None)
            bounds = program.range_constraints.get(expression)
            if bounds is None or not isinstance(dim, str):
                continue
            upper, lower = bounds.upper, bounds.lower
            finite = upper.is_Integer if hasattr(upper, "is_Integer") else isinstance(upper, int)
            found.setdefault(dim, []).extend([int(upper)] if finite and int(upper) < 1 << 30 else [])
            found[dim].extend([int(lower)] if int(lower) > 2 else [])
    return {dim: sorted(set(sizes)) for dim, sizes in found.items() if sizes}


@contextmanager
def compared_sizes() -> Iterator[list[int]]:
    """While torch traces, where sizes are tensors, collect the numbers that others than torch compare them with."""
    torch = require("torch", extra="torch")
    inside = f"{Path(str(torch.__file__)).parent}{os.sep}"
    found: list[int] = []
    names = ("__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__")

    def watched(original: Any) -> Any:
        def compare(self: Any, other: Any) -> Any:
            size = type(other) is int and self.ndim == 0 and self.dtype == torch.int64 and torch.jit.is_tracing()
            if size and not sys._getframe(1).f_code.co_filename.startswith(inside):
                found.append(other)
            return original(self, other)

        return compare

    before = {name: vars(torch.Tensor).get(name) for name in names}
    for name in names:
        setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    try:
        yield found
    finally:
        for name, value in before.items():
            if value is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, value)
