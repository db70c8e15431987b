"""What jobs do: make a variant, judge variants, screen, tune and measure them.

Each is a `jobs.Deed`: a function of its parameters and of the contents of its inputs. Inputs "model:NAME" are variants,
"data" and "eval_data" datasets; a dataset that a function gives is named in the parameters instead. "effort" among the
parameters is the time that a job may take: no part of what the result is about. A result that says that it is
"incomplete" is not to be taken for that of the same job with more time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact
from deploykit.benchmarks import Candidate, Settings, measure
from deploykit.benchmarks.arena import ProcessArena
from deploykit.benchmarks.screening import screen as screen_all
from deploykit.benchmarks.tuner import search
from deploykit.benchmarks.tuner_space import Config, stages_for
from deploykit.data import Dataset
from deploykit.errors import DeploykitError, SearchError
from deploykit.goals import Goal, Judge
from deploykit.machine import inspect_machine
from deploykit.models import LoadedModel, benchmark_feeds, load_model
from deploykit.progress import Progress
from deploykit.proof import prove_placement
from deploykit.recipe import Recipe
from deploykit.runner import run_recipe
from deploykit.runtimes import require_device
from deploykit.search.crew import NOT_TRIED
from deploykit.search.graphs import facts_of
from deploykit.search.so_far import teller
from deploykit.search.state import timed_sets

# Rows that a model is compared with its parent on, where no target was given.
_ROWS = 256
_KEPT = ("sqnr_db", "agreement", "metric", "value", "parent", "samples")

Inputs = Mapping[str, Path]


def make(params: Mapping[str, Any], inputs: Inputs, folder: Path, told: Progress) -> dict[str, Any]:
    """Run one step of a recipe.

    Args:
        params: "name" and "table" of the step, without what is among the inputs.
        inputs: "model", "data", "source", and "merge", the state of a calibration: override what the table says.
        folder: Receives the artifact.
        told: Told about steps and notes.

    Returns:
        "artifact": its place below the folder; and what it is, see `graphs.facts_of`.

    Raises:
        DeploykitError: As the step's verb.
    """
    name = str(params["name"])
    table = {**params["table"], **{key: str(path.absolute()) for key, path in inputs.items()}}
    if "merge" in inputs:
        table |= {"merge": [table["merge"]], "merge_only": True}
    recipe = Recipe.from_tables({name: table}, Path.cwd())
    made = run_recipe(recipe, folder / "made", resume=False, progress=told)[name]
    if not isinstance(made, Artifact):
        raise SearchError(f"{table.get('step', name)} makes no model", expected="a step that makes one")
    return {"artifact": f"made/{name}", **facts_of(made)}


def judge(params: Mapping[str, Any], inputs: Inputs, folder: Path, told: Progress) -> dict[str, Any]:
    """Judge variants on one device, on real data, against the model that they come from; and see what they run on.

    What is found of each is written to a file at once: a model may end the process, or never answer.

    Args:
        params: "device"; "goal", the fields of `goals.Goal`; "seats": pairs of a variant's name and a
            precision; "placed": names whose kernels are looked at; "data" where a function gives it; among the
            "effort" the file "so_far", see `so_far`.
        inputs: "parent", "model:NAME", and "data".
        folder: Unused.
        told: Told how far it is.

    Returns:
        "found": by name and precision "quality", "placement" or "error".
    """
    device = require_device(params["device"])
    goal = Goal(**params["goal"])
    source = inputs.get("data") or params.get("data")
    parent = load_model(inputs["parent"])
    deadline, incomplete = time.monotonic() + params["effort"]["budget_s"], False
    longest = 0.0
    tell = teller(params["effort"].get("so_far"))
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="deploykit-judge-") as name:
        judged = None
        if source is not None:
            limit = None if goal.asked else _ROWS
            judged = Judge(
                parent.path, parent.signature, device, Dataset.open(source), goal, Path(name), limit=limit
            )  # fmt: skip
        for number, (model, precision) in enumerate(params["seats"]):
            told.advance(number, len(params["seats"]), "models judged")
            entry: dict[str, Any] = {}
            found[f"{model}/{precision}"] = entry
            began = time.monotonic()
            if number and began + longest > deadline:
                entry["error"] = NOT_TRIED
                incomplete = True
                continue
            tell({"began": f"{model}/{precision}"})
            try:
                path = load_model(inputs[f"model:{model}"]).path
                if judged is not None:
                    score = judged.judge(path, precision=precision)
                    record = judged.record(score)
                    entry["quality"] = {
                        "summary": score.describe(goal), "met": score.met, "collapsed": score.collapsed,
                        **{k: record.get(k) for k in _KEPT}
                    }  # fmt: skip
                if model in params["placed"]:
                    entry["placement"] = prove_placement(path, device, {})
            except DeploykitError as exc:
                entry["error"] = str(exc)
                incomplete = True  # a failure is not kept: memory may have been short
            tell({"judged": f"{model}/{precision}", "entry": entry})
            longest = max(longest, time.monotonic() - began)
    return {"found": found, "incomplete": incomplete}


def screen(params: Mapping[str, Any], inputs: Inputs, folder: Path, told: Progress) -> dict[str, Any]:
    """Time candidates in turns, and send the slower ones home.

    Args:
        params: "seats": what `Place.as_params` gives, the reference first; "settings", the fields of
            `benchmarks.Settings`; "dims", "keep".
        inputs: "model:NAME", and "data".
        folder: Unused.
        told: Told how far it is.

    Returns:
        "found": one entry a seat, see `Screened.as_dict`.
    """
    candidates, feeds, settings = _asked(params, inputs)
    found = screen_all(candidates, feeds, settings, params["effort"]["budget_s"], keep=params["keep"], progress=told)
    # What failed may have failed for want of memory: that is not kept either.
    late = any(entry.status.startswith(("not tried", "failed")) for entry in found)
    return {"found": [entry.as_dict() for entry in found], "incomplete": late}


def tune(params: Mapping[str, Any], inputs: Inputs, folder: Path, told: Progress) -> dict[str, Any]:
    """Search the runtime's settings for one seat.

    Args:
        params: As for `screen`, with one seat; "objective" for `stages_for`, and "batches": whether larger ones may be
            tried.
        inputs: "model:NAME", and "data".
        folder: Unused.
        told: Told how far it is.

    Returns:
        "chosen": the fields of `tuner_space.Config`; "trials".
    """
    (candidate,), _, settings = _asked(params, inputs)
    model = _reference(params, inputs)
    data = _dataset(params, inputs)
    machine = inspect_machine()
    base = Config(
        candidate.threads or machine.cores_allowed, sessions=candidate.sessions,
        concurrency=candidate.concurrency or 1, batch=settings.batch,
        precision=candidate.precision or settings.precision, optimize=candidate.optimize,
        settings=tuple(sorted(candidate.settings.items())),
    )  # fmt: skip
    stages = stages_for(
        candidate.device, params["objective"], machine, native=False, batches=params["batches"]
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="deploykit-tune-") as name,
        ProcessArena(
            candidate, settings, lambda n: benchmark_feeds(model, data, n, params["dims"])[0], Path(name),
            by_wall=params["objective"] == "throughput",
        ) as arena,
    ):  # fmt: skip
        found = search(
            base, stages, arena, params["effort"]["budget_s"],
            told=lambda text, left, of: told.advance(of - left, of, f"settings of {text}"),
        )  # fmt: skip
    return {"chosen": found.chosen.as_dict(), "trials": [s.as_dict() for s in found.trials]}


def decide(params: Mapping[str, Any], inputs: Inputs, folder: Path, told: Progress) -> dict[str, Any]:
    """Measure the best well: interleaved rounds in fresh processes, and a verdict.

    Args:
        params: As for `screen`.
        inputs: "model:NAME", and "data".
        folder: Unused.
        told: Told how far it is.

    Returns:
        "report": the document of a `benchmarks.Report`.
    """
    candidates, feeds, settings = _asked(params, inputs)
    within_s = params["effort"]["budget_s"]
    return {"report": measure(candidates, feeds, settings, data=None, progress=told, within_s=within_s).data}


def _asked(params: Mapping[str, Any], inputs: Inputs) -> tuple[list[Candidate], list[Any], Settings]:
    """Candidates, inputs and settings that a timed job is told."""
    effort = {k: v for k, v in params["effort"].items() if k != "budget_s"}
    settings = Settings(**{**params["settings"], **effort})
    loaded: dict[str, LoadedModel] = {}
    candidates = []
    for seat in params["seats"]:
        name = seat["model"]
        model = loaded.setdefault(name, load_model(inputs[f"model:{name}"]))
        given = {k: v for k, v in seat.items() if k not in ("model", "label")}
        candidates.append(
            Candidate(seat["label"], str(model.path), sha256=model.digest, size_bytes=model.size_bytes, **given)
        )
    feeds, origin, size = benchmark_feeds(
        _reference(params, inputs), _dataset(params, inputs), settings.batch, params["dims"]
    )
    return candidates, feeds[: timed_sets(size)], replace(settings, batch=size, inputs=origin)


def _reference(params: Mapping[str, Any], inputs: Inputs) -> LoadedModel:
    return load_model(inputs[f"model:{params['seats'][0]['model']}"])


def _dataset(params: Mapping[str, Any], inputs: Inputs) -> Dataset | None:
    source = inputs.get("data") or params.get("data")
    return Dataset.open(source) if source is not None else None
