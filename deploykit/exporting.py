"""The verb `export`: from a source to a verified artifact."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.artifact import GOLDEN, Artifact, Evidence, StepRecord, write_golden
from deploykit.benchmarks.parity import (
    Verdict,
    check_vacuity,
    compare,
)
from deploykit.errors import DeploykitError, ExportError, ParityError, UnverifiableError
from deploykit.exporters import Case, ExportOptions, Source, Way, open_source
from deploykit.exporters import export as write_onnx
from deploykit.models import load_model
from deploykit.progress import Progress, quiet
from deploykit.runtimes import Device, default_devices, open_session
from deploykit.staging import ArtifactWriter

if TYPE_CHECKING:
    pass

from deploykit.comparing import find_targets

_MODEL = "model.onnx"
_LOG = "export.log"


def export(
    source: str | Path,
    output: str | Path,
    *,
    dynamic: Sequence[str] = (),
    inputs: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    exporter: str = "auto",
    data: str | Path | None = None,
    devices: Sequence[str | Device] = (),
    allow_unverified: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Turn a model into a verified artifact.

    The result is run beside the source at several shapes (batch 1 and others); an artifact is written only when the
    outputs agree within an absolute and a relative tolerance, on the first device at least.

    Args:
        source: `file.py:factory`, `package.module:factory`, a `.pt2`, `.keras`, `.tflite`, `.skops` or `.onnx` file, a
            Hugging Face model directory, a SavedModel directory (`DIR` or `DIR:signature`).
        output: Where the artifact will stand; nothing may be there.
        dynamic: `batch` (default), `none`, or `input:axis=symbol,axis=symbol`.
        inputs: `name=dtype[dim,...]` for a factory that gives no example inputs.
        dims: Sizes of dynamic dimensions where inputs are made up.
        opset: ONNX opset; 18 by default.
        exporter: "auto" (torch.export, then TorchScript), "torch.export" or "torchscript".
        data: Real inputs for the parity check.
        devices: Where the result has to be right; by default on the CPU of every installed runtime, where only the
            first decides and the others are reported.
        allow_unverified: Keep a model whose outputs do not react to inputs; the evidence says "unverifiable".
        progress: Told about steps and notes.

    Raises:
        SourceError: The source cannot be loaded.
        ExportError: No way leads to ONNX.
        ParityError: Every exported graph gave other numbers than the source.
        UnverifiableError: The outputs do not react to the inputs.
        OutputExistsError: The output is taken.
    """
    told = progress or Progress()
    started = time.monotonic()
    options = ExportOptions(
        tuple(inputs), tuple(dynamic), opset, exporter, dict(dims or {}), str(data) if data else None
    )
    targets, strict = find_targets(devices)
    with ArtifactWriter(output) as writer, _log_kept_on_failure(writer.dir / _LOG, told):
        log = writer.dir / _LOG
        with told.step(f"load {source}"), quiet(log):
            opened = open_source(str(source), options, _unoptimized)
        for note in opened.notes:
            told.note(note)
        vacuous = check_vacuity([case.outputs for case in opened.cases])
        if vacuous and not allow_unverified:
            raise UnverifiableError(
                f"parity cannot be verified: {vacuous}",
                expected="a trained model, and inputs that make a difference",
                hint="give real inputs with --data, or accept it with --allow-unverified",
            )
        target = writer.dir / _MODEL
        way, evidence = _export_first_right(opened, targets, target, opset, log, told, strict=strict)
        if vacuous:
            evidence = [record | {"verdict": str(Verdict.UNVERIFIABLE), "reason": vacuous} for record in evidence]
            told.note(f"unverifiable: {vacuous}")
        cases = opened.cases_for(way)
        write_golden(writer.dir / GOLDEN, [(case.feeds, case.outputs) for case in cases])
        for asset in opened.assets:
            (writer.dir / "assets").mkdir(exist_ok=True)
            shutil.copyfile(asset, writer.dir / "assets" / asset.name)
        if not log.stat().st_size:
            log.unlink()
        exported = load_model(target)
        step = StepRecord(
            step="export",
            params={
                "source": str(source), "kind": opened.kind, "exporter": str(way), "opset": exported.opset,
                "dynamic": list(dynamic), "inputs": list(inputs), "dims": dict(dims or {}),
            },
            tools=opened.tools(),
            parent=None,
            seconds=round(time.monotonic() - started, 3),
            notes=list(told.notes),
        )  # fmt: skip
        return writer.commit(
            model=_MODEL,
            signature=exported.signature if opened.kind != "onnx" else opened.signature,
            lineage=[step],
            evidence=Evidence(parity=evidence),
            ranges=opened.ranges,
        )


