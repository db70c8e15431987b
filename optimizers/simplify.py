"""Graph simplification by onnxsim, by onnxslim as second opinion, in child processes that may crash or hang."""

from __future__ import annotations

import filecmp
import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from deploykit.errors import ModelError, OptimizationError
from deploykit.extras import version_of
from deploykit.modelfile import copy_model, model_bytes, read_model, tensor_bytes
from deploykit.nodes import all_nodes
from deploykit.optimizers.base import Check, StepResult
from deploykit.optimizers.simplifier_process import FOLD_LIMIT_BYTES, SimplifierProcess
from deploykit.weights import LightModel, open_light, put_back, set_aside, write_light

if TYPE_CHECKING:
    import onnx

_TOOLS = ("onnxsim", "onnxslim")
# Folded constants may take the place of several small ones; beyond this, folding is a loss of space.
_GROWTH, _GROWTH_BYTES = 1.1, 32 * 2**20
_Port = tuple[str, str, int | None]


@dataclass(frozen=True, slots=True)
class SimplifyConfig:
    """How to simplify.

    Attributes:
        timeout_s: Seconds that one simplifier may take.
    """

    timeout_s: float = 300.0


def simplify(
    model: Path, config: SimplifyConfig, target: Path, check: Check, process: SimplifierProcess | None = None
) -> StepResult:
    """Simplify with the first tool whose result is acceptable; else the model stays as it is.

    Large weights of a large model are set aside meanwhile: simplifiers hold several copies of a model.

    Args:
        model: The ONNX file.
        config: Time limit.
        target: Where the result goes.
        check: Says why a candidate is not acceptable (does not load, or differs from ``model``).
        process: Where to run the tools; by default a process of their own.
    """
    if not (math.isfinite(config.timeout_s) and config.timeout_s > 0):
        raise OptimizationError(f"a time limit of {config.timeout_s} s", expected="a positive number")
    before = _count(model)
    notes: list[str] = []
    with ExitStack() as stack:
        # Beside the result: what is accepted is moved there, whatever its size.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix=".simplify-", dir=target.parent)))
        worker = process or stack.enter_context(SimplifierProcess())
        given, light, aside = set_large_aside(model, folder)
        limit = max(FOLD_LIMIT_BYTES, _largest(model))
        for tool in _TOOLS:
            candidate = folder / tool / target.name
            candidate.parent.mkdir()
            why = (
                worker.run(tool, given, candidate, config.timeout_s, fold_limit_bytes=limit)
                or put_large_back(candidate, light, aside)
                or _grown(candidate, before, model_bytes(model))
                or changed_interface(model, candidate)
                or check(candidate)
            )
            if why:
                notes.append(f"{tool} was not used: {why}")
                shutil.rmtree(candidate.parent)
                continue
            params = {"tool": tool, "nodes_before": before, "nodes_after": _count(candidate)}
            if aside:
                params["weights_set_aside"] = len(aside)
            move_candidate(candidate, target)
            return StepResult(
                changed=not filecmp.cmp(target, model, shallow=False),
                notes=tuple(notes),
                params=params | {"bytes_after": model_bytes(target)},
                tools={tool: version_of(tool) or "unknown"},
            )
    copy_model(model, target)
    notes.append("no simplifier gave an acceptable result; the graph is left as it was")
    return StepResult(False, tuple(notes), {"tool": "none", "nodes_before": before, "nodes_after": before})


def set_large_aside(model: Path, folder: Path) -> tuple[Path, LightModel | None, list[onnx.TensorProto]]:
    """The file that the tools are given, and the weights that are not in it."""
    import onnx

    scratch = folder / "weights"
    scratch.mkdir()
    light = open_light(model, scratch)
    if light.whole:
        return model, None, []
    aside = set_aside(light.proto)
    given = folder / "light.onnx"
    onnx.save(light.proto, str(given))
    return given, light, aside


def put_large_back(candidate: Path, light: LightModel | None, aside: list[onnx.TensorProto]) -> str | None:
    """Give a candidate its large weights back; says why it cannot be done."""
    if light is None:
        return None
    try:
        proto = read_model(candidate)
    except ModelError as exc:
        return f"it wrote no usable file ({exc})"
    for file in candidate.parent.iterdir():
        file.unlink()
    put_back(proto, aside)
    write_light(LightModel(proto, light.folder), candidate)
    return None


def move_candidate(candidate: Path, target: Path) -> None:
    """Move an accepted file, with its external data, to where the result goes."""
    for file in candidate.parent.iterdir():
        file.replace(target.parent / file.name)


def changed_interface(model: Path, candidate: Path) -> str | None:
    """How a candidate's inputs or outputs differ from the model's: another name, order, type or rank."""
    want, have = (_interface(read_model(path, weights=False)) for path in (model, candidate))
    for old, new in zip(want, have, strict=True):
        if [name for name, _, _ in old] != [name for name, _, _ in new]:
            return f"it changed {', '.join(n for n, _, _ in old)} to {', '.join(n for n, _, _ in new) or 'nothing'}"
        for (name, kind, rank), (_, other_kind, other_rank) in zip(old, new, strict=True):
            if kind != other_kind or (None not in (rank, other_rank) and rank != other_rank):
                return f"it changed the type or rank of {name!r}"
    return None


def _interface(model: onnx.ModelProto) -> tuple[list[_Port], list[_Port]]:
    """Name, type without shape, and rank (None where open) of inputs and outputs, whatever their types are."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [_port(value) for value in model.graph.input if value.name not in weights]
    return inputs, [_port(value) for value in model.graph.output]


def _port(value: onnx.ValueInfoProto) -> _Port:
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type":
        return value.name, str(value.type.WhichOneof("value")), None
    return value.name, f"tensor {tensor.elem_type}", len(tensor.shape.dim) if tensor.HasField("shape") else None


def _grown(candidate: Path, nodes: int, size: int) -> str | None:
    """Why the candidate is no simplification: it is no model, or larger than the model was."""
    try:
        after = _count(candidate)
    except ModelError as exc:
        return f"it wrote no usable file ({exc})"
    if after > nodes:
        return f"it made the graph larger: {after} nodes instead of {nodes}"
    if model_bytes(candidate) > _GROWTH * size + _GROWTH_BYTES:
        return f"it made the file larger: {model_bytes(candidate) / 1e6:.1f} MB instead of {size / 1e6:.1f}"
    return None


def _largest(model: Path) -> int:
    """Bytes of the largest weight: the transpose of a weight may be folded, a table made of two numbers may not."""
    return max((tensor_bytes(t) for t in read_model(model, weights=False).graph.initializer), default=0)


def _count(model: Path) -> int:
    """Nodes of a model. Those of subgraphs count: an If that is replaced by its branch makes the graph smaller."""
    return sum(1 for _ in all_nodes(read_model(model, weights=False)))
