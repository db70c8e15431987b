"""Findings that have to be tried out: the same model run another way, in turns with the way that it runs now.

Each returns a finding only where the other way is faster, and not by chance.
"""

from __future__ import annotations

import math
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.benchmarks.findings import Finding, named
from deploykit.benchmarks.trials import Trial, in_processes, in_turns, one_after_another
from deploykit.errors import DeploykitError
from deploykit.modelfile import external_files, model_bytes, read_model, signature_of
from deploykit.optimizers.repair import RepairConfig, repair
from deploykit.runtimes import Device, Session, open_session
from deploykit.specs import Feeds

# A copy of a larger file would take longer than all the rest.
_LARGEST_COPY = 1 << 30
_GAIN, _CLEAR_GAIN, _GREAT_GAIN = 1.08, 1.15, 1.5
_FEWER_NODES = 0.9
_NATIVE_GAIN = 1.2
_SUBNORMAL_SHARE = 1e-3
_DENORMAL = {
    "ort": ("session.set_denormal_as_zero", "0", "1"),
    "openvino": ("CPU_DENORMALS_OPTIMIZATION", False, True),
}
_SPINNING = "session.intra_op.allow_spinning"


@dataclass(frozen=True, slots=True)
class Setup:
    """A model as it is run.

    Attributes:
        path: The file.
        device: Where.
        feeds: One request.
        threads: That were asked for; None for all that are allowed.
        precision: As in `open_session`.
        settings: The runtime's own settings.
        optimize: As in `open_session`.
    """

    path: Path
    device: Device
    feeds: Feeds
    threads: int | None = None
    precision: str = "fp32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimize: bool | str = True

    def open(self, **changed: Any) -> Session:
        """A session of it, with something else."""
        given: dict[str, Any] = {
            "threads": self.threads, "precision": self.precision, "settings": dict(self.settings),
            "optimize": self.optimize,
        }  # fmt: skip
        path = changed.pop("path", self.path)
        given["settings"] |= changed.pop("settings", {})
        return open_session(path, self.device, **(given | changed))

    def against(self, session: Session, *, quick: bool = True, **changed: Any) -> Trial | None:
        """Run it in turns with a changed one; None where that does not load. For `quick` see `in_turns`."""
        try:
            with self.open(**changed) as other:
                return in_turns(partial(session.run, self.feeds), partial(other.run, self.feeds), quick=quick)
        except DeploykitError:
            return None


def _severity(ratio: float) -> str:
    return "high" if ratio >= _GREAT_GAIN else "medium" if ratio >= _CLEAR_GAIN else "low"


def _told(trial: Trial) -> str:
    return f"{trial.ratio:.2f}x as fast ({trial.second_ms:.3f} ms instead of {trial.first_ms:.3f} ms, in turns)"


