"""The verb `distill`: a small student learns to answer as a teacher does, and becomes a verified artifact."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, StepRecord
from deploykit.comparing import find_targets
from deploykit.data import LABELS, Dataset
from deploykit.errors import AccuracyError, DataError, OptimizationError
from deploykit.exporters import ExportOptions
from deploykit.exporters.base import DEFAULT_OPSET
from deploykit.exporters.live import undisturbed
from deploykit.exporters.pytorch import TorchSource
from deploykit.exporting import export_source
from deploykit.extras import version_of
from deploykit.fidelity import Answerer, Fidelity, compare_answers
from deploykit.goals import read_drop
from deploykit.optimizers.distillation import DistillConfig, check_distill_config
from deploykit.optimizers.distillation.cache import why_not_kept, with_answers
from deploykit.optimizers.distillation.distiller import Distillation, make_distiller
from deploykit.optimizers.distillation.networks import Network, move
from deploykit.optimizers.distillation.plan import Plan, make_plan
from deploykit.optimizers.training import Score, TrainConfig, Trained, check_train_config, train
from deploykit.optimizers.training.folder import TrainingFolder, settings_of
from deploykit.optimizers.training.losses import CLASSIFIERS
from deploykit.optimizers.training.outputs import tensors_of
from deploykit.pairing import Pair, networks_of, open_pair, rows_for
from deploykit.progress import Progress
from deploykit.runtimes import Device, open_session
from deploykit.specs import Array
from deploykit.staging import check_free
from deploykit.targets import choose_opset, parse_targets
from deploykit.trainable import find_score, known_as, opened, save_module, work_folder

_STUDENT = "student"
_LOG = "train.log"
_PROBED_ROWS = 32


def distill(
    teacher: str | Path | Any,
    output: str | Path,
    *,
    student: str | Path | Any,
    data: str | Path | Dataset,
    eval_data: str | Path | Dataset | None = None,
    metric: str | None = None,
    max_drop: float | str | None = None,
    config: DistillConfig | None = None,
    training: TrainConfig | None = None,
    teacher_inputs: Any = None,
    student_inputs: Any = None,
    dynamic: Sequence[str] = (),
    inputs: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    task: str | None = None,
    devices: Sequence[str | Device] = (),
    contract: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train a student to answer as a teacher does, and export it.

    The teacher is never changed. The exported model is compared with the trained student, as `export` compares; its
    evidence holds the metric of both, how often they agree, and how many parameters each has. The training stands in a
    folder beside the output, `OUTPUT.training`, and stays there: checkpoints, logs, and the student's weights in
    `student/` (a directory of Hugging Face where it is such a model) to be trained on.

    Args:
        teacher: `file.py:factory`, `package.module:factory` or a Hugging Face model directory, or a torch module of
            this process, of which a copy is taken.
        output: Where the artifact will stand; nothing may be there.
        student: The same kinds of source, or `derive:layers=N,width=F,ffn=F`: the teacher (a model of transformers)
            with fewer layers and narrower ones, which begins with the teacher's weights.
        data: What is learned on; `labels` are used where there are any.
        eval_data: What is judged on, after every epoch and at the end; the best weights are kept.
        metric: On the labels of `eval_data`; by default accuracy, where it applies, else the loss.
        max_drop: How much of the teacher's metric may be lost, 0.01 in the metric's units or "1%" of the teacher's
            value; nothing is asked by default.
        config: What of the two is compared.
        training: How long and how it is trained; what it says of a metric gives way to `metric`.
        teacher_inputs: Example inputs of a teacher in this process.
        student_inputs: Example inputs of a student in this process; by default the teacher's.
        dynamic: As for `export`, and so are the following.
        inputs: See there.
        dims: See there.
        opset: See there.
        task: See there.
        devices: See there.
        contract: See there.
        resume: Go on with the training beside the output, where there is one.
        progress: Told about steps, notes and epochs.

    Raises:
        SourceError: Teacher or student cannot be loaded, or is none of PyTorch.
        OptimizationError: They do not fit together, or what is asked for cannot be done.
        DataError: The data do not fit.
        AccuracyError: The student loses more than `max_drop`; the training stays.
        ExportError: No way leads to ONNX.
        ParityError: The exported graph gives other numbers than the student; the training stays.
        OutputExistsError: The output is taken, or a training is there and ``resume`` is not given.
        KeyboardInterrupt: Interrupted; the checkpoint is kept.
    """
    told, asked = progress or Progress(), config or DistillConfig()
    started, before = time.monotonic(), len(told.notes)
    check_distill_config(asked)
    settings = replace(training or TrainConfig(), metric="loss")
    check_train_config(settings)
    if settings.mixup:
        raise OptimizationError("mixup of samples that a teacher answers", hint="leave mixup out")
    drop = None if max_drop is None else read_drop(max_drop)
    (device, *_), _ = find_targets(devices)
    choose_opset(parse_targets(contract), opset, DEFAULT_OPSET)
    place = Path(output)
    check_free(place)
    work = work_folder(place)
    about = _about(teacher, student, place, asked)
    _check_begun(work, settings, about, resume=resume)
    options = ExportOptions(tuple(inputs), tuple(dynamic), opset, dims=dict(dims or {}), task=task)
    with undisturbed():
        pair = open_pair(teacher, student, (teacher_inputs, student_inputs), options, settings.seed, told)
        judged = None if eval_data is None else opened(eval_data)
        lesson = _prepare(pair, opened(data), judged, metric, asked, told)
        if drop is not None and lesson.score is None:
            raise OptimizationError(
                "a largest drop, and no metric to hold to it", hint="give labelled data: --eval DATA"
            )
        settings = replace(settings, metric="loss" if lesson.score is None else lesson.score.name)
        trained = _train(lesson, asked, settings, work, about, told, resume=resume)
        source = pair.student.renewed()
        assert isinstance(source, TorchSource)
        source.assets = save_module(pair.student, work / _STUDENT, work / _LOG)
        step = StepRecord(
            step="distill",
            params=_params(lesson, asked, settings, trained),
            tools={n: found for n in ("torch", "pytorch-lightning", "transformers") if (found := version_of(n))},
            parent=None,
            seconds=round(time.monotonic() - started, 3),
            notes=list(told.notes[before:]),
        )
        return export_source(
            source, place, options=options, devices=devices, contract=contract, steps=[step],
            judge=lambda model: [_judge(lesson, model, device, drop)], progress=told,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Lesson:
    """All that a training needs.

    Attributes:
        pair: Teacher and student.
        networks: The same, as batches are given to them.
        plan: What is compared.
        data: To learn on, as both take it.
        eval_data: To be judged on; None for no judgement.
        judged: The same as the user gave it.
        score: The metric; None where there is none.
    """

    pair: Pair
    networks: tuple[Network, Network]
    plan: Plan
    data: Dataset
    eval_data: Dataset | None
    judged: Dataset | None
    score: Score | None


def _about(teacher: Any, student: Any, place: Path, asked: DistillConfig) -> dict[str, Any]:
    """What a training to go on with has to be the same in, beside its settings and data."""
    loss = {name: value for name, value in asdict(asked).items() if name != "cache"}
    return {"verb": "distill", "teacher": known_as(teacher, place), "student": known_as(student, place), **loss}


def _check_begun(work: Path, settings: TrainConfig, about: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse a folder that is taken, or another training, before anything is loaded; which metric, is not known yet.

    Raises:
        OutputExistsError: A training is there and `resume` is not given, or something else is.
        OptimizationError: It was another one.
    """
    plan = settings_of(settings, about)
    del plan["config"]["metric"]
    TrainingFolder(work).check(plan, resume=resume)


def _prepare(
    pair: Pair, data: Dataset, eval_data: Dataset | None, metric: str | None, asked: DistillConfig, told: Progress
) -> _Lesson:
    """See that both, the data and what is asked for fit together."""
    networks = networks_of(pair)
    rows = rows_for(pair, networks, data)
    held_out = None if eval_data is None else rows_for(pair, networks, eval_data)
    head = None if held_out is None else held_out.head(_PROBED_ROWS)
    labels = None if head is None else tensors_of(head, "cpu").get(LABELS)
    plan = make_plan(*networks, tensors_of(rows.head(_PROBED_ROWS), "cpu"), asked, judged=labels)
    for note in plan.notes:
        told.note(note)
    score = _score(metric, eval_data, head, plan)
    if head is not None and score is None and "task" in plan.weights and LABELS not in head:
        raise DataError(f"the evaluation data have no {LABELS!r}, and the loss is on labels too", hint="add them")
    return _Lesson(pair, networks, plan, rows, held_out, eval_data, score)


def _score(asked: str | None, data: Dataset | None, head: Mapping[str, Array] | None, plan: Plan) -> Score | None:
    """The metric that both are judged by.

    Raises:
        DataError: It is asked for, and cannot be computed.
    """
    if asked == "loss":
        return None
    chosen = None if asked is None else find_score(asked)
    if chosen is not None and plan.kind == "embedding":
        raise DataError(
            f"{asked} of embeddings", expected="their cosines with the teacher's", hint="leave --metric out"
        )
    if chosen is not None and (data is None or head is None or LABELS not in head):
        lacking = "there are no data to judge on" if data is None else f"{data.source} has no {LABELS!r}"
        raise DataError(f"{asked} is asked for, and {lacking}", hint="give labelled data: --eval DATA")
    if chosen is not None or head is None or LABELS not in head or plan.kind != "classification":
        return chosen
    # Labels of another form are those of a loss of the user's choice.
    labels = head[LABELS]
    return find_score("accuracy") if labels.ndim == 1 and labels.dtype.kind in "iub" else None


def _train(
    lesson: _Lesson,
    asked: DistillConfig,
    settings: TrainConfig,
    work: Path,
    about: Mapping[str, Any],
    told: Progress,
    *,
    resume: bool,
) -> Trained:
    """Train the student in place."""
    teacher, student = lesson.networks
    data, held_out = lesson.data, lesson.eval_data
    if "task" in lesson.plan.weights and settings.loss in (*CLASSIFIERS, "ctc"):
        data = _with_known_labels(data, lesson.plan)
        held_out = None if held_out is None else _with_known_labels(held_out, lesson.plan)
    few = tensors_of(data.head(_PROBED_ROWS), "cpu")
    why = why_not_kept(data, lesson.plan, asked.cache)
    if why is None:
        data = with_answers(
            data, teacher, lesson.plan, settings.batch_size,
            lambda done: told.advance(done, lesson.data.length, "samples asked of the teacher"),
            trim=settings.trim_padding,
        )  # fmt: skip
    else:
        told.note(f"the teacher is asked in every epoch: {why}")
    distiller = make_distiller(student, lesson.plan, settings.seed)
    objective = Distillation(teacher, student, lesson.plan, asked, settings)
    try:
        with objective.looking():
            objective.check(distiller, few)
            return train(
                distiller, data, settings, work, objective=objective, eval_data=held_out, score=lesson.score,
                feed=objective.feed, resume=resume, about=about, progress=told,
            )  # fmt: skip
    finally:
        move(teacher.module, "cpu")


def _with_known_labels(data: Dataset, plan: Plan) -> Dataset:
    """The same data, whose labels are classes that the models have.

    Raises:
        DataError: While it is read: one is not.
    """
    classes = max(2, plan.answer[-1] if plan.answer else 2)

    def batches(size: int) -> Iterator[dict[str, Array]]:
        for batch in data.batches(size):
            labels = batch.get(LABELS)
            if labels is not None and labels.dtype.kind not in "iub":
                raise DataError(f"labels of {data.source} are {labels.dtype}", expected="integer classes")
            if labels is not None and int(labels.max()) >= classes:
                raise DataError(f"{data.source} has label {labels.max()}", expected=f"classes from 0 to {classes - 1}")
            yield batch

    return Dataset(data.source, batches, length=data.length, names=data.names)


def _judge(lesson: _Lesson, model: Path, device: Device, drop: tuple[float, bool] | None) -> dict[str, Any]:
    """The evidence: how student and teacher answer, and how large they are.

    Raises:
        AccuracyError: More is lost than may be.
    """
    large, small = (network.parameters for network in lesson.networks)
    ratio = large / max(1, small)
    told = f"{small:,} parameters, {ratio:.1f} times fewer than the teacher's {large:,}"
    record: dict[str, Any] = {"parameters": small, "teacher_parameters": large, "ratio": round(ratio, 3)}
    if lesson.judged is None:
        return {"summary": f"not judged: there were no data for it; {told}", "certified": False, **record}
    plan, teacher = lesson.plan, lesson.pair.teacher.source
    with open_session(model, device) as session:
        found = compare_answers(
            Answerer(lambda feeds: teacher.run(feeds), teacher.signature, plan.teacher_output),
            Answerer(session.run, session.signature, plan.student_output),
            lesson.judged,
            plan.kind,
            None if lesson.score is None else lesson.score.name,
        )
    if drop is not None and lesson.score is not None:
        _check_drop(found, drop, lesson.score)
    source = lesson.judged.source
    return {
        "summary": f"{found.describe('teacher')} on {source} ({found.samples} samples); {told}",
        "certified": drop is not None,
        "data": source,
        "device": str(device),
        "output": plan.student_output,
        **found.record(),
        **record,
    }


def _check_drop(found: Fidelity, drop: tuple[float, bool], score: Score) -> None:
    assert found.value is not None and found.reference is not None
    lost = found.reference - found.value if score.higher_is_better else found.value - found.reference
    allowed = drop[0] * abs(found.reference) if drop[1] else drop[0]
    if lost > allowed + 1e-9:
        raise AccuracyError(
            f"the student's {score.name} is {found.value:.4f}, the teacher's {found.reference:.4f}",
            expected=f"{allowed:.4g} less at most",
            hint="train longer (--epochs) or a larger student, or allow more (--max-drop)",
        )


def _params(lesson: _Lesson, asked: DistillConfig, settings: TrainConfig, trained: Trained) -> dict[str, Any]:
    """For the lineage."""
    plan, pair = lesson.plan, lesson.pair
    made = {} if pair.derived is None else {"tensors_copied": pair.derived.copied, "tensors_cut": pair.derived.cut}
    return {
        "teacher": pair.teacher.label,
        "student": pair.student.label,
        **made,
        "data": lesson.data.source,
        "eval_data": None if lesson.judged is None else lesson.judged.source,
        "kind": plan.kind,
        "weights": dict(plan.weights),
        "temperature": asked.temperature,
        "embedding_loss": plan.embedding_loss or None,
        "features": [f"{p.teacher}={p.student}" for p in plan.pairs],
        "attention": [f"{theirs[0]}={ours[0]}" for theirs, ours in plan.attention],
        "config": asdict(settings),
        "epochs": trained.epochs,
        "stopped": trained.stopped,
        "before": trained.before,
        "after": trained.metric,
        "history": [dict(entry) for entry in trained.history],
    }
