"""The verb `preprocess`: what a client would compute before it asks a model, put into the model's graph.

The inputs change, so that the result is not run beside its parent on the same ones: a reference in float64, without the
graph, computes what the parent has to be given.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.artifact import GOLDEN, Artifact, Evidence, write_golden
from deploykit.benchmarks.parity import Verdict, compare
from deploykit.comparing import outputs_of
from deploykit.contract import conform, contract_of
from deploykit.data import Dataset, ValueRange, generate
from deploykit.deriving import as_verified, check_verifiable, compare_with_parent, copy_companions, record_of
from deploykit.errors import DataError, DeploykitError, OptimizationError, ParityError
from deploykit.modelfile import read_model
from deploykit.models import LoadedModel, load_model, probe_feeds
from deploykit.nodes import quantized_ops
from deploykit.optimizers import (
    AudioConfig,
    Plan,
    PreprocessConfig,
    add_preprocessing,
    plan_preprocessing,
    with_preprocessing,
    write_alone,
)
from deploykit.progress import Progress
from deploykit.runtimes import Device, default_devices
from deploykit.specs import Signature, TensorSpec
from deploykit.staging import ArtifactWriter, check_free

if TYPE_CHECKING:
    from deploykit.specs import Array, Feeds

_MODEL = "model.onnx"
# A quantizer turns the last digit of its input into a whole step.
_QUANTIZED_COSINE = 0.99
_CASES = 3
# Of made-up sound: how many tones, and how loud.
_TONES, _LOUDEST = 3, 0.3
_LEVELS = 32767


def preprocess(
    model: str | Path,
    output: str | Path,
    *,
    config: PreprocessConfig,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    min_cosine: float | None = None,
    contract: Sequence[str] = (),
    progress: Progress | None = None,
) -> Artifact:
    """Let a model take decoded images, or samples of sound, and prepare them in its graph.

    The preprocessing alone is compared with its reference, and the whole with the parent that is given what the
    reference computes. The golden cases of the artifact have the new inputs.

    Args:
        model: Artifact or `.onnx` file.
        output: Where the artifact will stand.
        config: An `ImageConfig` or an `AudioConfig` of `deploykit.optimizers`, where `make_image_config`,
            `make_audio_config` and `read_processor` make them out of a `preprocessor_config.json`.
        data: Real inputs for the comparison, as the result takes them; made-up ones by default.
        dims: Sizes of the result's dynamic dimensions where inputs are made up.
        min_cosine: Smallest accepted cosine between an output and the parent's; None for equality, or for 0.99 where
            the parent is quantized.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        progress: Told about steps and notes.

    Raises:
        ModelError: The model cannot be read.
        OptimizationError: No input can take it, or the config contradicts the model or itself.
        DataError: The data do not fit the new inputs.
        ParityError: The preprocessing is not its reference, or the whole is not its parent.
        ContractError: The result breaks the contract.
    """
    told = progress or Progress()
    check_free(Path(output))
    targets, started, first_note = default_devices(), time.monotonic(), len(told.notes)
    parent = load_model(model)
    if parent.path.suffix != ".onnx":
        raise OptimizationError(f"{parent.path} is OpenVINO IR", expected="an ONNX model", hint="start from that one")
    held = contract_of(parent.lineage, contract)
    plan = plan_preprocessing(parent.signature, config)
    signature = with_preprocessing(parent.signature, plan)
    _check_dims(signature, dims or {})
    dataset = Dataset.open(data) if data else None
    feeds, origin = _feeds(parent, plan, signature, dataset, dims or {})
    wanted = [{plan.given.name: plan.reference(case[plan.given.name])} for case in feeds]
    expected = outputs_of(parent.path, targets[0], [{**case, **own} for case, own in zip(feeds, wanted, strict=True)])
    vacuous = check_verifiable(parent, expected)
    if min_cosine is None and (parent.quantized or quantized_ops(read_model(parent.path, weights=False))):
        min_cosine = _QUANTIZED_COSINE
    with ArtifactWriter(output) as writer:
        target, scratch = writer.dir / _MODEL, writer.dir / ".work"
        scratch.mkdir()
        with told.step(f"{plan.step} {model}"):
            done = add_preprocessing(parent.path, plan, target)
        for note in (*done.notes, *conform(target, held)):
            told.note(note)
        with told.step(f"compare with the reference and the parent in {', '.join(map(str, targets))}"):
            parts = _compare_alone(parent, plan, scratch / _MODEL, targets, feeds, wanted, origin, told)
            records = compare_with_parent(
                parent, target, targets, feeds, expected, origin, min_cosine, told,
                "give real inputs with --data; or, where outputs hang on the last digits of inputs: --min-cosine X",
            )  # fmt: skip
        records = as_verified(records, vacuous, told)
        shutil.rmtree(scratch)
        copy_companions(parent, writer.dir, golden=False)
        write_golden(writer.dir / GOLDEN, zip(feeds, expected, strict=True))
        record = record_of(plan.step, done, parent, held, started, told.notes[first_note:])
        return writer.commit(
            model=_MODEL,
            signature=signature,
            lineage=[*parent.lineage, record],
            evidence=Evidence(parity=[*records, *parts]),
            ranges=parent.ranges | {plan.given.name: ValueRange(*plan.low_high)},
        )


def _check_dims(signature: Signature, dims: Mapping[str, int]) -> None:
    unknown = next((name for name in dims if name not in signature.symbols), None)
    if unknown is not None:
        raise DataError(
            f"--dim names {unknown!r}, which is no dynamic dimension of the result",
            expected=f"one of {', '.join(signature.symbols) or 'none: all dimensions are fixed'}",
        )


def _feeds(
    parent: LoadedModel, plan: Plan, signature: Signature, data: Dataset | None, dims: Mapping[str, int]
) -> tuple[list[dict[str, Array]], str]:
    """Inputs of the result, several cases of them, and where they come from.

    Raises:
        DataError: The data do not fit.
    """
    if data is not None:
        return probe_feeds(replace(parent, signature=signature, artifact=None), data, {})
    name, shape = plan.given.name, plan.given.shape
    assert shape is not None  # plans know their shapes
    inside, _ = probe_feeds(parent, None, {n: s for n, s in dims.items() if n in parent.signature.symbols})
    feeds = []
    for number in range(max(_CASES, min(len(inside), _CASES + 1))):
        case = inside[number % len(inside)]
        sizes = plan.free_sizes(number, case[name].shape) | dict(dims)
        lengths = [sizes[dim] if isinstance(dim, str) else dim for dim in shape[1:]]
        feeds.append({**case, name: _made_up(plan, (len(case[name]), *lengths), number)})
    return feeds, "generated"


def _made_up(plan: Plan, shape: tuple[int, ...], seed: int) -> Array:
    """Pictures, or sound: tones that rise, each of its own loudness, over noise."""
    name, dtype = plan.given.name, plan.given.dtype
    if not isinstance(plan.config, AudioConfig):
        ranges = {name: ValueRange(*plan.low_high)}
        return generate([TensorSpec(name, dtype, shape)], {}, ranges=ranges, seed=seed)[name]
    rng, rate = np.random.default_rng(seed), plan.config.sample_rate
    seconds = np.arange(shape[1]) / rate
    made = np.empty(shape)
    for wave in made:
        pitches, rises = rng.uniform(rate / 200, rate / 5, (_TONES, 1)), rng.uniform(0, 1, (_TONES, 1))
        tones = np.sin(2 * np.pi * pitches * seconds * (1 + rises * seconds / max(seconds[-1], 1e-3)))
        loudness = rng.uniform(0.02, _LOUDEST, (_TONES, 1))
        wave[:] = (loudness * tones).sum(0) + rng.standard_normal(shape[1]) * 10 ** rng.uniform(-4, -1.5)
    made = np.clip(made, -1, 1)
    return np.rint(made * _LEVELS).astype(dtype) if dtype == "int16" else made.astype(dtype)


def _compare_alone(
    parent: LoadedModel,
    plan: Plan,
    file: Path,
    targets: Sequence[Device],
    feeds: Sequence[Feeds],
    wanted: Sequence[Mapping[str, Array]],
    origin: str,
    told: Progress,
) -> list[dict[str, Any]]:
    """Compare the preprocessing without the model with its reference, in every device.

    Raises:
        OptimizationError: The first device cannot run it.
        ParityError: There it gives something else.
    """
    made, name = write_alone(parent.path, plan, file), plan.given.name
    alone = [{name: case[name]} for case in feeds]
    records: list[dict[str, Any]] = []
    for number, device in enumerate(targets):
        about = {"against": "reference in float64", "part": "preprocessing", "device": str(device), "data": origin}
        try:
            outputs = [{name: found[made]} for found in outputs_of(file, device, alone)]
        except DeploykitError as exc:
            if number == 0:
                raise OptimizationError(f"{device} cannot run the preprocessing ({exc.what})", hint=exc.hint) from exc
            told.note(f"{device} cannot run the preprocessing: {exc.what}")
            records.append(about | {"verdict": "failed", "reason": str(exc)})
            continue
        result = compare(wanted, outputs)
        if result.verdict is Verdict.FAILED:
            text = f"in {device} the preprocessing is not its reference: {result.reason}"
            if number == 0:
                raise ParityError(text, hint="give other inputs with --data, and report it with the command")
            told.note(text)
        records.append(about | result.as_dict())
    return records
