"""What a machine is, as far as a measurement or a quantized model hangs on it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deploykit
from deploykit.extras import version_of
from deploykit.machine import inspect_machine

LOCAL = "local"
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "openvino", "torch", "nncf", "ai-edge-litert")


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that does jobs.

    Attributes:
        name: For `Job.node`.
        slots: Jobs that it does side by side.
        machine: `machine_of` there.
        address: Where it is.
    """

    name: str
    slots: int
    machine: Mapping[str, Any]
    address: str = ""

    @property
    def kind(self) -> str:
        """Equal for machines on which the same is fastest."""
        return kind_of(self.machine)


def machine_of() -> dict[str, Any]:
    """This machine: processor, instruction sets, cores allowed, memory (GiB), versions of what runs models.

    Two machines of a type give the same, so memory is rounded, and neither names nor loads are in it.
    """
    found = inspect_machine()
    return {
        "cpu": found.cpu,
        "architecture": found.architecture,
        "flags": sorted(name for name, there in found.flags.items() if there),
        "cores_allowed": found.cores_allowed,
        "threads_per_core": found.threads_per_core,
        "memory_gib": round(found.memory_bytes / 2**30) if found.memory_bytes else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "deploykit": deploykit.__version__,
        "runtimes": {name: version for name in _RUNTIMES if (version := version_of(name))},
    }


def kind_of(machine: Mapping[str, Any]) -> str:
    """A short digest of `machine_of`."""
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]
