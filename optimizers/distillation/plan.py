"""What of a teacher and a student is compared: decided once, on a few rows, before anything is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploykit.data import LABELS
from deploykit.errors import OptimizationError
from deploykit.optimizers.distillation.config import DistillConfig
from deploykit.optimizers.distillation.derive import evenly
from deploykit.optimizers.distillation.networks import (
    Network,
    attention_modules,
    blocks,
    first_tensor,
    showing_attention,
    watched,
)

MASK = "attention_mask"
_EMBEDDINGS = ("sentence_embedding", "text_embeds", "image_embeds", "last_hidden_state", "pooler_output")
_SCORES = ("logit", "score", "prob")
_DIMENSIONS = {"classification": (1, 2), "frames": (3,), "embedding": (2, 3)}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two inner modules whose outputs are compared.

    Attributes:
        teacher: Name of the teacher's.
        student: Name of the student's.
        axis: The axis that runs over the channels.
        widths: Channels of the student's output and of the teacher's.
    """

    teacher: str
    student: str
    axis: int
    widths: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared.

    Attributes:
        kind: "classification", "embedding" or "frames".
        teacher_output: The judged output of the teacher, by name.
        student_output: The judged output of the student.
        teacher_probabilities: Whether the teacher gives probabilities and not scores.
        student_probabilities: The same of the student.
        weights: The parts of the loss that have one, in the order of `config.PARTS`.
        embedding_loss: "cosine", "mse" or "similarity".
        widths: Width of an embedding of the student and of the teacher.
        answer: Shape of the teacher's answer to one row.
        pairs: Inner modules whose features are compared.
        attention: Modules whose distributions are compared: teacher's and student's, each with the place of the
            distributions among what it returns.
        notes: What the user must know.
    """

    kind: str
    teacher_output: str
    student_output: str
    teacher_probabilities: bool
    student_probabilities: bool
    weights: Mapping[str, float]
    embedding_loss: str
    widths: tuple[int, int]
    answer: tuple[int, ...]
    pairs: tuple[Pair, ...]
    attention: tuple[tuple[tuple[str, int], tuple[str, int]], ...]
    notes: tuple[str, ...]

    @property
    def looks_inside(self) -> bool:
        """Whether more of the teacher is needed than its output."""
        return bool(self.pairs or self.attention)

    @property
    def projects(self) -> bool:
        """Whether the student's embeddings are compared through a learned projection."""
        return self.kind == "embedding" and self.embedding_loss != "similarity" and self.widths[0] != self.widths[1]


def make_plan(
    teacher: Network, student: Network, batch: Mapping[str, Any], config: DistillConfig, *, judged: Any = None
) -> Plan:
    """Decide what is compared.

    Args:
        teacher: In evaluation mode.
        student: In evaluation mode.
        batch: Tensors by name, some rows of the data; `labels` where there are any.
        config: What the user asked for.
        judged: Labels of the data to be judged on, which tell what the models give where `batch` has none.

    Raises:
        OptimizationError: The two do not fit together, or what is asked for is not there.
    """
    labels = batch.get(LABELS, judged)
    theirs, ours = teacher.run(batch), student.run(batch)
    kind = config.kind if config.kind != "auto" else _kind(theirs, labels, teacher.label)
    names = _output(theirs, kind, config.output, teacher.label), _output(ours, kind, config.output, student.label)
    weights = _weights(config, kind, LABELS in batch)
    want, have = theirs[names[0]], ours[names[1]]
    notes = [f"{kind}: {student.label}'s {names[1]} learns from {teacher.label}'s {names[0]}"]
    probabilities = False, False
    if kind == "embedding":
        loss, more = _embedding_loss(config, have, want)
        notes += more
    else:
        loss = ""
        _check_classes(have, want, kind)
        probabilities = _are_probabilities(want, have)
    pairs = _pairs(teacher, student, batch, config) if weights.get("features") else ()
    attention = _attention(teacher, student, batch, config) if weights.get("attention") else ()
    return Plan(
        kind, names[0], names[1], probabilities[0], probabilities[1], weights, loss,
        (have.shape[-1], want.shape[-1]), tuple(want.shape[1:]), pairs, attention, tuple(notes),
    )  # fmt: skip


