"""A teacher and a student: opened, kept apart, and given the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError, SourceError
from deploykit.exporters import ExportOptions
from deploykit.exporters.live import name_of
from deploykit.exporters.pytorch import TorchSource
from deploykit.optimizers.distillation import Derived, derive_student, parse_derivation
from deploykit.optimizers.distillation.networks import Network
from deploykit.progress import Progress
from deploykit.specs import Array
from deploykit.trainable import Trainable, open_trainable

_DERIVED = "derive:"


@dataclass(frozen=True, slots=True)
class Pair:
    """Teacher and student.

    Attributes:
        teacher: Nothing of it is trained.
        student: What is trained.
        derived: How the student was made of the teacher; None where it was given.
    """

    teacher: Trainable
    student: Trainable
    derived: Derived | None


def _called(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else name_of(model)


def open_pair(
    teacher: Any, student: Any, examples: tuple[Any, Any], options: ExportOptions, seed: int, told: Progress
) -> Pair:
    """Load both, or derive the student.

    Args:
        teacher: A source, or a module of this process.
        student: The same, or `derive:…`.
        examples: Example inputs of each, where it is a module of this process; a student's are the teacher's by
            default.
        options: As for `export`.
        seed: Of what starts anew in a derived student.
        told: Steps and notes.

    Raises:
        SourceError: One cannot be loaded or trained, or they share weights.
        OptimizationError: The student cannot be derived.
    """
    asked = parse_derivation(student) if isinstance(student, str) and student.startswith(_DERIVED) else None
    with told.step(f"load the teacher {_called(teacher)}"):
        master = open_trainable(teacher, examples[0], options)
    if asked is not None:
        derived = derive_student(master.module, asked, seed=seed)
        for note in derived.notes:
            told.note(note)
        source = master.renewed(derived.module)
        assert isinstance(source, TorchSource)
        source.label = f"{student} of {master.label}"
        pair = Pair(master, Trainable(source), derived)
    else:
        with told.step(f"load the student {_called(student)}"):
            live = not isinstance(student, str | Path)
            given = examples[0] if live and examples[1] is None else examples[1]
            pair = Pair(master, open_trainable(student, given, options), None)
    _check_apart(pair)
    pair.teacher.module.requires_grad_(False)
    return pair


def _check_apart(pair: Pair) -> None:
    """Refuse a student that holds tensors of the teacher: a step of the training would change both.

    Raises:
        SourceError: It does.
    """
    places = {p.data_ptr(): name for name, p in pair.teacher.module.named_parameters() if p.numel()}
    for name, parameter in pair.student.module.named_parameters():
        if parameter.numel() and parameter.data_ptr() in places:
            raise SourceError(
                f"the student's {name} is the teacher's {places[parameter.data_ptr()]}: they share their memory",
                expected="a student with weights of its own",
                hint="copy it in the factory: copy.deepcopy(module)",
            )


def networks_of(pair: Pair) -> tuple[Network, Network]:
    """Where the inputs of both stand in a batch: once, where both take the same."""
    types = {spec.name: spec.dtype for spec in pair.student.source.signature.inputs}
    apart = {
        spec.name: spec.name if types.get(spec.name, spec.dtype) == spec.dtype else f"teacher.{spec.name}"
        for spec in pair.teacher.source.signature.inputs
    }
    return (
        Network(pair.teacher.module, {n: apart[n] for n in pair.teacher.names}, pair.teacher.feed, pair.teacher.label),
        Network(pair.student.module, {n: n for n in pair.student.names}, pair.student.feed, pair.student.label),
    )


def rows_for(pair: Pair, networks: tuple[Network, Network], data: Dataset) -> Dataset:
    """A dataset whose arrays are those that teacher and student take, and `labels`.

    Raises:
        DataError: While it is read: an array is missing, or does not fit.
    """

    def fitted(model: Trainable, batch: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return model.fit_batch(batch)
        except DataError as exc:
            raise DataError(f"{data.source} does not fit {model.label}: {exc.what}", expected=exc.expected) from exc

    def batches(size: int) -> Iterator[dict[str, Array]]:
        for batch in data.batches(size):
            made = {networks[0].keys[name]: array for name, array in fitted(pair.teacher, batch).items()}
            made |= fitted(pair.student, batch)
            yield made | ({LABELS: batch[LABELS]} if LABELS in batch else {})

    names: tuple[str, ...] | None = None
    if data.names is not None:
        taken = dict.fromkeys([*networks[0].keys.values(), *networks[1].keys.values()])
        names = (*taken, *((LABELS,) if data.has_labels else ()))
    return Dataset(data.source, batches, length=data.length, names=names)
