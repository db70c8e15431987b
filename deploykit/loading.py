"""Which of the installed runtimes can load a model, and why the others cannot: tried, each in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploykit.extras import available, install_command, version_of

_WORKER = Path(__file__).with_name("load_worker.py")
_PACKAGES = {"ort": "onnxruntime", "openvino": "openvino"}
_REASON_LENGTH = 300
# Lines of OpenVINO that say where in its sources it is.
_NOISE = ("Exception from", "Check '", "While validating", "FrontEnd API failed with")


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Whether one runtime loads a model.

    Attributes:
        device: "ort:cpu" or "openvino:cpu".
        version: The runtime's version; None where it is not installed.
        loads: None where it was not tried.
        reason: Why not.
    """

    device: str
    version: str | None
    loads: bool | None
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)


def try_loading(path: Path, *, timeout_s: float = 120.0) -> list[LoadResult]:
    """Load a model on the CPU of every runtime.

    Args:
        path: `.onnx` or `.xml`, checked to be safe.
        timeout_s: Seconds a runtime may take.
    """
    return [_try(runtime, path, timeout_s) for runtime in _PACKAGES]


def not_tried(path: Path, why: str) -> list[LoadResult]:
    """The same list, without trying."""
    return [LoadResult(f"{runtime}:cpu", version_of(name), None, why) for runtime, name in _PACKAGES.items()]


def _try(runtime: str, path: Path, timeout_s: float) -> LoadResult:
    device, package = f"{runtime}:cpu", _PACKAGES[runtime]
    if not available(package):
        return LoadResult(device, None, None, f"not installed; run: {install_command(runtime)}")
    if runtime == "ort" and path.suffix == ".xml":
        return LoadResult(device, version_of(package), False, "ONNX Runtime cannot read OpenVINO IR")
    command = [sys.executable, "-P", str(_WORKER), runtime, str(path.absolute())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        return LoadResult(device, version_of(package), False, f"it took more than {timeout_s:g} s")
    if done.returncode < 0:
        return LoadResult(device, version_of(package), False, f"it crashed ({_signal(-done.returncode)})")
    try:
        said = json.loads(done.stdout.strip().splitlines()[-1])
        version, reason = str(said["version"]), said["reason"]
    except (IndexError, ValueError, KeyError, TypeError):
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return LoadResult(device, version_of(package), False, lines[-1][:_REASON_LENGTH])
    return LoadResult(device, version, reason is None, None if reason is None else reason_of(str(reason)))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def reason_of(text: str) -> str:
    """The sentence of a runtime's message that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = " ".join(line for line in lines if not line.startswith(_NOISE)) or " ".join(lines)
    # "[ONNXRuntimeError] : 1 : FAIL : why"
    said = said.split(" : ", 3)[-1] if said.startswith("[ONNXRuntimeError]") else said
    return said if len(said) <= _REASON_LENGTH else said[: _REASON_LENGTH - 3] + "..."
