"""Artifacts: immutable directories that hold a model and the evidence that it is right.

    artifact/
    ├── manifest.json     schema version, signature, lineage, evidence, sha256 and size of every other file
    ├── model.onnx        (+ external data), or model.xml + model.bin
    ├── golden.npz        inputs, and the outputs of the source model for them
    ├── export.log        what the frameworks printed
    ├── settings.json     how to open it, where a tuner found that out
    ├── assets/           tokenizer files and the like
    └── torch/            what a torch module was trained to, to be trained on

What `optimize` writes is a directory of artifacts with an `optimize.json` that names the winner; wherever an artifact
is asked for, such a directory stands for its winner.

An artifact is written into a temporary directory beside its place and renamed when it is whole, so that a crash leaves
nothing or everything. It is verified whenever it is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from deploykit.archives import unsafe_archive
from deploykit.data import ValueRange
from deploykit.errors import ArtifactError, DataError, first_line
from deploykit.npz_reader import UNREADABLE
from deploykit.sealed import Seal, Stamp, hash_regular
from deploykit.specs import Array, Signature, TensorSpec

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
LOG = "export.log"
SETTINGS = "settings.json"
# Of the file beside an artifact, behind its name, that signs it.
SIGNATURE_SUFFIX = ".sig"
ASSETS = "assets/"
TORCH = "torch/"
RESULT = "optimize.json"
_MANIFEST_LIMIT_BYTES = 16 * 2**20
_GOLDEN_LIMIT_BYTES = 32 * 2**20


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Model):
    """Size and hash of one file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class TensorEntry(_Model):
    """A `TensorSpec` as JSON; `range` holds the values that made-up inputs may take."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None
    range: tuple[float, float] | None = None


class StepRecord(_Model):
    """One step of the lineage."""

    step: str
    params: dict[str, JsonValue]
    tools: dict[str, str]
    parent: str | None
    seconds: float
    notes: list[str] = []


class Evidence(_Model):
    """What was measured of this very artifact. Free of claims that nobody checked: absent means not measured."""

    parity: list[dict[str, JsonValue]] = []
    accuracy: list[dict[str, JsonValue]] = []
    placement: list[dict[str, JsonValue]] = []
    benchmark: list[dict[str, JsonValue]] = []


class Manifest(_Model):
    """`manifest.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    deploykit: str
    created: str
    model: str
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    lineage: list[StepRecord]
    evidence: Evidence
    files: dict[str, FileEntry]


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema of `manifest.json`."""
    return Manifest.model_json_schema()


class Artifact:
    """A verified artifact on disk. Made by `Artifact.open`; written by `ArtifactWriter`."""

    def __init__(self, path: Path, manifest: Manifest, digest: str, seal: Seal | None = None) -> None:
        self.path = path
        self._seal = seal or Seal()
        self.manifest = manifest
        self.digest = digest

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read the manifest and check every file against it.

        Args:
            path: The artifact's directory, or what `optimize` wrote, for its winner.

        Raises:
            ArtifactError: No artifact, an unknown schema version, or a file that is missing, added or changed.
        """
        root = Path(path)
        try:
            return cls._open(_winner_of(root) if _is_result(root) else root)
        except OSError as exc:
            raise ArtifactError(f"cannot read {exc.filename or root}: {exc.strerror or exc}") from exc

    @classmethod
    def _open(cls, root: Path) -> Artifact:
        raw = _read_manifest(root)
        try:
            version = json.loads(raw).get("schema_version")
        except (ValueError, AttributeError, RecursionError) as exc:
            raise ArtifactError(f"{root / MANIFEST} is not JSON ({first_line(exc)})", hint="make it again") from exc
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{root} has manifest schema {version!r}",
                expected=f"schema {SCHEMA_VERSION}",
                hint="make it again, or use the DeployKit that wrote it",
            )
        try:
            manifest = Manifest.model_validate_json(raw)
        except ValidationError as exc:
            error = exc.errors()[0]
            where = ".".join(str(p)[:80] for p in error["loc"])
            raise ArtifactError(f"{root / MANIFEST}: {where}: {error['msg']}", hint="make it again") from exc
        return cls(root, manifest, hashlib.sha256(raw).hexdigest(), _check_files(root, manifest))

    def check_unchanged(self) -> None:
        """Make sure that the files are still those whose hashes were checked; for after a runtime has opened them.

        Raises:
            ArtifactError: One is another, or was written to.
        """
        self._seal.check()

    @property
    def model_path(self) -> Path:
        """The model's file."""
        return self.path / self.manifest.model

    @property
    def signature(self) -> Signature:
        """Inputs and outputs."""
        return Signature(
            tuple(TensorSpec(t.name, t.dtype, t.shape) for t in self.manifest.inputs),
            tuple(TensorSpec(t.name, t.dtype, t.shape) for t in self.manifest.outputs),
        )

    @property
    def ranges(self) -> dict[str, ValueRange]:
        """Values that made-up inputs may take, by input."""
        return {t.name: ValueRange(*t.range) for t in self.manifest.inputs if t.range is not None}

    @property
    def size_bytes(self) -> int:
        """Size of the model with its weights, in bytes."""
        # External data may have any name, so that the companions are named instead.
        return sum(
            f.bytes
            for name, f in self.manifest.files.items()
            if name not in (GOLDEN, LOG, SETTINGS) and not name.startswith((ASSETS, TORCH))
        )

    def golden(self) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        """Golden cases: inputs, and the outputs that the source model gave for them."""
        if GOLDEN not in self.manifest.files:
            return []
        return read_golden(self.path / GOLDEN)


def is_artifact(path: Path) -> bool:
    """Whether ``path`` is a directory with a manifest, or one that `optimize` wrote."""
    return (path / MANIFEST).is_file() or _is_result(path)


def manifest_digest(path: Path) -> str:
    """The digest of the artifact that is at ``path`` now, without looking at its other files.

    Raises:
        ArtifactError: There is none.
    """
    try:
        return hashlib.sha256(_read_manifest(_winner_of(path) if _is_result(path) else path)).hexdigest()
    except OSError as exc:
        raise ArtifactError(f"cannot read {exc.filename or path}: {exc.strerror or exc}") from exc


def _is_result(root: Path) -> bool:
    return (root / RESULT).is_file() and not (root / MANIFEST).exists()


def _winner_of(root: Path) -> Path:
    """The winning artifact in what `optimize` wrote."""
    file, again = root / RESULT, "run the search again"
    if file.is_symlink() or file.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise ArtifactError(f"{file} is a link, or larger than {_MANIFEST_LIMIT_BYTES} bytes", hint=again)
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{file} is not JSON ({first_line(exc)})", hint=again) from exc
    winner = found.get("winner") if isinstance(found, dict) else None
    if not isinstance(winner, str) or not winner:
        raise ArtifactError(f"{file} names no winner", expected="a search that came to its end", hint=again)
    parts = PurePosixPath(winner).parts
    if PurePosixPath(winner).is_absolute() or not parts or ".." in parts or "\\" in winner or "\0" in winner:
        raise ArtifactError(
            f"{file} names the winner {winner!r:.200}", expected="a directory below its own", hint=again
        )
    here = root
    for part in parts:
        here = here / part
        if here.is_symlink():
            raise ArtifactError(f"{here} is a link", expected="a directory, as the search wrote it", hint=again)
    if not (here / MANIFEST).is_file():
        raise ArtifactError(f"{file} names the winner {winner!r:.200}, which is no artifact", hint=again)
    return here


def _read_manifest(root: Path) -> bytes:
    file = root / MANIFEST
    parts = sorted(p.parent.name for p in root.glob(f"*/{MANIFEST}") if p.is_file()) if root.is_dir() else []
    if parts and not file.is_file():
        raise ArtifactError(
            f"{root} holds {len(parts)} artifacts: {', '.join(parts[:8])}",
            expected="one of them",
            hint=f"name it: -m {root / parts[0]}",
        )
    if not root.is_dir() or not file.is_file():
        raise ArtifactError(
            f"{root} is no artifact: it has no {MANIFEST}",
            hint=f"make one: deploykit export SOURCE -o {root}",
        )
    if file.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise ArtifactError(f"{file} is larger than {_MANIFEST_LIMIT_BYTES} bytes", hint="make the artifact again")
    return file.read_bytes()


def _check_files(root: Path, manifest: Manifest) -> Seal:
    again = "it was changed after it was written; make it again"
    found = set()
    stamps: dict[Path, Stamp] = {}
    for folder, dirs, names in os.walk(root):
        for name in [*dirs, *names]:
            path = Path(folder) / name
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            relative = path.relative_to(root).as_posix()
            if not stat.S_ISREG(mode):
                raise ArtifactError(f"{path} is a link or a special file", expected="regular files only", hint=again)
            found.add(relative)
    found.discard(MANIFEST)
    for name in sorted(found - manifest.files.keys()):
        raise ArtifactError(f"{root} holds {name}, which its manifest does not list", hint=again)
    for name, entry in manifest.files.items():
        if name not in found:
            raise ArtifactError(f"{root} lacks {name}", expected="every file of the manifest", hint="make it again")
        digest, stamp = hash_regular(root / name)
        if (root / name).stat().st_size != entry.bytes or digest != entry.sha256:
            raise ArtifactError(f"{root / name} does not have the sha256 of the manifest", hint=again)
        stamps[root / name] = stamp
    if manifest.model not in manifest.files:
        raise ArtifactError(
            f"{root}: the manifest's model {manifest.model!r} is not among its files", hint="make it again"
        )
    return Seal(stamps)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stamp_of(path: Path) -> list[str]:
    """What tells one state of a file or a directory from another; empty where there is neither."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    return [f"{p.name} {p.stat().st_size} {sha256_of(p)}" for p in files]


# --- golden cases ----------------------------------------------------------------------------------------------------


def write_golden(path: Path, cases: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> int:
    """Keep the smallest of ``cases`` that fit 32 MiB together; at least one.

    Returns:
        How many were kept.
    """
    sized = sorted(
        ((sum(a.nbytes for a in (*i.values(), *o.values())), n, i, o) for n, (i, o) in enumerate(cases)),
        key=lambda c: c[:2],
    )
    arrays: dict[str, Array] = {}
    total = kept = 0
    for nbytes, _, inputs, outputs in sized:
        if kept and total + nbytes > _GOLDEN_LIMIT_BYTES:
            break
        arrays |= {f"{kept}/in/{name}": np.asarray(a) for name, a in inputs.items()}
        arrays |= {f"{kept}/out/{name}": np.asarray(a) for name, a in outputs.items()}
        total += nbytes
        kept += 1
    # Object arrays would need pickle; strings are stored as numpy's own.
    plain = {k: a.astype(str) if a.dtype.kind == "O" else a for k, a in arrays.items()}
    np.savez(path, **plain)  # type: ignore[arg-type]
    return kept


def read_golden(path: Path) -> list[tuple[dict[str, Array], dict[str, Array]]]:
    """Read what `write_golden` wrote.

    Raises:
        DataError: It cannot be read.
    """
    cases: dict[int, tuple[dict[str, Array], dict[str, Array]]] = {}
    try:
        if why := unsafe_archive(path, unpacked=False):
            raise ValueError(f"it {why}")
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                match = re.fullmatch(r"(\d+)/(in|out)/(.+)", key, re.DOTALL)
                if match is None:
                    raise ValueError(f"unexpected array {key!r}")
                case = cases.setdefault(int(match[1]), ({}, {}))
                array = archive[key]
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"{key!r} is no array")
                case[match[2] == "out"][match[3]] = array
    except (*UNREADABLE, MemoryError) as exc:
        raise DataError(f"cannot read {path} ({first_line(exc)})", hint="make the artifact again") from exc
    return [cases[n] for n in sorted(cases)]
