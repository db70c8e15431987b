"""Calibration of a search's static schemes, spread over machines: parts of the data, each a job, added up."""

from __future__ import annotations

from pathlib import Path

from deploykit.artifact import Artifact
from deploykit.data import Dataset
from deploykit.errors import DeploykitError
from deploykit.modelfile import read_model
from deploykit.optimizers import StaticConfig
from deploykit.optimizers.escalation import model_kind
from deploykit.progress import Progress
from deploykit.search.crew import Crew
from deploykit.search.jobs import Done
from deploykit.search.shards import STATE, cut, merge_job, shard_job
from deploykit.search.state import Variant

# Schemes whose settings look at the data once more, part by part, would not see all of them.
_ADAPTIVE = ("equalize", "rounding", "bias_correction", "engine")


def shares(variant: Variant) -> bool:
    """Whether a scheme can be made from a state that parts of the data add up to."""
    table = variant.table or {}
    return table.get("step") == "quantize-static" and not any(key in table for key in _ADAPTIVE)


def calibrate_in_parts(
    parent: Variant, data: str, parts: int, crew: Crew, folder: Path, device: str, told: Progress, until: float
) -> Path | None:
    """Calibrate a model in parts, and merge what they saw.

    Args:
        parent: The floating-point model.
        data: Calibration data.
        parts: How many.
        crew: Has the jobs done.
        folder: Receives the parts of the data.
        device: Runs the model.
        told: Told why it was not done.
        until: When it has to be done by.

    Returns:
        The state; None where the schemes have to look at the data themselves: for transformers, which SmoothQuant
        changes by what it sees, and where a part failed.
    """
    assert parent.path is not None
    artifact = Artifact.open(parent.path)
    if model_kind(read_model(artifact.model_path, weights=False)).transformer:
        told.note("calibration is not spread: SmoothQuant changes the model by the data, which one process has to see")
        return None
    config = StaticConfig()
    try:
        files = cut(Dataset.open(data), artifact.model_path, config, folder, parts)
    except DeploykitError as exc:
        told.note(f"calibration is not spread: {exc}")
        return None
    jobs = [shard_job(artifact.path, file, config, device, artifact.manifest.model) for file in files]
    states = [found.folder / STATE for found in crew.do(jobs, until) if isinstance(found, Done)]
    if len(states) < len(files):
        told.note("calibration is not spread: a part of it failed")
        return None
    (merged,) = crew.do([merge_job(states)], until)
    return merged.folder / STATE if isinstance(merged, Done) else None
