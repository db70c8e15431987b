"""Runs a recipe: each step makes a whole artifact below the output, so that an interrupted run can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from deploykit import pipeline
from deploykit.artifact import Artifact, is_artifact, stamp_of
from deploykit.benchmarks import Report
from deploykit.errors import OutputExistsError, RecipeError, first_line, storage_error
from deploykit.optimizers import (
    DynamicConfig,
    HalfConfig,
    PreprocessConfig,
    RepairConfig,
    StaticConfig,
    WeightsConfig,
    make_audio_config,
    make_image_config,
)
from deploykit.optimizers.distillation import DistillConfig
from deploykit.optimizers.pruning import PruneConfig
from deploykit.optimizers.training import TrainConfig
from deploykit.progress import Progress
from deploykit.recipe import Recipe
from deploykit.recipe_steps import (
    SOURCE_STEPS,
    ApplyStep,
    AudioStep,
    BenchmarkStep,
    DistillStep,
    DynamicStep,
    ExportStep,
    FinetuneStep,
    FuseStep,
    HalfStep,
    ImageStep,
    PruneStep,
    QatStep,
    RepairStep,
    SimplifyStep,
    StaticStep,
    Step,
    WeightsStep,
)
from deploykit.staging import check_free, write_file

_RECORD = ".recipe.json"
_PATHS = ("data", "eval_data", "source", "teacher", "student", "model", "preset")
_FILES = ("merge", "tuned")
_CONFIG = tuple(field.name for field in fields(StaticConfig))
_TRAIN = tuple(field.name for field in fields(TrainConfig))
_PRUNE = tuple(field.name for field in fields(PruneConfig) if field.name != "keep")


def run_recipe(recipe: Recipe, output: Path, *, resume: bool, progress: Progress) -> dict[str, Artifact | Report]:
    """Run the steps in order.

    Args:
        recipe: The steps.
        output: Directory for `<step>/` artifacts and `<step>.json` reports.
        resume: Keep what an interrupted run finished, where step, parents and files are still the same.
        progress: Told about steps.

    Raises:
        OutputExistsError: The output is there, and `resume` is not given.
        RecipeError: The output was not made by a recipe.
        KeyboardInterrupt: The user interrupted; finished steps stay.
    """
    record = _open_output(output, resume=resume)
    made: dict[str, Artifact | Report] = {}
    try:
        for name, step in recipe.steps.items():
            previous = next((n for n in reversed(made) if not isinstance(recipe.steps[n], BenchmarkStep)), None)
            target = output / (f"{name}.json" if isinstance(step, BenchmarkStep) else name)
            with progress.step(f"[{name}]"):
                key = _key(recipe, name, made, previous)
                if record.get(name) == key and target.exists():
                    made[name] = _reopen(target, step)
                    progress.note(f"[{name}] is kept from the interrupted run")
                    continue
                # Made from something else, or whole and not yet noted as done when the run was killed.
                _remove(target)
                made[name] = _run_step(recipe, name, step, output, previous, progress, resume=resume)
                if isinstance(made[name], Report) and made[name].interrupted:  # type: ignore[union-attr]
                    raise KeyboardInterrupt
                record[name] = key
                _write_record(output, record)
    except BaseException:
        if not record:
            _drop_empty(output)
        raise
    return made


def _key(recipe: Recipe, name: str, made: Mapping[str, Artifact | Report], previous: str | None) -> str:
    """Hash of all that a step's result follows from: its parameters, its parents, the files that it reads."""
    step = recipe.steps[name]
    params = step.model_dump()
    texts = [str(params[k]) for k in _PATHS if params.get(k) is not None] + [
        text for name in _FILES for text in params.get(name, [])
    ]
    if isinstance(step, BenchmarkStep):
        models = step.models or [n for n in made if not isinstance(recipe.steps[n], BenchmarkStep)]
    elif isinstance(step, SOURCE_STEPS):
        models = []
    else:
        models = [step.model or str(previous)]
    digests = [found.digest for m in models if isinstance(found := made.get(m), Artifact)]
    files = [
        stamp_of(recipe.folder / text.rpartition(":")[0] if ":" in text else recipe.folder / text) for text in texts
    ]
    files += [stamp_of(recipe.folder / m) for m in models if m not in made]
    return hashlib.sha256(json.dumps([params, models, digests, files]).encode()).hexdigest()


