"""The verbs: every command of the command line is a function here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.progress import Progress

if TYPE_CHECKING:
    from deploykit.recipe import Recipe

from deploykit.applying import apply
from deploykit.benchmarking import benchmark
from deploykit.benchmarks.compare_verb import compare
from deploykit.deriving import simplify
from deploykit.distilling import distill
from deploykit.exporting import export, export_parts
from deploykit.finetuning import finetune
from deploykit.fusing import fuse
from deploykit.listing import show_data
from deploykit.optimizing import optimize
from deploykit.packaging import package
from deploykit.packing import pack_data
from deploykit.preprocessing import preprocess
from deploykit.pruning import prune
from deploykit.qat import quantize_qat
from deploykit.quantizing import quantize_dynamic, quantize_static
from deploykit.repairing import quantize_repair
from deploykit.selecting import select_data
from deploykit.serving.smoke import smoke
from deploykit.serving_models import serve
from deploykit.signing import check_signature, sbom, sign
from deploykit.storing import quantize_half, quantize_weights
from deploykit.sweeping import quantize_sweep
from deploykit.verifying import verify

__all__ = [
    "apply",
    "benchmark",
    "check_signature",
    "compare",
    "distill",
    "export",
    "export_parts",
    "finetune",
    "fuse",
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


def run(
    recipe: str | Path | Recipe, output: str | Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Run a recipe; see `deploykit.recipe`.

    Args:
        recipe: A `.toml` file, or a recipe.
        output: Directory that receives one artifact a step, and the reports.
        resume: Go on in a directory that an interrupted run left: finished steps are kept.
        progress: Told about steps.

    Returns:
        The path of what each step made, by step.
    """
    from deploykit.recipe import Recipe
    from deploykit.runner import run_recipe

    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return run_recipe(loaded, Path(output), resume=resume, progress=progress or Progress())
