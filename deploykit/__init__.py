"""DeployKit: from a trained model to the fastest artifact that is still correct, with the evidence beside it.

The public names are loaded on first use: ``import deploykit`` reads nothing but this file.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# From version 1.29 on ONNX Runtime tells its maker about models and machines, on Linux too, unless this stood in the
# environment before it was loaded. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# In a checkout the sub-packages stand beside this folder (exporters/, runtimes/, ...), not inside it. Python finds
# this folder first when it runs from the checkout's root, even with a wheel installed, so both places are searched.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "exporters" / "__init__.py").is_file():
    __path__.append(str(_root))

_EXPORTS = {
    "Artifact": "artifact",
    "Dataset": "data",
    "DeploykitError": "errors",
    "Recipe": "recipe",
    "Report": "benchmarks",
    "Session": "runtimes",
    "Signature": "specs",
    "TensorSpec": "specs",
    "apply": "pipeline",
    "benchmark": "pipeline",
    "check_signature": "pipeline",
    "compare": "pipeline",
    "distill": "pipeline",
    "export": "pipeline",
    "export_parts": "pipeline",
    "finetune": "pipeline",
    "fuse": "pipeline",
    "load": "runtimes",
    "open_session": "runtimes",
    "optimize": "pipeline",
    "pack_data": "packing",
    "package": "packaging",
    "preprocess": "pipeline",
    "prune": "pipeline",
    "quantize_dynamic": "pipeline",
    "quantize_half": "pipeline",
    "quantize_qat": "pipeline",
    "quantize_repair": "pipeline",
    "quantize_static": "pipeline",
    "quantize_sweep": "pipeline",
    "quantize_weights": "pipeline",
    "run": "pipeline",
    "sbom": "pipeline",
    "select_data": "selecting",
    "serve": "pipeline",
    "show_data": "listing",
    "sign": "pipeline",
    "simplify": "pipeline",
    "smoke": "serving.smoke",
    "verify": "pipeline",
}

__all__ = [
    "Artifact",
    "Dataset",
    "DeploykitError",
    "Recipe",
    "Report",
    "Session",
    "Signature",
    "TensorSpec",
    "__version__",
    "apply",
    "benchmark",
    "check_signature",
    "compare",
    "distill",
    "export",
    "export_parts",
    "finetune",
    "fuse",
    "load",
    "open_session",
    "optimize",
    "pack_data",
    "package",
    "preprocess",
    "prune",
    "quantize_dynamic",
    "quantize_half",
    "quantize_qat",
    "quantize_repair",
    "quantize_static",
    "quantize_sweep",
    "quantize_weights",
    "run",
    "sbom",
    "select_data",
    "serve",
    "show_data",
    "sign",
    "simplify",
    "smoke",
    "verify",
]

if TYPE_CHECKING:
    from deploykit.artifact import Artifact
    from deploykit.benchmarks import Report
    from deploykit.data import Dataset
    from deploykit.errors import DeploykitError
    from deploykit.listing import show_data
    from deploykit.packing import pack_data
    from deploykit.pipeline import (
        apply,
        benchmark,
        check_signature,
        compare,
        distill,
        export,
        export_parts,
        finetune,
        fuse,
        optimize,
        package,
        preprocess,
        prune,
        quantize_dynamic,
        quantize_half,
        quantize_qat,
        quantize_repair,
        quantize_static,
        quantize_sweep,
        quantize_weights,
        run,
        sbom,
        serve,
        sign,
        simplify,
        smoke,
        verify,
    )
    from deploykit.recipe import Recipe
    from deploykit.runtimes import Session, load, open_session
    from deploykit.selecting import select_data
    from deploykit.specs import Signature, TensorSpec


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'deploykit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deploykit.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
