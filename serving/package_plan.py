"""What every target is made from: the artifact, how it is opened, which requests may be joined, the golden ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import GOLDEN, SETTINGS, Artifact
from deploykit.benchmarks.parity import Verdict, compare, compare_lossy, without_padding
from deploykit.errors import DeploykitError, DeviceError, MissingDependencyError, PackageError
from deploykit.nodes import bounded_outputs
from deploykit.progress import Progress
from deploykit.runtimes import Device, Session, default_devices, open_session, parse_device
from deploykit.runtimes.settings import RuntimeSettings
from deploykit.serving.bundles import Contract
from deploykit.serving.joining import beside, lossy_steps, moved_output, one_scale
from deploykit.serving.smoke import accepted, judge
from deploykit.specs import Array, TensorSpec

Case = tuple[dict[str, Array], dict[str, Array]]

MIN_COSINE = 0.95
DEFAULT_BATCH = 8
# A name becomes a directory, a part of URLs, and the label of an image.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """What only some targets take; what a target does not take is None.

    Attributes:
        max_delay_ms: How long a request may wait for others to be joined with.
        lock: Requirements with hashes, for an image.
        base_image: Image that the own one starts from, with its digest.
        image: Name of the own image.
        storage_uri: Where KServe finds the model.
    """

    max_delay_ms: float | None = None
    lock: Path | None = None
    base_image: str | None = None
    image: str | None = None
    storage_uri: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a bundle is made from.

    Attributes:
        artifact: Opened, so verified.
        name: The model's name on the server.
        settings: How it is opened.
        tuned: Whether a tuner found the settings.
        max_batch: Most rows of joined requests; 0 where requests are not joined.
        inputs: With known ranks.
        outputs: Likewise.
        cases: Golden requests that the server takes.
        contract: When an answer counts as the golden one.
        options: What only this target takes.
        notes: What the user has to know.
    """

    artifact: Artifact
    name: str
    settings: RuntimeSettings
    tuned: bool
    max_batch: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cases: tuple[Case, ...]
    contract: Contract
    options: TargetOptions
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> Device:
        """Where the model is to run."""
        return parse_device(self.settings.device)

    @property
    def lanes(self) -> int:
        """Requests that run side by side."""
        streams = str(self.settings.settings.get("NUM_STREAMS", 1))
        return self.settings.sessions * (int(streams) if streams.isdecimal() and int(streams) > 0 else 1)


def check_name(name: str, hint: str = "give one with --name") -> str:
    """A name that every target takes for a directory.

    Raises:
        PackageError: It is none.
    """
    if not _NAME.fullmatch(name):
        raise PackageError(
            f"{name!r:.100} cannot be a model's name",
            expected="letters, digits, dots, dashes and underscores, 63 at most, a letter or digit first",
            hint=hint,
        )
    return name


def contract_of(artifact: Artifact, min_cosine: float | None = None) -> Contract:
    """When an answer of an artifact counts as its golden one.

    Args:
        artifact: Its lineage says whether a step changed the numbers on purpose.
        min_cosine: Asked for by the user, in place of the default for such models.
    """
    unverifiable = any(r.get("verdict") == "unverifiable" for r in artifact.manifest.evidence.parity)
    if min_cosine is None and lossy_steps(artifact.manifest):
        min_cosine = MIN_COSINE
    bounded = sorted(bounded_outputs(artifact.model_path))
    return Contract(min_cosine=min_cosine, bounded=bounded, unverifiable=unverifiable)


