"""The one verb of the runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import DeviceError, ModelError
from deploykit.extras import available, install_command
from deploykit.machine import allowed_cores
from deploykit.runtimes.base import TORCH_RUNTIMES, Device, Session, SessionOptions, parse_device

if TYPE_CHECKING:
    from deploykit.artifact import Artifact

PRECISIONS = ("fp32", "native")


def open_session(
    model: str | Path | Artifact,
    device: str | Device = "ort:cpu",
    *,
    threads: int | None = None,
    optimize: bool | str = True,
    precision: str = "fp32",
    settings: dict[str, Any] | None = None,
) -> Session:
    """Load a model on a device.

    Args:
        model: An artifact or its directory (verified first), an `.onnx` file, or an OpenVINO `.xml`.
        device: `ort:cpu`, `ort:cuda`, `openvino:cpu`, ... or a provider's full name.
        threads: Threads inside one request; None for all cores that this process may use.
        optimize: Whether the runtime may rewrite the graph; for ONNX Runtime also a level: "basic", "extended", "all".
        precision: "fp32" keeps floating-point models in single precision (no silent bf16 or TF32); "native" leaves it
            to the runtime.
        settings: The runtime's own settings: session configuration and provider options, or OpenVINO properties.

    Raises:
        DeviceError: Unknown, or cannot be had. Nothing falls back to another device.
        MissingDependencyError: The runtime is not installed.
        ModelError: The file is missing, corrupt or unsafe.
        InferenceError: The runtime cannot load it.
    """
    target = parse_device(device)
    if threads is not None and threads < 1:
        raise DeviceError(f"{threads} threads", expected="1 or more")
    if precision not in PRECISIONS:
        raise DeviceError(f"unknown precision {precision!r}", expected=" or ".join(PRECISIONS))
    path = _model_file(model)
    options = SessionOptions(threads or allowed_cores(), optimize, precision, settings)
    if target.runtime == "ort":
        from deploykit.runtimes.ort import OrtSession

        return OrtSession(path, target, options)
    if target.runtime in TORCH_RUNTIMES:
        from deploykit.runtimes.torch_session import TorchSession

        return TorchSession(path, target, options)
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


def _model_file(model: str | Path | Artifact) -> Path:
    if not isinstance(model, str | Path):
        return model.model_path
    path = Path(model)
    if path.is_dir():
        from deploykit.artifact import Artifact

        return Artifact.open(path).model_path
    expected = "an artifact directory, or an .onnx, .xml or .pt2 file"
    if not path.exists():
        raise ModelError(f"{path} does not exist", expected=expected)
    if path.suffix not in (".onnx", ".xml", ".pt2"):
        raise ModelError(f"{path} is not a model", expected=expected)
    return path
