"""The verbs: every command of the command line is a function here."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.artifact import GOLDEN, Artifact, ArtifactWriter, Evidence, StepRecord, check_free, write_golden
from deploykit.benchmarks.parity import (
    Parity,
    Verdict,
    check_vacuity,
    compare,
    compare_lossy,
    top1_agreement,
    without_padding,
)
from deploykit.data import Dataset
from deploykit.errors import DeploykitError, ExportError, OptimizationError, ParityError, UnverifiableError
from deploykit.exporters import Case, ExportOptions, Source, Way, open_source
from deploykit.exporters import export as write_onnx
from deploykit.models import LoadedModel, load_model, probe_feeds
from deploykit.optimizers import DynamicConfig, SimplifyConfig, StaticConfig, StepConfig, optimize
from deploykit.progress import Progress, quiet
from deploykit.runtimes import Device, default_devices, open_session, require_device

if TYPE_CHECKING:
    from deploykit.benchmarks import Report
    from deploykit.recipe import Recipe
    from deploykit.specs import Array, Feeds

MIN_COSINE = 0.95
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
        source: `file.py:factory`, `package.module:factory`, a `.pt2` file, a Hugging Face model directory, an `.onnx`
            file.
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
    targets, strict = _targets(devices)
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


def _targets(devices: Sequence[str | Device]) -> tuple[tuple[Device, ...], bool]:
    """Devices to check on, and whether all of them decide: those that the user named do."""
    if devices:
        return tuple(require_device(d) for d in devices), True
    return default_devices(), False


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


# --- steps from artifact to artifact ----------------------------------------------------------------------------------


def simplify(
    model: str | Path,
    output: str | Path,
    *,
    timeout_s: float = 300.0,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Simplify the graph: onnxsim, else onnxslim, else as it was; each result is compared with its parent.

    Args:
        model: Artifact or `.onnx` file.
        output: Where the artifact will stand.
        timeout_s: Seconds for one simplifier.
        data: Real inputs for the comparison; golden or made-up ones by default.
        dims: Sizes of dynamic dimensions where inputs are made up.
        progress: Told about steps and notes.

    Raises:
        ModelError: The model cannot be read.
        ParityError: The result differs from its parent.
    """
    return _derive("simplify", model, output, SimplifyConfig(timeout_s), data, dims, None, progress)


