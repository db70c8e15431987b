"""The verb of the runtimes, and the same with the settings that an artifact brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import ArtifactError, DeviceError, ModelError
from deploykit.extras import available, install_command
from deploykit.machine import allowed_cores
from deploykit.runtimes.base import Session, SessionOptions
from deploykit.runtimes.device import OWN_RUNTIMES, TORCH_RUNTIMES, Device, parse_device
from deploykit.runtimes.settings import RuntimeSettings

if TYPE_CHECKING:
    from deploykit.artifact import Artifact

PRECISIONS = ("fp32", "native")


def open_session(
    model: str | Path | Artifact,
    device: str | Device | None = None,
    *,
    threads: int | None = None,
    optimize: bool | str | None = None,
    precision: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tuned: str | Path | RuntimeSettings | None = None,
) -> Session:
    """Load a model on a device.

    Args:
        model: An artifact or its directory (verified first), an `.onnx` file, an OpenVINO `.xml`, or a `.pt2` program
            for PyTorch's devices.
        device: `ort:cpu` by default; `ort:cuda`, `openvino:cpu`, `torch:cpu`, ... or a provider's full name;
            `NAME:TARGET` of a plugin's runtime.
        threads: Threads inside one request; None for all cores that this process may use.
        optimize: Whether the runtime may rewrite the graph, which is the default; for ONNX Runtime also a level:
            "basic", "extended", "layout", "all".
        precision: "fp32", the default, keeps floating-point models in single precision (no silent bf16 or TF32);
            "native" leaves it to the runtime.
        settings: The runtime's own settings. ONNX Runtime: `intra_op_num_threads`, `inter_op_num_threads`,
            `execution_mode`, `graph_optimization_level`, `device_buffers` (an IOBinding with buffers on the device for
            every run), session configuration (a dot in the name), and options of the provider. OpenVINO: its
            properties. torch.compile: its arguments.
        tuned: Settings that a tuner found, or their file. What is given beside them wins; another device is an error.
            `settings["tuned_notes"]` of the session lists what is not as it was when they were found.

    Raises:
        DeviceError: Unknown, or cannot be had, or a setting is wrong. Nothing falls back to another device.
        DataError: The file of tuned settings is missing, corrupt, or of an unknown schema version.
        MissingDependencyError: The runtime is not installed.
        ModelError: The file is missing, corrupt or unsafe.
        InferenceError: The runtime cannot load it.
    """
    found = None
    if tuned is not None:
        found = tuned if isinstance(tuned, RuntimeSettings) else RuntimeSettings.load(tuned)
        if device is not None:
            found.check_device(parse_device(device))
        device = found.device
        threads = found.threads if threads is None else threads
        optimize = found.optimize if optimize is None else optimize
        precision = found.precision if precision is None else precision
        settings = {**found.settings, **(settings or {})}
    target = parse_device("ort:cpu" if device is None else device)
    precision = "fp32" if precision is None else precision
    if threads is not None and threads < 1:
        raise DeviceError(f"{threads} threads", expected="1 or more")
    if precision not in PRECISIONS:
        raise DeviceError(f"unknown precision {precision!r}", expected=" or ".join(PRECISIONS))
    path, artifact = _model_file(model)
    optimize = True if optimize is None else optimize
    session = _open(path, target, SessionOptions(threads or allowed_cores(), optimize, precision, settings))
    if artifact is not None:
        try:
            artifact.check_unchanged()
        except ArtifactError:
            session.close()
            raise
    if found is not None:
        session.settings["tuned_notes"] = found.notes_for(path, artifact.digest if artifact is not None else None)
    return session


def load(
    model: str | Path | Artifact,
    device: str | Device | None = None,
    *,
    threads: int | None = None,
    optimize: bool | str | None = None,
    precision: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tuned: str | Path | RuntimeSettings | None = None,
) -> Session:
    """Open a model as it was found to be fastest: `open_session` with the settings that its artifact brings.

    Args:
        model: As for `open_session`; what `optimize` wrote stands for its winner.
        device: Where; by default the device of the artifact's own settings, else `ort:cpu`. Named as another, the
            settings are not used.
        threads: As for `open_session`, like the arguments after it; what is given wins over the artifact's settings.
        optimize: Whether the runtime may rewrite the graph.
        precision: "fp32" or "native".
        settings: The runtime's own settings.
        tuned: Settings to use in place of the artifact's.

    Returns:
        A context manager with `run`, which takes and gives arrays by name. `settings["tuned_notes"]` lists what is not
        as it was when the settings were found: they hold, but may not be the fastest any more.

    Raises:
        DeploykitError: As `open_session`.
    """
    if isinstance(model, str | Path) and Path(model).is_dir():
        from deploykit.artifact import Artifact

        model = Artifact.open(model)
    if tuned is None and not isinstance(model, str | Path):
        tuned = _own_settings(model, device)
    return open_session(
        model, device, threads=threads, optimize=optimize, precision=precision, settings=settings, tuned=tuned
    )


def _own_settings(artifact: Artifact, device: str | Device | None) -> RuntimeSettings | None:
    """The settings that an artifact brings, where they are for the device."""
    from deploykit.artifact import SETTINGS

    if SETTINGS not in artifact.manifest.files:
        return None
    own = RuntimeSettings.load(artifact.path / SETTINGS)
    own.check_contained(str(artifact.path / SETTINGS))
    return own if device is None or parse_device(own.device) == parse_device(device) else None


def _open(path: Path, target: Device, options: SessionOptions) -> Session:
    if target.runtime == "ort":
        from deploykit.runtimes.ort import OrtSession

        return OrtSession(path, target, options)
    if target.runtime in TORCH_RUNTIMES:
        from deploykit.runtimes.torch_session import TorchSession

        return TorchSession(path, target, options)
    if target.runtime not in OWN_RUNTIMES:
        from deploykit.runtimes.plugged import open_plugged

        return open_plugged(path, target, options)
    from deploykit.runtimes.ov import OpenVinoSession

    return OpenVinoSession(path, target, options)


def require_device(device: str | Device) -> Device:
    """Check that a device can be had, without a model.

    Raises:
        DeviceError: It cannot.
        MissingDependencyError: Its runtime is not installed.
    """
    target = parse_device(device)
    if target.runtime == "ort":
        from deploykit.runtimes.ort import check_provider

        check_provider(target)
    elif target.runtime in TORCH_RUNTIMES:
        from deploykit.runtimes.torch_session import check_torch

        check_torch(target)
    elif target.runtime not in OWN_RUNTIMES:
        from deploykit.runtimes.plugged import check_plugged

        check_plugged(target)
    else:
        from deploykit.runtimes.ov import check_device

        check_device(target)
    return target


def default_devices() -> tuple[Device, ...]:
    """The CPU devices of the runtimes that are installed, ONNX Runtime first.

    Raises:
        DeviceError: There is no runtime.
    """
    found = []
    if available("onnxruntime"):
        found.append(parse_device("ort:cpu"))
    if available("openvino"):
        found.append(parse_device("openvino:cpu"))
    if not found:
        raise DeviceError("no runtime is installed", hint=f"run: {install_command('ort')}")
    return tuple(found)


def _model_file(model: str | Path | Artifact) -> tuple[Path, Artifact | None]:
    """The model's file, and the artifact that it is in."""
    if not isinstance(model, str | Path):
        return model.model_path, model
    path = Path(model)
    if path.is_dir():
        from deploykit.artifact import Artifact

        artifact = Artifact.open(path)
        return artifact.model_path, artifact
    expected = "an artifact directory, or an .onnx, .xml or .pt2 file"
    if not path.exists():
        raise ModelError(f"{path} does not exist", expected=expected)
    if path.suffix not in (".onnx", ".xml", ".pt2"):
        raise ModelError(f"{path} is not a model", expected=expected)
    return path, None
