"""Embedding tables in 8 bits, with a scale for each row.

A table that is read by Gather holds most of a small text model, and its rows differ much in size: one scale for all of
them costs more than the products do. The values and their scales are gathered apart and multiplied, which any runtime
does in its plain operators.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

import numpy as np

from deploykit.optimizers.editing import Editor, attributes, standard
from deploykit.specs import Array
from deploykit.weights import LightModel

if TYPE_CHECKING:
    import onnx

# Smaller tables gain nothing that anybody would notice.
_SMALLEST_ELEMENTS = 1 << 14
_PIECE_ROWS = 1 << 14


def quantize_embeddings(light: LightModel, excluded: Set[str] = frozenset()) -> list[str]:
    """Round the tables of Gather nodes to int8, in place.

    Taken are float32 tables `[rows, columns]` read along their rows by Gather nodes only. What leaves the node is as
    before, in float32.

    Args:
        light: The graph; constants are initializers.
        excluded: Names and operator types of nodes that stay as they are.

    Returns:
        Names of the nodes.
    """
    editor = Editor(light)
    tables: dict[str, list[onnx.NodeProto]] = {}
    for node in light.proto.graph.node:
        if _reads_rows(editor, node) and not {node.name, node.op_type} & excluded:
            tables.setdefault(node.input[0], []).append(node)
    done = []
    for name, nodes in tables.items():
        if name in editor.outputs or len(nodes) != len(editor.readers[name]):
            continue  # in float for somebody else: the file would grow
        values, scales = round_rows(editor.read(name))
        if values is not None:
            _replace(light, editor, name, values, scales, nodes)
            done += [n.name for n in nodes]
    return done


def _reads_rows(editor: Editor, node: onnx.NodeProto) -> bool:
    if not standard(node, "Gather") or attributes(node).get("axis", 0) != 0 or not editor.is_weight(node.input[0]):
        return False
    dims = editor.dims(node.input[0])
    return len(dims) == 2 and dims[0] * dims[1] >= _SMALLEST_ELEMENTS and not editor.is_constant(node.input[1])


def round_rows(table: Array) -> tuple[Array | None, Array]:
    """int8 values `[rows, columns]` and float32 scales `[rows, 1]`; no values where some are not finite."""
    values, scales = np.empty(table.shape, np.int8), np.ones((len(table), 1), np.float32)
    for start in range(0, len(table), _PIECE_ROWS):
        rows = np.asarray(table[start : start + _PIECE_ROWS], np.float32)
        height = np.abs(rows).max(axis=1, keepdims=True)
        if not np.isfinite(height).all():
            return None, scales
        scale = np.where(height > np.finfo(np.float32).tiny * 127, height / 127, 1).astype(np.float32)
        values[start : start + _PIECE_ROWS] = np.clip(np.rint(rows / scale), -127, 127)
        scales[start : start + _PIECE_ROWS] = scale
    return values, scales


def _replace(
    light: LightModel, editor: Editor, name: str, values: Array, scales: Array, nodes: list[onnx.NodeProto]
) -> None:
    """Store the rounded table instead of the other, and let the nodes read it."""
    import onnx
    from onnx import helper, numpy_helper

    graph = light.proto.graph
    codes = numpy_helper.from_array(values, editor.free_name(f"{name}_quantized"))
    sizes = numpy_helper.from_array(scales, editor.free_name(f"{name}_scales"))
    for place, tensor in enumerate(graph.initializer):
        if tensor.name == name:
            del graph.initializer[place]
            break
    for place, value in enumerate(graph.input):  # before IR version 4, weights are listed as inputs
        if value.name == name:
            del graph.input[place]
            break
    graph.initializer.extend([codes, sizes])
    for node in nodes:
        made = str(node.output[0])
        parts = [editor.free_name(f"{made}_{part}") for part in ("codes", "sizes", "values")]
        fresh = [
            helper.make_node("Gather", [codes.name, node.input[1]], [parts[0]], f"{node.name}_codes", axis=0),
            helper.make_node("Gather", [sizes.name, node.input[1]], [parts[1]], f"{node.name}_sizes", axis=0),
            helper.make_node("Cast", [parts[0]], [parts[2]], f"{node.name}_values", to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [parts[2], parts[1]], [made], node.name),
        ]
        place = next(i for i, n in enumerate(graph.node) if n.name == node.name)
        del graph.node[place]
        for offset, other in enumerate(fresh):
            graph.node.insert(place + offset, other)
    editor.refresh()
