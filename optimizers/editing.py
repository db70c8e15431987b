"""A graph that is being rewritten: who makes and who reads each tensor, and its weights by name, wherever they are."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.graphs import domain_of, subgraphs
from deploykit.optimizers.lazy_weights import read_weight
from deploykit.specs import Array
from deploykit.weights import LightModel, is_external, write_light

if TYPE_CHECKING:
    import onnx


def own_copy(light: LightModel, folder: Path) -> LightModel:
    """A model whose weights may be written: those on disk are copied to ``folder``, which is made.

    Where all weights are in memory it is the model itself.
    """
    if light.whole:
        return light
    folder.mkdir(exist_ok=True)
    write_light(light, folder / "own.onnx")  # from here on, its tensors point into the new file
    return LightModel(light.proto, folder)


class Editor:
    """Reads and changes a model in place.

    Args:
        light: The model; nothing else may change it meanwhile. External weights are written to (see `own_copy`).

    Attributes:
        makers: The node that makes a tensor, by tensor.
        readers: The nodes of the main graph that read a tensor, once for each input, by tensor.
        outputs: Tensors that leave the main graph: its outputs, and what subgraphs take from it.
    """

    def __init__(self, light: LightModel) -> None:
        self.light = light
        self.refresh()

    def refresh(self) -> None:
        """Look at the graph again after nodes were added."""
        graph = self.light.proto.graph
        self.makers = {out: node for node in graph.node for out in node.output if out}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.outputs = {value.name for value in graph.output}
        for node in graph.node:
            for name in node.input:
                if name:
                    self.readers[name].append(node)
            for _, inner in subgraphs(node):
                self.outputs |= _names_in(inner)
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        known = (*graph.value_info, *graph.input, *graph.output)
        self._shapes = {v.name: _shape_of(v) for v in known if v.type.HasField("tensor_type")}

    def is_weight(self, name: str) -> bool:
        """Whether a tensor is a float32 initializer."""
        return name in self._weights and self._weights[name].data_type == 1

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer of any type."""
        return name in self._weights

    def is_external(self, name: str) -> bool:
        """Whether a weight is on disk."""
        return is_external(self._weights[name])

    def dims(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return tuple(self._weights[name].dims)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape of any tensor as far as it is known; None for an unknown rank."""
        return self.dims(name) if name in self._weights else self._shapes.get(name)

    def is_shared(self, name: str) -> bool:
        """Whether a weight has several readers, or leaves the graph."""
        return len(self.readers[name]) != 1 or name in self.outputs

    def read(self, name: str) -> Array:
        """A weight's values; of one on disk, a read-only view."""
        from onnx import numpy_helper

        tensor = self._weights[name]
        return read_weight(tensor, self.light.folder) if is_external(tensor) else numpy_helper.to_array(tensor)

    def write(self, name: str, values: Array) -> None:
        """Give a weight other values of the same shape."""
        tensor = self._weights[name]
        made = np.ascontiguousarray(values, np.float32).reshape(tuple(tensor.dims))
        if is_external(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            with (self.light.folder / entries["location"]).open("r+b") as stream:
                stream.seek(int(entries.get("offset") or 0))
                stream.write(made.astype("<f4", copy=False).tobytes())
            return
        for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        tensor.raw_data = made.astype("<f4", copy=False).tobytes()

    def private(self, node: onnx.NodeProto, index: int) -> str | None:
        """The name of a weight that only this input reads: a copy where others read it too.

        Returns:
            None where it is shared and on disk, or leaves the graph: nothing is changed then.
        """
        name = str(node.input[index])
        if not self.is_shared(name):
            return name
        if is_external(self._weights[name]) or name in self.outputs:
            return None
        made = self.add_weight(name, self.read(name))
        self.readers[name].remove(node)
        node.input[index] = made
        self.readers[made] = [node]
        return made

    def add_weight(self, base: str, values: Array) -> str:
        """Add an initializer; its name begins with ``base``."""
        from onnx import numpy_helper

        name = self.free_name(base)
        graph = self.light.proto.graph
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
        self._weights[name] = graph.initializer[-1]
        return name

    def free_name(self, base: str) -> str:
        """A tensor name that nothing has."""
        number, taken = 1, {*self._weights, *self.makers, *self._shapes, *self.outputs}
        while f"{base}_{number}" in taken:
            number += 1
        return f"{base}_{number}"

    def insert_after(self, tensor: str, made: onnx.NodeProto) -> None:
        """Add a node that reads ``tensor``, behind what makes it: the graph stays sorted."""
        nodes = self.light.proto.graph.node
        maker = self.makers.get(tensor)
        place = next((i + 1 for i, n in enumerate(nodes) if n is maker or n == maker), 0) if maker is not None else 0
        nodes.insert(place, made)


def standard(node: onnx.NodeProto | None, *kinds: str) -> bool:
    """Whether a node is of the standard's domain and of one of these types."""
    return node is not None and node.op_type in kinds and not domain_of(node)


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """A node's attributes as Python values."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _names_in(graph: onnx.GraphProto) -> set[str]:
    """Everything that a subgraph reads, its own tensors included."""
    names = {v.name for v in graph.output}
    for node in graph.node:
        names.update(n for n in node.input if n)
        for _, inner in subgraphs(node):
            names |= _names_in(inner)
    return names


def _shape_of(value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in kind.shape.dim)