def choose_settings(
    artifact: Artifact, file: str | Path | None, device: str | None, runs: Sequence[str], target: str, told: Progress
) -> tuple[RuntimeSettings, bool]:
    """How the model is opened: as a file says, else as the artifact says, else with the runtime's defaults.

    Args:
        artifact: May bring settings.
        file: Tuned settings.
        device: Named by the user.
        runs: Devices that the target has, the preferred one first: a runtime ("openvino") or a device ("ort:cpu").
        target: For messages.
        told: Told what is not used.

    Returns:
        The settings, and whether they were tuned.

    Raises:
        PackageError: The target has no such device, or the artifact's file is not for it.
        DataError: The file cannot be read.
    """
    wanted = parse_device(device) if device is not None else None
    if wanted is not None and not _has(runs, wanted):
        raise PackageError(f"{target} has no {wanted}", expected=" or ".join(runs))
    kept = RuntimeSettings.load(file) if file is not None else None
    if kept is not None:
        if wanted is not None:
            kept.check_device(wanted)
        if not _has(runs, parse_device(kept.device)):
            raise PackageError(
                f"{file} is for {kept.device}, which {target} has not", expected=" or ".join(runs),
                hint="tune on such a device: deploykit benchmark --tune --save-settings FILE --device DEVICE",
            )  # fmt: skip
    elif SETTINGS in artifact.manifest.files:
        own = RuntimeSettings.load(artifact.path / SETTINGS)
        own.check_contained(str(artifact.path / SETTINGS))
        if _has(runs, parse_device(own.device)) and wanted in (None, parse_device(own.device)):
            kept = own
        else:
            told.note(f"the artifact's own settings are for {own.device} and are not used")
    chosen = parse_device(kept.device) if kept is not None else wanted or _default(artifact, runs, target)
    if artifact.model_path.suffix not in chosen.reads:
        raise PackageError(f"{chosen} does not read {artifact.manifest.model}", hint="name another --device")
    if kept is None:
        return RuntimeSettings(str(chosen)), False
    for note in kept.notes_for(artifact.model_path, artifact.digest):
        told.note(f"settings: {note}")
    return kept, True


def _has(runs: Sequence[str], device: Device) -> bool:
    return str(device) in runs or device.runtime in runs


def _default(artifact: Artifact, runs: Sequence[str], target: str) -> Device:
    suffix = artifact.model_path.suffix
    for name in runs:
        device = parse_device(name if ":" in name else f"{name}:cpu")
        if suffix in device.reads:
            return device
    raise PackageError(f"{target} does not read {artifact.manifest.model}", expected="an artifact that holds ONNX")


def golden_cases(artifact: Artifact) -> list[Case]:
    """The golden requests of an artifact, with the model's inputs only.

    Raises:
        PackageError: There are none.
    """
    if GOLDEN not in artifact.manifest.files or not (cases := artifact.golden()):
        raise PackageError(
            f"{artifact.path} holds no golden requests, so that no server could be tested",
            hint="make it with deploykit export",
        )
    names = [s.name for s in artifact.signature.inputs]
    held = {*(("input", n) for n in cases[0][0]), *(("output", n) for n in cases[0][1])}
    wanted = [*(("input", n) for n in names), *(("output", s.name) for s in artifact.signature.outputs)]
    missing = next((f"{kind} {name!r}" for kind, name in wanted if (kind, name) not in held), None)
    if missing is not None:
        raise PackageError(f"the golden requests of {artifact.path} have no {missing}", hint="export it again")
    return [({n: i[n] for n in names}, o) for i, o in cases]


