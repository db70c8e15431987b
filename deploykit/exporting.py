"""The verb `export`: from a source to a verified artifact."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, Evidence, StepRecord
from deploykit.comparing import find_targets
from deploykit.errors import (
    ContractError,
    ExportError,
    OptionError,
    ParityError,
    SourceError,
    UnverifiableError,
)
from deploykit.exporters import ExportOptions, Source, open_parts, open_source
from deploykit.exporters.base import DEFAULT_OPSET
from deploykit.exporters.live import name_of, open_model, undisturbed
from deploykit.graph_exporting import LOG, MODEL, export_graph
from deploykit.progress import Progress, quiet
from deploykit.runtimes import Device, default_devices, open_session
from deploykit.staging import ArtifactWriter
from deploykit.targets import Target, choose_opset, parse_targets


def export(
    source: str | Path | Any,
    output: str | Path,
    example_inputs: Any = None,
    *,
    dynamic: Sequence[str] = (),
    inputs: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    exporter: str = "auto",
    timeout_s: float | None = None,
    data: str | Path | None = None,
    task: str | None = None,
    part: str | None = None,
    devices: Sequence[str | Device] = (),
    contract: Sequence[str] = (),
    allow_unverified: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Turn a model into a verified artifact.

    The result is run beside the source at several shapes (batch 1 and others); an artifact is written only when the
    outputs agree within an absolute and a relative tolerance, on the first device at least.

    Args:
        source: `file.py:factory`, `package.module:factory`, a `.pt2`, `.keras`, `.tflite`, `.skops` or `.onnx` file, a
            Hugging Face model directory, a SavedModel directory (`DIR` or `DIR:signature`). Or a model in this process:
            a `torch.nn.Module` in any mode, a Keras model, a fitted scikit-learn estimator. A copy of it is exported,
            in evaluation mode; the model itself, its training flags, weights and hooks stay as they are.
        output: Where the artifact will stand; nothing may be there.
        example_inputs: Of a model in this process, what a factory would return beside it: a tensor, a tuple of
            arguments, a dictionary of them, or nests of these; an array or rows for Keras and scikit-learn, which may
            do without.
        dynamic: `batch` (default), `none`, or `input:axis=symbol,axis=symbol`.
        inputs: `name=dtype[dim,...]` for a factory that gives no example inputs.
        dims: Sizes of dynamic dimensions where inputs are made up.
        opset: ONNX opset; 18 by default.
        exporter: "auto" (torch.export, then TorchScript), "torch.export" or "torchscript".
        timeout_s: Seconds of CPU time that one way to ONNX may take; by default 40 and more for large modules, and
            five times that where no other way leads there.
        data: Real inputs for the parity check.
        task: What a Hugging Face model is for ("text-classification"), where that is not what its config names.
        part: Which graph of a model that becomes several ("encoder"); see `export_parts`.
        devices: Where the result has to be right; by default on the CPU of every installed runtime, where only the
            first decides and the others are reported.
        contract: Runtimes that have to be able to run it, like "triton:24.08", "ort:1.18" or "openvino:2024.6"; they
            choose opset and IR version.
        allow_unverified: Keep a model whose outputs do not react to inputs; the evidence says "unverifiable".
        progress: Told about steps and notes.

    Raises:
        SourceError: The source cannot be loaded.
        ExportError: No way leads to ONNX.
        ContractError: No way leads to a model that the contract's runtimes can run, or they are unknown.
        ParityError: Every exported graph gave other numbers than the source.
        UnverifiableError: The outputs do not react to the inputs.
        OutputExistsError: The output is taken.
    """
    options = ExportOptions(
        tuple(inputs), tuple(dynamic), opset, exporter, dict(dims or {}), str(data) if data else None, task, part,
        timeout_s,
    )  # fmt: skip
    live = not isinstance(source, str | Path)
    label = name_of(source) if live else str(source)
    if example_inputs is not None and not live:
        raise OptionError(
            f"example_inputs are given, and {label} has inputs of its own",
            expected="example_inputs beside a model in this process",
            hint="let the factory return (model, example_inputs), or give real inputs as data",
        )

    def load() -> dict[str, Source]:
        if live:
            return {"": open_model(source, example_inputs, options, label)}
        return {"": open_source(label, options, _unoptimized)}

    with undisturbed():
        made = _export(
            label, output, options, devices, parse_targets(contract), progress or Progress(), load,
            unverified=allow_unverified,
        )  # fmt: skip
    return next(iter(made.values()))


def export_parts(
    source: str | Path,
    output: str | Path,
    *,
    dynamic: Sequence[str] = (),
    inputs: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    exporter: str = "auto",
    timeout_s: float | None = None,
    data: str | Path | None = None,
    task: str | None = None,
    part: str | None = None,
    devices: Sequence[str | Device] = (),
    contract: Sequence[str] = (),
    allow_unverified: bool = False,
    progress: Progress | None = None,
) -> dict[str, Artifact]:
    """Turn a model into verified artifacts, one for each graph that it becomes.

    The arguments and errors are those of `export`. An encoder-decoder becomes `OUTPUT/encoder` and `OUTPUT/decoder`,
    the towers of CLIP `OUTPUT/text` and `OUTPUT/image`; all of them appear together or none does.

    Returns:
        The artifacts by the name of their part; one under an empty name, at `output` itself, where there is one graph.
    """
    options = ExportOptions(
        tuple(inputs), tuple(dynamic), opset, exporter, dict(dims or {}), str(data) if data else None, task, part,
        timeout_s,
    )  # fmt: skip
    if not isinstance(source, str | Path):
        raise SourceError(f"a {type(source).__name__} becomes one graph", hint="use deploykit.export")
    return _export(
        str(source), output, options, devices, parse_targets(contract), progress or Progress(),
        lambda: open_parts(str(source), options, _unoptimized), unverified=allow_unverified,
    )  # fmt: skip


