"""The one verb of the optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploykit.data import Dataset
from deploykit.errors import OptimizationError
from deploykit.optimizers.base import Check, Opener, StepResult
from deploykit.optimizers.fuse import FuseConfig, fuse
from deploykit.optimizers.quantize_config import (
    DynamicConfig,
    HalfConfig,
    StaticConfig,
    WeightsConfig,
    check_engine,
)
from deploykit.optimizers.quantize_dynamic import quantize_dynamic
from deploykit.optimizers.quantize_half import quantize_half
from deploykit.optimizers.quantize_nncf import quantize_nncf
from deploykit.optimizers.quantize_static import quantize_static
from deploykit.optimizers.quantize_weights import quantize_weights
from deploykit.optimizers.repair import RepairConfig, repair
from deploykit.optimizers.simplifier_process import SimplifierProcess
from deploykit.optimizers.simplify import SimplifyConfig, simplify
from deploykit.progress import Progress
from deploykit.specs import Feeds

StepConfig = SimplifyConfig | FuseConfig | DynamicConfig | StaticConfig | WeightsConfig | HalfConfig | RepairConfig


def optimize(
    model: Path,
    config: StepConfig,
    target: Path,
    *,
    check: Check,
    open_model: Opener | None = None,
    data: Dataset | None = None,
    process: SimplifierProcess | None = None,
    progress: Progress | None = None,
    same_bits: Check | None = None,
    keep_float: Path | None = None,
    cases: Sequence[Feeds] = (),
) -> StepResult:
    """Apply one step.

    Args:
        model: The ONNX file to start from; left as it is.
        config: Its type selects the step.
        target: Where the result goes; nothing is there yet.
        check: Says why a candidate is not acceptable; steps with alternatives ask it.
        open_model: Runs a model file; needed by `StaticConfig`.
        data: Calibration data; needed by `StaticConfig`.
        process: Where simplifiers and fusions run; whoever simplifies many models keeps one.
        progress: Told how far a step is that takes long.
        same_bits: Says why a file does not give the model's very bits without fusions; `RepairConfig` asks it.
        keep_float: Where a quantizer leaves the graph as it was, rewritten, before anything in it was quantized; for
            who compares the two layer by layer.
        cases: Inputs that the model is known to take; `HalfConfig` watches activations on them where it has no data.

    Raises:
        OptimizationError: The step cannot be applied.
    """
    if isinstance(config, SimplifyConfig):
        return simplify(model, config, target, check, process)
    if isinstance(config, FuseConfig):
        return fuse(model, config, target, check, process)
    if isinstance(config, DynamicConfig):
        return quantize_dynamic(model, config, target, keep_float)
    if isinstance(config, WeightsConfig):
        return quantize_weights(model, config, target, progress, keep_float)
    if isinstance(config, HalfConfig):
        return quantize_half(model, config, target, open_model, data, cases)
    if isinstance(config, RepairConfig):
        return repair(model, config, target, same_bits)
    check_engine(config)
    if config.engine == "both":
        raise OptimizationError("two engines make two models", hint="deploykit.quantize_static keeps the better one")
    if config.engine == "nncf":
        return quantize_nncf(model, config, target, open_model, data, progress, keep_float)
    return quantize_static(model, config, target, open_model, data, progress, keep_float)
