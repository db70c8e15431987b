"""The verb `quantize_qat`: train with 8-bit rounding in the way, then quantize as `quantize_static` does."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, StepRecord
from deploykit.comparing import MIN_COSINE, find_targets
from deploykit.data import Dataset
from deploykit.errors import DataError, OptimizationError
from deploykit.exporters import ExportOptions
from deploykit.exporters.base import DEFAULT_OPSET
from deploykit.exporters.live import undisturbed
from deploykit.exporting import export_source
from deploykit.extras import version_of
from deploykit.gating import DEFAULT_SECONDS
from deploykit.goals import read_drop
from deploykit.nesting import flatten_outputs
from deploykit.optimizers import StaticConfig
from deploykit.optimizers.fake_quantize import fake_quantize, fold_batch_norms
from deploykit.optimizers.quantize_config import weight_bits
from deploykit.optimizers.scheme import Scheme
from deploykit.optimizers.training import Score, TrainConfig, check_train_config, train
from deploykit.optimizers.training.config import LOSS
from deploykit.optimizers.training.evaluating import Evaluation
from deploykit.optimizers.training.folder import TrainingFolder, settings_of
from deploykit.optimizers.training.outputs import tensors_of
from deploykit.optimizers.training.probing import try_evaluation
from deploykit.progress import Progress
from deploykit.quantizing import quantize_static
from deploykit.runtimes import Device
from deploykit.staging import check_free
from deploykit.targets import choose_opset, parse_targets
from deploykit.trainable import Trainable, find_score, known_as, open_trainable, work_folder

_FLOAT = "float"
_OBSERVED_ROWS, _OBSERVED_BATCH = 512, 64


def quantize_qat(
    source: str | Path | Any,
    output: str | Path,
    example_inputs: Any = None,
    *,
    data: str | Path,
    eval_data: str | Path | None = None,
    training: TrainConfig | None = None,
    config: StaticConfig | None = None,
    max_drop: float | str | None = None,
    resume: bool = False,
    dynamic: Sequence[str] = (),
    inputs: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    task: str | None = None,
    devices: Sequence[str | Device] = (),
    contract: Sequence[str] = (),
    allow_slower: bool = False,
    gate_seconds: float = DEFAULT_SECONDS,
    progress: Progress | None = None,
) -> Artifact:
    """Quantize a model of PyTorch to 8 bits, after a training in which its weights learn to be rounded.

    For models that lose too much in `quantize_static`. The batch normalizations are folded, convolutions and linear
    layers compute on rounded weights and inputs, and the training goes on with that. Then the real-valued module is
    exported (`OUTPUT.training/float`, an artifact) and quantized statically, on the training data.

    Args:
        source: As for `finetune`.
        output: Where the artifact will stand; nothing may be there.
        example_inputs: As for `export`.
        data: Inputs by name, and `labels`, to train on; a part of them gives the ranges.
        eval_data: The same, to be judged on: the weights that are best with rounding are kept.
        training: How to train; by default 5 epochs at a learning rate of 1e-4.
        config: As for `quantize_static`; what would change the trained weights is off, and `max_samples` is 512 where
            it says nothing.
        max_drop: How much of the metric of the trained module may be lost by the real rounding, as for
            `quantize_static`; 0.01 by default where there are ``eval_data``, which it needs.
        resume: Go on with the training beside the output, where there is one.
        dynamic: As for `export`, and so are the following.
        inputs: See there.
        dims: See there.
        opset: See there.
        task: See there.
        devices: As for `quantize_static`, and so are the following.
        contract: See there.
        allow_slower: See there.
        gate_seconds: See there.
        progress: Told about steps, notes and epochs.

    Raises:
        SourceError: The source cannot be loaded or trained.
        OptimizationError: Nothing to quantize, or a setting is wrong.
        DataError: The data do not fit.
        AccuracyError: The quantized model loses more than `max_drop`.
        ParityError: The outputs are too far from the trained module's.
        SpeedError: It is slower than in floating point.
        OutputExistsError: The output is taken, or a training is there and ``resume`` is not given.
        KeyboardInterrupt: Interrupted; the checkpoint is kept.
    """
    told, started = progress or Progress(), time.monotonic()
    before = len(told.notes)
    asked = training or TrainConfig(epochs=5, learning_rate=1e-4)
    check_train_config(asked)
    settings = _settled(config)
    score = find_score(asked.metric) if eval_data is not None and asked.metric != LOSS else None
    if max_drop is not None and score is None:
        raise DataError("a largest drop needs a metric on evaluation data", hint="give labelled data: --eval DATA")
    if max_drop is not None:
        read_drop(max_drop)
    find_targets(devices)
    choose_opset(parse_targets(contract), opset, DEFAULT_OPSET)
    place = Path(output)
    check_free(place)
    work = work_folder(place)
    bits, why = weight_bits(settings.weight_bits)
    about = {
        "verb": "quantize qat", "source": known_as(source, place), "weight_bits": bits,
        "per_channel": settings.per_channel,
    }  # fmt: skip
    TrainingFolder(work).check(settings_of(asked, about), resume=resume)
    for note in why:
        told.note(note)
    options = ExportOptions(tuple(inputs), tuple(dynamic), opset, dims=dict(dims or {}), task=task)
    with undisturbed():
        with told.step(f"load {source}" if isinstance(source, str | Path) else "load the module"):
            model = open_trainable(source, example_inputs, options)
        rows = model.fit(Dataset.open(data))
        held_out = None if eval_data is None else model.fit(Dataset.open(eval_data))
        scheme = Scheme(bits, settings.per_channel)
        record = _train(model, rows, held_out, asked, score, scheme, work, about, told, resume=resume)
        step = StepRecord(
            step="qat",
            params={"source": model.label, "data": rows.source, "config": asdict(asked), **record},
            tools={n: found for n in ("torch", "pytorch-lightning") if (found := version_of(n))},
            parent=None,
            seconds=round(time.monotonic() - started, 3),
            notes=list(told.notes[before:]),
        )
        shutil.rmtree(work / _FLOAT, ignore_errors=True)
        trained = export_source(
            model.renewed(), work / _FLOAT, options=options, contract=contract, steps=[step], progress=told
        )
    # Weights that were trained to be rounded need not give the same without: where there is a metric, that decides.
    min_cosine = MIN_COSINE if score is None else -1.0
    judged = {} if score is None else {"eval_data": eval_data, "metric": score.name, "max_drop": max_drop}
    return quantize_static(
        trained.path, place, data=data, config=settings, min_cosine=min_cosine, contract=contract, devices=devices,
        allow_slower=allow_slower, gate_seconds=gate_seconds, escalate=False, progress=told,
        **judged,  # type: ignore[arg-type]
    )  # fmt: skip


def _settled(config: StaticConfig | None) -> StaticConfig:
    """The settings with which the trained weights are quantized as they are.

    Raises:
        OptimizationError: What is asked for would change them.
    """
    asked = config or StaticConfig()
    off = {"smooth": ("auto", "off"), "equalize": (False, False), "bias_correction": ("auto", "off"),
           "rounding": ("nearest", "nearest"), "engine": ("deploykit", "deploykit")}  # fmt: skip
    for name, usual in off.items():
        if getattr(asked, name) not in usual:
            raise OptimizationError(
                f"{name.replace('_', ' ')} {getattr(asked, name)} would change weights that were trained to be rounded",
                hint="leave it out, or use quantize static",
            )
    rows = _OBSERVED_ROWS if asked.max_samples is None else asked.max_samples
    return replace(asked, max_samples=rows, **{name: usual[1] for name, usual in off.items()})  # type: ignore[arg-type]


def _train(
    model: Trainable,
    rows: Dataset,
    held_out: Dataset | None,
    asked: TrainConfig,
    score: Score | None,
    scheme: Scheme,
    work: Path,
    about: Mapping[str, Any],
    told: Progress,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Train with rounding in the way, and leave real-valued weights.

    Returns:
        What the lineage keeps of it.
    """
    module = model.module
    found = None
    if held_out is not None and score is not None:
        with told.step(f"{score.name} in floating point"):
            found = try_evaluation(Evaluation(held_out, score, None, None, model.feed, asked.batch_size), module)
    with told.step("fold batch normalizations"):
        folded = _fold(model, rows)
        few = tensors_of(rows.head(_OBSERVED_BATCH), "cpu")
        rounding = fake_quantize(module, scheme, lambda: model.feed(module, few))
    try:
        with told.step("observe"):
            rounding.observe(_runs(model, rows))
        trained = train(
            module, rows, asked, work, eval_data=held_out, score=score, feed=model.feed, resume=resume, about=about,
            progress=told,
        )  # fmt: skip
    finally:
        rounding.remove()
    return {
        "weight_bits": scheme.bits, "layers": len(rounding.layers), "folded": folded, "metric": asked.metric,
        "before": found, "rounded_before": trained.before, "rounded_after": trained.metric, "epochs": trained.epochs,
        "stopped": trained.stopped, "history": [dict(entry) for entry in trained.history],
    }  # fmt: skip


def _fold(model: Trainable, rows: Dataset) -> int:
    batch = tensors_of(rows.head(_OBSERVED_BATCH), "cpu")
    model.module.eval()
    return fold_batch_norms(model.module, lambda: flatten_outputs(model.feed(model.module, batch), model.names))


def _runs(model: Trainable, rows: Dataset) -> Iterator[Any]:
    """What the module gives for the first rows."""
    for batch in itertools.islice(rows.batches(_OBSERVED_BATCH), _OBSERVED_ROWS // _OBSERVED_BATCH):
        yield model.feed(model.module, tensors_of(batch, "cpu"))
