"""An artifact inside a bundle: as it is, or with the settings that it is to be served with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from deploykit.artifact import MANIFEST, SETTINGS, Artifact, StepRecord, sha256_of
from deploykit.runtimes.settings import RuntimeSettings
from deploykit.serving.package_plan import Plan
from deploykit.staging import ArtifactWriter


def write_artifact(plan: Plan, target: Path) -> Artifact:
    """Copy the artifact; where it is served with other settings than its own, those are written into the copy.

    Args:
        plan: With the settings.
        target: Directory; nothing may be there.
    """
    source = plan.artifact
    target.parent.mkdir(parents=True, exist_ok=True)
    if _settings_of(source) == plan.settings:
        for name in (*source.manifest.files, MANIFEST):
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, copy)
        return Artifact.open(target)
    with ArtifactWriter(target) as writer:
        for name in source.manifest.files:
            if name != SETTINGS:
                copy = writer.dir / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source.path / name, copy)
        # The copy's manifest is another one; the model's file is the same.
        kept = replace(plan.settings, model_sha256=sha256_of(source.model_path)) if plan.tuned else plan.settings
        (writer.dir / SETTINGS).write_text(json.dumps(kept.as_dict(), indent=1) + "\n", encoding="utf-8")
        record = StepRecord(
            step="package", params={"device": plan.settings.device, "tuned": plan.tuned}, tools={},
            parent=source.digest, seconds=0.0,
        )  # fmt: skip
        return writer.commit(
            model=source.manifest.model, signature=source.signature, lineage=[*source.manifest.lineage, record],
            evidence=source.manifest.evidence, ranges=source.ranges,
        )  # fmt: skip


def _settings_of(artifact: Artifact) -> RuntimeSettings:
    """What a server opens an artifact with, where it is told nothing."""
    if SETTINGS in artifact.manifest.files:
        return RuntimeSettings.load(artifact.path / SETTINGS)
    return RuntimeSettings("ort:cpu" if artifact.model_path.suffix == ".onnx" else "openvino:cpu")
