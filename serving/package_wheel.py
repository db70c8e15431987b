"""A wheel of the DeployKit that runs: what an image installs, because the project is on no package index."""

from __future__ import annotations

import base64
import hashlib
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import deploykit
from deploykit.extras import DISTRIBUTION

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


def find_packages(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Import packages and the folders that they are in.

    Args:
        folders: Of the packages that do not lie in another one of them; all below them are found, by their
            `__init__.py`, as setuptools finds them.
    """

    def below(name: str, folder: Path) -> Iterator[tuple[str, Path]]:
        yield name, folder
        for inner in sorted(folder.iterdir()):
            if (inner / "__init__.py").is_file():
                yield from below(f"{name}.{inner.name}", inner)

    return {name: folder for top, at in folders.items() for name, folder in below(top, at)}


def _folders() -> dict[str, Path]:
    """The package, and in a checkout those beside it, which an installed wheel has inside."""
    found = {"deploykit": Path(deploykit.__file__).resolve().parent}
    for root in map(Path, deploykit.__path__[1:]):
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        mapped = project["tool"]["setuptools"]["package-dir"]
        found |= {name: root / folder for name, folder in mapped.items() if name not in found}
    return found


def package_files() -> dict[str, bytes]:
    """Every file of the packages, by its place in a wheel."""
    found = {}
    for package, folder in find_packages(_folders()).items():
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in _DATA or path.name == "py.typed":
                found[f"{package.replace('.', '/')}/{path.name}"] = path.read_bytes()
    return found


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
