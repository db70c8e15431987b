"""A wheel of the DeployKit that runs: what an image installs, because the project is on no package index."""

from __future__ import annotations

import base64
import hashlib
import importlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from deploykit.extras import DISTRIBUTION

# The import packages of the distribution; tests compare them with pyproject.toml.
PACKAGES = (
    "deploykit", "deploykit.cli", "deploykit.search", "deploykit.exporters", "deploykit.optimizers",
    "deploykit.optimizers.distillation", "deploykit.optimizers.pruning", "deploykit.optimizers.training",
    "deploykit.runtimes", "deploykit.benchmarks", "deploykit.serving",
)  # fmt: skip
_DATA = (".py", ".toml", ".typed")
# The first moment that the format knows: the same files give the same wheel.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def wheel_name() -> str:
    """The file's name."""
    from deploykit import __version__

    return f"{DISTRIBUTION.replace('-', '_')}-{__version__}-py3-none-any.whl"


def write_wheel(folder: Path, requires: Sequence[str]) -> Path:
    """Write the wheel.

    Args:
        folder: Receives it.
        requires: Distributions that the server needs; the wheel asks for no others.
    """
    from deploykit import __version__

    stem = f"{DISTRIBUTION.replace('-', '_')}-{__version__}"
    info = f"{stem}.dist-info"
    files = package_files()
    lines = [
        "Metadata-Version: 2.1", f"Name: {DISTRIBUTION}", f"Version: {__version__}", "Requires-Python: >=3.11",
        *(f"Requires-Dist: {name}" for name in requires),
    ]  # fmt: skip
    files[f"{info}/METADATA"] = ("\n".join(lines) + "\n").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: deploykit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\ndeploykit = deploykit.cli:main\n"
    record = f"{info}/RECORD"
    rows = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in sorted(files.items())]
    files[record] = ("\n".join([*rows, f"{record},,"]) + "\n").encode()
    path = folder / wheel_name()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return path


def package_files() -> dict[str, bytes]:
    """Every file of the packages, by its place in a wheel; in a checkout, folders stand beside each other."""
    found = {}
    for package in PACKAGES:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in _DATA or path.name == "py.typed":
                found[f"{package.replace('.', '/')}/{path.name}"] = path.read_bytes()
    return found


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
