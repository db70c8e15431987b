"""The verb of this package: `train`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.data import Dataset, user_frame
from deploykit.errors import DeploykitError, OptimizationError, first_line, storage_error
from deploykit.extras import require
from deploykit.optimizers.training.config import LOSS, TrainConfig, check_train_config
from deploykit.optimizers.training.course import Course, Stopped
from deploykit.optimizers.training.evaluating import Evaluation
from deploykit.optimizers.training.folder import (
    LOG,
    WEIGHTS,
    TrainingFolder,
    load_tensors,
    save_tensors,
    settings_of,
)
from deploykit.optimizers.training.losses import Objective, Supervised
from deploykit.optimizers.training.outputs import Feed, feed_by_name
from deploykit.optimizers.training.padding import padded_share, trimmed
from deploykit.optimizers.training.probing import dropout_of, probe, try_evaluation
from deploykit.optimizers.training.rows import Rows, Survey, discard, gather, survey
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
        before: The metric, or the loss, before the first step; None without evaluation data.
        metric: The same of the weights that were kept.
        epochs: Epochs that were run, in this process and before.
        stopped: "epochs" or "patience".
        weights: The file that holds the weights.
    """

    module: Any
    history: tuple[dict[str, float], ...]
    before: float | None
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
    about: Mapping[str, Any] | None = None,
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
        resume: Go on with the training in ``folder``, where there is one; it has to be the same one: settings, data,
            evaluation data, and names and shapes of the weights.
        about: What else has to be the same, by name: numbers and strings, such as the module's source.
        progress: Told how far it is.

    Raises:
        OptimizationError: A setting is wrong, nothing can be trained, the loss is not finite any more, or the training
            in ``folder`` is another one.
        DataError: The data do not fit the module, the loss or the metric.
        OutputExistsError: A training is in ``folder`` and ``resume`` is not given, or something else is.
        StorageError: The folder cannot be written, or the disk is full; the last checkpoint stays.
        KeyboardInterrupt: SIGINT or SIGTERM came; the checkpoint is written.
    """
    check_train_config(config)
    _check_request(config, objective, eval_data, score)
    told = progress or Progress()
    place = TrainingFolder(Path(folder))
    settings = settings_of(config, about)
    place.check(settings, resume=resume)
    load_libraries()
    with dropout_of(module, config.dropout) as changed, untouched_randomness():
        if config.dropout is not None:
            told.note(f"dropout {config.dropout:g} in {changed} layers")
        rows, judged, found = _open(place, settings, module, data, eval_data, told, trim=config.trim_padding)
        try:
            _tell_padding(rows, config, told)
            if found is None or not found[STATE]["stopped"]:
                fed = feed or feed_by_name
                supervised = Supervised(config, fed)
                held_out = trimmed(eval_data) if eval_data is not None and config.trim_padding else eval_data
                evaluation = _evaluation(config, objective, supervised, held_out, score, fed)
                try:
                    probe(
                        module, rows, config, objective, supervised, fed, told,
                        None if eval_data is None or judged is None else (eval_data, judged),
                    )  # fmt: skip
                    before = found[STATE]["before"] if found else _judge_first(evaluation, module, objective, told)
                except BaseException:
                    place.forget()
                    raise
                with stop_on_signals() as stop:
                    course = Course(
                        module, rows, config, objective or supervised, evaluation, place, after_step, told, stop.is_set
                    )
                    course.before = before
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
    place: TrainingFolder,
    settings: Mapping[str, Any],
    module: Any,
    data: Dataset,
    eval_data: Dataset | None,
    told: Progress,
    *,
    trim: bool,
) -> tuple[Rows, Survey | None, dict[str, Any] | None]:
    """The rows, what was seen of the evaluation data, and the checkpoint to go on from where there is one."""
    place.begin()
    try:
        discard(place.rows)
        with told.step(f"read {data.source}"):
            rows = gather(data, place.rows, trim=trim)
            judged = None if eval_data is None else survey(eval_data)
        plan = {
            **settings, "data": rows.seen.plan(), "eval_data": {"rows": 0} if judged is None else judged.plan(),
            "module": _form_of(module),
        }  # fmt: skip
        found = load_tensors(place.last) if place.open(plan) else None
        if found is not None and STATE not in found:
            raise OptimizationError(f"{place.last} is no checkpoint of ours", hint=f"remove it: rm -r {place.path}")
    except BaseException:
        discard(place.rows)
        place.forget()
        raise
    return rows, judged, found


def _tell_padding(rows: Rows, config: TrainConfig, told: Progress) -> None:
    share = padded_share(rows.arrays)
    if share >= _MUCH_PADDING and not config.trim_padding:
        told.note(f"{share:.0%} of the positions are padding, which is computed too; --trim-padding leaves most out")


def _form_of(module: Any) -> str:
    """A digest of the names, types and shapes of a module's weights."""
    torch = require("torch", extra="train")
    forms = [(n, str(v.dtype), tuple(v.shape)) for n, v in module.state_dict().items() if torch.is_tensor(v)]
    return hashlib.sha256(repr(forms).encode()).hexdigest()


def _judge_first(
    evaluation: Evaluation | None, module: Any, objective: Objective | None, told: Progress
) -> float | None:
    """What is watched, before the training, on the device that it will be measured on."""
    if evaluation is None:
        return None
    torch = require("torch", extra="train")
    moved = [part for part in (module, objective) if isinstance(part, torch.nn.Module)]
    with told.step(f"{evaluation.name} before the training"):
        try:
            if torch.cuda.is_available():
                for part in moved:
                    part.cuda()
            return try_evaluation(evaluation, module)
        except torch.OutOfMemoryError as exc:
            raise OptimizationError(
                "the GPU has no memory for the evaluation", hint="take a smaller batch size"
            ) from exc
        finally:
            for part in moved:
                part.cpu()


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
        except OSError as exc:
            raise storage_error(exc, place.path) or exc from exc
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
        epoch = state["best_epoch"]
        last = epoch is None
        save_tensors(_last_weights(place, config) if last else load_tensors(place.best(epoch)), kept)
    _load(module, load_tensors(kept))
    place.write_history(state["history"])  # a kill may have come between it and the last checkpoint
    place.keep_best(None)
    module.eval()
    history = tuple(dict(entry) for entry in state["history"])
    return Trained(module, history, state["before"], state["best"], state["epoch"], state["stopped"], kept)


def _last_weights(place: TrainingFolder, config: TrainConfig) -> dict[str, Any]:
    prefix = "module." if config.ema is None else "average.module."
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