def _text(value: Any) -> str:
    """A setting as runtimes read it: of a switch, what is given as a boolean is the same as its digit."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _cost(trial: Trial) -> float:
    return round(trial.saved_us, 1)


def oversubscribed(setup: Setup, allowed: int) -> Finding | None:
    """More threads than cores that this process may use."""
    threads = setup.threads or allowed
    if threads <= allowed:
        return None
    trial = one_after_another(setup.open, partial(setup.open, threads=allowed), setup.feeds)
    if not trial.gains(_GAIN):
        return None
    return Finding(
        "oversubscribed-threads", _severity(trial.ratio),
        f"{threads} threads share the {allowed} cores that this process may use (affinity and cgroup quota counted); "
        f"with {allowed} it is {_told(trial)}",
        f"--threads {allowed}, or leave --threads out", (), _cost(trial),
    )  # fmt: skip


def spinning(setup: Setup, session: Session, others: float) -> Finding | None:
    """Threads that wait by spinning, on cores that others want."""
    if setup.device.runtime != "ort" or _text(setup.settings.get(_SPINNING)) == "0":
        return None
    trial = setup.against(session, settings={_SPINNING: "0"}, quick=False)
    if trial is None or not trial.gains(_CLEAR_GAIN):
        return None
    return Finding(
        "spinning-threads", "medium",
        f"the thread pool spins on cores that other processes want ({others:.1f} busy); without that it is "
        f"{_told(trial)}",
        f"open_session(..., settings={{{_SPINNING!r}: '0'}}), or give this process cores of its own", (), _cost(trial),
    )  # fmt: skip


# --- shapes -----------------------------------------------------------------------------------------------------------


def dynamic_shapes(setup: Setup, session: Session) -> Finding | None:
    """Dimensions left open, where the same model with fixed ones is fused further."""
    if setup.path.suffix != ".onnx" or model_bytes(setup.path) > _LARGEST_COPY:
        return None
    model = read_model(setup.path, weights=False)
    sizes = open_sizes(model, setup.feeds)
    if not sizes:
        return None
    with _copy(setup.path) as place:
        _write_fixed(setup.path, place, setup.feeds)
        try:
            with setup.open(path=place) as fixed:
                before, after = len(session.executed()), len(fixed.executed())
                trial = in_turns(partial(session.run, setup.feeds), partial(fixed.run, setup.feeds))
        except DeploykitError:
            return None
    fewer = after < _FEWER_NODES * before
    if not trial.gains(_GAIN if fewer else _CLEAR_GAIN):
        return None
    fused = f"fuses to {after} nodes instead of {before} and " if fewer else ""
    fixed_at = ", ".join(f"{name}={size}" for name, size in sizes.items())
    return Finding(
        "dynamic-shapes", _severity(trial.ratio),
        f"with {fixed_at} fixed the model {fused}is {_told(trial)}",
        "export it again with fixed sizes, where all requests have the same: deploykit export SOURCE --dynamic none "
        + " ".join(
            f"--input '{name}={array.dtype}[{','.join(map(str, array.shape))}]'" for name, array in setup.feeds.items()
        )
        + " (without --input where the source brings an example)",
        tuple(sizes), _cost(trial),
    )  # fmt: skip


def open_sizes(model: Any, feeds: Feeds) -> dict[str, int]:
    """What the dynamic dimensions of a model's inputs are in one request."""
    found: dict[str, int] = {}
    for spec in signature_of(model).inputs:
        if spec.shape is None or spec.name not in feeds:
            continue
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=False):
            if isinstance(dim, str):
                found[dim] = int(size)
    return found


def _write_fixed(source: Path, target: Path, feeds: Feeds) -> None:
    import onnx

    model = read_model(source, weights=False)
    names = open_sizes(model, feeds)
    weights = {t.name for t in model.graph.initializer}
    for value in model.graph.input:
        if value.name in weights or value.name not in feeds:
            continue
        for dim, size in zip(value.type.tensor_type.shape.dim, feeds[value.name].shape, strict=False):
            dim.dim_value = int(size)
    # Inner and outer shapes that still name a dimension would contradict it.
    for value in (*model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_value = names[dim.dim_param]
    onnx.save(model, str(target))


@contextmanager
def _copy(source: Path) -> Iterator[Path]:
    """A folder with the external data of a model, and the place for a changed file beside them."""
    with tempfile.TemporaryDirectory(prefix="deploykit-explain-") as name:
        folder = Path(name)
        for location in external_files(read_model(source, weights=False)):
            target = folder / location
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.parent / location, target)
        yield folder / source.name


# --- Q/DQ pairs -------------------------------------------------------------------------------------------------------


def repaired(setup: Setup, session: Session) -> tuple[bool, Trial | None]:
    """Whether `quantize repair` could be tried, and its result in turns with the model; None where it has none."""
    if setup.path.suffix != ".onnx" or model_bytes(setup.path) > _LARGEST_COPY:
        return False, None
    with tempfile.TemporaryDirectory(prefix="deploykit-explain-") as name:
        target = Path(name) / "model.onnx"
        try:
            changed = repair(setup.path, RepairConfig(), target).changed
        except DeploykitError:
            return True, None
        return True, setup.against(session, path=target) if changed else None


def with_repair(found: Finding, trial: Trial | None, model: str) -> Finding:
    """The finding about Q/DQ pairs, with the cure that was measured."""
    if trial is not None and trial.gains(_GAIN):
        return Finding(
            found.kind, max(found.severity, _severity(trial.ratio), key=("low", "medium", "high").index),
            f"{found.what}; repaired, the model is {_told(trial)}", f"deploykit quantize repair -m {model} -o DIR",
            found.nodes, _cost(trial),
        )  # fmt: skip
    return Finding(
        found.kind, found.severity, found.what,
        "a repair of the file does not help here: quantize the float model again, deploykit quantize static -m "
        "FLOAT_MODEL --data DATA -o DIR",
        found.nodes, found.cost_us,
    )  # fmt: skip