def _open_output(output: Path, *, resume: bool) -> dict[str, str]:
    """Create the output, or read what an interrupted run noted there: a key by finished step."""
    file = output / _RECORD
    if not resume or not output.exists():
        try:
            check_free(output)
        except OutputExistsError as exc:
            hint = "add --resume to go on with it" if file.is_file() else exc.hint
            raise OutputExistsError(exc.what, hint=hint) from exc
        try:
            output.mkdir(parents=True)
        except OSError as exc:
            raise storage_error(exc, output) or exc from exc
        _write_record(output, {})
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise RecipeError(f"{output} was not made by deploykit run", hint="choose another -o") from exc
    if not isinstance(found, dict):
        raise RecipeError(f"{file} was changed", hint="choose another -o")
    return {str(name): str(key) for name, key in found.items()}


def _drop_empty(output: Path) -> None:
    """Remove an output in which no step was finished."""
    with contextlib.suppress(OSError):
        (output / _RECORD).unlink()
        output.rmdir()


def _write_record(output: Path, record: Mapping[str, Any]) -> None:
    temporary = output / (_RECORD + ".new")
    try:
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(output / _RECORD)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise storage_error(exc, output) or exc from exc


def _reopen(target: Path, step: Step) -> Artifact | Report:
    if not isinstance(step, BenchmarkStep):
        return Artifact.open(target)
    try:
        return Report(json.loads(target.read_text(encoding="utf-8")))
    except (OSError, ValueError) as exc:
        raise RecipeError(f"{target} is damaged ({first_line(exc)})", hint=f"remove it: rm {target}") from exc


def _remove(target: Path) -> None:
    import shutil

    if is_artifact(target):
        shutil.rmtree(target)
    elif target.is_file():
        target.unlink()


def _run_step(
    recipe: Recipe, name: str, step: Step, output: Path, previous: str | None, progress: Progress, *, resume: bool
) -> Artifact | Report:
    target = output / name
    params = step.model_dump(exclude={"step"})
    for key in (*_PATHS, "save_calibration", "save_settings"):
        if params.get(key) is not None:
            params[key] = _located(params[key], recipe, output, is_model=key == "model")
    for key in _FILES:
        if key in params:
            params[key] = [_located(file, recipe, output, is_model=False) for file in params[key]]
    if isinstance(step, BenchmarkStep):
        models = step.models or [n for n, s in recipe.steps.items() if not isinstance(s, BenchmarkStep)]
        earlier = models if step.models else models[: models.index(previous) + 1] if previous else models
        paths = [_located(m, recipe, output, is_model=True) for m in earlier]
        report = pipeline.benchmark(paths, progress=progress, **{k: v for k, v in params.items() if k != "models"})
        write_file(output / f"{name}.json", report.to_json().encode())
        return report
    if isinstance(step, ExportStep):
        return pipeline.export(params.pop("source"), target, progress=progress, **params)
    if isinstance(step, FinetuneStep):
        return _finetune(target, resume=resume, progress=progress, **params)
    if isinstance(step, DistillStep):
        return _distill(target, resume=resume, progress=progress, **params)
    if isinstance(step, PruneStep):
        return _prune(target, resume=resume, progress=progress, **params)
    if isinstance(step, QatStep):
        return _qat(target, resume=resume, progress=progress, **params)
    model = params.pop("model") or str(output / str(previous))
    verbs: dict[type[Step], Callable[..., Artifact]] = {
        SimplifyStep: pipeline.simplify,
        FuseStep: pipeline.fuse,
        DynamicStep: _dynamic,
        StaticStep: _static,
        WeightsStep: _weights,
        HalfStep: _half,
        RepairStep: _repair,
        ApplyStep: _apply,
        ImageStep: partial(_preprocess, make_image_config),
        AudioStep: partial(_preprocess, make_audio_config),
    }
    return verbs[type(step)](model, target, progress=progress, **params)


def _finetune(target: Path, *, source: str, **params: Any) -> Artifact:
    return pipeline.finetune(source, target, config=_training(params), **params)


