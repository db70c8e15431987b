"""Optional dependencies: imported where they are used, with the install command where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from deploykit.errors import MissingDependencyError, first_line

DISTRIBUTION = "deploykit-ml"
# Packages that report to their maker through another one, and do without it where it cannot be imported.
_REPORTING = {"openvino": "openvino_telemetry", "nncf": "openvino_telemetry"}


def install_command(extra: str) -> str:
    """The command that installs ``extra`` from a checkout."""
    return f"pip install -c constraints.txt -e '.[{extra}]' in the DeployKit checkout"


def require(name: str, *, extra: str | None = None) -> ModuleType:
    """Import ``name`` or say how to install it.

    Args:
        name: Module to import, dots allowed.
        extra: The extra of this distribution that brings it; None for a core dependency.

    Raises:
        MissingDependencyError: It is not installed, or is installed and does not load.
    """
    try:
        with _no_telemetry(name.partition(".")[0]):
            return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        top = name.partition(".")[0]
        if exc.name is not None and exc.name.partition(".")[0] != top:
            raise MissingDependencyError(
                f"{top} is installed, but its own dependency {exc.name} is not",
                hint=f"run: pip check; pip install {exc.name}",
            ) from exc
        command = install_command(extra) if extra else f"pip install {top}"
        raise MissingDependencyError(f"{top} is needed here and is not installed", hint=f"run: {command}") from exc
    except (ImportError, OSError) as exc:
        raise MissingDependencyError(
            f"{name} is installed but does not load ({first_line(exc)})",
            hint=f"reinstall it: pip install --force-reinstall {name.partition('.')[0]}",
        ) from exc


@contextmanager
def _no_telemetry(package: str) -> Iterator[None]:
    """Keep a package from reporting its import to its maker.

    OpenVINO does so unless its telemetry cannot be imported: from a process that it forks while its threads run, which
    may never end, and which Python waits for when it exits. NNCF reports every call through the same package.
    """
    name = _REPORTING.get(package, "")
    if not name or package in sys.modules or name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def available(name: str) -> bool:
    """Whether ``name`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, None where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
