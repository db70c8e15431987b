"""The verb of this package: `train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.data import Dataset, user_frame
from deploykit.errors import DeploykitError, OptimizationError, first_line
from deploykit.extras import require
from deploykit.optimizers.training.config import LOSS, TrainConfig, check_train_config
from deploykit.optimizers.training.course import Course, Stopped
from deploykit.optimizers.training.evaluating import Evaluation
from deploykit.optimizers.training.folder import LOG, WEIGHTS, TrainingFolder, load_tensors, save_tensors
from deploykit.optimizers.training.losses import Objective, Supervised
from deploykit.optimizers.training.outputs import Feed, feed_by_name
from deploykit.optimizers.training.padding import padded_share, trimmed
from deploykit.optimizers.training.probing import probe, set_dropout
from deploykit.optimizers.training.rows import Rows, discard, gather
from deploykit.optimizers.training.scoring import Score
from deploykit.optimizers.training.surroundings import (
    load_libraries,
    silent_lightning,
    stop_on_signals,
    untouched_randomness,
)
from deploykit.optimizers.training.trainee import STATE, make_trainee, make_trainer, precision_of
from deploykit.progress import Progress, quiet

# Less is not worth a word.
_MUCH_PADDING = 0.25


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training gave.

    Attributes:
        module: The same module, with the best weights, or their average; in evaluation mode, on the CPU.
        history: One entry an epoch: epoch, step, learning_rate, loss and the other parts of the objective, and, with
            evaluation data, eval_loss and the metric by its name; seconds since the start.
        metric: The metric of the weights that were kept, or their loss; None without evaluation data.
        epochs: Epochs that were run, in this process and before.
        stopped: "epochs" or "patience".
        weights: The file that holds the weights.
    """

    module: Any
    history: tuple[dict[str, float], ...]
    metric: float | None
    epochs: int
    stopped: str
    weights: Path


