"""The verb `verify`: a model against its golden cases, another model, or the source it came from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.artifact import is_artifact
from deploykit.benchmarks.parity import Parity, Verdict, check_vacuity
from deploykit.comparing import MIN_COSINE, compare_outputs, find_targets, graph_choices, relax_ties
from deploykit.data import Dataset
from deploykit.errors import DataError, DeploykitError, InferenceError, ModelError, OptionError, ParityError, first_line
from deploykit.exporters import KINDS, ExportOptions, Source, open_source
from deploykit.models import LoadedModel, load_model, probe_feeds
from deploykit.nodes import bounded_outputs
from deploykit.progress import Progress, quiet
from deploykit.reference import run_parent
from deploykit.runtimes import Device, default_devices, open_session
from deploykit.specs import fit_feeds, terms
from deploykit.staging import check_free

if TYPE_CHECKING:
    from deploykit.benchmarks.bisect_finding import Finding
    from deploykit.specs import Array, Feeds, Signature

_MODEL_SUFFIXES = (".onnx", ".xml")
NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class _Reference:
    """What is right: a model, or a source.

    Attributes:
        label: What the user called it.
        digest: What stands in the record.
        model: Where it is a model.
        source: Where it is one.
        expected: Its outputs, one mapping a case.
        device: Where they were computed; None for a source.
    """

    label: str
    digest: str
    model: LoadedModel | None
    source: Source | None
    expected: list[dict[str, Array]]
    device: Device | None


def verify(
    model: str | Path,
    *,
    against: str | Path | None = None,
    data: str | Path | None = None,
    devices: Sequence[str | Device] = (),
    dims: Mapping[str, int] | None = None,
    min_cosine: float | None = None,
    bisect: bool = True,
    report: str | Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Check a model: its files, and its outputs against another model, its source, or its own golden cases.

    Args:
        model: Artifact or model file.
        against: The reference: a model, or what `export` takes (`file.py:factory`, `.pt2`, a Hugging Face directory);
            without one, the artifact's golden cases.
        data: Real inputs.
        devices: Where to run; by default on the CPU of every installed runtime.
        dims: Sizes of dynamic dimensions where inputs are made up.
        min_cosine: Accept other values down to this cosine, as for quantized models; None for strict equality.
        bisect: Where the outputs differ from ``against``, look for the first node that diverges.
        report: Directory that receives that node as a runnable model, with its tensors; must not exist.
        progress: Told about steps.

    Returns:
        One record a device, with a "verdict"; the first that failed holds a "bisection". The verdict is "not run" for a
        runtime that cannot run the model, where it is not the first and nobody named it.

    Raises:
        ArtifactError: A file was changed.
        ParityError: No reference to compare with.
        InferenceError: The first device, or a named one, cannot run the model.
        OutputExistsError: The report's place is taken.
    """
    told = progress or Progress()
    targets, named = find_targets(devices)
    if report is not None:
        check_free(Path(report), "--report")
        if against is None or not bisect:
            raise ParityError("a report needs a reference to bisect against", hint="add --against MODEL")
    candidate = load_model(model)
    if against is None:
        return _replay(candidate, model, targets, min_cosine, told, named=named)
    dataset = Dataset.open(data) if data else None
    if _is_source(against):
        source = _open(against, candidate, data, dims or {}, told)
        feeds, origin, expected = _source_cases(source, candidate, dataset, dims or {})
        reference = _Reference(str(against), "source", None, source, expected, None)
    else:
        other = _load_reference(against)
        _check_inputs(str(against), other.signature, candidate)
        sizes = {**_fixed_sizes(other.signature, candidate.signature), **(dims or {})}
        with told.step(f"run {against} in {targets[0]}"):
            made = run_parent(other, targets[0], dataset, sizes)
        for note in made.notes:
            told.note(note)
        feeds, origin = made.feeds, made.origin
        reference = _Reference(str(against), other.digest, other, None, made.outputs, targets[0])
    return _compare(candidate, reference, targets, feeds, origin, min_cosine, bisect, report, told, named=named)


def _replay(
    candidate: LoadedModel,
    model: str | Path,
    targets: Sequence[Device],
    min_cosine: float | None,
    told: Progress,
    *,
    named: bool,
) -> list[dict[str, Any]]:
    from deploykit.serving.replay import replay_golden

    if candidate.artifact is None:
        raise ParityError(f"{model} has no golden cases", hint="name a reference: --against MODEL")
    cosine = min_cosine if min_cosine is not None else MIN_COSINE if candidate.quantized else None
    with told.step(f"replay the golden cases of {model}"):
        records = []
        for number, device in enumerate(targets):
            try:
                records.append(replay_golden(candidate.artifact, device, min_cosine=cosine))
            except (InferenceError, ModelError) as exc:
                records.append(_not_run("golden", device, exc, decisive=named or number == 0))
        return records


