"""Preprocessing in the graph: what a client would compute before it calls a model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.extras import version_of
from deploykit.modelfile import read_model, signature_of
from deploykit.optimizers.base import StepResult
from deploykit.optimizers.prepare import raise_opset
from deploykit.optimizers.preprocess_audio import AudioPlan, plan_audio
from deploykit.optimizers.preprocess_config import ImageConfig, PreprocessConfig
from deploykit.optimizers.preprocess_graph import Builder, alone, attach, free_scope, opset_of
from deploykit.optimizers.preprocess_image import ImagePlan, plan_image
from deploykit.specs import Dim, Signature, TensorSpec, terms
from deploykit.weights import LightModel, open_light, write_light

if TYPE_CHECKING:
    import onnx

Plan = ImagePlan | AudioPlan
# Unsqueeze and ReduceSum read their axes from inputs since then.
_MIN_OPSET = 13
# For a model without operators of the standard.
_OPSET = 17


def plan_preprocessing(signature: Signature, config: PreprocessConfig) -> Plan:
    """Find out what has to go before which input.

    Args:
        signature: The model's.
        config: Its type selects the way.

    Raises:
        OptimizationError: No input can take it, or the config contradicts the model or itself.
    """
    return plan_image(signature, config) if isinstance(config, ImageConfig) else plan_audio(signature, config)


def with_preprocessing(signature: Signature, plan: Plan) -> Signature:
    """The signature of the model behind preprocessing: the new input, and sizes that hung on the old one."""
    old = next(spec for spec in signature.inputs if spec.name == plan.given.name)
    pairs = zip(old.shape or (), plan.wanted.shape or (), strict=True)
    known = {o: n for o, n in pairs if isinstance(o, str) and isinstance(n, int)}
    inputs = (plan.given if s.name == plan.given.name else _with_sizes(s, known) for s in signature.inputs)
    return Signature(tuple(inputs), tuple(_with_sizes(s, known) for s in signature.outputs))


def _with_sizes(spec: TensorSpec, known: Mapping[str, int]) -> TensorSpec:
    if spec.shape is None or not known:
        return spec
    return replace(spec, shape=tuple(_with_size(dim, known) for dim in spec.shape))


def _with_size(dim: Dim, known: Mapping[str, int]) -> Dim:
    parts = [known.get(part, part) if isinstance(part, str) else part for part in terms(dim)]
    numbers = [part for part in parts if isinstance(part, int)]
    if len(numbers) == len(parts):
        return sum(numbers)
    return dim if parts == list(terms(dim)) else " + ".join(map(str, parts))


def add_preprocessing(model: Path, plan: Plan, target: Path) -> StepResult:
    """Put the preprocessing before a model.

    Args:
        model: The ONNX file to start from; left as it is.
        plan: Made for its signature.
        target: Where the result goes.

    Raises:
        OptimizationError: It cannot be put there.
    """
    with tempfile.TemporaryDirectory(prefix=".preprocess-", dir=target.parent) as scratch:
        light = open_light(model, Path(scratch))
        proto, notes = _raised(light.proto)
        graph = Builder(free_scope(proto, plan.given.name), opset_of(proto))
        made = replace(plan.wanted, name=plan.build(graph))
        attach(proto, graph, made, plan.given, with_preprocessing(signature_of(proto), plan))
        write_light(LightModel(proto, light.folder), target)
    params = plan.params | {"nodes": len(graph.nodes)}
    return StepResult(True, (*notes, *plan.notes), params, {"onnx": version_of("onnx") or "unknown"})


def write_alone(model: Path, plan: Plan, target: Path) -> str:
    """Write a model of the preprocessing alone, with the very nodes that `add_preprocessing` puts before a model.

    Args:
        model: The ONNX file that it is for.
        plan: Made for its signature.
        target: Where it goes.

    Returns:
        The name of its output.
    """
    import onnx

    proto = read_model(model, weights=False)
    graph = Builder(free_scope(proto, plan.given.name), max(opset_of(proto) or _OPSET, _MIN_OPSET))
    made = replace(plan.wanted, name=plan.build(graph))
    onnx.save(alone(graph, made, plan.given, max(proto.ir_version, 7)), str(target))
    return made.name


def _raised(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The model in an opset that has the operators."""
    if not opset_of(proto):
        entry = proto.opset_import.add()
        entry.domain, entry.version = "", _OPSET
    return raise_opset(proto, _MIN_OPSET, "the operators that prepare the input")
