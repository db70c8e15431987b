"""What the verbs that make an artifact out of another share: run, compare, and only then commit. And `simplify`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deploykit.artifact import GOLDEN, Artifact, Evidence, StepRecord
from deploykit.benchmarks.parity import (
    Verdict,
    check_vacuity,
    compare,
    top1_agreement,
)
from deploykit.contract import conform, contract_of, why_not
from deploykit.data import Dataset
from deploykit.errors import DeploykitError, InferenceError, OptimizationError, ParityError, UnverifiableError
from deploykit.machine import free_memory
from deploykit.modelfile import model_bytes
from deploykit.models import LoadedModel, load_model
from deploykit.nodes import bounded_outputs
from deploykit.optimizers import SimplifierProcess, SimplifyConfig, StepResult, optimize
from deploykit.optimizers.base import Check
from deploykit.progress import Progress
from deploykit.reference import Reference, run_parent
from deploykit.runtimes import Device, default_devices
from deploykit.staging import ArtifactWriter, check_free

if TYPE_CHECKING:
    from deploykit.specs import Array, Feeds
    from deploykit.targets import Target

from deploykit.comparing import compare_outputs, outputs_of

_MODEL = "model.onnx"
# Measured: 2.0 times the weights in floating point, 3.3 times those before dynamic quantization, which it undoes.
_OPENVINO_COPIES = 3.5


def simplify(
    model: str | Path,
    output: str | Path,
    *,
    timeout_s: float = 300.0,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    contract: Sequence[str] = (),
    process: SimplifierProcess | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Simplify the graph: onnxsim, else onnxslim, else as it was; each result is compared with its parent.

    Args:
        model: Artifact or `.onnx` file.
        output: Where the artifact will stand.
        timeout_s: Seconds for one simplifier.
        data: Real inputs for the comparison; golden or made-up ones by default.
        dims: Sizes of dynamic dimensions where inputs are made up.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        process: Where the simplifiers run; who simplifies many models keeps one, because its start takes seconds.
        progress: Told about steps and notes.

    Raises:
        ModelError: The model cannot be read.
        ParityError: The result differs from its parent.
        ContractError: The result, or the model itself, breaks the contract.
    """
    return derive(
        "simplify", model, output, _Simplifier(SimplifyConfig(timeout_s), process), data=data, dims=dims,
        min_cosine=None, contract=contract, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What a step is given.

    Attributes:
        parent: The model to start from.
        folder: Where scratch files may go; removed before the artifact is committed.
        data: Real inputs, or None.
        feeds: Inputs of the comparison, one mapping a case.
        dims: Sizes of dynamic dimensions where inputs are made up.
        origin: Where the inputs of the comparison come from: "generated", "golden" or a dataset's name.
        device: Where inference is done on the way.
        told: Steps and notes.
        check: Says why a candidate is not acceptable.
    """

    parent: LoadedModel
    folder: Path
    data: Dataset | None
    feeds: Sequence[Feeds]
    dims: Mapping[str, int]
    origin: str
    device: Device
    told: Progress
    check: Check


class Maker(Protocol):
    """A step: makes a model out of another, and says what was measured of it once it is known to be right.

    Attributes:
        cure: What to do where the result is too far from its parent.
        unfused: Whether a parent that does not run otherwise may run without fusions.
    """

    @property
    def cure(self) -> str | None: ...

    @property
    def unfused(self) -> bool: ...

    def make(self, work: Work, target: Path) -> StepResult:
        """Write the model."""

    def prove(self, work: Work, target: Path) -> Evidence:
        """Measure the model that will be committed, without its parity.

        Raises:
            DeploykitError: It is not what was asked for; nothing is committed.
        """


def derive(
    step: str,
    model: str | Path,
    output: str | Path,
    maker: Maker,
    *,
    data: str | Path | None,
    dims: Mapping[str, int] | None,
    min_cosine: float | None,
    contract: Sequence[str],
    progress: Progress | None,
) -> Artifact:
    """Apply one step, compare with the parent on every default device, write the artifact."""
    told = progress or Progress()
    check_free(Path(output))
    targets, started = default_devices(), time.monotonic()
    first_note = len(told.notes)
    parent = load_model(model)
    held = contract_of(parent.lineage, contract)
    dataset = Dataset.open(data) if data else None
    reference = _reference(parent, targets[0], dataset, dims or {}, told, unfused=maker.unfused)
    feeds, expected, origin = reference.feeds, reference.outputs, reference.origin
    for note in reference.notes:
        told.note(note)
    vacuous = check_verifiable(parent, expected)
    with ArtifactWriter(output) as writer:
        target = writer.dir / _MODEL
        bounded = bounded_outputs(parent.path)

        def check(candidate: Path) -> str | None:
            try:
                result = compare(expected, outputs_of(candidate, targets[0], feeds), bounded=bounded)
            except DeploykitError as exc:
                return exc.what
            return (
                f"its outputs differ: {result.reason}" if result.verdict is Verdict.FAILED else why_not(candidate, held)
            )

        scratch = writer.dir / ".work"
        scratch.mkdir()
        work = Work(parent, scratch, dataset, feeds, dims or {}, origin, targets[0], told, check)
        with told.step(f"{step} {model}"):
            done = maker.make(work, target)
        for note in (*done.notes, *conform(target, held)):
            told.note(note)
        with told.step(f"compare with the parent in {', '.join(map(str, targets))}"):
            records = compare_with_parent(
                parent, target, targets, feeds, expected, origin, min_cosine, told, maker.cure
            )
        records = as_verified(records, vacuous, told)
        evidence = maker.prove(work, target)
        shutil.rmtree(scratch)
        copy_companions(parent, writer.dir)
        record = record_of(step, done, parent, held, started, told.notes[first_note:])
        return writer.commit(
            model=_MODEL,
            signature=parent.signature,
            lineage=[*parent.lineage, record],
            evidence=evidence.model_copy(update={"parity": records}),
            ranges=parent.ranges,
        )


def check_verifiable(parent: LoadedModel, expected: Sequence[Mapping[str, Array]]) -> str:
    """Why equal outputs would prove nothing; empty where they do.

    Raises:
        UnverifiableError: They would not, and nobody has accepted that of the parent.
    """
    vacuous = check_vacuity(expected)
    if vacuous and not parent.unverifiable:
        raise UnverifiableError(
            f"the result could not be verified: {vacuous}",
            expected="a trained model, and several different inputs",
            hint="give real inputs with --data, or accept it once: deploykit export MODEL --allow-unverified",
        )
    return vacuous or ""


def as_verified(records: list[dict[str, Any]], vacuous: str, told: Progress) -> list[dict[str, Any]]:
    """Records of comparisons, which are no verdicts where equal outputs prove nothing."""
    if not vacuous:
        return records
    told.note(f"unverifiable: {vacuous}")
    return [r | {"verdict": str(Verdict.UNVERIFIABLE), "reason": vacuous} for r in records]


def record_of(
    step: str,
    done: StepResult,
    parent: LoadedModel,
    held: Sequence[Target],
    started: float,
    notes: Sequence[str],
) -> StepRecord:
    """A step for the lineage.

    Args:
        step: Its name.
        done: What it did.
        parent: What it began with.
        held: The contract.
        started: `time.monotonic` when it began.
        notes: Of it.
    """
    return StepRecord(
        step=step,
        params={**done.params, "changed": done.changed, "contract": [t.name for t in held]},
        tools=done.tools,
        parent=parent.digest,
        seconds=round(time.monotonic() - started, 3),
        notes=list(notes),
    )


@dataclass(frozen=True, slots=True)
class _Simplifier:
    config: SimplifyConfig
    process: SimplifierProcess | None

    @property
    def cure(self) -> None:
        return None

    @property
    def unfused(self) -> bool:
        return False

    def make(self, work: Work, target: Path) -> StepResult:
        return optimize(work.parent.path, self.config, target, check=work.check, process=self.process)

    def prove(self, work: Work, target: Path) -> Evidence:
        return Evidence()


def _reference(
    parent: LoadedModel,
    device: Device,
    data: Dataset | None,
    dims: Mapping[str, int],
    told: Progress,
    *,
    unfused: bool,
) -> Reference:
    """What the parent gives; without fusions where it may, and does not run with them.

    ONNX Runtime fuses a convolution with a quantizer of several scales, and fails when it runs that.

    Raises:
        InferenceError: It does not run.
    """
    try:
        return run_parent(parent, device, data, dims)
    except InferenceError as exc:
        if not unfused or device.runtime != "ort":
            raise
        found = run_parent(parent, device, data, dims, optimize=False)
        told.note(f"the model runs without fusions only ({exc.what}); compared with that")
        return found


def compare_with_parent(
    parent: LoadedModel,
    target: Path,
    targets: Sequence[Device],
    feeds: Sequence[Feeds],
    expected: Sequence[Mapping[str, Array]],
    origin: str,
    min_cosine: float | None,
    told: Progress,
    cure: str | None,
) -> list[dict[str, Any]]:
    """Run a result on every device, and compare it with what its parent gave.

    Args:
        parent: The parent.
        target: The result.
        targets: The devices; the first decides.
        feeds: Inputs of the result, one mapping a case.
        expected: The parent's outputs for them.
        origin: Where the inputs come from.
        min_cosine: Smallest accepted cosine; None for equality.
        told: Told what the other devices cannot do.
        cure: What to do where it is too far off.

    Returns:
        A record a device, for the manifest.

    Raises:
        OptimizationError: The first device cannot run it.
        ParityError: There it is not its parent.
    """
    records: list[dict[str, Any]] = []
    for number, device in enumerate(targets):
        short = memory_short(device, parent, target) if number else ""
        if short:
            told.note(f"not compared in {device}: {short}")
            records.append(
                {"against": parent.digest, "device": str(device), "verdict": "not compared", "reason": short}
            )
            continue
        try:
            outputs = outputs_of(target, device, feeds)
        except DeploykitError as exc:
            if number == 0:
                raise OptimizationError(f"{device} cannot run the result ({exc.what})", hint=exc.hint) from exc
            told.note(f"{device} cannot run the result: {exc.what}")
            records.append({"against": parent.digest, "device": str(device), "verdict": "failed", "reason": str(exc)})
            continue
        result = compare_outputs(expected, outputs, feeds, min_cosine, bounded_outputs(parent.path))
        if result.verdict is Verdict.FAILED:
            text = f"in {device} the result is not its parent: {result.reason}"
            if number == 0:
                raise ParityError(text, hint=cure)
            told.note(text)
        agreement = top1_agreement(expected, outputs) if min_cosine is not None else None
        extra = {} if agreement is None else {"top1_agreement": agreement}
        records.append({"against": parent.digest, "device": str(device), "data": origin, **result.as_dict(), **extra})
    return records


def memory_short(device: Device, parent: LoadedModel, target: Path) -> str:
    """Why a device that does not decide is not tried: it would be killed for memory, and the whole step with it."""
    if device.runtime != "openvino":
        return ""
    need, free = _OPENVINO_COPIES * max(parent.size_bytes, model_bytes(target)), free_memory()
    if free is None or need < free:
        return ""
    return f"it may take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def copy_companions(parent: LoadedModel, folder: Path, *, golden: bool = True) -> None:
    """Golden cases stay those of the source model, unless the inputs change; assets belong to every descendant."""
    if parent.artifact is None:
        return
    for name in parent.artifact.manifest.files:
        if (name == GOLDEN and golden) or name.startswith("assets/"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(parent.artifact.path / name, folder / name)