def _export_first_right(
    opened: Source,
    targets: Sequence[Device],
    target: Path,
    opset: int | None,
    log: Path,
    told: Progress,
    *,
    strict: bool,
) -> tuple[Way, list[dict[str, Any]]]:
    """Try the source's ways until one gives a graph with the right numbers; say why the others did not."""
    failures: list[tuple[Way, DeploykitError]] = []
    for way in opened.ways:
        _clear(target)
        try:
            with told.step(f"export by {way}"), quiet(log):
                write_onnx(opened, way, target, opset=opset)
            with told.step(f"compare with the source in {', '.join(map(str, targets))}"), quiet(log):
                evidence = _parity_records(target, opened.cases_for(way), targets, opened.data, told, strict=strict)
        except (ExportError, ParityError) as exc:
            failures.append((way, exc))
            continue
        for failed, why in failures:
            told.note(f"{failed} was not used: {why.what}")
        if not way.dynamic and opened.signature.symbols:
            shapes = ", ".join(f"{n}{list(a.shape)}" for n, a in opened.cases[0].feeds.items())
            told.note(f"the shapes are fixed, because no way with dynamic ones was right: {shapes}")
        return way, evidence
    _clear(target)
    reasons = "; ".join(dict.fromkeys(f"{way}: {exc.what}" for way, exc in failures))
    kind = ParityError if any(isinstance(exc, ParityError) for _, exc in failures) else ExportError
    raise kind(f"no way led to a right ONNX graph of {opened.label}: {reasons}", hint=failures[0][1].hint)


def _clear(target: Path) -> None:
    for file in target.parent.glob(target.name + "*"):
        file.unlink()


def _parity_records(
    model: Path, cases: Sequence[Case], targets: Sequence[Device], data: str, told: Progress, *, strict: bool
) -> list[dict[str, Any]]:
    """Compare on every device; the first, and with ``strict`` every one, has to be right.

    Raises:
        ParityError: It is not.
    """
    records = []
    for number, device in enumerate(targets):
        decisive = strict or number == 0
        try:
            with open_session(model, device) as session:
                names = {s.name for s in session.signature.inputs}
                outputs = [session.run({k: v for k, v in case.feeds.items() if k in names}) for case in cases]
            result = compare([case.outputs for case in cases], outputs)
        except DeploykitError as exc:
            if decisive:
                raise ParityError(f"{device} cannot run the exported graph ({exc.what})", hint=exc.hint) from exc
            told.note(f"{device} cannot run it: {exc.what}")
            records.append({"against": "source", "device": str(device), "verdict": "failed", "reason": str(exc)})
            continue
        if result.verdict is Verdict.FAILED:
            text = f"{device} gives other numbers than the source: {result.reason}"
            if decisive:
                raise ParityError(text, hint="nothing was written; export a smaller part to find the operator")
            told.note(text)
        records.append({"against": "source", "device": str(device), "data": data, **result.as_dict()})
    return records


def _unoptimized(path: Path) -> Any:
    device = default_devices()[0]
    return open_session(path, device, optimize=device.runtime != "ort").run


@contextmanager
def _log_kept_on_failure(log: Path, told: Progress) -> Iterator[None]:
    """Where the frameworks printed something before a failed export, keep it outside the discarded directory."""
    try:
        yield
    except (ExportError, ParityError):
        if log.is_file() and log.stat().st_size:
            with tempfile.NamedTemporaryFile("wb", prefix="deploykit-", suffix=".log", delete=False) as kept:
                kept.write(log.read_bytes())
            told.note(f"what the frameworks printed: {kept.name}")
        raise
