"""Which models a benchmark runs on which devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploykit.comparing import find_targets
from deploykit.errors import DeviceError
from deploykit.models import LoadedModel
from deploykit.runtimes import Device, require_device

_PROGRAM = ".pt2"


def candidate_devices(models: Sequence[LoadedModel], devices: Sequence[str | Device]) -> tuple[Device, ...]:
    """Devices to measure on: those that are named, else the CPU of every runtime that the models are for.

    Raises:
        DeviceError: One cannot be had, or a model runs on none of them.
    """
    programs = [m for m in models if m.path.suffix == _PROGRAM]
    if devices:
        targets, _ = find_targets(devices)
    else:
        targets = find_targets(())[0] if len(programs) < len(models) or not models else ()
        targets += (require_device("torch:cpu"),) if programs else ()
    for model in models:
        if not any(enters(model.path, device, named=bool(devices)) for device in targets):
            program = model.path.suffix == _PROGRAM
            raise DeviceError(
                f"{model.path} runs on none of {', '.join(map(str, targets))}",
                expected="a device of PyTorch for a .pt2 program, another one for a model in ONNX",
                hint=f"add --device {'torch:cpu' if program else 'ort:cpu'}",
            )
    return targets


def enters(path: Path, device: Device, *, named: bool) -> bool:
    """Whether a model is a candidate on a device.

    PyTorch and the other runtimes share no format, so that `-m model.onnx -m model.pt2` means each where it can be
    read. OpenVINO's format on ONNX Runtime is left out only where nobody named the device; otherwise it is reported.
    """
    if path.suffix in device.reads:
        return True
    return named and path.suffix != _PROGRAM and _PROGRAM not in device.reads
