"""Why is it slow? Profile, roofline and findings of one model on one device: `deploykit benchmark --explain`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.benchmarks import Candidate, experiments, findings, rules
from deploykit.benchmarks.experiments import Setup
from deploykit.benchmarks.explain import explanation_markdown, explanation_text
from deploykit.benchmarks.findings import Context, Finding
from deploykit.benchmarks.profile import Profile, SourceNode, compute_us, fold, join
from deploykit.benchmarks.roofline import Peaks, measure_peaks, raised
from deploykit.benchmarks.trials import LoadMeter, whole_runs_us
from deploykit.errors import DeploykitError, DeviceError
from deploykit.graphs import domain_of, element_bits
from deploykit.machine import Machine, inspect_machine
from deploykit.macs import UncountedError, count_macs
from deploykit.modelfile import read_model, tensor_bytes
from deploykit.progress import Progress
from deploykit.proof import layers_of
from deploykit.runtimes import Device, Session, open_session, parse_device
from deploykit.runtimes.placement import Placement, traffic_bytes
from deploykit.shaping import Value, trace_model
from deploykit.specs import Feeds, fit_feeds

if TYPE_CHECKING:
    import onnx

__all__ = ["cure_of", "explain_candidates", "explain_model", "explanation_markdown", "explanation_text"]

# Runs with the profiler: as many as fit, and of each kernel the quickest median of two profiles or more. A neighbour
# slows some of them: while kernels take longer together than a quick run did, they are measured again.
_PROFILED_US, _FEWEST_RUNS, _MOST_RUNS = 300_000.0, 3, 40
_PROFILES, _MOST_PROFILES, _TOO_LONG = 2, 5, 1.2
_BELIEVED_US = 50.0
_ON_INTEGERS = ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger")
_FALLBACK = "session.disable_cpu_ep_fallback"


def explain_model(
    path: str | Path,
    device: str | Device,
    feeds: Feeds | Sequence[Feeds],
    *,
    threads: int | None = None,
    precision: str = "fp32",
    settings: Mapping[str, Any] | None = None,
    optimize: bool | str = True,
    label: str | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Say where the time of a model goes, and what to do about it.

    The model runs in this process: whole, then with the runtime's profiler, then beside variants of itself where the
    profile gives reason to try one (fewer threads, fixed shapes, repaired Q/DQ pairs, flushed denormals).

    Args:
        path: An `.onnx` or `.xml` file.
        device: As in `open_session`.
        feeds: One request, or several, of which the first counts.
        threads: As in `open_session`.
        precision: "fp32" or "native".
        settings: The runtime's own settings.
        optimize: As in `open_session`.
        label: Its name in the report.
        machine: What the CPU has; this machine by default.
        progress: Told about steps.

    Returns:
        A JSON-ready record; see `explanation_text` for how it reads. A device that refuses the model gives a record
        without layers, and a finding that says which nodes it refuses.

    Raises:
        DataError: The feeds do not fit.
        DeviceError: The device's name, the threads or the precision make no sense.
        InferenceError: The model does not run.
    """
    told = progress or Progress()
    target = parse_device(device)
    one = feeds if isinstance(feeds, Mapping) else feeds[0]
    setup = Setup(Path(path), target, one, threads, precision, dict(settings or {}), optimize)
    base = {"label": label or str(target), "device": str(target)}
    here = machine or inspect_machine()
    with told.step(f"explain {base['label']}"):
        try:
            session = setup.open()
        except DeviceError as exc:
            if exc.expected is not None:  # an argument that makes no sense, and no device that refuses
                raise
            return base | _refused(setup, exc)
        with session:
            fitted = replace(setup, feeds=fit_feeds(session.signature, one))
            return base | _explain(fitted, session, here)