def train(
    module: Any,
    data: Dataset,
    config: TrainConfig,
    folder: Path,
    *,
    objective: Objective | None = None,
    eval_data: Dataset | None = None,
    score: Score | None = None,
    feed: Feed | None = None,
    after_step: Callable[[Any, int], None] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train a module in place, on a GPU where there is one.

    Checkpoints, logs and the history stand in ``folder`` (see `folder.TrainingFolder`). After kill -9, ``resume`` loses
    the steps since the last checkpoint and gives what an uninterrupted training gives. So does an interrupt, which
    ends the step, writes the checkpoint, says how to go on, and is raised again as KeyboardInterrupt.

    Args:
        module: A torch module; its forward takes the inputs of the data.
        data: Inputs and, unless ``objective`` does without, `labels`; read once.
        config: Settings.
        folder: For all that is written; no training may be there, unless ``resume`` is given.
        objective: What is minimised, in place of the config's loss. Where it is a torch module itself, it moves along,
            its parameters are trained, and checkpoints hold it.
        eval_data: What the metric is measured on after every epoch, to keep the best weights; without it the last
            weights are kept.
        score: The metric that `config.metric` names; not for "loss".
        feed: How a batch is given to the module; by name or position by default.
        after_step: Called with the module and the number of steps after each, such as to keep pruned weights at zero.
        resume: Go on with the training in ``folder``, where there is one.
        progress: Told how far it is.

    Raises:
        OptimizationError: A setting is wrong, nothing can be trained, or the loss is not finite any more.
        DataError: The data do not fit the module, the loss or the metric.
        OutputExistsError: A training is in ``folder``, and ``resume`` is not given.
        KeyboardInterrupt: SIGINT or SIGTERM came; the checkpoint is written.
    """
    check_train_config(config)
    _check_request(config, objective, eval_data, score)
    load_libraries()
    told = progress or Progress()
    place = TrainingFolder(Path(folder))
    if config.dropout is not None:
        told.note(f"dropout {config.dropout:g} in {set_dropout(module, config.dropout)} layers")
    with untouched_randomness():
        rows, found = _open(place, config, data, told, resume=resume)
        try:
            _tell_padding(rows, config, told)
            if found is None or not found[STATE]["stopped"]:
                fed = feed or feed_by_name
                supervised = Supervised(config, fed)
                _probe(place, module, rows, config, objective, supervised, fed, told)
                held_out = trimmed(eval_data) if eval_data is not None and config.trim_padding else eval_data
                evaluation = _evaluation(config, objective, supervised, held_out, score, fed)
                with stop_on_signals() as stop:
                    course = Course(
                        module, rows, config, objective or supervised, evaluation, place, after_step, told, stop.is_set
                    )
                    found = _run(course, place, found, told)
        finally:
            discard(place.rows)
    return _finish(module, found[STATE], place, config)


def _check_request(
    config: TrainConfig, objective: Objective | None, eval_data: Dataset | None, score: Score | None
) -> None:
    """Refuse arguments that contradict each other.

    Raises:
        OptimizationError: They do.
    """
    if objective is not None and config.mixup:
        raise OptimizationError("mixup mixes the labels of the config's own loss", hint="set mixup to 0")
    if config.patience is not None and eval_data is None:
        raise OptimizationError("patience needs data that the metric is measured on", hint="give evaluation data")
    if eval_data is not None and config.metric != LOSS and (score is None or score.name != config.metric):
        name = "none" if score is None else score.name
        raise OptimizationError(f"the metric is {config.metric}, and the score that was given is {name}")
    if config.precision == "fp16" and not require("torch", extra="train").cuda.is_available():
        raise OptimizationError("fp16 is trained on GPUs, and there is none", expected="fp32, bf16 or auto")


def _open(
    place: TrainingFolder, config: TrainConfig, data: Dataset, told: Progress, *, resume: bool
) -> tuple[Rows, dict[str, Any] | None]:
    """The rows, and the checkpoint to go on from where there is one."""
    place.check(resume=resume)
    discard(place.rows)
    try:
        with told.step(f"read {data.source}"):
            rows = gather(data, place.rows, trim=config.trim_padding)
        begun = place.open(config, {"rows": rows.length, "arrays": ", ".join(sorted(rows.arrays))})
        found = load_tensors(place.last) if begun else None
        if found is not None and STATE not in found:
            raise OptimizationError(f"{place.last} is no checkpoint of ours", hint=f"remove it: rm -r {place.path}")
    except BaseException:
        discard(place.rows)
        place.abandon()
        raise
    return rows, found


def _tell_padding(rows: Rows, config: TrainConfig, told: Progress) -> None:
    share = padded_share(rows.arrays)
    if share >= _MUCH_PADDING and not config.trim_padding:
        told.note(f"{share:.0%} of the positions are padding, which is computed too; --trim-padding leaves most out")


def _probe(place: TrainingFolder, *args: Any) -> None:
    try:
        probe(*args)
    except DeploykitError:
        place.forget()
        raise


def _evaluation(
    config: TrainConfig,
    objective: Objective | None,
    supervised: Supervised,
    eval_data: Dataset | None,
    score: Score | None,
    feed: Feed,
) -> Evaluation | None:
    if eval_data is None:
        return None
    watched = score if config.metric != LOSS else None
    return Evaluation(
        eval_data,
        watched,
        supervised.loss if objective is None else None,
        objective if watched is None else None,
        feed,
        config.batch_size,
    )


def _run(course: Course, place: TrainingFolder, found: Mapping[str, Any] | None, told: Progress) -> dict[str, Any]:
    """Train to the end.

    Returns:
        The last checkpoint's state under its key.
    """
    precision, why = precision_of(course.config.precision)
    if why:
        told.note(why)
    begun_at = 0 if found is None else int(found[STATE]["step"])
    if begun_at:
        told.note(f"the training goes on after step {begun_at} of {course.steps}")
    with silent_lightning(), told.step(f"train {course.config.epochs} epochs"), quiet(place.path / LOG):
        course.module.train()
        trainee = make_trainee(course, place)
        trainer = make_trainer(course.config, place, precision, begun_at=begun_at)
        try:
            trainer.fit(trainee, ckpt_path=place.last if found is not None else None, weights_only=True)
        except (Stopped, SystemExit) as exc:
            # Lightning makes a SystemExit of signals that come while it runs.
            if (
                isinstance(exc, SystemExit)
                and not isinstance(exc.__context__, KeyboardInterrupt)
                and not _by_signal(exc)
            ):
                raise
            held = (
                f"go on from {place.last} with --resume (resume=True)"
                if place.last.exists()
                else "there was no checkpoint yet"
            )
            told.note(f"interrupted after step {course.step} of {course.steps}; {held}")
            raise KeyboardInterrupt from None
        except DeploykitError:
            raise
        except RuntimeError as exc:
            raise _explained(exc, course) from exc
        finally:
            course.module.cpu()
    return {STATE: course.state()}


def _by_signal(exc: SystemExit) -> bool:
    return type(exc).__name__ == "SIGTERMException"


def _explained(exc: RuntimeError, course: Course) -> Exception:
    """A failure in a step, in our own words where it is the user's to mend."""
    torch = require("torch", extra="train")
    where = f"step {course.step + 1}{user_frame(exc)}"
    if isinstance(exc, torch.OutOfMemoryError):
        return OptimizationError(
            f"the GPU has no memory left in {where}",
            hint=f"take a smaller batch size (it was {course.config.batch_size}), and another folder",
        )
    return OptimizationError(f"the training failed in {where} ({first_line(exc)})", hint="mend the module or the data")


def _finish(module: Any, state: Mapping[str, Any], place: TrainingFolder, config: TrainConfig) -> Trained:
    """Load the weights that are kept, and write them."""
    kept = place.path / WEIGHTS
    if not kept.exists():
        source = place.best if place.best.exists() else None
        weights = load_tensors(source) if source else _last_weights(place, averaged=config.ema is not None)
        save_tensors(weights, kept)
    _load(module, load_tensors(kept))
    place.discard()
    module.eval()
    history = tuple(dict(entry) for entry in state["history"])
    return Trained(module, history, state["best"], state["epoch"], state["stopped"], kept)


def _last_weights(place: TrainingFolder, *, averaged: bool) -> dict[str, Any]:
    prefix = "average.module." if averaged else "module."
    whole = load_tensors(place.last)["state_dict"]
    return {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}


def _load(module: Any, weights: Mapping[str, Any]) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as exc:
        raise OptimizationError(
            f"the trained weights do not fit the module ({first_line(exc)})",
            expected="the module that the training was begun with",
        ) from exc
