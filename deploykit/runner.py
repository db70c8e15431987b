"""Runs a recipe: each step makes a whole artifact below the output, so that an interrupted run can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploykit import pipeline
from deploykit.artifact import Artifact, check_free, is_artifact, write_file
from deploykit.benchmarks import Report
from deploykit.errors import OutputExistsError, RecipeError, storage_error
from deploykit.optimizers import DynamicConfig, StaticConfig
from deploykit.progress import Progress
from deploykit.recipe import BenchmarkStep, DynamicStep, ExportStep, Recipe, SimplifyStep, StaticStep, Step

_RECORD = ".recipe.json"
_PATHS = ("data", "source", "model")


def run_recipe(recipe: Recipe, output: Path, *, resume: bool, progress: Progress) -> dict[str, Artifact | Report]:
    """Run the steps in order.

    Args:
        recipe: The steps.
        output: Directory for `<step>/` artifacts and `<step>.json` reports.
        resume: Keep what an interrupted run of the same recipe finished.
        progress: Told about steps.

    Raises:
        OutputExistsError: The output is there, and `resume` is not given.
        RecipeError: The output was made by another recipe.
    """
    record = _open_output(recipe, output, resume=resume)
    made: dict[str, Artifact | Report] = {}
    previous: str | None = None
    for name, step in recipe.steps.items():
        target = output / (f"{name}.json" if isinstance(step, BenchmarkStep) else name)
        with progress.step(f"[{name}]"):
            if record.get(name) and target.exists():
                made[name] = _reopen(target, step)
                progress.note(f"[{name}] is kept from the interrupted run")
            else:
                # Whole, but not noted as done: the run was killed between the two.
                _remove(target)
                made[name] = _run_step(recipe, name, step, output, previous, progress)
                record[name] = True
                _write_record(output, record)
        if not isinstance(step, BenchmarkStep):
            previous = name
    return made


def _fingerprint(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps([recipe.tables(), str(recipe.folder.resolve())]).encode()).hexdigest()


def _open_output(recipe: Recipe, output: Path, *, resume: bool) -> dict[str, Any]:
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
        record: dict[str, Any] = {"fingerprint": _fingerprint(recipe)}
        _write_record(output, record)
        return record
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise RecipeError(f"{output} was not made by deploykit run", hint="choose another -o") from exc
    if found.get("fingerprint") != _fingerprint(recipe):
        raise RecipeError(f"{output} was made by another recipe, or this one has changed", hint="choose another -o")
    return found


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
    if isinstance(step, BenchmarkStep):
        return Report(json.loads(target.read_text(encoding="utf-8")))
    return Artifact.open(target)


def _remove(target: Path) -> None:
    import shutil

    if is_artifact(target):
        shutil.rmtree(target)
    elif target.is_file():
        target.unlink()


def _run_step(
    recipe: Recipe, name: str, step: Step, output: Path, previous: str | None, progress: Progress
) -> Artifact | Report:
    target = output / name
    params = step.model_dump(exclude={"step"})
    for key in _PATHS:
        if params.get(key) is not None:
            params[key] = _located(params[key], recipe, output, is_model=key == "model")
    if isinstance(step, BenchmarkStep):
        models = step.models or [n for n, s in recipe.steps.items() if not isinstance(s, BenchmarkStep)]
        earlier = models if step.models else models[: models.index(previous) + 1] if previous else models
        paths = [_located(m, recipe, output, is_model=True) for m in earlier]
        report = pipeline.benchmark(paths, progress=progress, **{k: v for k, v in params.items() if k != "models"})
        write_file(output / f"{name}.json", report.to_json().encode())
        return report
    if isinstance(step, ExportStep):
        return pipeline.export(params.pop("source"), target, progress=progress, **params)
    model = params.pop("model") or str(output / str(previous))
    verbs: dict[type[Step], Callable[..., Artifact]] = {
        SimplifyStep: pipeline.simplify,
        DynamicStep: _dynamic,
        StaticStep: _static,
    }
    return verbs[type(step)](model, target, progress=progress, **params)


def _dynamic(
    model: str, target: Path, *, exclude: list[str], weight_bits: str, per_channel: bool, **rest: Any
) -> Artifact:
    config = DynamicConfig(exclude=tuple(exclude), weight_bits=weight_bits, per_channel=per_channel)
    return pipeline.quantize_dynamic(model, target, config=config, **rest)


def _static(model: str, target: Path, *, min_cosine: float, data: str, progress: Progress, **config: Any) -> Artifact:
    config["exclude"] = tuple(config["exclude"])
    return pipeline.quantize_static(
        model, target, data=data, config=StaticConfig(**config), min_cosine=min_cosine, progress=progress
    )


def _located(text: str, recipe: Recipe, output: Path, *, is_model: bool) -> str:
    """A step's folder, or a path relative to the recipe; `module:function` stays as it is."""
    if is_model and text in recipe.steps:
        return str(output / text)
    file, sep, function = text.rpartition(":")
    if sep and file.endswith(".py"):
        return f"{recipe.folder / file}:{function}"
    if sep and function.isidentifier() and not (recipe.folder / text).exists():
        return text
    return str(recipe.folder / text)
