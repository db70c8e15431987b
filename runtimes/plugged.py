"""Runtimes of other distributions, behind a device name `NAME:TARGET`; see `docs/extending.md`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from deploykit.errors import DeviceError, InferenceError, ModelError, PluginError
from deploykit.plugins import Plugin, find
from deploykit.runtimes.base import Session, SessionOptions
from deploykit.runtimes.device import OWN_RUNTIMES, Device


class Runtime(Protocol):
    """What an entry point of `deploykit.runtimes` is.

    Attributes:
        reads: Suffixes of the model files that it reads: ".onnx", ".xml", ".pt2".
        concurrent: Whether several threads may run one session at once.
    """

    reads: tuple[str, ...]
    concurrent: bool

    def check(self, target: str) -> None:
        """See that a target can be had, without a model; `target` is what follows the colon, in lower case.

        Raises:
            DeviceError: It cannot.
            MissingDependencyError: What it needs is not installed.
        """

    def open(self, path: Path, device: Device, options: SessionOptions) -> Session:
        """Load a model.

        Raises:
            DeviceError: A setting is unknown or wrong.
            ModelError: The file is corrupt or unsafe.
            InferenceError: The runtime cannot load it.
        """


def plugged(device: Device) -> tuple[Plugin, Runtime]:
    """Whose runtime a device is, and the runtime.

    Raises:
        DeviceError: Nobody's.
        PluginError: It does not load.
    """
    plugin = find("runtimes", device.runtime)
    if plugin is None:
        raise DeviceError(f"no installed distribution has a runtime {device.runtime!r}", hint="run: deploykit doctor")
    runtime: Runtime = plugin.load()
    return plugin, runtime


def check_plugged(device: Device) -> None:
    """Refuse a target that cannot be had.

    Raises:
        DeviceError: As said.
        PluginError: The plugin does not load, or fails.
    """
    plugin, runtime = plugged(device)
    with plugin.blamed(f"looked for {device}", DeviceError):
        runtime.check(device.target)


def open_plugged(path: Path, device: Device, options: SessionOptions) -> Session:
    """Load a model in a plugin's runtime; its distribution stands in the session's `settings["plugin"]`.

    Raises:
        DeviceError: The target cannot be had, or a setting is wrong.
        ModelError: The file is corrupt, or of a format that it does not read.
        InferenceError: It cannot load the model.
        PluginError: The plugin does not load, or gives no session.
    """
    plugin, runtime = plugged(device)
    if path.suffix not in runtime.reads:
        raise ModelError(
            f"{device} cannot read {path}", expected=" or ".join(runtime.reads), hint="use another --device"
        )
    check_plugged(device)
    with plugin.blamed(f"loaded {path}", InferenceError):
        session = runtime.open(path, device, options)
    if not isinstance(session, Session):
        raise PluginError(f"the {plugin} opened {path} as {type(session).__name__}", expected="a runtimes.Session")
    missing = [name for name in ("device", "signature", "settings") if not hasattr(session, name)]
    if missing:
        session.close()
        raise PluginError(f"the session of the {plugin} has no {missing[0]!r}", hint="see docs/extending.md")
    session.settings.setdefault("plugin", f"{plugin.distribution} {plugin.version}")
    return session


def runtime_tools(devices: Iterable[Device]) -> dict[str, str]:
    """Version by distribution of the plugins behind these devices, for the lineage."""
    plugins = [find("runtimes", device.runtime) for device in devices if device.runtime not in OWN_RUNTIMES]
    return {name: version for plugin in plugins if plugin is not None for name, version in plugin.tools.items()}