def ranked(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> tuple[TensorSpec, ...]:
    """Specifications whose ranks are known: where the model does not say, from a golden request."""
    found = []
    for spec in specs:
        shape = spec.shape
        if shape is None:
            shape = tuple(f"{spec.name}_dim{axis}" for axis in range(arrays[spec.name].ndim))
        found.append(TensorSpec(spec.name, spec.dtype, shape))
    return tuple(found)


def batch_symbol(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> tuple[str | None, str]:
    """The dimension that all tensors have first, or None and why there is none."""
    first = inputs[0].shape[0] if inputs and inputs[0].shape else None
    if not isinstance(first, str):
        return None, "the first dimension of the first input is fixed" if inputs and inputs[0].shape else "no rows"
    for spec in (*inputs, *outputs):
        if not spec.shape or spec.shape[0] != first:
            return None, f"{spec} does not begin with {first!r}"
        if first in spec.shape[1:]:
            return None, f"{spec} has {first!r} twice"
    return first, ""


def why_not_joined(session: Session, cases: Sequence[Case], min_cosine: float | None) -> str | None:
    """Why requests may not be joined: rows come out otherwise when others stand beside them. None where they may.

    The first axis of a model need not be rows: it may be the steps of a recurrence, or one large graph. So a golden
    request is run beside another one, and each is compared with what it gives alone, and, bit for bit, with what it
    gives beside others.
    """
    inputs, other = _neighbours([i for i, _ in cases])
    if all(np.array_equal(a, other[n]) for n, a in inputs.items()):
        return "there are no two requests of other values to try it with"
    rows, more = (len(next(iter(feeds.values()))) for feeds in (inputs, other))
    try:
        alone = [session.run(inputs), session.run(other)]
        both = session.run(beside(inputs, other))
    except DeploykitError as exc:
        return f"{rows + more} rows fail where {rows} do not ({exc.what})"
    if any(a.ndim == 0 or len(a) != rows + more for a in both.values()):
        return "an output does not have a row for each row of the input"
    if moved := moved_output(session.run, inputs, other, both):
        return f"rows depend on those beside them ({moved!r} is another, if only by its rounding)"
    parts = [{n: a[:rows] for n, a in both.items()}, {n: a[rows:] for n, a in both.items()}]
    feeds = [inputs, other]
    if min_cosine is None:
        result = compare(alone, parts)
    else:
        result = compare_lossy(without_padding(alone, feeds), without_padding(parts, feeds), min_cosine)
    return None if result.verdict is Verdict.PASSED else f"rows depend on those beside them ({result.reason})"


def _neighbours(requests: Sequence[dict[str, Array]]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Two requests that may stand beside each other, small and with other values.

    Where no other golden request has rows of the same shape, the second is the last row of the first, turned around, as
    often as the first has rows: values stay those that the model takes, and a result over all rows is another one.
    Reals are halved too, so that the largest of all is another one.
    """
    ordered = sorted(requests, key=lambda r: sum(a.nbytes for a in r.values()))
    first = ordered[0]
    for other in ordered[1:]:
        same = all(other[n].shape[1:] == a.shape[1:] for n, a in first.items())
        if same and any(not np.array_equal(other[n][:1], a[:1]) for n, a in first.items()):
            return first, other
    turned = {n: np.repeat(a[-1:], len(a), axis=0) for n, a in first.items()}
    halved = {n: (a / 2).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in turned.items()}
    return first, {n: np.ascontiguousarray(a[..., ::-1] if a.ndim > 1 else a) for n, a in halved.items()}


def plan_batch(
    artifact: Artifact,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    cases: Sequence[Case],
    contract: Contract,
    asked: int | None,
    tuned: RuntimeSettings,
    told: Progress,
) -> int:
    """The most rows of joined requests; 0 where requests are not joined.

    Args:
        artifact: For the proof, which runs it.
        inputs: With known ranks.
        outputs: Likewise.
        cases: Golden requests.
        contract: How rows are compared.
        asked: By the user; None to find out.
        tuned: The batch that the settings were found for.
        told: Told why requests are not joined.

    Raises:
        PackageError: The user asked for what the model cannot do.
    """
    if asked == 0:
        return 0
    symbol, why = batch_symbol(inputs, outputs)
    if symbol is not None:
        why = one_scale(artifact.model_path) or _prove_rows(artifact, cases, contract) or ""
    if why:
        if asked is not None:
            raise PackageError(f"requests cannot be joined: {why}", hint="leave --max-batch out, or give 0")
        told.note(f"requests are not joined: {why}")
        return 0
    sizes = [len(next(iter(i.values()))) for i, _ in cases]
    if asked is not None:
        if asked < min(sizes):
            raise PackageError(
                f"the smallest golden request has {min(sizes)} rows", hint=f"give --max-batch {min(sizes)} or more"
            )
        return asked
    return max(tuned.batch, DEFAULT_BATCH, min(sizes))


def _prove_rows(artifact: Artifact, cases: Sequence[Case], contract: Contract) -> str | None:
    for device in (d for d in default_devices() if artifact.model_path.suffix in d.reads):
        with open_session(artifact, device) as session:
            return why_not_joined(session, cases, contract.min_cosine)
    return "no runtime is installed here that could show it"


def fitting(cases: Sequence[Case], max_batch: int) -> tuple[Case, ...]:
    """Golden requests of no more rows than the server takes."""
    if max_batch == 0:
        return tuple(cases)
    return tuple(c for c in cases if len(next(iter(c[0].values()))) <= max_batch)


def replay(model: Path, settings: RuntimeSettings, cases: Sequence[Case], contract: Contract) -> dict[str, Any]:
    """Run golden requests on a packaged model; a parity record.

    Raises:
        PackageError: The answers are not the golden ones.
    """
    try:
        with open_session(model, tuned=settings) as session:
            device = str(session.device)
            answers = [session.run(i) for i, _ in cases]
    except (DeviceError, MissingDependencyError) as exc:
        return {"verdict": "not run", "device": settings.device, "reason": str(exc)}
    record = {"device": device} | judge(cases, answers, contract)
    if not accepted(record, contract):
        raise PackageError(
            f"the packaged model does not answer its golden requests on {device}: {record.get('reason')}",
            hint="give --min-cosine for a model whose numbers were changed on purpose",
        )
    return record
