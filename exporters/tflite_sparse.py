"""Sparse weights of TFLite files, made dense: tf2onnx reads the stored values as if they were all there are.

The format is that of the schema (`SparsityParameters`), after "Format Abstraction for Sparse Tensor Algebra
Compilers" (https://arxiv.org/abs/1804.10112): a tree with one level a dimension, ordered by `traversalOrder`, where
blocks are further dimensions behind the tensor's own. A dense level has all its places; a sparse one names, for every
node above it, a segment of the places that are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.extras import require

if TYPE_CHECKING:
    from deploykit.specs import Array

_DENSIFY = 124
# TensorType of the schema; weights of other types are not stored sparse.
_DTYPES = {0: np.float32, 1: np.float16, 2: np.int32, 3: np.uint8, 7: np.int16, 9: np.int8}


def write_dense(path: Path, to: Path) -> Path:
    """Write the file with all its tensors dense, and without the operators that would make them so.

    Args:
        path: A `.tflite` file.
        to: Where it is written if it has sparse tensors.

    Returns:
        ``to``, or ``path`` where nothing is sparse.

    Raises:
        ValueError, IndexError, KeyError: The tree of a sparse tensor contradicts itself.
    """
    schema = require("ai_edge_litert.schema_py_generated", extra="tflite")
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    sparse = [tensor for graph in model.subgraphs for tensor in graph.tensors if tensor.sparsity is not None]
    if not sparse:
        return path
    for tensor in sparse:
        stored = np.asarray(model.buffers[tensor.buffer].data, np.uint8).view(_DTYPES[int(tensor.type)])
        dense = densify(stored, [int(n) for n in tensor.shape], tensor.sparsity)
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(dense.tobytes(), np.uint8)
        tensor.buffer, tensor.sparsity = len(model.buffers), None
        model.buffers.append(buffer)
    codes = model.operatorCodes
    for graph in model.subgraphs:
        _bypass(graph, [max(code.builtinCode, code.deprecatedBuiltinCode) == _DENSIFY for code in codes])
    builder = require("flatbuffers", extra="tflite").Builder(path.stat().st_size)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    to.write_bytes(builder.Output())
    return to


def densify(values: Array, shape: list[int], sparsity: Any) -> Array:
    """A dense array out of the values that are stored.

    Args:
        values: The stored values, one axis.
        shape: Of the result.
        sparsity: A `SparsityParametersT` of the schema.
    """
    rank = len(shape)
    order = [int(d) for d in sparsity.traversalOrder]
    blocked = [int(d) for d in sparsity.blockMap] if sparsity.blockMap is not None else []
    sizes = {dim: int(level.denseSize) for dim, level in zip(order, sparsity.dimMetadata, strict=True)}
    nodes = np.zeros(1, np.int64)
    places = {dim: np.zeros(1, np.int64) for dim in order}
    for dim, level in zip(order, sparsity.dimMetadata, strict=True):
        if level.format:  # sparse, in compressed rows
            segments = np.asarray(level.arraySegments.values, np.int64)
            counts = segments[nodes + 1] - segments[nodes]
            starts = np.cumsum(counts) - counts
            parent = np.repeat(np.arange(len(nodes)), counts)
            nodes = np.arange(int(counts.sum())) - starts[parent] + segments[nodes][parent]
            here = np.asarray(level.arrayIndices.values, np.int64)[nodes]
        else:
            parent = np.repeat(np.arange(len(nodes)), sizes[dim])
            here = np.tile(np.arange(sizes[dim]), len(nodes))
            nodes = nodes[parent] * sizes[dim] + here
        places = {d: at[parent] for d, at in places.items()} | {dim: here}
    where = []
    for dim in range(rank):
        at = places[dim]
        for number, own in enumerate(blocked):
            if own == dim:
                at = at * sizes[rank + number] + places[rank + number]
        where.append(at)
    dense = np.zeros(shape, values.dtype)
    dense[tuple(where)] = values[nodes]
    return dense


def _bypass(graph: Any, dropped: list[bool]) -> None:
    """Take operators of these codes out of a graph; what reads their output reads their input."""
    instead = {int(op.outputs[0]): int(op.inputs[0]) for op in graph.operators if dropped[op.opcodeIndex]}
    graph.operators = [op for op in graph.operators if not dropped[op.opcodeIndex]]
    graph.outputs = [instead.get(int(i), int(i)) for i in graph.outputs]
    for op in graph.operators:
        if op.inputs is not None:
            op.inputs = [instead.get(int(i), int(i)) for i in op.inputs]
