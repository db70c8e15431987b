"""Nodes before an input: made one by one, then put before the model, or into a model of their own to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import OptimizationError
from deploykit.graphs import DEFAULT_DOMAINS, subgraphs
from deploykit.modelfile import rename_dimensions, signature_of
from deploykit.optimizers.select_nodes import PREPROCESS
from deploykit.specs import Array, Signature, TensorSpec

if TYPE_CHECKING:
    import onnx

# ReduceMax reads its axes from an input since then.
_AXES_OPSET = 18


class Builder:
    """Collects nodes and constants, whose names all begin with the same words, so that quantizers can tell them.

    Args:
        scope: What the names begin with, before a slash; nothing else in the model begins so.
        opset: Version of the standard's operators; 13 or newer.

    Attributes:
        nodes: Sorted, as they were added.
        weights: The constants.
    """

    def __init__(self, scope: str, opset: int) -> None:
        self.scope = scope
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._taken: set[str] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def constant(self, hint: str, value: Array) -> str:
        """Name of a constant; equal ones are stored once."""
        from onnx import numpy_helper

        array = np.asarray(value, order="C")
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._fresh(hint)
            self.weights.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def integers(self, hint: str, *values: int) -> str:
        """Name of a constant list of int64."""
        return self.constant(hint, np.array(values, np.int64))

    def integer(self, hint: str, value: int) -> str:
        """Name of a constant int64 without axes."""
        return self.constant(hint, np.array(value, np.int64))

    def number(self, hint: str, value: float) -> str:
        """Name of a constant float32 without axes."""
        return self.constant(hint, np.array(value, np.float32))

    def add(self, op: str, inputs: Sequence[str], hint: str, **attributes: Any) -> str:
        """Add a node of the standard with one output.

        Returns:
            The output's name.
        """
        from onnx import helper

        name = self._fresh(hint)
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"{name}/{op}", **attributes))
        return name

    def cast(self, name: str, dtype: str, hint: str) -> str:
        """Add a Cast."""
        from onnx import helper

        return self.add("Cast", [name], hint, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def cut(self, name: str, axis: int, start: int, end: int, hint: str) -> str:
        """Add a Slice along one axis."""
        first, last = self.integers(f"{hint}_from", start), self.integers(f"{hint}_to", end)
        return self.add("Slice", [name, first, last, self.integers(f"{hint}_axis", axis)], hint)

    def largest(self, name: str, axes: Sequence[int], hint: str) -> str:
        """Add a ReduceMax that keeps its axes."""
        if self.opset < _AXES_OPSET:
            return self.add("ReduceMax", [name], hint, axes=list(axes), keepdims=1)
        return self.add("ReduceMax", [name, self.integers(f"{hint}_axes", *axes)], hint, keepdims=1)

    def affine(self, name: str, scale: Array, shift: Array, hint: str) -> str:
        """Add the Mul and the Add of `name * scale + shift`, each only where it does something."""
        if np.any(scale != 1):
            name = self.add("Mul", [name, self.constant(f"{hint}_scale", scale.astype(np.float32))], f"{hint}_scaled")
        if np.any(shift != 0):
            name = self.add("Add", [name, self.constant(f"{hint}_shift", shift.astype(np.float32))], f"{hint}_shifted")
        return name

    def _fresh(self, hint: str) -> str:
        name, number = f"{self.scope}/{hint}", 1
        while name in self._taken:
            number += 1
            name = f"{self.scope}/{hint}_{number}"
        self._taken.add(name)
        return name


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard's operators; 0 where the model has none."""
    return max((int(o.version) for o in model.opset_import if o.domain in DEFAULT_DOMAINS), default=0)


def free_scope(model: onnx.ModelProto, name: str) -> str:
    """What names of nodes and tensors before an input begin with; new in the model."""
    graph = model.graph
    names = {n for node in graph.node for n in (node.name, *node.input, *node.output)}
    names |= {t.name for t in graph.initializer}
    scope, number = f"{PREPROCESS}{name}", 1
    while any(n.startswith(f"{scope}/") for n in names):
        number += 1
        scope = f"{PREPROCESS}{name}_{number}"
    return scope


def attach(model: onnx.ModelProto, graph: Builder, made: TensorSpec, given: TensorSpec, signature: Signature) -> None:
    """Put nodes before an input of a model, in place; all else stays as it is.

    Args:
        model: Of the builder's opset.
        graph: The nodes.
        made: The tensor that takes the input's place.
        given: The input as it will be.
        signature: The whole model's, as it will be.

    Raises:
        OptimizationError: The input is an output too.
    """
    name = given.name
    if any(value.name == name for value in model.graph.output):
        raise OptimizationError(f"input {name!r} is an output of the model as well", hint="export the model without it")
    before = signature_of(model)
    _rename(model.graph, name, made.name)
    held = [*graph.nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(held)
    model.graph.initializer.extend(graph.weights)
    next(v for v in model.graph.input if v.name == name).CopyFrom(value_of(given))
    if any(old != new for old, new in zip(before, signature, strict=True) if old.name != name):
        # Sizes of others hung on the old input's, and are known now.
        rename_dimensions(model, {spec.name: spec.shape for spec in signature if spec.shape is not None})
    model.graph.value_info.append(value_of(made))
    # From IR version 4 on, constants need not be inputs.
    model.ir_version = max(model.ir_version, 4)


def alone(graph: Builder, made: TensorSpec, given: TensorSpec, ir_version: int) -> onnx.ModelProto:
    """A model of nothing but the preprocessing.

    Args:
        graph: The nodes.
        made: Their result, the model's output.
        given: Its input.
        ir_version: Of the model that it is for.
    """
    from onnx import helper

    proto = helper.make_graph(graph.nodes, "preprocessing", [value_of(given)], [value_of(made)], graph.weights)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=ir_version)


def value_of(spec: TensorSpec) -> onnx.ValueInfoProto:
    """A spec as ONNX has it."""
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, kind, spec.shape)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let all readers of a tensor read another one, in branches and loops too."""
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
        for _, inner in subgraphs(node):
            _rename(inner, old, new)
