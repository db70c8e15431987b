"""What can be had on this machine: packages, providers, devices, and what clashes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from deploykit.errors import DeploykitError, first_line
from deploykit.extras import available, install_command, require, version_of
from deploykit.machine import Machine, inspect_machine
from deploykit.plugins import Status, survey
from deploykit.runtimes.device import ORT_PROVIDERS, Device

_PACKAGES = {
    "numpy": None, "onnx": None, "onnx-ir": None, "onnxsim": None, "onnxslim": None,
    "onnxruntime": "ort", "openvino": "openvino", "torch": "torch", "onnxscript": "torch",
    "transformers": "hf", "safetensors": "hf", "tokenizers": "hf",
    "scikit-learn": "sklearn", "skl2onnx": "sklearn", "skops": "sklearn",
    "tensorflow": "tensorflow", "keras": "keras", "tf2onnx": "tensorflow", "ai-edge-litert": "tflite",
}  # fmt: skip
# Wheels that all install the package `onnxruntime`, each over the files of the other.
_ORT_WHEELS = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-rocm",
    "onnxruntime-training", "onnxruntime-qnn",
)  # fmt: skip
_OFFERED = ("cpu", "cuda", "tensorrt", "openvino")


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """Whether one device can be had, and what to do where it cannot."""

    device: str
    usable: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that `doctor` shows.

    Attributes:
        machine: CPU, cores, memory.
        packages: Version by package; None where it is missing.
        missing: Install command by missing package.
        devices: One entry a device.
        problems: What is wrong, each with its cure.
        plugins: Steps that other distributions bring, those that cannot be used among them.
        advice: What limits speed here, without being wrong.
    """

    machine: Machine
    packages: dict[str, str | None]
    missing: dict[str, str]
    devices: tuple[DeviceStatus, ...]
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    plugins: tuple[Status, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return {
            "python": sys.version.split()[0],
            "machine": self.machine.as_dict(),
            "packages": self.packages,
            "missing": self.missing,
            "devices": [{"device": d.device, "usable": d.usable, "detail": d.detail} for d in self.devices],
            "problems": list(self.problems),
            "advice": list(self.advice),
            "plugins": [status.as_dict() for status in self.plugins],
        }


def diagnose() -> Diagnosis:
    """Look at everything; imports the runtimes, and nothing else that is heavy."""
    packages = {name: version_of(name) for name in _PACKAGES}
    wheels = installed_ort_wheels()
    if wheels and packages["onnxruntime"] is None:
        packages["onnxruntime"] = f"{version_of(wheels[0])} ({wheels[0]})"
    if packages["tensorflow"] is None and (found := version_of("tensorflow-cpu")):
        packages["tensorflow"] = f"{found} (tensorflow-cpu)"
    missing = {
        name: install_command(extra) if extra else f"pip install {name}"
        for name, extra in _PACKAGES.items()
        if packages[name] is None
    }
    machine = inspect_machine()
    problems = clashes(wheels)
    devices = (*_ort_devices(problems), *_openvino_devices(problems), *_torch_devices())
    if not any(d.usable for d in devices if not d.device.startswith("torch")):
        problems.append(f"no runtime can be used; run: {install_command('ort')}")
    plugins = survey()
    problems += [status.problem for status in plugins if status.problem]
    return Diagnosis(machine, packages, missing, devices, tuple(problems), tuple(advice(machine)), plugins)


def installed_ort_wheels() -> list[str]:
    """Names of all installed distributions that bring the package `onnxruntime`."""
    names = {(d.metadata["Name"] or "").lower().replace("_", "-") for d in metadata.distributions()}
    return [w for w in _ORT_WHEELS if w in names]


def clashes(wheels: list[str]) -> list[str]:
    """Problems with the set of installed onnxruntime wheels."""
    if len(wheels) < 2:
        return []
    wanted = next((w for w in wheels if w != "onnxruntime"), wheels[0])
    return [
        f"{' and '.join(wheels)} are installed together and overwrite each other's files; "
        f"run: pip uninstall -y {' '.join(wheels)} && pip install {wanted}"
    ]


def advice(machine: Machine) -> list[str]:
    """What limits speed on this machine."""
    found = []
    if machine.architecture in ("x86_64", "AMD64") and not machine.int8_dot:
        found.append("no VNNI or AMX: int8 gains are small here, and 8-bit weights saturate (7 bits are chosen)")
    if machine.cores_allowed < machine.cores_machine:
        found.append(
            f"{machine.cores_allowed} of {machine.cores_machine} cores are allowed; thread pools are sized to that"
        )
    if machine.flags.get("bf16") or machine.flags.get("amx_bf16"):
        found.append("bf16 in hardware: OpenVINO uses it with --precision native; fp32 is the default here")
    if machine.governor not in (None, "performance"):
        found.append(f"the CPU governor is {machine.governor}: timings will drift; set it to performance")
    return found


def _ort_devices(problems: list[str]) -> list[DeviceStatus]:
    from deploykit.runtimes.ort import check_provider

    if not available("onnxruntime"):
        return [DeviceStatus("ort:cpu", False, f"not installed; run: {install_command('ort')}")]
    try:
        built = set(require("onnxruntime", extra="ort").get_available_providers())
    except DeploykitError as exc:
        problems.append(str(exc))
        return [DeviceStatus("ort:cpu", False, str(exc))]
    rows = []
    for short, full in ORT_PROVIDERS.items():
        if short not in _OFFERED and full not in built:
            continue
        try:
            check_provider(Device("ort", full))
            rows.append(DeviceStatus(f"ort:{short}", True, f"{full}, in this build"))
        except DeploykitError as exc:
            rows.append(DeviceStatus(f"ort:{short}", False, exc.hint or exc.what))
    return rows


def _openvino_devices(problems: list[str]) -> list[DeviceStatus]:
    if not available("openvino"):
        return [DeviceStatus("openvino:cpu", False, f"not installed; run: {install_command('openvino')}")]
    try:
        core = require("openvino", extra="openvino").Core()
        found = list(core.available_devices)
        rows = [
            DeviceStatus(f"openvino:{d.lower()}", True, str(core.get_property(d, "FULL_DEVICE_NAME")).strip())
            for d in found
        ]
    except Exception as exc:  # noqa: BLE001 - a driver may raise anything; the doctor reports it
        problems.append(f"OpenVINO does not start ({first_line(exc)})")
        return [DeviceStatus("openvino:cpu", False, first_line(exc))]
    for wanted in ("GPU", "NPU"):
        if not any(d.startswith(wanted) for d in found):
            rows.append(DeviceStatus(f"openvino:{wanted.lower()}", False, "no such device, or its driver is missing"))
    return rows


def _torch_devices() -> list[DeviceStatus]:
    """PyTorch is not imported for this: that takes seconds."""
    found = version_of("torch")
    if found is None:
        return []
    return [DeviceStatus("torch:cpu", True, f"torch {found}; torch-compile:cpu too: baselines for .pt2 programs")]