def _distill(
    target: Path, *, teacher: str, weights: dict[str, Any], pairs: list[list[str]], output_name: str | None,
    metric: str | None, **params: Any,
) -> Artifact:  # fmt: skip
    kept = {key: params.pop(key) for key in ("kind", "temperature", "attention_layers", "embedding_loss", "cache")}
    named = tuple((of_teacher, of_student) for of_teacher, of_student in pairs)
    config = DistillConfig(**kept, **weights, pairs=named, output=output_name)
    return pipeline.distill(teacher, target, config=config, metric=metric, training=_training(params), **params)


def _prune(target: Path, *, source: str, recovery: bool, metric: str | None, resume: bool, **params: Any) -> Artifact:
    training = _training(params) if recovery and params["data"] else None
    params = {key: value for key, value in params.items() if key not in _TRAIN}
    config = PruneConfig(**{key: params.pop(key) for key in _PRUNE} | {"keep": tuple(params.pop("keep"))})
    return pipeline.prune(
        source, target, config=config, metric=metric, training=training, resume=resume and training is not None,
        **params,
    )  # fmt: skip


def _qat(target: Path, *, source: str, weight_bits: str, **params: Any) -> Artifact:
    config = StaticConfig(weight_bits=weight_bits)
    return pipeline.quantize_qat(source, target, config=config, training=_training(params), **params)


def _training(params: dict[str, Any]) -> TrainConfig:
    """The settings of a training, which are taken out of a step's parameters."""
    settings = {key: params.pop(key) for key in _TRAIN if key in params}
    return TrainConfig(**settings | {"clip_norm": settings["clip_norm"] or None})


def _dynamic(
    model: str, target: Path, *, exclude: list[str], weight_bits: str, per_channel: bool, smooth: str, **rest: Any
) -> Artifact:
    config = DynamicConfig(exclude=tuple(exclude), weight_bits=weight_bits, per_channel=per_channel, smooth=smooth)
    return pipeline.quantize_dynamic(model, target, config=config, **rest)


def _weights(
    model: str, target: Path, *, bits: int, block: int | None, form: str, exclude: list[str], embeddings: bool,
    **rest: Any,
) -> Artifact:  # fmt: skip
    config = WeightsConfig(bits, block, form, tuple(exclude), embeddings)
    return pipeline.quantize_weights(model, target, config=config, **rest)


def _half(model: str, target: Path, *, precision: str, compute: str, exclude: list[str], **rest: Any) -> Artifact:
    return pipeline.quantize_half(model, target, config=HalfConfig(precision, compute, tuple(exclude)), **rest)


def _repair(model: str, target: Path, *, exact: bool, **rest: Any) -> Artifact:
    return pipeline.quantize_repair(model, target, config=RepairConfig(exact=exact), **rest)


def _apply(model: str, target: Path, *, name: str, **rest: Any) -> Artifact:
    return pipeline.apply(name, model, target, **rest)


def _preprocess(
    make_config: Callable[..., PreprocessConfig], model: str, target: Path, *, progress: Progress, **params: Any
) -> Artifact:
    how = {key: params.pop(key) for key in ("data", "dims", "min_cosine", "contract")}
    return pipeline.preprocess(model, target, config=make_config(**params), progress=progress, **how)


def _static(model: str, target: Path, **params: Any) -> Artifact:
    config = {key: params.pop(key) for key in _CONFIG}
    config |= {"exclude": tuple(config["exclude"]), "merge": tuple(config["merge"])}
    return pipeline.quantize_static(model, target, config=StaticConfig(**config), **params)


def _located(text: str, recipe: Recipe, output: Path, *, is_model: bool) -> str:
    """A step's folder, or a path relative to the recipe; `module:function` stays as it is."""
    if text.startswith("derive:"):
        return text
    if is_model and text in recipe.steps:
        return str(output / text)
    file, sep, function = text.rpartition(":")
    if sep and file.endswith(".py"):
        return f"{recipe.folder / file}:{function}"
    if sep and function.isidentifier() and not (recipe.folder / text).exists():
        return text
    return str(recipe.folder / text)