def explain_candidates(
    candidates: Sequence[Candidate],
    statuses: Sequence[str],
    feeds: Sequence[Feeds],
    *,
    threads: int | None,
    precision: str,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Explain the candidates of a benchmark, by label; those with other outputs than the reference's are left out.

    Args:
        candidates: As they were measured.
        statuses: "ok", or why one was not timed.
        feeds: As the benchmark's.
        threads: Likewise.
        precision: Likewise, where a candidate has none of its own.
        settings: The runtime's own settings.
        progress: Told about steps.
    """
    told = progress or Progress()
    found = {}
    for candidate, status in zip(candidates, statuses, strict=True):
        if status.startswith("wrong outputs"):
            continue
        try:
            found[candidate.label] = explain_model(
                candidate.path, candidate.device, feeds, threads=candidate.threads or threads,
                precision=candidate.precision or precision, settings={**(settings or {}), **candidate.settings} or None,
                optimize=candidate.optimize, label=candidate.label, progress=told,
            )  # fmt: skip
        except DeploykitError as exc:
            told.note(f"{candidate.label} is not explained: {exc.what}")
    return found


def cure_of(found: Mapping[str, Any]) -> str | None:
    """What the gravest finding says to do; None where there is none."""
    return next((str(f["cure"]) for f in found["findings"]), None)


def _explain(setup: Setup, session: Session, machine: Machine) -> dict[str, Any]:
    threads = min(setup.threads or machine.cores_allowed, machine.cores_allowed)
    meter = LoadMeter()
    total, quick = whole_runs_us(partial(session.run, setup.feeds))
    graph = source_nodes(setup.path, setup.feeds)
    profile, placement = profile_of(setup, session, graph, total, quick)
    peaks = raised(
        measure_peaks(setup.device, threads, setup.precision),
        [(n.precision, 2 * n.macs / n.time_us / 1e3) for n in profile.layers if n.time_us >= _BELIEVED_US],
    )
    others = meter.others()
    x86 = machine.architecture.lower() in ("x86_64", "amd64", "i386", "i686")
    context = Context(
        shlex.quote(str(setup.path)), peaks, machine.int8_dot, x86, others, machine.cores_machine, threads
    )
    found = rules.find(profile, context)
    found = findings.in_order(_try_out(setup, session, profile, found, context, machine))
    notes = [] if graph else ["the file's own nodes are not known for this format: layers are kernels"]
    return {
        "total_us": round(total, 2),
        "profiled_us": round(profile.profiled_us, 2),
        "layers": findings.rows(profile, peaks),
        "unattributed_us": round(profile.unattributed_us, 2),
        "peak": _peak(peaks, context),
        "roofline": findings.whole(profile, peaks),
        "placement": placement,
        "findings": [f.as_dict() for f in found],
        "notes": notes,
    }


def _peak(peaks: Peaks, context: Context) -> dict[str, Any]:
    """Peaks with the load that was on the machine when they were measured."""
    numbers = {k: round(v, 2) if isinstance(v, float) else v for k, v in peaks.as_dict().items()}
    return numbers | {
        "other_cores": None if context.others is None else round(context.others, 2),
        "loaded": context.loaded,
    }


def profile_of(
    setup: Setup, session: Session, graph: Sequence[SourceNode], total_us: float, quick_us: float
) -> tuple[Profile, dict[str, Any]]:
    """Profile a session and fold it; with the placement's summary."""
    runs = int(min(max(_PROFILED_US / max(total_us, 1.0), _FEWEST_RUNS), _MOST_RUNS))
    placement = session.placement(setup.feeds, runs=runs)
    for number in range(1, _MOST_PROFILES):
        if number >= _PROFILES and sum(n.time_us for n in placement.nodes) <= _TOO_LONG * quick_us:
            break
        quicker = {n.name: n.time_us for n in session.placement(setup.feeds, runs=runs).nodes}
        nodes = [replace(n, time_us=min(n.time_us, quicker.get(n.name, n.time_us))) for n in placement.nodes]
        placement = replace(placement, nodes=tuple(nodes))
    kernels, layers = fold(join(placement.nodes, session.executed()), graph)
    names = [frozenset(s.name for s in ends) for ends in (session.signature.inputs, session.signature.outputs)]
    asked = _wanted(setup.device, placement)
    made = Profile(str(setup.device), asked, tuple(kernels), tuple(layers), total_us, quick_us, names[0], names[1])
    return made, replace(placement, asked=asked).summary()


def _wanted(device: Device, placement: Placement) -> str:
    """The device that nodes should be on: of AUTO:GPU,CPU and the like the first; AUTO:-GPU names none."""
    listed = [name.split("(")[0] for name in device.target.partition(":")[2].split(",") if name[:1] not in ("", "-")]
    if device.runtime != "openvino" or not listed:
        return placement.asked
    places = {node.on for node in placement.nodes}
    return f"{listed[0]}.0" if f"{listed[0]}.0" in places else listed[0]  # "GPU" is another name of "GPU.0"


def _try_out(
    setup: Setup,
    session: Session,
    profile: Profile,
    found: list[Finding],
    context: Context,
    machine: Machine,
) -> list[Finding]:
    """What has to be tried, where there is reason to."""
    allowed, kinds = machine.cores_allowed, {f.kind for f in found}
    extra: list[Finding | None] = [experiments.oversubscribed(setup, allowed)]
    if extra[0] is None and context.loaded and context.others is not None:
        extra.append(experiments.spinning(setup, session, context.others))
    extra.append(experiments.dynamic_shapes(setup, session))
    float_us = sum(us for kind, us in compute_us(profile.kernels).items() if kind != "int8")
    if float_us > 0.2 * profile.profiled_us:
        extra.append(experiments.native_precision(setup, session, machine.flags))
    found, signed = _with_repairs(setup, session, found)
    slow = {name for f in found if f.kind == "slow-kernel" for name in f.nodes}
    suspected = any(layer.name in slow and layer.precision != "int8" for layer in profile.layers)
    denormal = experiments.denormals(setup, setup.threads or allowed, suspected=suspected)
    if denormal is not None and "slow-kernel" in kinds:
        # That is why the kernel was slow.
        found = [f for f in found if f.kind != "slow-kernel"]
    return [*found, *(f for f in (*extra, signed, denormal) if f is not None)]


def _with_repairs(setup: Setup, session: Session, found: list[Finding]) -> tuple[list[Finding], Finding | None]:
    """Where pairs are not fused, or activations are signed: what a repair of the file gives."""
    unfused = next((f for f in found if f.kind == "unfused-qdq"), None)
    if setup.path.suffix != ".onnx":
        return found, None
    model = read_model(setup.path, weights=False)
    if unfused is None and not experiments.signed_quantizers(model):
        return found, None
    tried, trial = experiments.repaired(setup, session)
    if unfused is None:
        return found, experiments.signed_activations(model, setup.path, trial, setup.device)
    if not tried:
        return found, None
    # What the repair gives is counted once.
    cured = experiments.with_repair(unfused, trial, shlex.quote(str(setup.path)))
    return [cured if f is unfused else f for f in found], None


# --- a device that refuses --------------------------------------------------------------------------------------------


def _refused(setup: Setup, exc: DeviceError) -> dict[str, Any]:
    """What a device that cannot run the model would leave to the CPU, and what to do instead."""
    empty: dict[str, Any] = {
        "total_us": None, "profiled_us": None, "layers": [], "unattributed_us": None, "peak": {}, "roofline": {},
        "placement": None, "notes": [],
    }  # fmt: skip
    finding = Finding(
        "wrong-provider", "high", exc.what, f"measure where it runs: --device ort:cpu; {exc.hint or ''}".rstrip("; ")
    )
    if setup.device.runtime == "ort":
        try:
            # Only to see how much the provider would take; the user's run stays refused.
            with open_session(
                setup.path, setup.device, threads=setup.threads, settings={**setup.settings, _FALLBACK: "0"}
            ) as session:
                fitted = replace(setup, feeds=fit_feeds(session.signature, setup.feeds))
                profile, placement = profile_of(fitted, session, source_nodes(setup.path, fitted.feeds), 0.0, math.inf)
                context = Context(shlex.quote(str(setup.path)), Peaks(None, None, None, None, 1, ""))
                seen = rules.misplaced(profile, context)
                finding = replace(seen, what=f"{setup.device} refuses the model: {seen.what}") if seen else finding
                empty["placement"] = placement
        except DeploykitError:
            pass
    return empty | {"findings": [finding.as_dict()]}


# --- the file ---------------------------------------------------------------------------------------------------------


def source_nodes(path: Path, feeds: Feeds) -> list[SourceNode]:
    """The nodes of a file at the sizes of one request, with what each computes and moves; none of another format.

    Bodies of If, Loop and Scan are left out: their kernels keep the runtime's names.
    """
    if path.suffix != ".onnx":
        return []
    model = read_model(path, weights=False)
    trace = trace_model(model, path, experiments.open_sizes(model, feeds))
    layers = {name: layer for layer in layers_of(model) for name in layer.made}
    makers = {name: node for node in model.graph.node for name in node.output}
    stored = {t.name: tensor_bytes(t) for t in model.graph.initializer}
    found = []
    for visit in trace.visits:
        node = visit.node
        if node.op_type == "Constant":
            continue
        try:
            macs = count_macs(node, domain_of(node), visit.inputs, visit.outputs)
        except UncountedError:
            macs = 0
        layer = next((layers[name] for name in node.output if name in layers), None)
        found.append(
            SourceNode(
                name=node.name or next((name for name in node.output if name), node.op_type),
                op=node.op_type,
                inputs=tuple(node.input),
                outputs=tuple(node.output),
                macs=macs,
                moved_bytes=traffic_bytes(node.op_type, map(_size, visit.inputs), map(_size, visit.outputs)),
                weights=layer.weights if layer else frozenset(),
                weight_bytes=sum(stored.get(name, 0) for name in layer.weights) if layer else 0,
                compute=layer is not None or macs > 0,
                quantized=layer is not None and layer.quantized and _reads_codes(node, makers),
                signed=_multiplies_int8(node, visit.inputs),
            )
        )
    return found


def _multiplies_int8(node: onnx.NodeProto, inputs: Sequence[Value | None]) -> bool:
    """Whether it is an operator on integers, and its data are int8."""
    import onnx

    data = inputs[0] if inputs else None
    return node.op_type in _ON_INTEGERS and data is not None and data.elem_type == onnx.TensorProto.INT8


def _reads_codes(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether its data come out of a DequantizeLinear, seen through what only changes the layout."""
    name = node.input[0]
    while name in makers and makers[name].op_type in ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"):
        name = makers[name].input[0]
    return name in makers and makers[name].op_type == "DequantizeLinear"


def _size(value: Value | None) -> int:
    if value is None or value.size is None:
        return 0
    return int(value.size * element_bits(value.elem_type) // 8)
