"""The verbs that make an artifact out of another: simplify, quantize, repair."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from deploykit.optimizers import (
    DynamicConfig,
    RepairConfig,
    SimplifierProcess,
    SimplifyConfig,
    StaticConfig,
    StepConfig,
    optimize,
)
from deploykit.progress import Progress
from deploykit.reference import Reference, run_parent
from deploykit.runtimes import Device, default_devices, open_session
from deploykit.staging import ArtifactWriter, check_free

if TYPE_CHECKING:
    from deploykit.specs import Array, Feeds

from deploykit.comparing import MIN_COSINE, compare_outputs, integer_kernels, not_same_bits, outputs_of

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
    config = SimplifyConfig(timeout_s)
    return _derive("simplify", model, output, config, data, dims, None, contract, progress, process=process)


def quantize_dynamic(
    model: str | Path,
    output: str | Path,
    *,
    config: DynamicConfig | None = None,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    min_cosine: float = MIN_COSINE,
    contract: Sequence[str] = (),
    progress: Progress | None = None,
) -> Artifact:
    """Quantize weights to int8; activations are quantized while the model runs.

    Args:
        model: Artifact or `.onnx` file, in floating point.
        output: Where the artifact will stand.
        config: What to quantize.
        data: Real inputs for the comparison with the parent.
        dims: Sizes of dynamic dimensions where inputs are made up.
        min_cosine: Smallest accepted cosine between an output and the parent's.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        progress: Told about steps and notes.

    Raises:
        OptimizationError: Nothing to quantize, or the quantizer failed.
        ParityError: The outputs are too far from the parent's.
        ContractError: The result breaks the contract.
    """
    return _derive(
        "quantize-dynamic", model, output, config or DynamicConfig(), data, dims, min_cosine, contract, progress
    )


def quantize_static(
    model: str | Path,
    output: str | Path,
    *,
    data: str | Path,
    config: StaticConfig | None = None,
    min_cosine: float = MIN_COSINE,
    contract: Sequence[str] = (),
    progress: Progress | None = None,
) -> Artifact:
    """Quantize weights and activations to 8 bits, with ranges from calibration data.

    Args:
        model: Artifact or `.onnx` file, in floating point.
        output: Where the artifact will stand.
        data: Calibration data, anything that `Dataset.open` reads.
        config: How to quantize.
        min_cosine: Smallest accepted cosine between an output and the parent's.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        progress: Told about steps and notes.

    Raises:
        DataError: The data cannot be read, or do not fit the model.
        OptimizationError: Nothing to quantize, or the quantizer failed.
        ParityError: The outputs are too far from the parent's.
        ContractError: The result breaks the contract.
    """
    return _derive(
        "quantize-static", model, output, config or StaticConfig(), data, None, min_cosine, contract, progress
    )


def quantize_repair(
    model: str | Path,
    output: str | Path,
    *,
    config: RepairConfig | None = None,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    min_cosine: float = MIN_COSINE,
    contract: Sequence[str] = (),
    progress: Progress | None = None,
) -> Artifact:
    """Bring a model that another tool quantized with Q/DQ pairs into the form that runtimes run in integer kernels.

    What changes no bit is proven bit for bit, by running both graphs without fusions; the whole is compared with the
    model as it came, with fusions. How many products ran on integers before and after is counted in each runtime.

    Args:
        model: Artifact or `.onnx` file with Q/DQ pairs.
        output: Where the artifact will stand.
        config: How far to go.
        data: Real inputs for the comparison with the parent.
        dims: Sizes of dynamic dimensions where inputs are made up.
        min_cosine: Smallest accepted cosine between an output and the parent's.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        progress: Told about steps and notes.

    Raises:
        OptimizationError: It is not quantized, or not with Q/DQ pairs.
        ParityError: The outputs are too far from the parent's.
        ContractError: The result breaks the contract.
    """
    return _derive(
        "quantize-repair", model, output, config or RepairConfig(), data, dims, min_cosine, contract, progress
    )


def _derive(
    step: str,
    model: str | Path,
    output: str | Path,
    config: StepConfig,
    data: str | Path | None,
    dims: Mapping[str, int] | None,
    min_cosine: float | None,
    contract: Sequence[str],
    progress: Progress | None,
    *,
    process: SimplifierProcess | None = None,
) -> Artifact:
    """Apply one optimizer, compare with the parent on every default device, write the artifact."""
    told = progress or Progress()
    check_free(Path(output))
    targets, started = default_devices(), time.monotonic()
    first_note = len(told.notes)
    parent = load_model(model)
    held = contract_of(parent.lineage, contract)
    dataset = Dataset.open(data) if data else None
    reference = _reference(parent, targets[0], dataset, dims or {}, config, told)
    feeds, expected, origin = reference.feeds, reference.outputs, reference.origin
    for note in reference.notes:
        told.note(note)
    if min_cosine is not None and origin == "generated":
        told.note("checked on made-up inputs only, which prove no accuracy; give real ones with --data")
    vacuous = check_vacuity(expected)
    if vacuous and not parent.unverifiable:
        raise UnverifiableError(
            f"the result could not be verified: {vacuous}",
            expected="a trained model, and several different inputs",
            hint="give real inputs with --data, or accept it once: deploykit export MODEL --allow-unverified",
        )
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

        def compare_bits(candidate: Path) -> str | None:
            return not_same_bits(parent.path, candidate, feeds)

        with told.step(f"{step} {model}"):
            done = optimize(
                parent.path,
                config,
                target,
                check=check,
                open_model=lambda p: open_session(p, targets[0]).run,
                data=dataset,
                process=process,
                same_bits=compare_bits if targets[0].runtime == "ort" else None,
            )
        for note in (*done.notes, *conform(target, held)):
            told.note(note)
        with told.step(f"compare with the parent in {', '.join(map(str, targets))}"):
            records = _compare_with_parent(parent, target, targets, feeds, expected, origin, min_cosine, told, config)
        if vacuous:
            records = [r | {"verdict": str(Verdict.UNVERIFIABLE), "reason": vacuous} for r in records]
            told.note(f"unverifiable: {vacuous}")
        placement = _count_kernels(parent, target, targets, feeds, told) if isinstance(config, RepairConfig) else []
        _copy_companions(parent, writer.dir)
        record = StepRecord(
            step=step,
            params={**done.params, "changed": done.changed, "contract": [t.name for t in held]},
            tools=done.tools,
            parent=parent.digest,
            seconds=round(time.monotonic() - started, 3),
            notes=told.notes[first_note:],
        )
        return writer.commit(
            model=_MODEL,
            signature=parent.signature,
            lineage=[*parent.lineage, record],
            evidence=Evidence(parity=records, placement=placement),
            ranges=parent.ranges,
        )


def _reference(
    parent: LoadedModel,
    device: Device,
    data: Dataset | None,
    dims: Mapping[str, int],
    config: StepConfig,
    told: Progress,
) -> Reference:
    """What the parent gives. One to be repaired may run without fusions only.

    ONNX Runtime fuses a convolution with a quantizer of several scales, and fails when it runs that.

    Raises:
        InferenceError: It does not run.
    """
    try:
        return run_parent(parent, device, data, dims)
    except InferenceError as exc:
        if not isinstance(config, RepairConfig) or device.runtime != "ort":
            raise
        found = run_parent(parent, device, data, dims, optimize=False)
        told.note(f"the model runs without fusions only ({exc.what}); compared with that")
        return found


def _compare_with_parent(
    parent: LoadedModel,
    target: Path,
    targets: Sequence[Device],
    feeds: Sequence[Feeds],
    expected: Sequence[Mapping[str, Array]],
    origin: str,
    min_cosine: float | None,
    told: Progress,
    config: StepConfig,
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number, device in enumerate(targets):
        short = _memory_short(device, parent, target) if number else ""
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
                raise ParityError(text, hint=_cure(config))
            told.note(text)
        agreement = top1_agreement(expected, outputs) if min_cosine is not None else None
        extra = {} if agreement is None else {"top1_agreement": agreement}
        records.append({"against": parent.digest, "device": str(device), "data": origin, **result.as_dict(), **extra})
    return records


def _cure(config: StepConfig) -> str | None:
    """What to do where a result is too far from its parent."""
    if isinstance(config, RepairConfig):
        return (
            "keep to what changes no bit: --exact; or accept the distance from a badly quantized parent: --min-cosine X"
        )
    if isinstance(config, SimplifyConfig):
        return None
    return "give more calibration data, or leave layers out with --exclude"


def _count_kernels(
    parent: LoadedModel, target: Path, targets: Sequence[Device], feeds: Sequence[Feeds], told: Progress
) -> list[dict[str, Any]]:
    """How many convolutions and products ran on integers before and after, in each runtime."""
    records = []
    for number, device in enumerate(targets):
        if number and _memory_short(device, parent, target):
            continue
        try:
            after = integer_kernels(target, device, feeds[0])
        except DeploykitError as exc:
            told.note(f"kernels not counted in {device}: {exc.what}")
            continue
        try:
            before = integer_kernels(parent.path, device, feeds[0])
            had = f"{before['integer']} of {before['all']} convolutions and products ran on integers before"
        except DeploykitError as exc:
            before, had = {"failed": exc.what}, "the model did not run before"
        told.note(f"{device}: {had}, {after['integer']} of {after['all']} now")
        records.append({"device": str(device), "before": before, "after": after})
    return records


def _memory_short(device: Device, parent: LoadedModel, target: Path) -> str:
    """Why a device that does not decide is not tried: it would be killed for memory, and the whole step with it."""
    if device.runtime != "openvino":
        return ""
    need, free = _OPENVINO_COPIES * max(parent.size_bytes, model_bytes(target)), free_memory()
    if free is None or need < free:
        return ""
    return f"it may take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _copy_companions(parent: LoadedModel, folder: Path) -> None:
    """Golden cases stay those of the source model; assets belong to every descendant."""
    if parent.artifact is None:
        return
    for name in parent.artifact.manifest.files:
        if name == GOLDEN or name.startswith("assets/"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(parent.artifact.path / name, folder / name)
