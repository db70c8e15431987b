"""What files are, told apart by a digest: the same content has the same digest wherever it lies and whoever made it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deploykit import __version__
from deploykit.artifact import LOG, Artifact, is_artifact, sha256_of
from deploykit.errors import SearchError
from deploykit.extras import version_of
from deploykit.machine import inspect_machine
from deploykit.modelfile import external_files, read_model
from deploykit.plugins import KINDS, installed
from deploykit.search.jobs import Job

# Whatever turns models into others, or runs them: another version may give another result.
_TOOLS = (
    "numpy", "onnx", "onnx-ir", "onnxsim", "onnxslim", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino",
    "nncf", "torch", "transformers", "tensorflow", "tensorflow-cpu", "keras", "tf2onnx", "ai-edge-litert",
    "scikit-learn", "skl2onnx",
)  # fmt: skip

# Of a machine's fingerprint: what numbers may depend on, and not only times.
_NUMERIC = ("architecture", "flags")


def content_of(path: Path) -> str:
    """Digest of what a file, a directory or an artifact is.

    Of an artifact: its files but for the log, the signature, the ranges of its inputs, and the steps and parameters of
    its lineage; not when it was made, how long that took, nor what was measured of it. Of an `.onnx` file: its bytes
    and those of its external data; of an `.xml` file also its `.bin`. Of another directory: the names and bytes of all
    files in it. A file's own name does not count, but for its suffix.

    Raises:
        SearchError: There is nothing, or it cannot be read.
        ArtifactError: An artifact that was changed.
        ModelError: An ONNX file that is corrupt or unsafe.
    """
    try:
        return _content_of(path)
    except OSError as exc:
        raise SearchError(f"cannot read {exc.filename or path}: {exc.strerror or exc}") from exc


class Contents:
    """`content_of` for paths that are asked for often: they are read again when one of their files was touched."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[Any, ...], list[Path], str]] = {}

    def __call__(self, path: Path) -> str:
        """As `content_of`."""
        known = self._known.get(path)
        try:
            if known is not None and known[0] == _stats(list(_walk(path)) if path.is_dir() else known[1]):
                return known[2]
            files = _files_of(path)
            before = _stats(files)
        except OSError:
            return content_of(path)  # which says what is wrong
        digest = content_of(path)
        self._known[path] = before, files, digest
        return digest


def _content_of(path: Path) -> str:
    if path.is_dir() and is_artifact(path):
        return _digest(_artifact(path))
    files = _files_of(path)
    if path.is_dir():
        return _digest(["directory", [[p.relative_to(path).as_posix(), sha256_of(p)] for p in files]])
    others = [[p.relative_to(path.parent).as_posix(), sha256_of(p)] for p in files[1:] if path.suffix == ".onnx"]
    weights = [sha256_of(p) for p in files[1:] if path.suffix == ".xml"]
    return _digest(["file", path.suffix, sha256_of(path), others, weights])


def _files_of(path: Path) -> list[Path]:
    """The files that belong to a path; of a file, itself first."""
    if path.is_dir():
        return list(_walk(path))
    if not path.is_file():
        raise SearchError(f"{path} does not exist", expected="a file or a directory")
    if path.suffix == ".onnx":
        return [path, *(path.parent / name for name in sorted(external_files(read_model(path, weights=False))))]
    weights = path.with_suffix(".bin")
    return [path, weights] if path.suffix == ".xml" and weights.is_file() else [path]


def _walk(root: Path) -> Iterator[Path]:
    """Every file below a directory, in order; links are followed, as whoever reads them does."""
    seen: set[tuple[int, int]] = set()
    for folder, dirs, names in os.walk(root, followlinks=True):
        here = Path(folder).stat()
        if (here.st_dev, here.st_ino) in seen:  # a link to a directory above
            dirs.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        dirs.sort()
        yield from (file for name in sorted(names) if (file := Path(folder) / name).is_file())


def _stats(files: list[Path]) -> tuple[Any, ...]:
    """What changes when one of the files is written to."""
    found = [(p, p.stat()) for p in files]
    return tuple((str(p), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in found)


def _artifact(path: Path) -> list[Any]:
    found = Artifact.open(path).manifest
    return [
        "artifact",
        found.model,
        sorted([name, entry.sha256] for name, entry in found.files.items() if name != LOG),
        [spec.model_dump(mode="json") for spec in (*found.inputs, *found.outputs)],
        len(found.inputs),
        [[step.step, step.params] for step in found.lineage],
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tools_here() -> dict[str, str]:
    """Versions of the packages that a result may depend on, plugins among them, and the digest of our own sources."""
    plugged = {p.distribution: p.version for kind in KINDS for p in installed(kind)}
    known = {name: found for name in _TOOLS if (found := version_of(name))}
    return plugged | known | {"sources of deploykit": _sources()}


@lru_cache(maxsize=1)
def _sources() -> str:
    """A checkout changes without its version."""
    places = [
        Path(place)
        for name in ("", ".benchmarks", ".exporters", ".optimizers", ".runtimes", ".search")
        if (found := find_spec(f"deploykit{name}")) is not None
        for place in found.submodule_search_locations or ()
    ]
    return _digest([[file.name, sha256_of(file)] for place in places for file in sorted(place.glob("*.py"))])


def machine_here() -> dict[str, Any]:
    """What a measured time depends on: processor, instruction sets, cores and memory allowed."""
    machine = inspect_machine()
    return {
        "cpu": machine.cpu,
        "architecture": machine.architecture,
        "flags": sorted(name for name, there in machine.flags.items() if there),
        "cores_allowed": machine.cores_allowed,
        "memory_bytes": machine.memory_bytes,
    }


def key_of(
    job: Job,
    *,
    tools: Mapping[str, str],
    machine: Mapping[str, Any] | None,
    contents: Callable[[Path], str] = content_of,
) -> str:
    """Digest of all that a job's result follows from.

    Args:
        job: What is to be done; where its inputs lie does not count, nor its label, time limit and retries, nor the
            "effort" among its parameters: how long it may take.
        tools: Versions of the packages that take part.
        machine: The fingerprint of the machine that does it; all of it counts for exclusive jobs, which measure time.
            For others what decides about numbers does: a processor without VNNI saturates, another rounds elsewhere.
        contents: How the content of an input is found.

    Raises:
        DeploykitError: An input cannot be read; see `content_of`.
    """
    return _digest(
        {
            "deed": job.deed,
            "params": {name: value for name, value in job.params.items() if name != "effort"},
            "inputs": {name: contents(path) for name, path in job.inputs.items()},
            "tools": dict(tools),
            "deploykit": __version__,
            "machine": {k: v for k, v in (machine or {}).items() if job.exclusive or k in _NUMERIC} or None,
        }
    )
