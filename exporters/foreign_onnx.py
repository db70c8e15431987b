"""Puts a graph that another converter wrote into the project's form: names, order, shapes, nothing private."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import ExportError
from deploykit.exporters.tidy import numpy_dtype, tidy
from deploykit.modelfile import write_model
from deploykit.specs import Signature, TensorSpec

if TYPE_CHECKING:
    import onnx


def finish(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str], wanted: Signature, to: Path) -> None:
    """Write ``model`` with the names, the order and the shapes of ``wanted``.

    Args:
        model: What the converter made; changed in place.
        inputs: Its name for every input of ``wanted``, in that order; None of them may be missing from the graph.
        outputs: The same for outputs; those of the graph that are not named here are dropped.
        wanted: The signature. Output shapes are those observed, because converters declare wrong ones.
        to: The file.

    Raises:
        ExportError: The graph has other inputs or outputs.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    for role, names, specs in (("input", inputs, wanted.inputs), ("output", outputs, wanted.outputs)):
        values = getattr(model.graph, role)
        there = {value.name: value for value in values}
        missing = [name for name in names if name not in there]
        if missing:
            raise ExportError(f"the converted graph has no {role} {missing[0]!r}", expected=", ".join(there))
        kept = [there[name] for name in names]
        for value, spec in zip(kept, specs, strict=True):
            _set_shape(value, spec)
        copies = [type(value).FromString(value.SerializeToString()) for value in kept]
        del values[:]
        values.extend(copies)
    _drop_unused(model)
    # Names that no converter uses, so that a wanted one is never that of another tensor meanwhile.
    renamed = {name: f"deploykit.input.{i}" for i, name in enumerate(inputs)}
    for i, name in enumerate(outputs):
        renamed.setdefault(name, f"deploykit.output.{i}")
    _rename(model.graph, renamed)
    for i, name in enumerate(outputs):
        if model.graph.output[i].name != f"deploykit.output.{i}":  # an input, or an output, once more
            _identity(model, i, renamed[name])
    write_model(model, to)
    tidy(to, wanted, opset)


def _set_shape(value: onnx.ValueInfoProto, spec: TensorSpec) -> None:
    from onnx import helper

    kind = value.type.tensor_type.elem_type
    if not kind:
        kind = helper.np_dtype_to_tensor_dtype(numpy_dtype(spec.dtype))
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, spec.shape))


def _rename(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    for item in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        item.name = renamed.get(item.name, item.name)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _rename(inner, renamed)


def _identity(model: onnx.ModelProto, number: int, source: str) -> None:
    from onnx import helper

    name = f"deploykit.output.{number}"
    model.graph.node.append(helper.make_node("Identity", [source], [name]))
    model.graph.output[number].name = name


def _drop_unused(model: onnx.ModelProto) -> None:
    """Take out nodes and constants that no output needs any more."""
    needed = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed |= _read(node)
    if len(kept) == len(model.graph.node):
        return
    nodes = [type(node).FromString(node.SerializeToString()) for node in reversed(kept)]
    weights = [w for w in model.graph.initializer if w.name in needed]
    copies = [type(w).FromString(w.SerializeToString()) for w in weights]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(copies)


def _read(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that its subgraphs take from outside included."""
    found = set(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            found |= {value.name for value in graph.output}
            for inner in graph.node:
                found |= _read(inner)
    return found