def signed_activations(model: Any, path: Path, trial: Trial | None, device: Device) -> Finding | None:
    """Activations in int8, which the x86 kernels of ONNX Runtime are not made for."""
    if device.runtime != "ort" or device.target != "CPUExecutionProvider" or trial is None or not trial.gains(_GAIN):
        return None
    names = signed_quantizers(model)
    if not names:
        return None
    return Finding(
        "signed-activations", _severity(trial.ratio),
        f"{len(names)} activations are quantized to int8, and the x86 kernels of ONNX Runtime want uint8 "
        f"({named(names)}); repaired, the model is {_told(trial)}",
        f"deploykit quantize repair -m {shlex.quote(str(path))} -o DIR", tuple(names), _cost(trial),
    )  # fmt: skip


def signed_quantizers(model: Any) -> list[str]:
    """QuantizeLinear nodes whose codes are int8, by name or output."""
    import onnx

    kinds = {t.name: t.data_type for t in model.graph.initializer}
    kinds |= {
        n.output[0]: a.t.data_type
        for n in model.graph.node
        if n.op_type == "Constant"
        for a in n.attribute
        if a.name == "value"
    }
    return [
        n.name or n.output[0]
        for n in model.graph.node
        if n.op_type == "QuantizeLinear" and len(n.input) > 2 and kinds.get(n.input[2]) == onnx.TensorProto.INT8
    ]


# --- numbers ----------------------------------------------------------------------------------------------------------


def subnormal_weights(model: Any, folder: Path) -> dict[str, float]:
    """Share of subnormal values in each float32 weight that has any."""
    import onnx

    tiny = np.finfo(np.float32).tiny
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or not math.prod(tensor.dims):
            continue
        values = np.abs(onnx.numpy_helper.to_array(tensor, str(folder)))
        share = float(((values > 0) & (values < tiny)).mean())
        if share:
            found[tensor.name] = share
    return found


def denormals(setup: Setup, threads: int, *, suspected: bool) -> Finding | None:
    """Numbers below 1.2e-38, which many CPUs compute in microcode.

    Args:
        setup: The model.
        threads: That it runs with.
        suspected: Whether a float layer is slow for no other reason: then it is tried without any in the weights.
    """
    if setup.device.runtime not in _DENORMAL or not setup.device.target.startswith("CPU"):
        return None
    weights: dict[str, float] = {}
    if setup.path.suffix == ".onnx" and model_bytes(setup.path) <= _LARGEST_COPY:
        weights = subnormal_weights(read_model(setup.path, weights=False), setup.path.parent)
    many = [name for name, share in sorted(weights.items(), key=lambda w: -w[1]) if share >= _SUBNORMAL_SHARE]
    key, off, on = _DENORMAL[setup.device.runtime]
    if not (many or suspected) or _text(setup.settings.get(key, off)) == _text(on):
        return None
    # ONNX Runtime lets the first session of a process decide for all.
    sides = [{**setup.settings, key: off}, {**setup.settings, key: on}]
    # Where no weight holds any, a small difference has other reasons: denormals cost several times the run.
    least = _CLEAR_GAIN if many else _GREAT_GAIN
    trial = in_processes(
        setup.path, str(setup.device), setup.feeds, threads, setup.precision, sides, least, optimize=setup.optimize
    )
    if trial is None or not trial.gains(least):
        return None
    where = (
        f"{named([f'{n} ({weights[n]:.0%})' for n in many])} hold numbers below 1.2e-38"
        if many
        else "activations become smaller than 1.2e-38"
    )
    return Finding(
        "denormals", _severity(trial.ratio), f"{where}; flushed to zero, the model is {_told(trial)}",
        f"open_session(..., settings={{{key!r}: {on!r}}}), or clear them: weights below 1e-30 add nothing",
        tuple(many), _cost(trial),
    )  # fmt: skip


def native_precision(setup: Setup, session: Session, flags: Mapping[str, bool]) -> Finding | None:
    """bfloat16 that the CPU has and that was not allowed."""
    has = any(flags.get(name) for name in ("bf16", "amx_bf16", "fp16"))
    if setup.precision == "native" or setup.device.runtime != "openvino" or not has:
        return None
    if not setup.device.target.startswith("CPU"):
        return None
    trial = setup.against(session, precision="native")
    if trial is None or not trial.gains(_NATIVE_GAIN):
        return None
    return Finding(
        "unused-precision", "low",
        f"this CPU computes in 16 bits, which --precision fp32 forbids; where OpenVINO may choose, the model is "
        f"{_told(trial)}",
        "--precision native, and look at the outputs: the report compares them with the reference's", (), _cost(trial),
    )  # fmt: skip
