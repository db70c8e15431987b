"""Requirements with hashes for an image: asked of the package index, or given in a file."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.errors import PackageError
from deploykit.extras import DISTRIBUTION, version_of

# What the server imports; everything else comes in as a dependency of these.
SERVER = (
    "click", "grpcio", "httptools", "numpy", "orjson", "prometheus-client", "protobuf", "pydantic", "starlette",
    "uvicorn", "uvloop",
)  # fmt: skip
# Frameworks that a server of exported models never needs: gigabytes, and a larger surface.
FORBIDDEN = ("torch", "torchvision", "tensorflow", "tensorflow-cpu", "keras", "jax", "jaxlib", "triton", "transformers")
# What a runtime asks for, does without, and would tell its maker from.
_REPORTING = ("openvino-telemetry",)
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*==\s*([^\s;]+)(\s*;[^#]*?)?((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*")
_TIMEOUT_S = 300.0
_LIMIT_BYTES = 4 * 2**20
# Wheels that run on glibc 2.28 and later, which the slim images have; the index may offer those for older ones only.
_GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux_2_5",
          "manylinux2010", "manylinux1")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pin:
    """One locked distribution.

    Attributes:
        name: Normalized.
        version: Exact.
        hashes: sha256 of the files that may be installed.
        marker: Where it is wanted, as it stands in the file; empty for everywhere.
    """

    name: str
    version: str
    hashes: tuple[str, ...]
    marker: str = ""

    def __str__(self) -> str:
        marker = f" ; {self.marker}" if self.marker else ""
        return f"{self.name}=={self.version}{marker}" + "".join(f" \\\n    --hash=sha256:{h}" for h in self.hashes)


def normalize(name: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(runtime: str, suffix: str = ".onnx", dtypes: Collection[str] = ()) -> tuple[str, ...]:
    """Distributions that a server with one runtime imports.

    Args:
        runtime: "ort" or "openvino".
        suffix: Of the model's file: OpenVINO alone does not say the names of an ONNX file's tensors.
        dtypes: Of the model's inputs and outputs: numpy has no bfloat16 of its own.
    """
    found = {*SERVER, "onnxruntime" if runtime == "ort" else "openvino"}
    if runtime != "ort" and suffix == ".onnx":
        found.add("onnx")
    if "bfloat16" in dtypes:
        found.add("ml-dtypes")
    return tuple(sorted(found))


def machine_of_image() -> str:
    """The processor that the image is for: the one of this machine."""
    found = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(found, found)


def resolve(names: Sequence[str]) -> tuple[Pin, ...]:
    """Ask the package index for the versions that run here, and for those of everything that they need.

    pip is asked what it would install on glibc 2.28, and installs nothing.

    Raises:
        PackageError: pip is missing, or the index cannot be reached, or has no such files.
    """
    asked = [f"{name}=={version}" if (version := version_of(name)) else name for name in names]
    machine = machine_of_image()
    with tempfile.TemporaryDirectory(prefix="deploykit-lock-") as place:
        report = Path(place) / "report.json"
        command = [
            sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--no-input",
            "--disable-pip-version-check", "--only-binary=:all:", "--report", str(report), "--implementation", "cp",
            "--target", str(Path(place) / "nothing"),  # pip before 23.3 asks for one, and writes nothing there
            "--python-version", f"{sys.version_info.major}.{sys.version_info.minor}",
            *(part for tag in _GLIBC for part in ("--platform", f"{tag}_{machine}")), *asked,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, cwd=place)
        except subprocess.TimeoutExpired as exc:
            raise _unlocked(f"the package index did not answer within {_TIMEOUT_S:.0f} s") from exc
        if done.returncode != 0 or not report.exists():
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise _unlocked(said[-1][:300] if said else f"pip ended with {done.returncode}")
        return read_report(json.loads(report.read_bytes()))


def _unlocked(why: str) -> PackageError:
    return PackageError(
        f"the hashes of what the image installs could not be had: {why}",
        hint="where the package index cannot be reached, give a file of requirements with hashes: --lock FILE",
    )


def read_report(report: Any) -> tuple[Pin, ...]:
    """Pins out of pip's installation report: https://pip.pypa.io/en/stable/reference/installation-report/

    Raises:
        PackageError: A file has no sha256.
    """
    found = []
    for item in report["install"]:
        name, version = normalize(item["metadata"]["name"]), item["metadata"]["version"]
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise _unlocked(f"the package index says no sha256 for {name} {version}")
        if name not in _REPORTING:
            found.append(Pin(name, version, (digest,)))
    return tuple(sorted(found, key=lambda p: p.name))


def read_lock(path: Path) -> tuple[Pin, ...]:
    """Read a file of requirements, each with an exact version and hashes.

    Raises:
        PackageError: Missing, or a line is anything else.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise PackageError(f"{path} is larger than {_LIMIT_BYTES} bytes", expected="requirements with hashes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "not UTF-8"
        raise PackageError(f"cannot read {path}: {why}", expected="requirements with hashes") from exc
    found = []
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        plain = re.sub(r"(^|\s)#.*$", "", line).strip()
        if not plain:
            continue
        match = _LINE.fullmatch(plain)
        if match is None:
            raise PackageError(
                f"{path}: {plain[:120]!r}", expected="NAME==VERSION --hash=sha256:…",
                hint="make it with pip-compile --generate-hashes, or uv pip compile --generate-hashes",
            )  # fmt: skip
        hashes = tuple(re.findall(r"sha256:([0-9a-f]{64})", match[4]))
        found.append(Pin(normalize(match[1]), match[2], hashes, (match[3] or "").strip().removeprefix(";").strip()))
    return tuple(found)


def check_lock(pins: Sequence[Pin], names: Iterable[str], source: str) -> None:
    """Refuse a lock that lacks what the server imports, or holds what it must not.

    Raises:
        PackageError: It does.
    """
    held = {pin.name for pin in pins}
    missing = [name for name in names if name not in held]
    if missing:
        raise PackageError(f"{source} lacks {', '.join(missing)}", expected="everything that the server imports")
    unwanted = sorted(n for n in held if n in FORBIDDEN or n.startswith("nvidia-"))
    if unwanted:
        raise PackageError(f"{source} holds {', '.join(unwanted)}", expected="a runtime, numpy and the server only")
    if DISTRIBUTION in held:
        raise PackageError(f"{source} holds {DISTRIBUTION}, whose wheel is made here", hint="take that line out")