def _kind(outputs: Mapping[str, Any], labels: Any, label: str) -> str:
    """What a teacher gives, by the names and dimensions of its outputs, and by the labels."""
    floats = {name: t for name, t in outputs.items() if t.is_floating_point()}
    scores = next((t for n, t in floats.items() if any(word in n for word in _SCORES)), None)
    if scores is not None and scores.ndim in (1, 2, 3):
        return "frames" if scores.ndim == 3 else "classification"
    if any(name in _EMBEDDINGS or "embed" in name for name in floats):
        return "embedding"
    whole = labels is not None and not labels.is_floating_point()
    if whole and any(t.ndim == 3 for t in floats.values()):
        return "frames"
    if whole and labels.ndim == 1 and any(t.ndim in (1, 2) for t in floats.values()):
        return "classification"
    shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in outputs.items())
    raise OptimizationError(
        f"it is not clear what {label} gives: {shapes}",
        hint="say it: --kind classification, embedding or frames",
    )


def _output(outputs: Mapping[str, Any], kind: str, asked: str | None, label: str) -> str:
    """The judged output."""
    fitting = [n for n, t in outputs.items() if t.is_floating_point() and t.ndim in _DIMENSIONS[kind]]
    if asked is not None and asked in outputs:
        if asked in fitting:
            return asked
        raise OptimizationError(
            f"output {asked!r} of {label} is {outputs[asked].dtype}{list(outputs[asked].shape)}",
            expected=f"what the kind {kind} compares",
        )
    if asked is not None and len(outputs) > 1:
        raise OptimizationError(f"{label} has no output {asked!r}", expected=f"one of {', '.join(outputs)}")
    if kind == "embedding":
        fitting.sort(key=lambda n: _EMBEDDINGS.index(n) if n in _EMBEDDINGS else len(_EMBEDDINGS))
    elif kind == "classification":
        fitting.sort(key=lambda n: outputs[n].ndim != 2 or outputs[n].shape[-1] < 2)
    if not fitting:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in outputs.items())
        raise OptimizationError(f"no output of {label} is of the kind {kind}: {shapes}", hint="choose another --kind")
    return fitting[0]


def _weights(config: DistillConfig, kind: str, labelled: bool) -> dict[str, float]:
    """The weights that count, defaults in place.

    Raises:
        OptimizationError: A weight of a part that this kind does not have, or none at all.
    """
    main, other = ("embedding", "logits") if kind == "embedding" else ("logits", "embedding")
    if getattr(config, other) is not None:
        raise OptimizationError(f"weight {other} for models of the kind {kind}", hint=f"--weight {main}=NUMBER")
    if kind != "embedding" and config.embedding_loss != "auto":
        raise OptimizationError(f"an embedding loss for models of the kind {kind}", hint="leave --embedding-loss out")
    if config.task and kind == "embedding":
        raise OptimizationError("a loss on labels for embeddings", hint="leave --weight task out")
    if config.task and not labelled:
        raise OptimizationError("a loss on labels, and the data have none", hint="leave --weight task out")
    task = (0.1 if labelled and kind != "embedding" else 0.0) if config.task is None else config.task
    by_default = 1.0 if kind == "embedding" or not task else 0.9
    asked = getattr(config, main)
    found = {
        main: by_default if asked is None else asked,
        "features": config.features or 0.0,
        "attention": config.attention or 0.0,
        "task": task,
    }
    kept = {name: weight for name, weight in found.items() if weight}
    if not set(kept) - {"task"}:
        raise OptimizationError("nothing of the teacher has a weight", hint=f"add --weight {main}=1")
    return kept


def _embedding_loss(config: DistillConfig, have: Any, want: Any) -> tuple[str, list[str]]:
    """Which distance, and what is to be known of it."""
    same = have.shape[-1] == want.shape[-1]
    if config.embedding_loss == "auto":
        if same:
            return "cosine", []
        return "similarity", [
            f"the student's embeddings are {have.shape[-1]} wide and the teacher's {want.shape[-1]}: what is compared "
            "are the cosines between the rows of a batch"
        ]
    if same or config.embedding_loss == "similarity":
        return config.embedding_loss, []
    return config.embedding_loss, [
        f"the student's embeddings ({have.shape[-1]} wide) are compared with the teacher's ({want.shape[-1]} wide) "
        "through a learned projection, which does not belong to the student"
    ]


def _check_classes(have: Any, want: Any, kind: str) -> None:
    ours, theirs = (tuple(t.shape[1:]) or (1,) for t in (have, want))
    if ours == theirs:
        return
    what = "positions and classes" if kind == "frames" else "classes"
    raise OptimizationError(
        f"the student gives {' x '.join(map(str, ours))} {what}, the teacher {' x '.join(map(str, theirs))}",
        expected="the same of both",
    )


