"""Inputs of Hugging Face models: which dimensions are dynamic, at which sizes to compare, and who makes the values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deploykit.data import ValueRange
from deploykit.errors import ExportError
from deploykit.specs import Array, Dim, Feeds, TensorSpec, terms

Draw = Callable[[Mapping[str, int]], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What goes into one graph.

    Attributes:
        specs: Names, dtypes and shapes; symbols for all dimensions that can be dynamic.
        draw: Makes values for sizes of all the symbols; other values at every call.
        example: Sizes for the export itself; at least 2 each, for torch.export takes 0 and 1 as constants.
        check: Further sizes to compare at.
        ranges: Values that made-up inputs may take.
        limits: Smallest and largest size that the model allows, by symbol.
        data: Where the values come from: "text" or "generated".
        fixed: Symbols that are sizes of the example unless the user names their axes.
    """

    specs: tuple[TensorSpec, ...]
    draw: Draw
    example: dict[str, int]
    check: tuple[dict[str, int], ...] = ()
    ranges: dict[str, ValueRange] = field(default_factory=dict)
    limits: dict[str, tuple[int, int]] = field(default_factory=dict)
    data: str = "generated"
    fixed: frozenset[str] = frozenset()

    def by_default(self, example: Mapping[str, int]) -> tuple[TensorSpec, ...]:
        """Inputs with the dimensions that are dynamic where the user names none."""
        return tuple(
            TensorSpec(s.name, s.dtype, tuple(example[d] if d in self.fixed else d for d in s.shape or ()))
            for s in self.specs
        )

    def sized(self, dims: Mapping[str, int]) -> dict[str, int]:
        """Sizes for the export, with the user's in place.

        Raises:
            ExportError: A size that the model does not allow.
        """
        wanted = {k: v for k, v in dims.items() if k in self.example}
        for name, size in wanted.items():
            low, high = self.limits.get(name, (1, 1 << 30))
            if not low <= size <= high:
                raise ExportError(f"--dim {name}={size}", expected=f"{low} to {high} for this model")
        return self.example | wanted


@dataclass(frozen=True, slots=True)
class Choice:
    """The dynamic dimensions that the user wants, and how their sizes become those of `Inputs`.

    Attributes:
        specs: Inputs with the user's dimensions.
        draw: Makes values for the user's sizes.
        check: Sizes to compare at, in the user's symbols.
        limits: Sizes that the model allows, by the user's symbol.
    """

    specs: tuple[TensorSpec, ...]
    draw: Callable[[dict[str, int]], dict[str, Array]]
    check: tuple[dict[str, int], ...]
    limits: dict[str, tuple[int, int]]


def choose(inputs: Inputs, wanted: Sequence[TensorSpec], example: Mapping[str, int]) -> Choice:
    """Translate between the dimensions of a model and those that the user chose.

    Args:
        inputs: The model's.
        wanted: The same inputs with the user's dimensions.
        example: Sizes of the model's symbols in the example.

    Raises:
        ExportError: Axes that are one dimension of the model have different names or are fixed in part.
    """
    places: dict[str, Dim] = {}
    for own, asked in zip(inputs.specs, wanted, strict=True):
        for axis, (dim, user) in enumerate(zip(own.shape or (), asked.shape or (), strict=True)):
            if len(terms(dim)) > 1 or isinstance(dim, int):
                continue
            if places.setdefault(dim, user) != user:
                raise ExportError(
                    f"axis {axis} of {own.name!r} is {user!r}, where the same dimension of another input is "
                    f"{places[dim]!r}; the model's inputs share it ({', '.join(map(str, inputs.specs))})",
                    hint="name the same axes for every input",
                )

    def own_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
        there = {dim: sizes[user] for dim, user in places.items() if isinstance(user, str) and user in sizes}
        return {**example, **there}

    symbols = {dim: user for dim, user in places.items() if isinstance(user, str)}
    check: list[dict[str, int]] = []
    for sizes in inputs.check:
        mine = {user: sizes[dim] for dim, user in symbols.items()}
        if mine and mine not in check:
            check.append(mine)
    limits = {user: inputs.limits[dim] for dim, user in symbols.items() if dim in inputs.limits}
    return Choice(tuple(wanted), lambda sizes: inputs.draw(own_sizes(sizes)), tuple(check), limits)


def joined(first: Inputs, second: Inputs) -> Inputs:
    """The inputs of two towers of one graph; their batches are dimensions of their own."""

    def renamed(spec: TensorSpec, role: str) -> TensorSpec:
        dims = tuple(f"{role}_batch" if d == "batch" else d for d in spec.shape or ())
        return TensorSpec(spec.name, spec.dtype, dims)

    def own(sizes: Mapping[str, int], role: str) -> dict[str, int]:
        return {k.removeprefix(f"{role}_"): v for k, v in sizes.items()}

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        return {**first.draw(own(sizes, "text")), **second.draw(own(sizes, "image"))}

    rest = {k: v for k, v in (first.example | second.example).items() if k != "batch"}
    example = {"text_batch": 3, "image_batch": 2} | rest
    check = tuple(
        example | {"text_batch": t, "image_batch": i} | {k: v for k, v in one.items() if k != "batch"}
        for t, i, one in zip((1, 2, 4), (1, 3, 2), itertools.cycle(first.check), strict=False)
    )
    specs = tuple(renamed(s, "text") for s in first.specs) + tuple(renamed(s, "image") for s in second.specs)
    return Inputs(
        specs, draw, example, check, first.ranges | second.ranges, first.limits | second.limits, first.data,
        first.fixed | second.fixed,
    )  # fmt: skip


def rows_of(feeds: Feeds) -> int:
    """Batch size of a set of inputs."""
    return len(next(iter(feeds.values())))
