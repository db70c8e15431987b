"""Graph fusions of other projects, in the child process of the simplifiers: fewer nodes that do the same.

- "onnxscript": the optimizer of onnxscript and its default rewrite rules. Only operators of the standard come out.
- "transformers": attention in one node (`fuse_attention`), then the fusions of `onnxruntime.transformers`
  (SkipLayerNormalization, BiasGelu, EmbedLayerNormalization, ...). These are ONNX Runtime's own (`com.microsoft`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from deploykit.errors import ModelError, OptimizationError
from deploykit.extras import available, require, version_of
from deploykit.graphs import domain_of
from deploykit.modelfile import copy_model, model_bytes, read_model
from deploykit.nodes import all_nodes
from deploykit.optimizers.base import Check, StepResult
from deploykit.optimizers.fuse_attention import fuse_attention
from deploykit.optimizers.simplifier_process import SimplifierProcess
from deploykit.optimizers.simplify import changed_interface, move_candidate, put_large_back
from deploykit.weights import LightModel, open_light, set_aside

if TYPE_CHECKING:
    import onnx

PASSES = ("onnxscript", "transformers")
_CONTRIB = "com.microsoft"
# Who brings it, and the extra of ours that installs it.
_PACKAGES = {"onnxscript": ("onnxscript", "torch"), "transformers": ("onnxruntime", "ort")}
_FLOAT = 1


@dataclass(frozen=True, slots=True)
class FuseConfig:
    """What to fuse.

    Attributes:
        passes: "onnxscript" or "transformers".
        timeout_s: Seconds that one tool may take.
        attention: Whether "transformers" joins attention that its own tool does not know.
    """

    passes: str = "onnxscript"
    timeout_s: float = 300.0
    attention: bool = True


@dataclass(slots=True)
class _Given:
    """What a tool is given.

    Attributes:
        path: The file.
        light: The whole model, where large weights are not in the file.
        aside: Those weights.
        blocks: How many blocks of attention were joined in it.
    """

    path: Path
    light: LightModel | None = None
    aside: list[onnx.TensorProto] = field(default_factory=list)
    blocks: int = 0


def fuse(
    model: Path, config: FuseConfig, target: Path, check: Check, process: SimplifierProcess | None = None
) -> StepResult:
    """Fuse nodes; the model stays as it is where no result has fewer of them, the same interface and outputs.

    Large weights of a large model are set aside meanwhile.

    Args:
        model: The ONNX file.
        config: Which fusions.
        target: Where the result goes.
        check: Says why a candidate is not acceptable (does not load, or differs from ``model``).
        process: Where to run the tools; by default a process of their own.

    Raises:
        OptimizationError: No such passes, or no time.
        MissingDependencyError: The package with the passes is not installed.
    """
    if config.passes not in PASSES:
        raise OptimizationError(f"unknown passes {config.passes!r}", expected=" or ".join(PASSES))
    if not (math.isfinite(config.timeout_s) and config.timeout_s > 0):
        raise OptimizationError(f"a time limit of {config.timeout_s} s", expected="a positive number")
    package, extra = _PACKAGES[config.passes]
    if not available(package):
        require(package, extra=extra)
    before, notes = _count(model), list[str]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix=".fuse-", dir=target.parent)))
        worker = process or stack.enter_context(SimplifierProcess())
        light = open_light(model, _made(folder / "weights"))
        tools = ("onnxscript",) if config.passes == "onnxscript" else _model_types(light.proto)
        number = 0
        for given in _given(light, model, config, folder):
            for tool in tools:
                number += 1
                candidate = _made(folder / str(number)) / target.name
                why = (
                    worker.run(tool, given.path, candidate, config.timeout_s)
                    or put_large_back(candidate, given.light, given.aside)
                    or _refused(model, candidate, before, config.passes)
                    or changed_interface(model, candidate)
                    or check(candidate)
                )
                if why:
                    joined = " after attention was joined" if given.blocks else ""
                    notes.append(f"{tool} was not used{joined}: {why}")
                    shutil.rmtree(candidate.parent)
                    continue
                params = {"passes": config.passes, "tool": tool, "nodes_before": before}
                params |= {"nodes_after": _count(candidate), "fused": _fused(candidate), "blocks": given.blocks}
                if given.aside:
                    params["weights_set_aside"] = len(given.aside)
                move_candidate(candidate, target)
                params["bytes_after"] = model_bytes(target)
                return StepResult(True, tuple(notes), params, {package: version_of(package) or "unknown"})
    copy_model(model, target)
    notes.append("nothing was fused; the graph is left as it was")
    params = {"passes": config.passes, "tool": "none", "nodes_before": before, "nodes_after": before}
    return StepResult(False, tuple(notes), params)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _given(light: LightModel, model: Path, config: FuseConfig, folder: Path) -> Iterator[_Given]:
    """What to start from: the graph with its attention joined, where there is any, then the graph as it is."""
    if config.passes == "transformers" and config.attention:
        joined, blocks = fuse_attention(light.proto)
        if blocks:
            yield _written(LightModel(joined, light.folder), folder / "joined.onnx", blocks)
    yield _Given(model) if light.whole else _written(light, folder / "light.onnx", 0)


def _written(light: LightModel, path: Path, blocks: int) -> _Given:
    import onnx

    if light.whole:
        onnx.save(light.proto, str(path))
        return _Given(path, blocks=blocks)
    aside = set_aside(light.proto)
    onnx.save(light.proto, str(path))
    return _Given(path, light, aside, blocks)


def _model_types(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names that `onnxruntime.transformers` has for this kind of model, in the order in which to try them.

    Most of its names select one class, BertOnnxModel; they differ in the mask that is expected.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.type.tensor_type for value in model.graph.input if value.name not in weights]
    ops = {node.op_type for node in model.graph.node}
    if "Conv" in ops and any(len(kind.shape.dim) == 4 and kind.elem_type == _FLOAT for kind in inputs):
        return ("transformers:vit",)
    if "Softmax" in ops and ("Split" in ops or "Trilu" in ops):  # queries, keys and values in one product; causal
        return ("transformers:gpt2", "transformers:bert")
    return ("transformers:bert",)


def _refused(model: Path, candidate: Path, before: int, passes: str) -> str | None:
    """Why a candidate is not what was asked for."""
    try:
        made = read_model(candidate, weights=False)
    except ModelError as exc:
        return f"it wrote no usable file ({exc})"
    after = _count(candidate)
    if after >= before:
        return f"it found nothing to fuse: {after} nodes, {before} before"
    if passes == "onnxscript":
        new = {domain_of(n) for n in all_nodes(made)} - {
            domain_of(n) for n in all_nodes(read_model(model, weights=False))
        }
        if new - {""}:
            return f"it brought in operators of {', '.join(sorted(new - {''}))}"
    return None


def _fused(path: Path) -> dict[str, int]:
    """ONNX Runtime's own operators in a model, and how many of each."""
    found: dict[str, Any] = {}
    for node in all_nodes(read_model(path, weights=False)):
        if node.domain == _CONTRIB:
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return dict(sorted(found.items()))


def _count(model: Path) -> int:
    """Nodes that compute something: that a constant has become an initializer makes nothing faster."""
    return sum(n.op_type != "Constant" for n in all_nodes(read_model(model, weights=False)))
