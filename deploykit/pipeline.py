"""The verbs: every command of the command line is a function here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.data import Dataset
from deploykit.errors import BenchmarkError, OptimizationError
from deploykit.models import load_model
from deploykit.progress import Progress
from deploykit.runtimes import Device

if TYPE_CHECKING:
    from deploykit.benchmarks import Report
    from deploykit.recipe import Recipe

from deploykit.comparing import MIN_COSINE, find_targets
from deploykit.deriving import simplify
from deploykit.exporting import export, export_parts
from deploykit.quantizing import quantize_dynamic, quantize_static
from deploykit.repairing import quantize_repair
from deploykit.storing import quantize_half, quantize_weights
from deploykit.sweeping import quantize_sweep
from deploykit.verifying import verify

__all__ = [
    "benchmark",
    "export",
    "export_parts",
    "quantize_dynamic",
    "quantize_half",
    "quantize_repair",
    "quantize_static",
    "quantize_sweep",
    "quantize_weights",
    "run",
    "simplify",
    "verify",
]


def benchmark(
    models: Sequence[str | Path],
    *,
    devices: Sequence[str | Device] = (),
    data: str | Path | None = None,
    threads: int | None = None,
    batch: int = 1,
    rounds: int = 5,
    seconds: float = 2.0,
    warmup_s: float = 1.0,
    precision: str = "fp32",
    dims: Mapping[str, int] | None = None,
    max_drop: float = 0.01,
    min_cosine: float = MIN_COSINE,
    seed: int = 0,
    explain: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure models × devices in interleaved rounds, each in a fresh process.

    Args:
        models: Artifacts, `.onnx` or `.xml` files; the first, on the first device, is the reference.
        devices: By default the CPU of every installed runtime.
        data: Inputs; with `labels`, accuracy is measured too.
        threads: Threads in one request; all allowed cores by default.
        batch: Samples in one request.
        rounds: At least 3; the confidence intervals are over rounds.
        seconds: Timed seconds a candidate and round.
        warmup_s: Warm-up seconds before them (and at least 10 runs).
        precision: "fp32" or "native", see `open_session`.
        dims: Sizes of dynamic dimensions where inputs are made up.
        max_drop: A candidate whose accuracy is lower than the reference's by more does not win.
        min_cosine: A candidate whose outputs are further from the reference's does not enter.
        seed: Of the order of the candidates and of the bootstrap.
        explain: Profile each candidate afterwards and say why it is slow; see `deploykit.explaining`.
        progress: Told about steps.

    Raises:
        BenchmarkError: Nothing could be measured.
        DeviceError: A device cannot be had.
    """
    from deploykit.benchmarks import Candidate, Settings, measure
    from deploykit.explaining import cure_of, explain_candidates
    from deploykit.models import benchmark_feeds, names_of

    told = progress or Progress()
    targets, _ = find_targets(devices)
    loaded = [load_model(m) for m in models]
    dataset = Dataset.open(data) if data else None
    if not loaded:
        raise OptimizationError("nothing to measure", hint="name a model: -m MODEL")
    feeds, origin, size = benchmark_feeds(loaded[0], dataset, batch, dims or {})
    if size != batch:
        told.note(f"the model's batch is fixed to {size}")
    candidates = [
        Candidate(name, str(model.path), str(device), model.digest, model.size_bytes)
        for name, model in zip(names_of(models), loaded, strict=True)
        for device in targets
        # Nobody asked for ONNX Runtime by name, and it cannot read OpenVINO's format.
        if devices or model.path.suffix != ".xml" or device.runtime != "ort"
    ]
    settings = Settings(
        rounds=rounds, seconds=seconds, warmup_s=warmup_s, threads=threads, batch=size, precision=precision,
        max_drop=max_drop, min_cosine=min_cosine, seed=seed, inputs=origin,
    )  # fmt: skip
    try:
        report = measure(candidates, feeds, settings, data=dataset, progress=told)
    except BenchmarkError as exc:
        if not explain:
            raise
        found = explain_candidates(candidates[:1], ["failed"], feeds, threads=threads, precision=precision)
        raise BenchmarkError(exc.what, hint=next(map(cure_of, found.values()), None) or exc.hint) from exc
    if explain and not report.interrupted:
        statuses = [entry["status"] for entry in report.candidates]
        report.data["explain"] = explain_candidates(
            candidates, statuses, feeds, threads=threads, precision=precision, progress=told
        )
    return report


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
