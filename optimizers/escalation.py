"""What to try next while an accuracy target is not met: configurations of static quantization, from cheap to costly.

The order is the one that NNCF and AIMET found: better ranges, then SmoothQuant (transformers) or equalization
(convolutions), then bias correction, then AdaRound. Each keeps what the ones before it turned on, since they act on
different errors; what a model has nothing for is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.graphs import domain_of, walk
from deploykit.modelfile import read_model
from deploykit.optimizers.quantize_config import BIAS_CORRECTIONS, StaticConfig

if TYPE_CHECKING:
    import onnx

_NORMS = ("LayerNormalization", "SkipLayerNormalization", "RMSNormalization", "GroupQueryAttention")


@dataclass(frozen=True, slots=True)
class ModelKind:
    """What a model has that accuracy algorithms act on.

    Attributes:
        products: MatMul or Gemm nodes.
        convolutions: Conv nodes.
        depthwise: Those with a group for each channel.
        transformer: Whether it normalizes layers or attends.
    """

    products: int
    convolutions: int
    depthwise: int
    transformer: bool


def model_kind(model: onnx.ModelProto) -> ModelKind:
    """Count what matters; weights are not looked at."""
    products = convolutions = depthwise = 0
    transformer = False
    for located in walk(model):
        node = located.node
        if node.op_type in _NORMS or node.op_type == "Softmax" and _feeds_product(model, node):
            transformer = True
        if domain_of(node):
            continue
        products += node.op_type in ("MatMul", "Gemm")
        if node.op_type == "Conv":
            convolutions += 1
            depthwise += any(a.name == "group" and a.i > 1 for a in node.attribute)
    return ModelKind(products, convolutions, depthwise, transformer)


def escalation(model_path: str | Path, config: StaticConfig) -> Iterator[StaticConfig]:
    """Configurations to try in turn until an accuracy target is met.

    Args:
        model_path: The floating-point `.onnx` file.
        config: What the user asked for; it comes first, and nothing that it turns on is turned off again.

    Yields:
        Different configurations, each with one more means than the one before it.

    Raises:
        ModelError: The file cannot be read.
    """
    kind = model_kind(read_model(Path(model_path), weights=False))
    yield config
    if config.engine == "nncf":  # it runs its own means by itself
        return
    for change in _changes(kind, config):
        made = replace(config, **change)  # type: ignore[arg-type]
        if made != config:
            config = made
            yield config


def settled(config: StaticConfig, kind: ModelKind) -> StaticConfig:
    """What "auto" stands for with a model of this kind.

    Fast bias correction of MiniLM raises the cosine of its embeddings from 0.9971 to 0.9977 and from 0.9982 to 0.9984
    on two sets of sentences, and costs nothing in inference. What it makes hangs on the data, as SmoothQuant does.
    """
    if config.bias_correction != "auto":
        return config
    alone = not config.merge and config.save_calibration is None
    return replace(config, bias_correction="fast" if kind.transformer and alone else "off")


def _changes(kind: ModelKind, config: StaticConfig) -> Iterator[dict[str, object]]:
    """Fields to set, in order; each beside all earlier ones."""
    if config.calibration == "minmax":
        yield {"calibration": "auto"}
    smooth: dict[str, object] = {"smooth": "auto"} if config.smooth == "off" and kind.products else {}
    equalize: dict[str, object] = {"equalize": True} if kind.convolutions > 1 else {}
    # The one that acts on most of the model comes first.
    yield from (smooth, equalize) if kind.transformer or not kind.convolutions else (equalize, smooth)
    for step in BIAS_CORRECTIONS[1:]:
        if BIAS_CORRECTIONS.index(step) > BIAS_CORRECTIONS.index(settled(config, kind).bias_correction):
            yield {"bias_correction": step}
    yield {"rounding": "adaround"}


def _feeds_product(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether probabilities are multiplied with something, as in attention; a classifier's are not."""
    made = set(node.output)
    for _ in range(3):  # a guard against NaN, a Cast or a Dropout may stand between
        readers = [n for n in model.graph.node if made & set(n.input)]
        if any(n.op_type == "MatMul" for n in readers):
            return True
        made = {o for n in readers if n.op_type in ("Where", "Cast", "Dropout", "Identity", "IsNaN") for o in n.output}
    return False
