"""Optimizers: a model file becomes another. One verb: `optimize`; the config's type selects the step.

A step never changes its input, and says whether it changed anything. Whether the result is right is decided by the
pipeline, which can run it; steps that have to run models on the way are handed the means.
"""

from __future__ import annotations

from deploykit.optimizers.base import StepResult
from deploykit.optimizers.escalation import escalation
from deploykit.optimizers.fuse import FuseConfig
from deploykit.optimizers.fuse_attention import has_attention
from deploykit.optimizers.preprocess import Plan, add_preprocessing, plan_preprocessing, with_preprocessing, write_alone
from deploykit.optimizers.preprocess_config import AudioConfig, ImageConfig, PreprocessConfig
from deploykit.optimizers.preprocess_presets import make_audio_config, make_image_config, read_processor
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
    "AudioConfig",
    "DynamicConfig",
    "FuseConfig",
    "HalfConfig",
    "ImageConfig",
    "Plan",
    "PreprocessConfig",
    "RepairConfig",
    "SimplifierProcess",
    "SimplifyConfig",
    "StaticConfig",
    "StepConfig",
    "StepResult",
    "WeightsConfig",
    "add_preprocessing",
    "check_engine",
    "escalation",
    "for_engine",
    "has_attention",
    "make_audio_config",
    "make_image_config",
    "optimize",
    "own_options",
    "plan_preprocessing",
    "read_processor",
    "require_nncf",
    "with_preprocessing",
    "write_alone",
]
