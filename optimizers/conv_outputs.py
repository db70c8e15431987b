"""Quantizers behind convolutions that have none: ONNX Runtime runs a convolution in integers only between two.

NNCF puts quantizers where they are read: before an operator that it leaves in float, such as a normalization behind a
Relu, there is none.
"""

from __future__ import annotations

import numpy as np

from deploykit.optimizers.editor import is_op
from deploykit.optimizers.ranges import Ranges
from deploykit.optimizers.repair_pairs import QUANTIZE, PairEditor, Params

_CODES = 255


def bare_outputs(graph: PairEditor) -> list[str]:
    """Tensors that quantized convolutions make, behind their Relu or Clip, and that nobody quantizes."""
    found = []
    for node in graph.nodes:
        if not is_op(node, "Conv") or graph.weight(node.input[1]) is None or graph.pair_before(node.input[0]) is None:
            continue
        name = node.output[0]
        reader = graph.reader(name)
        if reader is not None and is_op(reader, "Relu", "Clip"):
            name = reader.output[0]
        readers = graph.readers(name)
        if readers and not graph.kept(name) and not any(is_op(r, QUANTIZE) for r in readers):
            found.append(name)
    return found


def quantize_outputs(graph: PairEditor, names: list[str], ranges: Ranges) -> int:
    """Put a uint8 pair behind tensors, in place, for all of their readers.

    Args:
        graph: What holds them.
        names: What `bare_outputs` found.
        ranges: Of these tensors; one without a range, or of one number, stays in float.

    Returns:
        How many have one.
    """
    count = 0
    for name in names:
        low, high = ranges.low.get(name, 0.0), ranges.high.get(name, 0.0)
        scale = np.asarray((high - low) / _CODES, np.float32)
        if not np.isfinite(scale) or scale < np.finfo(np.float32).tiny:
            continue
        zero = np.asarray(np.clip(np.rint(-low / scale), 0, _CODES), np.uint8)
        readers = graph.readers(name)
        copy = graph.add_pair(name, Params(scale, zero, 0))
        for reader in readers:
            for index, given in enumerate(reader.input):
                if given == name:
                    graph.set_input(reader, index, copy)
        count += 1
    return count
