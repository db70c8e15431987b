"""One graph of a source: written the first way that gives the right numbers, with the evidence that it does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploykit.artifact import GOLDEN, StepRecord, write_golden
from deploykit.benchmarks.parity import Tolerance, Verdict, check_vacuity, compare
from deploykit.comparing import MIN_COSINE, compare_outputs, within_rounding
from deploykit.contract import conform
from deploykit.errors import (
    ContractError,
    DeploykitError,
    ExportError,
    ParityError,
    TimeLimitError,
    UnverifiableError,
)
from deploykit.exporters import ExportOptions, Source, Way
from deploykit.exporters import export as write_onnx
from deploykit.exporters.base import DEFAULT_OPSET
from deploykit.models import load_model
from deploykit.nodes import bounded_outputs
from deploykit.progress import Progress, quiet
from deploykit.runtimes import Device, open_session
from deploykit.runtimes.plugged import runtime_tools
from deploykit.specs import Signature
from deploykit.targets import Target, choose_opset

MODEL = "model.onnx"
LOG = "export.log"


@dataclass(frozen=True, slots=True)
class Exported:
    """A graph in an artifact that is not committed yet.

    Attributes:
        step: For the lineage.
        parity: Records of the comparison with the source, a device each.
        signature: Inputs and outputs.
    """

    step: StepRecord
    parity: list[dict[str, Any]]
    signature: Signature


def export_graph(
    opened: Source,
    folder: Path,
    source: str,
    options: ExportOptions,
    targets: tuple[Sequence[Device], bool],
    held: Sequence[Target],
    started: float,
    told: Progress,
    *,
    unverified: bool,
) -> Exported:
    """Write one graph that is right, its golden cases and its companions into an artifact's folder.

    Args:
        opened: What is exported.
        folder: Of an `ArtifactWriter`.
        source: What the user called it.
        options: What the user asked for.
        targets: Where it has to be right, and whether on each of them.
        held: Contracts.
        started: When the work began, by `time.monotonic`.
        told: Steps and notes.
        unverified: Whether a model is kept whose outputs do not react to its inputs.

    Raises:
        ExportError: No way leads to ONNX.
        ContractError: No way leads to a model that the contract's runtimes can run.
        ParityError: Every exported graph gave other numbers than the source.
        UnverifiableError: The outputs do not react to the inputs.
    """
    log, target, before = folder / LOG, folder / MODEL, len(told.notes)
    for note in opened.notes:
        told.note(note)
    vacuous = check_vacuity([case.outputs for case in opened.cases])
    if vacuous and not unverified:
        raise UnverifiableError(
            f"parity cannot be verified: {vacuous}",
            expected="a trained model, and inputs that make a difference",
            hint="give real inputs with --data, or accept it with --allow-unverified",
        )
    opset = choose_opset(held, options.opset, DEFAULT_OPSET)
    way, evidence, loose = _export_first_right(opened, targets[0], target, opset, log, told, held, strict=targets[1])
    if vacuous:
        evidence = [record | {"verdict": str(Verdict.UNVERIFIABLE), "reason": vacuous} for record in evidence]
        told.note(f"unverifiable: {vacuous}")
    # What is replayed later has to be the same without the source at hand.
    cases = [case for number, case in enumerate(opened.cases_for(way)) if number not in loose]
    write_golden(folder / GOLDEN, [(case.feeds, case.outputs) for case in cases])
    for asset in opened.assets:
        (folder / "assets").mkdir(exist_ok=True)
        shutil.copyfile(asset, folder / "assets" / asset.name)
    if not log.stat().st_size:
        log.unlink()
    exported = load_model(target)
    step = StepRecord(
        step="export",
        params={
            "source": source, "kind": opened.kind, "exporter": str(way), "opset": exported.opset,
            "dynamic": list(options.dynamic), "inputs": list(options.inputs), "dims": dict(options.dims),
            "contract": [t.name for t in held], **({"quantized": True} if opened.quantized else {}),
            **({"task": options.task} if options.task else {}), **({"part": options.part} if options.part else {}),
        },
        tools=opened.tools() | (opened.plugin.tools if opened.plugin else {}) | runtime_tools(targets[0]),
        parent=None,
        seconds=round(time.monotonic() - started, 3),
        notes=list(told.notes[before:]),
    )  # fmt: skip
    return Exported(step, evidence, exported.signature if opened.kind != "onnx" else opened.signature)


def _export_first_right(
    opened: Source,
    targets: Sequence[Device],
    target: Path,
    opset: int | None,
    log: Path,
    told: Progress,
    held: Sequence[Target],
    *,
    strict: bool,
) -> tuple[Way, list[dict[str, Any]], set[int]]:
    """Try the source's ways until one gives a graph with the right numbers; say why the others did not."""
    failures: list[tuple[Way, DeploykitError]] = []
    waiting = list(opened.ways)
    while waiting:
        way = waiting.pop(0)
        _clear(target)
        try:
            with told.step(f"export by {way}"), quiet(log):
                write_onnx(opened, way, target, opset=opset)
                lowered = conform(target, held)
            with told.step(f"compare with the source in {', '.join(map(str, targets))}"), quiet(log):
                evidence, loose = _parity_records(target, opened, way, targets, told, strict=strict)
        except (ExportError, ParityError, ContractError) as exc:
            failures.append((way, exc))
            if isinstance(exc, TimeLimitError) and not way.patient:
                # Where nothing else keeps the shapes dynamic, it may take its time.
                later = next((i for i, w in enumerate(waiting) if way.dynamic and not w.dynamic), len(waiting))
                waiting.insert(later, replace(way, patient=True))
            continue
        for note in (*opened.notes_on(way), *lowered):
            told.note(note)
        for failed, why in failures:
            told.note(f"{failed} was not used: {why.what}")
        if not way.dynamic and opened.signature.symbols:
            shapes = ", ".join(f"{n}{list(a.shape)}" for n, a in opened.cases[0].feeds.items())
            told.note(f"the shapes are fixed, because no way with dynamic ones was right: {shapes}")
        return way, evidence, loose
    _clear(target)
    told_apart = {(way.name, exc.what): way for way, exc in reversed(failures)}
    reasons = "; ".join(f"{way}: {what}" for (_, what), way in reversed(told_apart.items()))
    kinds = (ParityError, ContractError, ExportError)
    kind = next(kind for kind in kinds if any(isinstance(exc, kind) for _, exc in failures))
    raise kind(f"no way led to a right ONNX graph of {opened.label}: {reasons}", hint=failures[0][1].hint)