def _not_run(against: str, device: Device, exc: DeploykitError, *, decisive: bool) -> dict[str, Any]:
    """The record of a runtime that nobody asked for and that cannot run the model, such as OpenVINO a forest of trees.

    Raises:
        InferenceError: Somebody asked for it, or it is the first.
    """
    if decisive:
        raise exc
    return {"against": against, "device": str(device), "verdict": NOT_RUN, "reason": exc.what}


def _is_source(against: str | Path) -> bool:
    """Whether it is something to export rather than a model."""
    path = Path(against)
    if path.is_dir():
        return not is_artifact(path) and (path / "config.json").is_file()
    if path.is_file():
        return path.suffix not in _MODEL_SUFFIXES
    return ":" in str(against)


def _open(
    against: str | Path, candidate: LoadedModel, data: str | Path | None, dims: Mapping[str, int], told: Progress
) -> Source:
    # A factory may give a module without example inputs; the candidate knows what they look like.
    inputs = [str(s).replace(": ", "=", 1) for s in candidate.signature.inputs if s.shape is not None]
    named = not Path(against).exists()
    made = next((step.params for step in candidate.lineage if step.step == "export"), {})
    task, part = (made.get(name) if Path(against).is_dir() else None for name in ("task", "part"))
    options = ExportOptions(
        inputs=tuple(inputs) if named else (), dims=dict(dims), data=str(data) if data is not None else None,
        task=str(task) if task else None, part=str(part) if part else None,
    )  # fmt: skip
    # Frameworks print bars and warnings; what is wrong with the source is in the error.
    with (
        tempfile.TemporaryDirectory(prefix="deploykit-") as folder,
        told.step(f"load {against}"),
        quiet(Path(folder) / "log"),
    ):
        try:
            return open_source(str(against), options, _unoptimized)
        except OptionError:
            if not options.inputs:
                raise
            # The example of another model: it is said below that the inputs differ.
            return open_source(str(against), replace(options, inputs=()), _unoptimized)


def _unoptimized(path: Path) -> Callable[[Feeds], dict[str, Array]]:
    device = default_devices()[0]
    return open_session(path, device, optimize=device.runtime != "ort").run


def _load_reference(against: str | Path) -> LoadedModel:
    if not Path(against).exists():
        raise ModelError(
            f"the reference {against} does not exist",
            expected=f"an artifact directory, an .onnx or .xml file, or {KINDS}",
        )
    return load_model(against)


def _check_inputs(label: str, theirs: Signature, candidate: LoadedModel, *, every: bool = False) -> None:
    """Refuse a reference that takes other inputs.

    A model that was made out of another may have lost an input that changed nothing, which a source's never has.

    Raises:
        DataError: It does.
    """
    takes = {s.name: s for s in theirs.inputs}
    mine = {s.name: s for s in candidate.signature.inputs}
    if set(mine) - set(takes) or (every and set(takes) - set(mine)):
        raise DataError(
            f"{label} takes {', '.join(map(str, takes.values())) or 'nothing'}, "
            f"the model takes {', '.join(map(str, mine.values())) or 'nothing'}",
            expected="a reference with the model's inputs: what it was made from",
        )


def _fixed_sizes(theirs: Signature, mine: Signature) -> dict[str, int]:
    """Sizes of the reference's dimensions that the candidate holds fixed: it can be compared at those only."""
    fixed: dict[str, int] = {}
    shapes = {s.name: s.shape for s in mine.inputs}
    for spec in theirs.inputs:
        own = shapes.get(spec.name) or ()
        if len(own) == len(spec.shape or ()):
            for dim, size in zip(spec.shape or (), own, strict=True):
                if isinstance(dim, str) and isinstance(size, int) and len(terms(dim)) == 1:
                    fixed[dim] = size
    return fixed


def _source_cases(
    source: Source, candidate: LoadedModel, dataset: Dataset | None, dims: Mapping[str, int]
) -> tuple[list[dict[str, Array]], str, list[dict[str, Array]]]:
    """Inputs, where they come from, and the source's outputs: the candidate's shapes decide, where it can be asked."""
    _check_inputs(source.label, source.signature, candidate, every=True)
    feeds, origin = probe_feeds(candidate, dataset, dims)
    expected = [found for case in feeds if (found := source.run(case)) is not None]
    if len(expected) == len(feeds):
        # What is made up has sizes that were guessed; the source's own cases have those that it was checked at.
        more = [c for c in source.cases if origin == "generated" and _accepts(candidate.signature, c.feeds)]
        return [*feeds, *(dict(c.feeds) for c in more)], origin, [*expected, *(dict(c.outputs) for c in more)]
    return [dict(c.feeds) for c in source.cases], source.data, [dict(c.outputs) for c in source.cases]


def _accepts(signature: Signature, feeds: Feeds) -> bool:
    try:
        fit_feeds(signature, feeds)
    except DataError:
        return False
    return True


