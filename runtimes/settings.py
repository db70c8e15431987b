"""Tuned settings in a file: how to open a model on one machine, as a tuner found it out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deploykit.errors import DataError, DeviceError
from deploykit.extras import version_of
from deploykit.machine import inspect_machine
from deploykit.plugins import find
from deploykit.runtimes.device import Device, parse_device

if TYPE_CHECKING:
    from deploykit.artifact import Artifact
    from deploykit.runtimes.base import Session

SCHEMA_VERSION = 1
_AGAIN = "tune the model again"
_LIMIT_BYTES = 2**20
_LARGEST = 2**20
# Names of settings that have a runtime read, write or load a file: caches, dumps, profiles, plugins, kernels.
_PLACE = re.compile(r"[/\\]|\.[A-Za-z]\w*$")
_FILES = re.compile(r"path|(^|[^a-z])dir|file|folder|lib|plugin|cache|dump|prefix|(^|[^a-z])log", re.IGNORECASE)
_WHEELS = {
    "ort": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-rocm"),
    "openvino": ("openvino",),
    "torch": ("torch",),
    "torch-compile": ("torch",),
}


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """How to open a model so that it is fast on one machine.

    Attributes:
        device: Device name.
        threads: Threads inside one request; None for all allowed cores.
        sessions: Sessions (ONNX Runtime, PyTorch) that are to serve side by side, see `open_all`.
        concurrency: Requests in flight, over all sessions, that it was tuned for.
        precision: "fp32" or "native".
        batch: Samples in one request that it was tuned for.
        optimize: As for `open_session`.
        settings: The runtime's own settings, as for `open_session`.
        machine: `machine_fingerprint` of where it was tuned; empty where that does not matter.
        model_sha256: Of the artifact's manifest or of the model's file; None where that does not matter.
    """

    device: str
    threads: int | None = None
    sessions: int = 1
    concurrency: int = 1
    precision: str = "fp32"
    batch: int = 1
    optimize: bool | str = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    model_sha256: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            DataError: Missing, corrupt, or of an unknown schema version.
            DeviceError: It names no device.
        """
        file = Path(path)
        try:
            if file.stat().st_size > _LIMIT_BYTES:
                raise ValueError(f"it is larger than {_LIMIT_BYTES} bytes")
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise DataError(f"{file} does not exist", expected="a file of tuned settings", hint=_AGAIN) from exc
        except (OSError, ValueError, RecursionError) as exc:
            raise DataError(f"{file} cannot be read as tuned settings ({exc})", expected="JSON", hint=_AGAIN) from exc
        return cls.from_dict(found, str(file))

    @classmethod
    def from_dict(cls, found: Any, label: str = "the settings") -> Self:
        """Check and take over what a JSON document holds.

        Raises:
            DataError: Not of this schema.
            DeviceError: It names no device.
        """
        if not isinstance(found, Mapping):
            raise DataError(f"{label} is no JSON object", expected="tuned settings", hint=_AGAIN)
        values = dict(found)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{label} has schema version {version!r}", expected=f"schema version {SCHEMA_VERSION}", hint=_AGAIN
            )
        unknown = sorted(set(values) - set(cls.__slots__))
        if unknown:
            raise DataError(f"{label} has an entry {unknown[0]!r}", expected=", ".join(cls.__slots__), hint=_AGAIN)
        for name, kinds in _KINDS.items():
            if name in values and (type(values[name]) not in kinds):
                raise DataError(f"{label}: {name} is {values[name]!r}", expected=_names(kinds), hint=_AGAIN)
        if "device" not in values:
            raise DataError(f"{label} names no device", hint=_AGAIN)
        for name in ("threads", "sessions", "concurrency", "batch"):
            if values.get(name) is not None and not 1 <= values[name] <= _LARGEST:
                raise DataError(f"{label}: {name} is {values[name]}", expected=f"1 to {_LARGEST}", hint=_AGAIN)
        parse_device(values["device"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy, with its schema version."""
        found = {"schema_version": SCHEMA_VERSION} | asdict(self)
        return found | {"settings": dict(self.settings), "machine": dict(self.machine)}

    def save(self, path: str | Path) -> None:
        """Write a new file.

        Raises:
            OutputExistsError: Something is there.
            StorageError: The file system refused.
        """
        from deploykit.staging import write_file

        write_file(Path(path), (json.dumps(self.as_dict(), indent=1) + "\n").encode())

    def open(self, model: str | Path | Artifact) -> Session:
        """Open a model with these settings; `settings["tuned_notes"]` of the session says what does not fit.

        Raises:
            DeploykitError: As `open_session`.
        """
        from deploykit.runtimes.sessions import open_session

        return open_session(model, tuned=self)

    def open_all(self, model: str | Path | Artifact) -> tuple[Session, ...]:
        """Open as many sessions as are to serve side by side, each for a thread of its own.

        Raises:
            DeploykitError: As `open_session`; those that were opened are closed again.
        """
        if self.sessions < 1:
            raise DeviceError(f"{self.sessions} sessions", expected="1 or more")
        opened: list[Session] = []
        try:
            for _ in range(self.sessions):
                opened.append(self.open(model))
        except Exception:
            for session in opened:
                session.close()
            raise
        return tuple(opened)

    def check_contained(self, label: str) -> None:
        """Refuse settings that name files, where they came with an artifact and not from the user.

        Through them, an artifact of unknown origin could have a runtime write files or load libraries.

        Raises:
            DataError: One does.
        """
        for key, value in _flat(self.settings):
            if _FILES.search(key) or (isinstance(value, str) and _PLACE.search(value)):
                raise DataError(
                    f"{label} has the setting {key!r:.100}, which names files",
                    expected="settings without files in what an artifact brings",
                    hint="if you trust it, name the settings yourself: --tuned FILE",
                )

    def check_device(self, device: Device) -> None:
        """Refuse to be used on another device than the one it was tuned on.

        Raises:
            DeviceError: It is another one.
        """
        if parse_device(self.device) != device:
            raise DeviceError(
                f"the settings were tuned on {self.device}, not on {device}", hint="leave the device out, or tune again"
            )

    def notes_for(self, model: Path, digest: str | None = None) -> list[str]:
        """What is not as it was when the settings were tuned: they hold, but may not be the fastest any more.

        Args:
            model: The model's file.
            digest: sha256 of the artifact's manifest, where the model is an artifact.
        """
        notes = []
        here = machine_fingerprint(self.device)
        for name, value in self.machine.items():
            if name in here and here[name] != value:
                notes.append(f"tuned where {name} was {value!r}; here it is {here[name]!r}")
        if self.model_sha256 and self.model_sha256 != digest:
            from deploykit.artifact import sha256_of

            found = sha256_of(model)
            if found != self.model_sha256:
                notes.append(f"tuned for the model {self.model_sha256[:12]}; this is {(digest or found)[:12]}")
        return notes


_KINDS: dict[str, tuple[type, ...]] = {
    "device": (str,),
    "threads": (int, type(None)),
    "sessions": (int,),
    "concurrency": (int,),
    "precision": (str,),
    "batch": (int,),
    "optimize": (bool, str),
    "settings": (dict,),
    "machine": (dict,),
    "model_sha256": (str, type(None)),
}


def machine_fingerprint(device: str | Device) -> dict[str, Any]:
    """What decides whether tuned settings still hold: processor, instruction sets, cores allowed, runtime version.

    Raises:
        DeviceError: No such device name.
    """
    machine = inspect_machine()
    target = parse_device(device)
    wheels = _WHEELS.get(target.runtime, ())
    if not wheels and (plugin := find("runtimes", target.runtime)) is not None:
        wheels = (plugin.distribution,)
    runtime = next((f"{name} {found}" for name in wheels if (found := version_of(name))), "none")
    return {
        "cpu": machine.cpu,
        "architecture": machine.architecture,
        "flags": sorted(name for name, there in machine.flags.items() if there),
        "cores_allowed": machine.cores_allowed,
        "runtime": runtime,
    }


def wheels_of(device: str | Device) -> tuple[str, ...]:
    """Distributions that may bring a device's runtime.

    Raises:
        DeviceError: No such device name.
    """
    return _WHEELS.get(parse_device(device).runtime, ())


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its own name, also inside others, and inside JSON that is given as text."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            yield key, value
            return
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield str(name), None
            yield from _flat(below, str(name))
    elif isinstance(value, list):
        for below in value:
            yield from _flat(below, key)
    else:
        yield key, value


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