def _clear(target: Path) -> None:
    for file in target.parent.glob(target.name + "*"):
        file.unlink()


def _parity_records(
    model: Path, opened: Source, way: Way, targets: Sequence[Device], told: Progress, *, strict: bool
) -> tuple[list[dict[str, Any]], set[int]]:
    """Compare on every device; the first, and with ``strict`` every one, has to be right.

    Returns:
        A record a device, and the numbers of the cases that are right within the source's own rounding only.

    Raises:
        ParityError: It is not.
    """
    records, loose = [], set[int]()
    cases = opened.cases_for(way)
    # An output in float32 of a model that computes in float16 has float16's accuracy.
    tolerance = Tolerance.for_dtype(opened.precision) if opened.precision else None
    bounded = bounded_outputs(model)
    for number, device in enumerate(targets):
        decisive = strict or number == 0
        try:
            with open_session(model, device) as session:
                names = {s.name for s in session.signature.inputs}
                outputs = [session.run({k: v for k, v in case.feeds.items() if k in names}) for case in cases]
            if opened.quantized:
                feeds = [case.feeds for case in cases]
                result = compare_outputs([case.outputs for case in cases], outputs, feeds, MIN_COSINE)
            else:
                result = compare([case.outputs for case in cases], outputs, tolerance, bounded=bounded)
                result, moved = within_rounding(
                    result,
                    [c.feeds for c in cases],
                    [c.outputs for c in cases],
                    outputs,
                    opened.run,
                    tolerance,
                    bounded,
                )
                loose |= moved if decisive else set()
        except DeploykitError as exc:
            if decisive:
                raise ParityError(f"{device} cannot run the exported graph ({exc.what})", hint=exc.hint) from exc
            told.note(f"{device} cannot run it: {exc.what}")
            records.append({"against": "source", "device": str(device), "verdict": "failed", "reason": str(exc)})
            continue
        if result.verdict is Verdict.FAILED:
            sizes = ", ".join(f"{name}={size}" for name, size in cases[result.failed_case].sizes.items())
            text = f"{device} gives other numbers than the source{sizes and f' at {sizes}'}: {result.reason}"
            if decisive:
                raise ParityError(text, hint="nothing was written; export a smaller part to find the operator")
            told.note(text)
        for text in result.relaxed:
            told.note(f"{device}: {text}")
        records.append({"against": "source", "device": str(device), "data": opened.data, **result.as_dict()})
    return records, loose
