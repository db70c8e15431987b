"""Inner tensors of a model, as many at a time as memory allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from deploykit.benchmarks.bisect_graph import Graph, bytes_of, value_info
from deploykit.modelfile import dtype_name
from deploykit.runtimes import Device, open_session, parse_device
from deploykit.specs import Array, Feeds

# Tensors of one model that are held at the same time.
BUDGET_BYTES = 256 * 1024 * 1024


class TensorSource(Protocol):
    """A model whose inner tensors can be had by name: an ONNX graph, or a torch module.

    Attributes:
        sizes: Bytes of every tensor, in the order in which they are made.
    """

    sizes: dict[str, int]

    def fetch(self, names: Sequence[str]) -> dict[str, Array]:
        """Run the model and return these tensors."""
        ...

    def describe(self, name: str) -> str:
        """What made a tensor, for people."""
        ...


class Probe:
    """An ONNX graph on a device, run as often as it takes, with other tensors exposed each time.

    Args:
        graph: Its folder receives the cut models.
        feeds: Inputs by name.
        device: Where to run.
        budget_bytes: How much is kept after a run; graphs with less are run once only.
    """

    def __init__(self, graph: Graph, feeds: Feeds, device: Device, budget_bytes: int = BUDGET_BYTES) -> None:
        self.graph = graph
        self.feeds = feeds
        self.device = device
        self._budget = budget_bytes
        self._types = self._known_types()
        self.sizes = self._measure()
        self._kept: dict[str, Array] = {}

    def _known_types(self) -> dict[str, int | None]:
        """Element types of what can be exposed: tensors, no sequences and no strings."""
        import onnx

        found = self.graph.types()
        skip = {name for name, kind in found.items() if kind is None or kind == onnx.TensorProto.STRING}
        untyped_allowed = self.device.runtime == "ort"  # it infers what onnx does not know, its own operators' types
        for node in self.graph.nodes:
            if node.op_type.startswith(("Sequence", "Optional", "SplitToSequence")):
                skip |= {name for name in node.output if name not in found}
        return {
            name: found.get(name)
            for name in self.graph.producer
            if name not in skip and (found.get(name) or untyped_allowed)
        }

    def _measure(self) -> dict[str, int]:
        """Sizes in bytes, by a run that gives out the shapes only."""
        from onnx import TensorProto, helper

        free = itertools.count()
        marks = {name: f"deploykit.shape.{next(free)}" for name in self._types}
        if not marks:
            return {}
        extra = [helper.make_node("Shape", [name], [mark]) for name, mark in marks.items()]
        cut = self.graph.cut([value_info(m, TensorProto.INT64) for m in marks.values()], extra)
        # Accelerators leave Shape to the CPU, which their sessions refuse.
        device = parse_device("ort:cpu") if self.device.runtime == "ort" else self.device
        shapes = run_model(cut, self.graph.folder, self.feeds, device)
        return {
            name: int(np.prod(shapes[mark], dtype=np.int64)) * bytes_of(self._types[name])
            for name, mark in marks.items()
        }

    def fetch(self, names: Sequence[str]) -> dict[str, Array]:
        """Run and return these tensors; those of small graphs are all kept from the first run on."""
        direct = {name: np.asarray(self.feeds[name]) for name in names if name in self.feeds}
        wanted = [name for name in names if name in self.sizes]
        if sum(self.sizes.values()) <= self._budget:
            if not self._kept and wanted:
                self._kept = self._exposed(list(self.sizes))
            return direct | {name: self._kept[name] for name in wanted}
        return direct | (self._exposed(wanted) if wanted else {})

    def _exposed(self, names: Sequence[str]) -> dict[str, Array]:
        cut = self.graph.cut([value_info(name, self._types[name]) for name in names])
        return run_model(cut, self.graph.folder, self.feeds, self.device)

    def dtype(self, name: str) -> str:
        """Element type of a tensor; empty where it is unknown."""
        kind = self._types[name]
        return dtype_name(kind) if kind else ""

    def describe(self, name: str) -> str:
        """Operator and name of the node that made it."""
        number = self.graph.producer.get(name)
        return name if number is None else f"{self.graph.nodes[number].op_type} {self.graph.label(number)}"


def run_model(model: object, folder: Path, feeds: Feeds, device: Device, *, optimize: bool = False) -> dict[str, Array]:
    """Write a model into its weights' folder and run it; OpenVINO optimizes its graph in any case."""
    file = folder / f"cut-{len(list(folder.glob('cut-*.onnx')))}.onnx"
    file.write_bytes(model.SerializeToString())  # type: ignore[attr-defined]
    try:
        with open_session(file, device, optimize=optimize or device.runtime != "ort") as session:
            names = {s.name for s in session.signature.inputs}
            return session.run({k: v for k, v in feeds.items() if k in names})
    finally:
        file.unlink()


def in_chunks(sizes: Mapping[str, int], names: Sequence[str], budget_bytes: int) -> Iterator[list[str]]:
    """Cut a list of tensors into pieces of at most ``budget_bytes``; a larger one stands alone."""
    piece: list[str] = []
    used = 0
    for name in names:
        if piece and used + sizes[name] > budget_bytes:
            yield piece
            piece, used = [], 0
        piece.append(name)
        used += sizes[name]
    if piece:
        yield piece