def quantize_dynamic(
    model: str | Path,
    output: str | Path,
    *,
    config: DynamicConfig | None = None,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    min_cosine: float = MIN_COSINE,
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
        progress: Told about steps and notes.

    Raises:
        OptimizationError: Nothing to quantize, or the quantizer failed.
        ParityError: The outputs are too far from the parent's.
    """
    return _derive("quantize-dynamic", model, output, config or DynamicConfig(), data, dims, min_cosine, progress)


def quantize_static(
    model: str | Path,
    output: str | Path,
    *,
    data: str | Path,
    config: StaticConfig | None = None,
    min_cosine: float = MIN_COSINE,
    progress: Progress | None = None,
) -> Artifact:
    """Quantize weights and activations to 8 bits, with ranges from calibration data.

    Args:
        model: Artifact or `.onnx` file, in floating point.
        output: Where the artifact will stand.
        data: Calibration data, anything that `Dataset.open` reads.
        config: How to quantize.
        min_cosine: Smallest accepted cosine between an output and the parent's.
        progress: Told about steps and notes.

    Raises:
        DataError: The data cannot be read, or do not fit the model.
        OptimizationError: Nothing to quantize, or the quantizer failed.
        ParityError: The outputs are too far from the parent's.
    """
    return _derive("quantize-static", model, output, config or StaticConfig(), data, None, min_cosine, progress)


def _derive(
    step: str,
    model: str | Path,
    output: str | Path,
    config: StepConfig,
    data: str | Path | None,
    dims: Mapping[str, int] | None,
    min_cosine: float | None,
    progress: Progress | None,
) -> Artifact:
    """Apply one optimizer, compare with the parent on every default device, write the artifact."""
    told = progress or Progress()
    check_free(Path(output))
    targets, started = default_devices(), time.monotonic()
    first_note = len(told.notes)
    parent = load_model(model)
    dataset = Dataset.open(data) if data else None
    feeds, origin = probe_feeds(parent, dataset, dims or {})
    if min_cosine is not None and origin == "generated":
        told.note("checked on made-up inputs only, which prove no accuracy; give real ones with --data")
    expected = _outputs(parent.path, targets[0], feeds)
    vacuous = check_vacuity(expected)
    if vacuous and not parent.unverifiable:
        raise UnverifiableError(
            f"the result could not be verified: {vacuous}",
            expected="a trained model, and several different inputs",
            hint="give real inputs with --data, or accept it once: deploykit export MODEL --allow-unverified",
        )
    with ArtifactWriter(output) as writer:
        target = writer.dir / _MODEL

        def check(candidate: Path) -> str | None:
            try:
                result = compare(expected, _outputs(candidate, targets[0], feeds))
            except DeploykitError as exc:
                return exc.what
            return f"its outputs differ: {result.reason}" if result.verdict is Verdict.FAILED else None

        with told.step(f"{step} {model}"):
            done = optimize(
                parent.path,
                config,
                target,
                check=check,
                open_model=lambda p: open_session(p, targets[0]).run,
                data=dataset,
            )
        for note in done.notes:
            told.note(note)
        with told.step(f"compare with the parent in {', '.join(map(str, targets))}"):
            records = _compare_with_parent(parent, target, targets, feeds, expected, origin, min_cosine, told)
        if vacuous:
            records = [r | {"verdict": str(Verdict.UNVERIFIABLE), "reason": vacuous} for r in records]
            told.note(f"unverifiable: {vacuous}")
        _copy_companions(parent, writer.dir)
        record = StepRecord(
            step=step,
            params={**done.params, "changed": done.changed},
            tools=done.tools,
            parent=parent.digest,
            seconds=round(time.monotonic() - started, 3),
            notes=told.notes[first_note:],
        )
        return writer.commit(
            model=_MODEL,
            signature=parent.signature,
            lineage=[*parent.lineage, record],
            evidence=Evidence(parity=records),
            ranges=parent.ranges,
        )


def _outputs(model: Path, device: Device, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    with open_session(model, device) as session:
        return [session.run(case) for case in feeds]


def _compare(
    expected: Sequence[Mapping[str, Array]],
    outputs: Sequence[Mapping[str, Array]],
    feeds: Sequence[Feeds],
    min_cosine: float | None,
) -> Parity:
    """Strictly, or down to a cosine at the positions that are no padding."""
    if min_cosine is None:
        return compare(expected, outputs)
    return compare_lossy(without_padding(expected, feeds), without_padding(outputs, feeds), min_cosine)


def _compare_with_parent(
    parent: LoadedModel,
    target: Path,
    targets: Sequence[Device],
    feeds: Sequence[Feeds],
    expected: Sequence[Mapping[str, Array]],
    origin: str,
    min_cosine: float | None,
    told: Progress,
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number, device in enumerate(targets):
        try:
            outputs = _outputs(target, device, feeds)
        except DeploykitError as exc:
            if number == 0:
                raise OptimizationError(f"{device} cannot run the result ({exc.what})", hint=exc.hint) from exc
            told.note(f"{device} cannot run the result: {exc.what}")
            records.append({"against": parent.digest, "device": str(device), "verdict": "failed", "reason": str(exc)})
            continue
        result = _compare(expected, outputs, feeds, min_cosine)
        if result.verdict is Verdict.FAILED:
            text = f"in {device} the result is not its parent: {result.reason}"
            if number == 0:
                hint = (
                    "give more calibration data, or leave layers out with --exclude" if min_cosine is not None else None
                )
                raise ParityError(text, hint=hint)
            told.note(text)
        agreement = top1_agreement(expected, outputs) if min_cosine is not None else None
        extra = {} if agreement is None else {"top1_agreement": agreement}
        records.append({"against": parent.digest, "device": str(device), "data": origin, **result.as_dict(), **extra})
    return records


def _copy_companions(parent: LoadedModel, folder: Path) -> None:
    """Golden cases stay those of the source model; assets belong to every descendant."""
    if parent.artifact is None:
        return
    for name in parent.artifact.manifest.files:
        if name == GOLDEN or name.startswith("assets/"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(parent.artifact.path / name, folder / name)


# --- verify, benchmark, run -------------------------------------------------------------------------------------------


def verify(
    model: str | Path,
    *,
    against: str | Path | None = None,
    data: str | Path | None = None,
    devices: Sequence[str | Device] = (),
    dims: Mapping[str, int] | None = None,
    min_cosine: float | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Check a model: its files, and its outputs against another model or against its own golden cases.

    Args:
        model: Artifact or model file.
        against: The reference; without one, the artifact's golden cases.
        data: Real inputs.
        devices: Where to run; by default on the CPU of every installed runtime.
        dims: Sizes of dynamic dimensions where inputs are made up.
        min_cosine: Accept other values down to this cosine, as for quantized models; None for strict equality.
        progress: Told about steps.

    Returns:
        One record a device, with a "verdict".

    Raises:
        ArtifactError: A file was changed.
        ParityError: No reference to compare with.
    """
    from deploykit.serving.replay import replay_golden

    told = progress or Progress()
    targets, _ = _targets(devices)
    candidate = load_model(model)
    if against is None:
        if candidate.artifact is None:
            raise ParityError(f"{model} has no golden cases", hint="name a reference: --against MODEL")
        cosine = min_cosine if min_cosine is not None else MIN_COSINE if candidate.quantized else None
        with told.step(f"replay the golden cases of {model}"):
            return [replay_golden(candidate.artifact, device, min_cosine=cosine) for device in targets]
    reference = load_model(against)
    feeds, origin = probe_feeds(reference, Dataset.open(data) if data else None, dims or {})
    records = []
    with told.step(f"compare {model} with {against}"):
        expected = _outputs(reference.path, targets[0], feeds)
        vacuous = check_vacuity(expected)
        for device in targets:
            outputs = _outputs(candidate.path, device, feeds)
            result = _compare(expected, outputs, feeds, min_cosine)
            record = {"against": reference.digest, "device": str(device), "data": origin, **result.as_dict()}
            if vacuous and result.verdict is Verdict.PASSED:
                record |= {"verdict": str(Verdict.UNVERIFIABLE), "reason": vacuous}
            records.append(record)
    return records


def benchmark(
    models: Sequence[str | Path],
    *,
    devices: Sequence[str | Device] = (),
    data: str | Path | None = None,
    threads: int | None = None,
    batch: int = 1,
    rounds: int = 5,
    seconds: float = 2.0,
    warmup_s: float = 1.0,
    precision: str = "fp32",
    dims: Mapping[str, int] | None = None,
    max_drop: float = 0.01,
    min_cosine: float = MIN_COSINE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Measure models × devices in interleaved rounds, each in a fresh process.

    Args:
        models: Artifacts, `.onnx` or `.xml` files; the first, on the first device, is the reference.
        devices: By default the CPU of every installed runtime.
        data: Inputs; with `labels`, accuracy is measured too.
        threads: Threads in one request; all allowed cores by default.
        batch: Samples in one request.
        rounds: At least 3; the confidence intervals are over rounds.
        seconds: Timed seconds a candidate and round.
        warmup_s: Warm-up seconds before them (and at least 10 runs).
        precision: "fp32" or "native", see `open_session`.
        dims: Sizes of dynamic dimensions where inputs are made up.
        max_drop: A candidate whose accuracy is lower than the reference's by more does not win.
        min_cosine: A candidate whose outputs are further from the reference's does not enter.
        seed: Of the order of the candidates and of the bootstrap.
        progress: Told about steps.

    Raises:
        BenchmarkError: Nothing could be measured.
        DeviceError: A device cannot be had.
    """
    from deploykit.benchmarks import Candidate, Settings, measure
    from deploykit.models import benchmark_feeds, names_of

    told = progress or Progress()
    targets, _ = _targets(devices)
    loaded = [load_model(m) for m in models]
    dataset = Dataset.open(data) if data else None
    if not loaded:
        raise OptimizationError("nothing to measure", hint="name a model: -m MODEL")
    feeds, origin, size = benchmark_feeds(loaded[0], dataset, batch, dims or {})
    if size != batch:
        told.note(f"the model's batch is fixed to {size}")
    candidates = [
        Candidate(name, str(model.path), str(device), model.digest, model.size_bytes)
        for name, model in zip(names_of(models), loaded, strict=True)
        for device in targets
        # Nobody asked for ONNX Runtime by name, and it cannot read OpenVINO's format.
        if devices or model.path.suffix != ".xml" or device.runtime != "ort"
    ]
    settings = Settings(
        rounds=rounds, seconds=seconds, warmup_s=warmup_s, threads=threads, batch=size, precision=precision,
        max_drop=max_drop, min_cosine=min_cosine, seed=seed, inputs=origin,
    )  # fmt: skip
    return measure(candidates, feeds, settings, data=dataset, progress=told)


def run(
    recipe: str | Path | Recipe, output: str | Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Run a recipe; see `deploykit.recipe`.

    Args:
        recipe: A `.toml` file, or a recipe.
        output: Directory that receives one artifact a step, and the reports.
        resume: Go on in a directory that an interrupted run left: finished steps are kept.
        progress: Told about steps.

    Returns:
        The path of what each step made, by step.
    """
    from deploykit.recipe import Recipe
    from deploykit.runner import run_recipe

    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return run_recipe(loaded, Path(output), resume=resume, progress=progress or Progress())
