"""What a model file or an artifact is, without running it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact
from deploykit.modelfile import check_model, model_bytes, read_model, signature_of


def describe(path: str | Path) -> dict[str, Any]:
    """Signature, opsets, operators, parameters and size; lineage and evidence of an artifact. JSON-ready.

    Raises:
        ModelError: Missing or corrupt.
        ArtifactError: Changed since it was written.
    """
    given = Path(path)
    artifact = Artifact.open(given) if given.is_dir() else None
    file = artifact.model_path if artifact else given
    model = read_model(file, weights=False)
    check_model(model, file)
    signature = signature_of(model)
    found: dict[str, Any] = {
        "model": str(file),
        "bytes": model_bytes(file),
        "ir_version": int(model.ir_version),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {o.domain: int(o.version) for o in model.opset_import},
        "inputs": [str(s) for s in signature.inputs],
        "outputs": [str(s) for s in signature.outputs],
        "parameters": sum(math.prod(w.dims) for w in model.graph.initializer),
        "nodes": len(model.graph.node),
        "node_names": [n.name for n in model.graph.node],
        "ops": dict(Counter(n.op_type for n in model.graph.node).most_common()),
    }
    if artifact:
        manifest = json.loads(artifact.manifest.model_dump_json())
        found |= {"sha256": artifact.digest, "lineage": manifest["lineage"], "evidence": manifest["evidence"]}
    return found
