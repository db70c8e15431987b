"""The environment of a measurement, as a report has to record it."""

from __future__ import annotations

import os
import platform
from typing import Any

from deploykit.extras import version_of
from deploykit.machine import inspect_machine

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "openvino", "onnx", "numpy", "torch")


def environment() -> dict[str, Any]:
    """Machine, load, Python and package versions."""
    return {
        "machine": inspect_machine().as_dict(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := version_of(name))},
        "variables": {
            k: v for k, v in os.environ.items() if k.startswith(("OMP_", "KMP_", "ORT_", "OPENVINO_", "OV_"))
        },
    }