def _run(path: Path, device: Device, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    """Run on every case; inputs that a model does not have are left out."""
    with open_session(path, device) as session:
        names = {s.name for s in session.signature.inputs}
        return [session.run({k: v for k, v in case.items() if k in names}) for case in feeds]


def _compare(
    candidate: LoadedModel,
    reference: _Reference,
    targets: Sequence[Device],
    feeds: Sequence[Feeds],
    origin: str,
    min_cosine: float | None,
    bisect: bool,
    report: str | Path | None,
    told: Progress,
    *,
    named: bool,
) -> list[dict[str, Any]]:
    vacuous = check_vacuity(reference.expected)
    records: list[dict[str, Any]] = []
    bounded = bounded_outputs(candidate.path if reference.model is None else reference.model.path)
    for number, device in enumerate(targets):
        with told.step(f"compare {candidate.path} with {reference.label} in {device}"):
            try:
                outputs = _run(candidate.path, device, feeds)
            except (InferenceError, ModelError) as exc:
                records.append(_not_run(reference.digest, device, exc, decisive=named or number == 0))
                continue
            result = compare_outputs(reference.expected, outputs, feeds, min_cosine, bounded)
            if min_cosine is None:
                result = _relax(result, candidate, reference, device, feeds, outputs)
        record = {"against": reference.digest, "device": str(device), "data": origin, **result.as_dict()}
        if vacuous and result.verdict is Verdict.PASSED:
            record |= {"verdict": str(Verdict.UNVERIFIABLE), "reason": vacuous}
        looked = any("bisection" in r for r in records)
        if result.verdict is Verdict.FAILED and bisect and not looked:
            record |= _bisect(candidate, reference, device, feeds, result, min_cosine, report, told)
        records.append(record)
    return records


def _relax(
    result: Parity,
    candidate: LoadedModel,
    reference: _Reference,
    device: Device,
    feeds: Sequence[Feeds],
    outputs: Sequence[Mapping[str, Array]],
) -> Parity:
    """Choices between equal scores are no difference, where both graphs can be asked for them."""
    other = reference.model
    if other is not None and reference.device is not None:
        if other.path.suffix != ".onnx":
            return result
        choices = graph_choices(other.path, reference.device)
    else:
        tensors = reference.source.tensors(feeds[0]) if reference.source is not None else None
        if tensors is None:
            return result

        def choices(folder: Path) -> Any:
            return tensors

    try:
        return relax_ties(result, candidate.path, device, feeds, reference.expected, outputs, choices)
    except (DeploykitError, OSError) as exc:  # what cannot be exposed cannot be excused
        why = exc.what if isinstance(exc, DeploykitError) else first_line(exc)
        return replace(result, reason=f"{result.reason} (ties could not be looked for: {why})")


def _bisect(
    candidate: LoadedModel,
    reference: _Reference,
    device: Device,
    feeds: Sequence[Feeds],
    result: Parity,
    min_cosine: float | None,
    report: str | Path | None,
    told: Progress,
) -> dict[str, Any]:
    """Look for the first node that diverges; a search that cannot be made says why, and changes no verdict."""
    case = result.failed_case
    try:
        with told.step(f"look for the first node that diverges, in case {case}"):
            finding = _find(candidate, reference, device, feeds[case], case, min_cosine)
    except (DeploykitError, OSError) as exc:  # no room for a copy of the weights, for one
        why = exc.what if isinstance(exc, DeploykitError) else first_line(exc)
        return {"bisection": {"kind": "unknown", "summary": f"the models cannot be looked into ({why})"}}
    made: dict[str, Any] = {"bisection": finding.as_dict()}
    if report is not None:
        from deploykit.benchmarks.bisect_report import save_finding

        context = {
            "candidate": str(candidate.path),
            "reference": reference.label,
            "device": str(device),
            "case": case,
            "reason": result.reason,
        }
        made["report"] = str(save_finding(finding, Path(report), context))
    return made


def _find(
    candidate: LoadedModel,
    reference: _Reference,
    device: Device,
    feeds: Feeds,
    case: int,
    min_cosine: float | None,
) -> Finding:
    from deploykit.benchmarks.bisection import bisect_models, bisect_source

    for loaded in (candidate, reference.model):
        if loaded is not None and loaded.path.suffix != ".onnx":
            raise ParityError(f"{loaded.path} is in OpenVINO's format, which has no ONNX nodes")
    loosest = min_cosine if min_cosine is not None else MIN_COSINE if _quantized(candidate, reference) else None
    # Outputs of one norm whose cosine is c differ by at least this much of it.
    max_error = float(np.sqrt(1 - loosest**2)) if loosest is not None and 0 < loosest < 1 else None
    if reference.model is not None and reference.device is not None:
        return bisect_models(candidate.path, device, reference.model.path, reference.device, feeds, max_error=max_error)
    source = reference.source
    tensors = source.tensors(feeds) if source is not None else None
    if tensors is None:
        raise ParityError(f"{reference.label} does not show what it computes on its way")
    return bisect_source(candidate.path, device, tensors, reference.expected[case], feeds, max_error=max_error)


def _quantized(candidate: LoadedModel, reference: _Reference) -> bool:
    """Whether the candidate alone is quantized."""
    return candidate.quantized and not (reference.model is not None and reference.model.quantized)
