"""What a pruning leaves: what the lineage keeps of it, and what the module can be trained on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.artifact import TORCH, Artifact
from deploykit.errors import ExportError, OptimizationError
from deploykit.exporters.pytorch import TorchSource
from deploykit.extras import require, version_of
from deploykit.optimizers.pruning import Masks, Pruned, changed_attributes, count_zeros, restore_structure
from deploykit.progress import Progress, quiet

WEIGHTS, STRUCTURE, PROGRAM = "model.safetensors", "structure.json", "program.pt2"


def write_torch(source: TorchSource, folder: Path, before: Mapping[str, Any], log: Path, told: Progress) -> None:
    """Write what a pruned module can be trained on from: weights, structure, and a program where torch.export can.

    Args:
        source: Whose module was pruned.
        folder: Where; it is made.
        before: `attributes_of` the module before.
        log: Takes what frameworks print.
        told: Told where there is no program.
    """
    torch = require("torch", extra="prune")
    folder.mkdir()
    module = source.module
    state = module.state_dict()
    kept = {
        # safetensors holds no tensor twice, and none that shares memory; `restore` ties again what is tied.
        name: tensor.detach().clone().contiguous()
        for named in (module.named_parameters(), module.named_buffers())
        for name, tensor in named
        if name in state
    }
    require("safetensors.torch", extra="prune").save_file(kept, str(folder / WEIGHTS))
    text = {"class": type(module).__qualname__, "changed": changed_attributes(before, module)}
    (folder / STRUCTURE).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    try:
        with told.step("write a program of torch.export"), quiet(log):
            torch.export.save(source.program(), str(folder / PROGRAM))
    except ExportError as exc:
        told.note(f"there is no {TORCH}{PROGRAM} ({exc.what}); deploykit.pruning.restore takes the weights")


def restore(module: Any, artifact: str | Path) -> Any:
    """Give a module of the class that was pruned its structure and its weights, to train it on.

    Args:
        module: As it was built before the pruning; changed in place.
        artifact: What `prune` wrote, or a later artifact's parent.

    Returns:
        The module.

    Raises:
        OptimizationError: The artifact has no torch module beside it, or another one.
        ArtifactError: It was changed.
    """
    opened = Artifact.open(artifact)
    folder = opened.path / TORCH
    if TORCH + STRUCTURE not in opened.manifest.files:
        raise OptimizationError(f"{opened.path} has no {TORCH}{STRUCTURE}", expected="an artifact of deploykit prune")
    weights = require("safetensors.torch", extra="prune").load_file(str(folder / WEIGHTS))
    changed = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))["changed"]
    restore_structure(module, changed, weights)
    return module


def structured_params(done: Pruned) -> dict[str, Any]:
    """What the lineage keeps of channels that were taken out."""
    return {
        "ratio": round(done.ratio, 4),
        "parameters": list(done.parameters),
        "macs": list(done.macs),
        "channels": {name: list(pair) for name, pair in done.channels.items()},
        "heads": {name: list(pair) for name, pair in done.heads.items()},
        "layers": {
            name: {"inputs": [a.inputs, b.inputs], "outputs": [a.outputs, b.outputs]}
            for name, (a, b) in done.layers.items()
            if a != b
        },
        "kept": dict(done.kept),
        "importance": done.importance,
        "sensitivity": {name: float(f"{value:.4g}") for name, value in done.sensitivity.items()},
        "trials": [{"ratio": round(p.ratio, 4), "ms": round(p.ms, 4)} for p in done.probes],
    }


def sparse_params(masks: Masks, module: Any) -> dict[str, Any]:
    """What the lineage keeps of weights that were set to zero, counted in the module as it is now."""
    found = count_zeros(module, masks)
    return {
        "sparsity": round(found.count / found.weights, 6),
        "zeros": found.count,
        "weights": found.weights,
        "parameters": found.parameters,
        "layers": {name: round(zeros / total, 4) for name, (zeros, total) in found.layers.items()},
        "kept": dict(masks.left),
    }


def tools_used() -> dict[str, str]:
    """Versions of the packages that prune and train."""
    names = ("torch", "torch-pruning", "pytorch-lightning", "safetensors")
    return {name: found for name in names if (found := version_of(name))}
