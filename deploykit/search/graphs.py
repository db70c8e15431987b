"""What a variant's graph is, in a few numbers: enough to see that two ways led to the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from deploykit.artifact import Artifact
from deploykit.modelfile import read_model

_SHOWN = 8


def facts_of(artifact: Artifact) -> dict[str, Any]:
    """Size, operators and shape of the graph.

    Returns:
        "size_bytes", "nodes", "ops" (the commonest), "quantized" (whether integers take part), and "likeness": equal
        for graphs with the same operators, attributes, wiring and sizes of weights, whatever they are named.
    """
    size = artifact.size_bytes
    if artifact.model_path.suffix != ".onnx":
        return {"size_bytes": size, "nodes": None, "ops": {}, "quantized": False, "likeness": artifact.digest}
    model = read_model(artifact.model_path, weights=False)
    ops = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph.node)
    known: dict[str, str] = {}
    for tensor in model.graph.initializer:
        known[tensor.name] = _digest("weight", str(tensor.data_type), *map(str, tensor.dims))
    for number, value in enumerate(model.graph.input):
        known.setdefault(value.name, _digest("input", str(number)))
    for node in model.graph.node:
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        key = hashlib.sha256(b"".join(attributes)).hexdigest()
        origin = [known.get(name, "") for name in node.input]
        for number, name in enumerate(node.output):
            known[name] = _digest(node.domain, node.op_type, key, *origin, str(number))
    return {
        "size_bytes": size,
        "nodes": len(model.graph.node),
        "ops": dict(ops.most_common(_SHOWN)),
        "quantized": any("Quantize" in op or "Integer" in op or "QLinear" in op or "NBits" in op for op in ops),
        "likeness": _digest(*(known.get(output.name, "") for output in model.graph.output)),
    }


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