def export_source(
    opened: Source,
    output: str | Path,
    *,
    options: ExportOptions | None = None,
    devices: Sequence[str | Device] = (),
    contract: Sequence[str] = (),
    steps: Sequence[StepRecord] = (),
    judge: Callable[[Path], list[dict[str, Any]]] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Turn a source that is loaded already, because something was done to it, into a verified artifact.

    Args:
        opened: The source, with the reference outputs that it gives now.
        output: Where the artifact will stand; nothing may be there.
        options: What it was loaded with.
        devices: As for `export`.
        contract: As for `export`.
        steps: What was done to it, for the lineage.
        judge: Measures the accuracy of the model file, before the artifact stands; for the evidence.
        progress: Told about steps and notes.

    Raises:
        ExportError: As for `export`.
        ContractError: As for `export`.
        ParityError: As for `export`.
        UnverifiableError: As for `export`.
        OutputExistsError: As for `export`.
    """
    try:
        made = _export(
            opened.label, output, options or ExportOptions(), devices, parse_targets(contract), progress or Progress(),
            lambda: {"": opened}, unverified=False, done=_Done(tuple(steps), judge),
        )  # fmt: skip
    except UnverifiableError as exc:
        # The options that `export` names are not those of a training.
        raise UnverifiableError(
            exc.what, expected=exc.expected,
            hint="let the source bring example inputs that differ as real ones do, or train longer",
        ) from exc  # fmt: skip
    return next(iter(made.values()))


@dataclass(frozen=True, slots=True)
class _Done:
    """What was done to a source before its export, and how the result is measured."""

    steps: tuple[StepRecord, ...] = ()
    judge: Callable[[Path], list[dict[str, Any]]] | None = None


def _export(
    source: str,
    output: str | Path,
    options: ExportOptions,
    devices: Sequence[str | Device],
    held: Sequence[Target],
    told: Progress,
    load: Callable[[], dict[str, Source]],
    *,
    unverified: bool,
    done: _Done | None = None,
) -> dict[str, Artifact]:
    done = done or _Done()
    started = time.monotonic()
    targets = find_targets(devices)
    choose_opset(held, options.opset, DEFAULT_OPSET)  # a contradiction is said before the work is done
    with ArtifactWriter(output) as writer, _log_kept_on_failure(writer.dir / LOG, told):
        log = writer.dir / LOG
        with nullcontext() if done.steps else told.step(f"load {source}"), quiet(log):
            opened = load()
        _check_dims(opened, options.dims, told)
        if len(opened) == 1:
            ((name, only),) = opened.items()
            return {
                name: _export_graph(
                    only, writer, source, options, targets, held, started, told, done, unverified=unverified
                )
            }
        if options.data is not None:
            raise ExportError(
                f"{source} becomes {len(opened)} graphs, and --data holds the inputs of one",
                hint=f"one at a time: --part {next(iter(opened))}",
            )
        printed = log.read_bytes()
        log.unlink()
        made = {}
        for name, graph in opened.items():
            told.note(f"part {name}:")
            with ArtifactWriter(writer.dir / name) as inner, _log_kept_on_failure(inner.dir / LOG, told):
                (inner.dir / LOG).write_bytes(printed)
                own = replace(options, part=name)
                made[name] = _export_graph(
                    graph, inner, source, own, targets, held, started, told, done, unverified=unverified
                )
        return writer.commit_parts(made)


def _check_dims(opened: Mapping[str, Source], dims: Mapping[str, int], told: Progress) -> None:
    """Refuse sizes of dimensions that no graph has; say which sizes were not needed.

    Raises:
        OptionError: There is no such dimension.
    """
    known = list(dict.fromkeys(symbol for graph in opened.values() for symbol in graph.signature.symbols))
    for name, size in dims.items():
        if name not in known:
            raise OptionError(
                f"--dim names {name!r}, which is no dynamic dimension of the inputs",
                expected=f"one of {', '.join(known)}" if known else "no --dim: all dimensions are fixed",
            )
        if not any(case.sizes.get(name) == size for graph in opened.values() for case in graph.cases):
            told.note(f"--dim {name}={size} was not used: the inputs are not made up, and have sizes of their own")


def _export_graph(
    opened: Source,
    writer: ArtifactWriter,
    source: str,
    options: ExportOptions,
    targets: tuple[Sequence[Device], bool],
    held: Sequence[Target],
    started: float,
    told: Progress,
    done: _Done,
    *,
    unverified: bool,
) -> Artifact:
    """Write one graph that is right, with its evidence."""
    made = export_graph(opened, writer.dir, source, options, targets, held, started, told, unverified=unverified)
    accuracy = done.judge(writer.dir / MODEL) if done.judge is not None else []
    return writer.commit(
        model=MODEL,
        signature=made.signature,
        lineage=[*done.steps, made.step],
        evidence=Evidence(parity=made.parity, accuracy=accuracy),
        ranges=opened.ranges,
    )


def _unoptimized(path: Path) -> Any:
    device = default_devices()[0]
    return open_session(path, device, optimize=device.runtime != "ort").run


@contextmanager
def _log_kept_on_failure(log: Path, told: Progress) -> Iterator[None]:
    """Where the frameworks printed something before a failed export, keep it outside the discarded directory."""
    try:
        yield
    except (ExportError, ParityError, ContractError) as exc:
        if not isinstance(exc, OptionError) and log.is_file() and log.stat().st_size:
            with tempfile.NamedTemporaryFile("wb", prefix="deploykit-", suffix=".log", delete=False) as kept:
                kept.write(log.read_bytes())
            told.note(f"what the frameworks printed: {kept.name}")
        raise
