"""What a parent model gives, which its descendants have to give as well: at several shapes, and every time the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.benchmarks.parity import Verdict, compare
from deploykit.data import Dataset, generate
from deploykit.errors import InferenceError, ModelError
from deploykit.exporters.shapes import sizes_to_check
from deploykit.modelfile import read_model
from deploykit.models import LoadedModel, probe_feeds
from deploykit.nodes import random_ops
from deploykit.runtimes import Device, Session, open_session
from deploykit.specs import TensorSpec, terms

if TYPE_CHECKING:
    from deploykit.specs import Array, Feeds

_REPEATS = 4


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs, and what the parent makes of them.

    Attributes:
        feeds: One mapping a case.
        outputs: One mapping a case.
        origin: Where the inputs come from: "generated", "golden" or a dataset's name.
        notes: What the user must know.
    """

    feeds: list[dict[str, Array]]
    outputs: list[dict[str, Array]]
    origin: str
    notes: tuple[str, ...] = ()


def run_parent(
    parent: LoadedModel, device: Device, data: Dataset | None, dims: Mapping[str, int], *, optimize: bool = True
) -> Reference:
    """Run a parent on real, golden or made-up inputs.

    Made-up ones vary every dynamic dimension, because a step may have fixed any of them; what the parent itself does
    not run at is left out.

    Args:
        parent: The model.
        device: Where it runs.
        data: Real inputs.
        dims: Sizes of dynamic dimensions where inputs are made up.
        optimize: Whether the runtime may fuse operators.

    Raises:
        InferenceError: It runs at no shape.
        ModelError: Its outputs are random.
    """
    feeds, origin = probe_feeds(parent, data, dims)
    notes: list[str] = []
    with open_session(parent.path, device, optimize=optimize) as session:
        if origin == "generated" and not _is_golden(parent, feeds, dims):
            feeds, outputs, notes = _runnable(session, [*feeds, *_other_shapes(parent, feeds, dims)])
            for case in _other_values(parent, feeds):
                outputs.append(session.run(case))
                feeds.append(case)
        else:
            outputs = [session.run(case) for case in feeds]
        _refuse_random(parent, session, feeds[0], outputs[0])
    return Reference(feeds, outputs, origin, tuple(notes))


def _is_golden(parent: LoadedModel, feeds: Sequence[Feeds], dims: Mapping[str, int]) -> bool:
    """Whether the inputs were compared with the source before: those vary already."""
    return parent.artifact is not None and not dims and bool(parent.artifact.golden()) and bool(feeds)


def _other_values(parent: LoadedModel, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Three cases at least: of a model that runs at one shape only, more values of that shape."""
    specs = [TensorSpec(s.name, s.dtype, feeds[0][s.name].shape) for s in parent.signature.inputs]
    return [generate(specs, {}, ranges=parent.ranges, seed=100 + i) for i in range(3 - len(feeds))]


def _other_shapes(
    parent: LoadedModel, feeds: Sequence[Mapping[str, Array]], dims: Mapping[str, int]
) -> list[dict[str, Array]]:
    specs = parent.signature.inputs
    sizes = {
        dim: int(size)
        for spec in specs
        for dim, size in zip(spec.shape or (), feeds[0][spec.name].shape, strict=True)
        if isinstance(dim, str) and len(terms(dim)) == 1
    }
    batch = {s.shape[0] for s in specs if s.shape and isinstance(s.shape[0], str)}
    if not sizes.keys() - batch - dims.keys():
        return []  # made-up inputs have several batches already
    wanted = [found | dict(dims) for found in sizes_to_check(sizes, batch=batch)[1:]]
    return [generate(specs, found, ranges=parent.ranges, seed=3 + i) for i, found in enumerate(wanted)]


def _runnable(
    session: Session, feeds: Sequence[dict[str, Array]]
) -> tuple[list[dict[str, Array]], list[dict[str, Array]], list[str]]:
    kept, outputs, refused = [], [], []
    for case in feeds:
        try:
            outputs.append(session.run(case))
            kept.append(case)
        except InferenceError as exc:
            refused.append((case, exc))
    if not kept:
        first = refused[0][1]
        raise InferenceError(
            f"it does not run on made-up inputs ({first.what})", hint="give real ones: --data FILE, or --dim NAME=SIZE"
        ) from first
    notes = []
    if refused:
        shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in refused[0][0].items())
        notes.append(f"not compared at {len(refused)} of {len(feeds)} shapes, where the model does not run: {shapes}")
    return kept, outputs, notes


def _refuse_random(parent: LoadedModel, session: Session, feeds: Feeds, outputs: Mapping[str, Array]) -> None:
    """Refuse a model that draws random numbers which reach its outputs.

    Raises:
        ModelError: The same inputs give other outputs.
    """
    if parent.path.suffix != ".onnx":
        return
    ops = random_ops(read_model(parent.path, weights=False))
    # Few random bits may well be the same twice.
    if ops and any(compare([outputs], [session.run(feeds)]).verdict is Verdict.FAILED for _ in range(_REPEATS)):
        raise ModelError(
            f"{parent.path} gives other outputs each time for the same inputs (it has {', '.join(ops)})",
            expected="a deterministic model",
            hint="export it in inference mode",
        )
