"""The verb `finetune`: train a torch source further, and export what came out, with the evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, StepRecord, sha256_of
from deploykit.comparing import find_targets
from deploykit.data import Dataset
from deploykit.exporters import ExportOptions
from deploykit.exporters.base import DEFAULT_OPSET
from deploykit.exporters.live import undisturbed
from deploykit.exporting import export_source
from deploykit.extras import version_of
from deploykit.optimizers.training import Score, TrainConfig, Trained, check_train_config, train
from deploykit.optimizers.training.config import LOSS
from deploykit.optimizers.training.folder import LOG, TrainingFolder, settings_of
from deploykit.progress import Progress
from deploykit.runtimes import Device
from deploykit.staging import check_free
from deploykit.targets import choose_opset, parse_targets
from deploykit.trainable import (
    find_score,
    known_as,
    measure_artifact,
    open_trainable,
    opened,
    save_module,
    work_folder,
)

_MODEL = "model"
TOOLS = ("torch", "pytorch-lightning", "tensorboardX")


def finetune(
    source: str | Path | Any,
    output: str | Path,
    example_inputs: Any = None,
    *,
    data: str | Path | Dataset,
    eval_data: str | Path | Dataset | None = None,
    config: TrainConfig | None = None,
    resume: bool = False,
    dynamic: Sequence[str] = (),
    inputs: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    exporter: str = "auto",
    timeout_s: float | None = None,
    task: str | None = None,
    part: str | None = None,
    devices: Sequence[str | Device] = (),
    contract: Sequence[str] = (),
    progress: Progress | None = None,
) -> Artifact:
    """Train a model of PyTorch further, and turn it into a verified artifact.

    The training stands in a folder beside the output, `OUTPUT.training`: checkpoints, TensorBoard logs, `history.json`
    and, at the end, `weights.pt`, the trained `state_dict`, and of a model of transformers `model/`, the directory that
    it is loaded from. It stays there. After a crash or an interrupt, ``resume`` goes on with it.

    Args:
        source: `file.py:factory`, `package.module:factory` or a Hugging Face model directory, or a module of this
            process, a copy of which is trained.
        output: Where the artifact will stand; nothing may be there.
        example_inputs: As for `export`.
        data: Inputs by name, and `labels`.
        eval_data: The same, for the metric after every epoch; the weights with the best one are kept. Without it, the
            last ones.
        config: How to train.
        resume: Go on with the training beside the output, where there is one.
        dynamic: As for `export`, and so are the following.
        inputs: See there.
        dims: See there.
        opset: See there.
        exporter: See there.
        timeout_s: See there.
        task: See there.
        part: See there.
        devices: See there.
        contract: See there.
        progress: Told about steps, notes and epochs.

    Raises:
        SourceError: The source cannot be loaded, or is none of PyTorch.
        OptimizationError: A setting is wrong, or the training failed.
        DataError: The data do not fit.
        ExportError: The trained model could not be exported; the training stays.
        ParityError: The exported graph gives other numbers than the trained module; the training stays.
        OutputExistsError: The output is taken, or a training is there and ``resume`` is not given.
        KeyboardInterrupt: Interrupted; the checkpoint is kept.
    """
    told, asked, started = progress or Progress(), config or TrainConfig(), time.monotonic()
    place, before = Path(output), len(told.notes)
    check_train_config(asked)
    score = find_score(asked.metric) if eval_data is not None and asked.metric != LOSS else None
    targets, _ = find_targets(devices)
    check_free(place)
    work = work_folder(place)
    choose_opset(parse_targets(contract), opset, DEFAULT_OPSET)
    about = {"verb": "finetune", "source": known_as(source, place)}
    TrainingFolder(work).check(settings_of(asked, about), resume=resume)
    options = ExportOptions(
        tuple(inputs), tuple(dynamic), opset, exporter, dict(dims or {}), None, task, part, timeout_s
    )  # fmt: skip
    with undisturbed():
        with told.step(f"load {source}" if isinstance(source, str | Path) else "load the module"):
            model = open_trainable(source, example_inputs, options)
        rows = model.fit(opened(data))
        held_out = None if eval_data is None else model.fit(opened(eval_data))
        trained = train(
            model.module, rows, asked, work, eval_data=held_out, score=score, feed=model.feed, resume=resume,
            about=about, progress=told,
        )  # fmt: skip
        first = trained.before
        if hasattr(model.module, "save_pretrained"):
            save_module(model, work / _MODEL, work / LOG)
        if score is not None and first is not None and trained.metric is not None:
            _warn_if_worse(score, first, trained.metric, told)
        step = StepRecord(
            step="finetune",
            params={
                "source": model.label, "data": rows.source, "eval_data": None if held_out is None else held_out.source,
                "config": asdict(asked), **summary(trained, score),
            },
            tools={name: found for name in TOOLS if (found := version_of(name))},
            parent=None,
            seconds=round(time.monotonic() - started, 3),
            notes=list(told.notes[before:]),
        )  # fmt: skip
        return export_source(
            model.renewed(), place, options=options, devices=devices, contract=contract, steps=[step],
            judge=judge_of(targets[0], held_out, score, first), progress=told,
        )  # fmt: skip


def judge_of(
    device: Device, data: Dataset | None, score: Score | None, before: float | None
) -> Callable[[Path], list[dict[str, Any]]] | None:
    """What measures the exported model on evaluation data, for its evidence; None where there is nothing to measure."""
    if data is None or score is None:
        return None

    def judge(model: Path) -> list[dict[str, Any]]:
        value, rows = measure_artifact(model, device, data, score)
        was = "" if before is None else f" (before: {before:.4f})"
        return [
            {
                "summary": f"{score.name} {value:.4f}{was} on {data.source} ({rows} samples)",
                "data": data.source, "device": str(device), "samples": rows, "certified": False, "target": None,
                "metric": score.name, "value": round(value, 6), "before": before,
            }
        ]  # fmt: skip

    return judge


def summary(trained: Trained, score: Score | None) -> dict[str, Any]:
    """What the lineage keeps of a training: how it went, what came out, and where the weights are."""
    return {
        "epochs": trained.epochs,
        "stopped": trained.stopped,
        "metric": score.name if score is not None else LOSS,
        "before": trained.before,
        "after": trained.metric,
        "weights": trained.weights.name,
        "weights_sha256": sha256_of(trained.weights),
        "history": [dict(entry) for entry in trained.history],
    }


def _warn_if_worse(score: Score, before: float, after: float, told: Progress) -> None:
    worse = after < before if score.higher_is_better else after > before
    if worse:
        told.note(f"the training made it worse: {score.name} {after:.4f}, and {before:.4f} before")
