"""Device names: a runtime, and where it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.errors import DeviceError
from deploykit.plugins import find, names

if TYPE_CHECKING:
    from deploykit.runtimes.plugged import Runtime

# What follows "ort:", and the execution provider that it stands for.
ORT_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "acl": "ACLExecutionProvider",
}
_PROVIDERS_LOWER = {full.lower(): full for full in ORT_PROVIDERS.values()}
# PyTorch as a baseline: operator by operator, and through torch.compile.
TORCH_RUNTIMES = ("torch", "torch-compile")
OWN_RUNTIMES = ("ort", "openvino", *TORCH_RUNTIMES)
_TORCH_TARGET = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model runs.

    Attributes:
        runtime: "ort", "openvino", "torch" or "torch-compile", or the name of a plugin.
        target: ONNX Runtime: the execution provider's full name. OpenVINO: its device ("CPU", "GPU.1", "AUTO").
            PyTorch: its device ("cpu", "cuda", "cuda:1"). A plugin: whatever it calls so.
    """

    runtime: str
    target: str

    def __str__(self) -> str:
        if self.runtime == "ort":
            short = {full: name for name, full in ORT_PROVIDERS.items()}
            return f"ort:{short.get(self.target, self.target)}"
        return f"{self.runtime}:{self.target.lower()}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Suffixes of the model files that its runtime reads."""
        if self.runtime in TORCH_RUNTIMES:
            return (".pt2",)
        if self.runtime not in OWN_RUNTIMES:
            return _plugged(self).reads
        return (".onnx",) if self.runtime == "ort" else (".onnx", ".xml")

    @property
    def on_cpu(self) -> bool:
        """Whether it is the processor, in any of our own runtimes."""
        if self.runtime == "ort":
            return self.target in (ORT_PROVIDERS["cpu"], ORT_PROVIDERS["xnnpack"])
        return self.runtime in OWN_RUNTIMES and self.target.lower() == "cpu"

    @property
    def concurrent(self) -> bool:
        """Whether several threads may run one session at once."""
        if self.runtime not in OWN_RUNTIMES:
            return _plugged(self).concurrent
        return self.target == ORT_PROVIDERS["cpu"]


def _plugged(device: Device) -> Runtime:
    from deploykit.runtimes.plugged import plugged

    return plugged(device)[1]


def parse_device(text: str | Device) -> Device:
    """Read a device name: `ort:cpu`, `ort:CUDAExecutionProvider`, `CUDAExecutionProvider`, `openvino:gpu`, `torch:cpu`.

    Raises:
        DeviceError: Not such a name.
    """
    if isinstance(text, Device):
        return text
    runtime, sep, target = text.strip().partition(":")
    runtime, lower = runtime.lower(), target.lower()
    if not sep:
        if runtime in _PROVIDERS_LOWER:
            return Device("ort", _PROVIDERS_LOWER[runtime])
    elif runtime == "ort" and lower:
        if lower in ORT_PROVIDERS:
            return Device("ort", ORT_PROVIDERS[lower])
        if lower in _PROVIDERS_LOWER:
            return Device("ort", _PROVIDERS_LOWER[lower])
        if lower.endswith("executionprovider"):
            return Device("ort", target)
    elif runtime in ("openvino", "ov") and lower:
        return Device("openvino", target.upper())
    elif lower and ((runtime in TORCH_RUNTIMES and _TORCH_TARGET.fullmatch(lower)) or find("runtimes", runtime)):
        return Device(runtime, lower)
    others = "".join(f"{name}:TARGET, " for name in names("runtimes"))
    raise DeviceError(
        f"unknown device {text!r}",
        expected=f"ort:{{{'|'.join(ORT_PROVIDERS)}}}, openvino:{{cpu|gpu|npu|auto}}, torch:{{cpu|cuda}}, "
        f"torch-compile:{{cpu|cuda}}, {others}or a provider's full name",
        hint="run: deploykit doctor",
    )
