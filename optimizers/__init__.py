"""Optimizers: a model file becomes another. One verb: `optimize`; the config's type selects the step.

A step never changes its input, and says whether it changed anything. Whether the result is right is decided by the
pipeline, which can run it; steps that have to run models on the way are handed the means.
"""

from __future__ import annotations

from deploykit.optimizers.base import StepResult
from deploykit.optimizers.escalation import escalation
from deploykit.optimizers.fuse import FuseConfig
from deploykit.optimizers.fuse_attention import has_attention
from deploykit.optimizers.quantize_config import (
    DynamicConfig,
    HalfConfig,
    StaticConfig,
    WeightsConfig,
    check_engine,
    for_engine,
    own_options,
)
from deploykit.optimizers.quantize_nncf import require_nncf
from deploykit.optimizers.repair import RepairConfig
from deploykit.optimizers.simplifier_process import SimplifierProcess
from deploykit.optimizers.simplify import SimplifyConfig
from deploykit.optimizers.steps import StepConfig, optimize

__all__ = [
    "DynamicConfig",
    "FuseConfig",
    "HalfConfig",
    "RepairConfig",
    "SimplifierProcess",
    "SimplifyConfig",
    "StaticConfig",
    "StepConfig",
    "StepResult",
    "WeightsConfig",
    "check_engine",
    "escalation",
    "for_engine",
    "has_attention",
    "optimize",
    "own_options",
    "require_nncf",
]
