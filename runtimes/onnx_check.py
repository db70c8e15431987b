"""An ONNX file before a runtime is shown it."""

from __future__ import annotations

from pathlib import Path

from deploykit.errors import ModelError
from deploykit.extras import available
from deploykit.modelfile import check_references, read_model
from deploykit.onnx_wire import read_wire
from deploykit.sealed import Seal

# The node that holds, or names the file of, what an execution provider has compiled.
_COMPILED = "EPContext"


def check_onnx(path: Path) -> Seal:
    """Look at a file and at everything that it refers to; the weights themselves are not read.

    Returns:
        What tells, once the runtime has opened the file, whether it opened the same.

    Raises:
        ModelError: It is no ONNX file, or refers to what it must not.
    """
    seal = Seal()
    try:
        seal.add([path])
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty", expected="an .onnx file")
    if available("onnx"):
        read_model(path, weights=False)
    # A serving image holds the runtime without onnx. Where both are there, both have to find nothing.
    wire = read_wire(path)
    check_references(wire.external, path)
    seal.add(path.parent / entries["location"] for _, entries in wire.external)
    if _COMPILED in wire.operators:
        raise ModelError(
            f"{path} holds {_COMPILED}: a model that a provider compiled, which nobody can look into",
            expected="a graph of operators",
        )
    return seal
