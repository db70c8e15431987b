"""The file that torch wrote, put in order: names, shapes, and nothing private."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import ExportError
from deploykit.modelfile import (
    external_files,
    model_bytes,
    read_model,
    rename_dimensions,
    signature_of,
    write_model,
)
from deploykit.specs import Dim, Signature, TensorSpec
from deploykit.weights import WHOLE_LIMIT_BYTES

if TYPE_CHECKING:
    import onnx


def placeholders(role: str, specs: Sequence[TensorSpec]) -> list[str]:
    """Names for the export itself: torch does not see that the wanted ones collide with its own, like "linear"."""
    return [f"deploykit.{role}.{i}" for i in range(len(specs))]


def tidy(target: Path, signature: Signature, opset: int) -> None:
    """Write the wanted names and shapes into the file, and take private metadata out.

    Raises:
        ExportError: Inputs, outputs or the opset are not those that were asked for.
    """
    # Weights that torch wrote beside a large graph stay where they are.
    large = model_bytes(target) > WHOLE_LIMIT_BYTES
    model = read_model(target, weights=not large)
    _name_values(model, signature)
    _check_made(signature_of(model), signature)
    found = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if found != opset:
        # torch.onnx only warns where it cannot convert to the opset.
        raise ExportError(
            f"torch wrote opset {found} instead of {opset}", hint="choose another --opset, or leave it out"
        )
    _restore_inputs(model, signature)
    shapes: dict[str, tuple[Dim, ...]] = {s.name: s.shape for s in signature if s.shape is not None}
    ranks = {s.name: len(s.shape or ()) for s in signature_of(model)}
    rename_dimensions(model, {n: shape for n, shape in shapes.items() if ranks.get(n) == len(shape)})
    _drop_private(model)
    kept = external_files(model)
    for leftover in target.parent.glob(glob.escape(target.name) + ".*"):
        if leftover.name not in kept:
            leftover.unlink()
    write_model(model, target)


def _name_values(model: onnx.ModelProto, signature: Signature) -> None:
    """Give inputs and outputs their names, and another one to whatever else in the graph has it."""
    wanted = {
        placeholder: spec.name
        for role, specs in (("input", signature.inputs), ("output", signature.outputs))
        for placeholder, spec in zip(placeholders(role, specs), specs, strict=True)
    }
    graphs = [model.graph]
    for graph in graphs:  # grows while it is walked
        graphs += _subgraphs(graph.node)
    used = {name for graph in graphs for node in graph.node for name in (*node.input, *node.output)}
    used |= {item.name for graph in graphs for item in (*graph.initializer, *graph.input, *graph.output)}
    renamed = dict(wanted)
    for name in wanted.values():
        number = 0
        free = name
        while free in used or free in wanted.values():
            number += 1
            free = f"{name}.{number}"
        renamed[name] = free
        used.add(free)
    for graph in graphs:
        for item in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            item.name = renamed.get(item.name, item.name)
        for node in graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]


def _check_made(made: Signature, wanted: Signature) -> None:
    inputs = {s.name: s for s in wanted.inputs}
    unknown = [s.name for s in made.inputs if s.name not in inputs]
    have, want = [s.name for s in made.outputs], [s.name for s in wanted.outputs]
    if unknown or have != want:
        raise ExportError(
            f"the exported graph has inputs {[s.name for s in made.inputs]} and outputs {have}",
            expected=f"inputs {list(inputs)} and outputs {want}",
        )
    for spec in made.inputs:
        asked = inputs[spec.name]
        if spec.dtype != asked.dtype or len(spec.shape or ()) != len(asked.shape or ()):
            raise ExportError(f"the exported graph has input {spec}", expected=str(asked))
        for axis, (size, dim) in enumerate(zip(spec.shape or (), asked.shape or (), strict=True)):
            if isinstance(size, int) and size != dim:
                raise ExportError(
                    f"the exported graph fixes axis {axis} of {spec.name!r} at {size}", expected=f"{dim!r} there"
                )


def _restore_inputs(model: onnx.ModelProto, signature: Signature) -> None:
    """Give back the inputs that no node reads (TorchScript leaves them out), and the signature's order."""
    from onnx import helper

    there = {value.name: value for value in model.graph.input}
    made = []
    for spec in signature.inputs:
        if spec.name in there:
            made.append(there.pop(spec.name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(numpy_dtype(spec.dtype))
            made.append(helper.make_tensor_value_info(spec.name, kind, spec.shape))
    made += there.values()  # initializers that older IR versions list as inputs
    del model.graph.input[:]
    model.graph.input.extend(made)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name out of `specs.DTYPES`; bfloat16 through ml_dtypes."""
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return found


def _drop_private(model: onnx.ModelProto) -> None:
    """Take metadata and documentation strings out of the model, its graphs and functions.

    torch writes stack traces with paths, the whole FX graph and the names of classes, with hashes, into them: private,
    and different in every process.
    """
    _clean(model)
    for function in model.functions:
        _clean(function, *function.value_info, *function.node)
    graphs = [model.graph, *_subgraphs(node for function in model.functions for node in function.node)]
    while graphs:
        graph = graphs.pop()
        _clean(graph, *graph.value_info, *graph.input, *graph.output, *graph.initializer, *graph.node)
        graphs += _subgraphs(graph.node)


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> list[onnx.GraphProto]:
    found: list[onnx.GraphProto] = []
    for node in nodes:
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            found += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return found


def _clean(*owners: Any) -> None:
    for owner in owners:
        del owner.metadata_props[:]
        owner.ClearField("doc_string")