def _are_probabilities(want: Any, have: Any) -> tuple[bool, bool]:
    """Whether the teacher's and the student's outputs are probabilities: a softmax or a sigmoid stands in the model."""

    def sums_to_one(output: Any) -> bool:
        return bool((output >= 0).all()) and bool((output.float().sum(-1) - 1).abs().max() < 1e-3)

    def within(output: Any) -> bool:
        return bool((output >= 0).all()) and bool((output <= 1).all())

    if want.ndim > 1 and want.shape[-1] > 1:
        return sums_to_one(want), sums_to_one(have)
    # An untrained student's single scores may all lie between 0 and 1; the teacher's would not.
    return within(want), within(want) and within(have)


def _pairs(teacher: Network, student: Network, batch: Mapping[str, Any], config: DistillConfig) -> tuple[Pair, ...]:
    """Modules whose outputs are compared, with their widths.

    Raises:
        OptimizationError: Unknown names, or outputs that cannot be compared.
    """
    names = config.pairs or _paired_blocks(teacher, student)
    with watched(teacher, [t for t, _ in names]) as theirs, watched(student, [s for _, s in names]) as ours:
        teacher.run(batch)
        student.run(batch)
    found = []
    for of_teacher, of_student in names:
        want, have = first_tensor(theirs.get(of_teacher)), first_tensor(ours.get(of_student))
        for tensor, name, network in ((want, of_teacher, teacher), (have, of_student, student)):
            if tensor is None:
                raise OptimizationError(
                    f"module {name} of {network.label} returned no tensor, or did not run",
                    hint="name another: --features TEACHER=STUDENT",
                )
        found.append(_fitted(of_teacher, of_student, tuple(want.shape), tuple(have.shape)))
    return tuple(found)


def _paired_blocks(teacher: Network, student: Network) -> list[tuple[str, str]]:
    """The student's blocks, each with that of the teacher which lies at its place."""
    theirs, ours = blocks(teacher), blocks(student)
    if not theirs or not 0 < len(ours) <= len(theirs):
        raise OptimizationError(
            f"it is not known which modules belong together: {len(theirs)} blocks of the teacher, {len(ours)} of the "
            "student",
            hint="name them: --features TEACHER=STUDENT, for each pair",
        )
    # What the student's last block gives has to be what the teacher's last one does.
    places = evenly(len(theirs), len(ours)) if len(ours) > 1 else (len(theirs) - 1,)
    return [(theirs[place], name) for place, name in zip(places, ours, strict=True)]


def _fitted(teacher: str, student: str, want: tuple[int, ...], have: tuple[int, ...]) -> Pair:
    """A pair whose outputs can be compared.

    Raises:
        OptimizationError: They differ in more than the channels and the size of a map.
    """
    if len(want) == len(have) == 4:
        return Pair(teacher, student, 1, (have[1], want[1]))
    # [batch, sequence, width], or [batch, channels, time]: the other axis is equal in both.
    axis = 1 if len(have) == 3 and have[2:] == want[2:] and have[1:2] != want[1:2] else len(have) - 1
    rest = [[size for place, size in enumerate(shape) if place != axis] for shape in (want, have)]
    if len(want) != len(have) or len(have) < 2 or rest[0] != rest[1]:
        raise OptimizationError(
            f"the features of {teacher} are {list(want)}, those of {student} {list(have)}",
            expected="shapes that differ in the channels alone, or maps [batch, channels, height, width]",
            hint="pair other modules: --features TEACHER=STUDENT",
        )
    return Pair(teacher, student, axis, (have[axis], want[axis]))


def _attention(
    teacher: Network, student: Network, batch: Mapping[str, Any], config: DistillConfig
) -> tuple[tuple[tuple[str, int], tuple[str, int]], ...]:
    """Modules whose attention is compared.

    Raises:
        OptimizationError: One of the two has none that can be seen.
    """
    with contextlib.ExitStack() as stack:
        for network in (teacher, student):
            stack.enter_context(showing_attention(network))
        theirs, ours = attention_modules(teacher, batch), attention_modules(student, batch)
    for network, found in ((teacher, theirs), (student, ours)):
        if not found:
            raise OptimizationError(
                f"no module of {network.label} returns its attention",
                expected="a model of transformers, or modules that return (output, attention)",
                hint="leave --weight attention out",
            )
    if config.attention_layers == "last":
        return ((theirs[-1], ours[-1]),)
    if len(ours) > len(theirs):
        raise OptimizationError(
            f"the student has {len(ours)} attentions, the teacher {len(theirs)}",
            hint="compare the last ones: --attention-layers last",
        )
    places = evenly(len(theirs), len(ours)) if len(ours) > 1 else (len(theirs) - 1,)
    return tuple((theirs[place], own) for place, own in zip(places, ours, strict=True))
