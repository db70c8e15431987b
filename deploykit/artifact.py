"""Artifacts: immutable directories that hold a model and the evidence that it is right.

    artifact/
    ├── manifest.json     schema version, signature, lineage, evidence, sha256 and size of every other file
    ├── model.onnx        (+ external data), or model.xml + model.bin
    ├── golden.npz        inputs, and the outputs of the source model for them
    ├── export.log        what the frameworks printed
    └── assets/           tokenizer files and the like

An artifact is written into a temporary directory beside its place and renamed when it is whole, so that a crash leaves
nothing or everything. It is verified whenever it is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from deploykit.data import UNREADABLE, ValueRange
from deploykit.errors import ArtifactError, DataError, OutputExistsError, StorageError, first_line, storage_error
from deploykit.specs import Array, Signature, TensorSpec

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
LOG = "export.log"
ASSETS = "assets/"
_MANIFEST_LIMIT_BYTES = 16 * 2**20
_GOLDEN_LIMIT_BYTES = 32 * 2**20
# A writer takes its lock a moment after it made the directory; nobody may sweep it in between.
_LOCK_GRACE_S = 2.0


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

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read the manifest and check every file against it.

        Raises:
            ArtifactError: No artifact, an unknown schema version, or a file that is missing, added or changed.
        """
        root = Path(path)
        try:
            return cls._open(root)
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
        _check_files(root, manifest)
        return cls(root, manifest, hashlib.sha256(raw).hexdigest())

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
            if name not in (GOLDEN, LOG) and not name.startswith(ASSETS)
        )

    def golden(self) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        """Golden cases: inputs, and the outputs that the source model gave for them."""
        if GOLDEN not in self.manifest.files:
            return []
        return _read_golden(self.path / GOLDEN)


def is_artifact(path: Path) -> bool:
    """Whether ``path`` is a directory with a manifest."""
    return (path / MANIFEST).is_file()


def _read_manifest(root: Path) -> bytes:
    file = root / MANIFEST
    if not root.is_dir() or not file.is_file():
        raise ArtifactError(
            f"{root} is no artifact: it has no {MANIFEST}",
            hint=f"make one: deploykit export SOURCE -o {root}",
        )
    if file.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise ArtifactError(f"{file} is larger than {_MANIFEST_LIMIT_BYTES} bytes", hint="make the artifact again")
    return file.read_bytes()


def _check_files(root: Path, manifest: Manifest) -> None:
    again = "it was changed after it was written; make it again"
    found = set()
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
        if (root / name).stat().st_size != entry.bytes or sha256_of(root / name) != entry.sha256:
            raise ArtifactError(f"{root / name} does not have the sha256 of the manifest", hint=again)
    if manifest.model not in manifest.files:
        raise ArtifactError(
            f"{root}: the manifest's model {manifest.model!r} is not among its files", hint="make it again"
        )


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def _read_golden(path: Path) -> list[tuple[dict[str, Array], dict[str, Array]]]:
    cases: dict[int, tuple[dict[str, Array], dict[str, Array]]] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                match = re.fullmatch(r"(\d+)/(in|out)/(.+)", key, re.DOTALL)
                if match is None:
                    raise ValueError(f"unexpected array {key!r}")
                case = cases.setdefault(int(match[1]), ({}, {}))
                case[match[2] == "out"][match[3]] = archive[key]
    except UNREADABLE as exc:
        raise DataError(f"cannot read {path} ({first_line(exc)})", hint="make the artifact again") from exc
    return [cases[n] for n in sorted(cases)]


# --- writing ---------------------------------------------------------------------------------------------------------


class ArtifactWriter:
    """Builds an artifact in a staging directory beside its place.

    Use as a context manager: write files below `dir`, then `commit`. Without `commit`, and on every error, the staging
    directory is removed. A staging directory that a killed process left is removed by the next writer to that place.

    Args:
        output: Where the artifact will stand; nothing may be there.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output
        self.dir = Path()
        self._made_parents: list[Path] = []
        self._lock: int | None = None

    def __enter__(self) -> ArtifactWriter:
        """Create the staging directory.

        Raises:
            OutputExistsError: Something stands at the output.
            StorageError: The place cannot be written.
        """
        check_free(self.output)
        try:
            self._make_parents()
            self._sweep()
            prefix = self._prefix()
            self.dir = Path(tempfile.mkdtemp(prefix=prefix, dir=self.output.parent))
            self._lock = _take_lock(self.dir)
        except OSError as exc:
            self._discard()
            raise _place_error(exc, self.output) from exc
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Remove the staging directory unless it was committed; translate a storage failure."""
        self._discard()
        if isinstance(exc, OSError):
            error = storage_error(exc, self.output)
            if error is not None:
                raise error from exc

    def commit(
        self,
        *,
        model: str,
        signature: Signature,
        lineage: list[StepRecord],
        evidence: Evidence,
        ranges: Mapping[str, ValueRange] | None = None,
    ) -> Artifact:
        """Write the manifest, flush everything to the disk and rename the directory to its place.

        Raises:
            OutputExistsError: Somebody put something there in the meantime.
        """
        from deploykit import __version__

        known = ranges or {}
        paths = sorted(p for p in self.dir.rglob("*") if p.is_file())
        manifest = Manifest(
            deploykit=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=model,
            inputs=[_entry(s, known.get(s.name)) for s in signature.inputs],
            outputs=[_entry(s, None) for s in signature.outputs],
            lineage=lineage,
            evidence=evidence,
            files={
                p.relative_to(self.dir).as_posix(): FileEntry(sha256=sha256_of(p), bytes=p.stat().st_size)
                for p in paths
            },
        )
        raw = (manifest.model_dump_json(indent=2) + "\n").encode()
        (self.dir / MANIFEST).write_bytes(raw)
        for path in (*paths, self.dir / MANIFEST, *(p for p in self.dir.rglob("*") if p.is_dir()), self.dir):
            _fsync(path)
        check_free(self.output)
        self.dir.chmod(0o777 & ~_umask())
        try:
            self.dir.rename(self.output)
        except OSError as exc:
            if self.output.exists():
                raise _taken(self.output) from exc
            raise
        _fsync(self.output.parent)
        self._made_parents.clear()
        return Artifact(self.output, manifest, hashlib.sha256(raw).hexdigest())

    def _prefix(self) -> str:
        return f".{self.output.name}.tmp-"

    def _make_parents(self) -> None:
        missing = []
        here = self.output.parent
        while not here.exists():
            missing.append(here)
            here = here.parent
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                self._made_parents.append(folder)

    def _sweep(self) -> None:
        """Remove staging directories whose writer is gone: nobody holds the lock on them."""
        for stale in self.output.parent.glob(f"{_escape(self._prefix())}*"):
            with contextlib.suppress(FileNotFoundError):  # another writer swept it
                if time.time() - stale.lstat().st_mtime < _LOCK_GRACE_S:
                    continue
            lock = _take_lock(stale)
            if lock is not None:
                shutil.rmtree(stale, ignore_errors=True)
                os.close(lock)

    def _discard(self) -> None:
        if self.dir != Path():
            shutil.rmtree(self.dir, ignore_errors=True)
            self.dir = Path()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for folder in reversed(self._made_parents):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made_parents.clear()


def check_free(output: Path) -> None:
    """Refuse an output path that is taken.

    Raises:
        OutputExistsError: Something is there, be it an empty directory or a dangling link.
    """
    if os.path.lexists(output):
        raise _taken(output)


def _place_error(exc: OSError, output: Path) -> StorageError:
    """For a failure that can only come from where the output is to stand, such as a folder that is not there."""
    return storage_error(exc, output) or StorageError(
        f"cannot write {output}: {exc.strerror or exc}", hint="choose an -o whose folder exists"
    )


def check_writable(folder: Path) -> None:
    """Refuse a folder that no file can be made in, before the work is done.

    Raises:
        StorageError: It is not there, or not ours to write to.
    """
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(f"cannot write to {folder}", expected="an existing folder that you may write to")


def _taken(output: Path) -> OutputExistsError:
    return OutputExistsError(f"{output} exists and is left as it is", hint="choose another -o, or remove it first")


def _entry(spec: TensorSpec, limits: ValueRange | None) -> TensorEntry:
    return TensorEntry(
        name=spec.name,
        dtype=spec.dtype,
        shape=spec.shape,
        range=(limits.low, limits.high) if limits else None,
    )


def _escape(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)


def _take_lock(folder: Path) -> int | None:
    """An exclusive lock on a directory, released by the kernel when its process ends; None where it is taken."""
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_file(path: Path, data: bytes) -> None:
    """Write a single file (a report) atomically; refuses to overwrite.

    Raises:
        OutputExistsError: Something is there.
        StorageError: The file system refused.
    """
    check_free(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        os.link(temporary, path)  # unlike rename, refuses to replace
    except FileExistsError as exc:
        raise _taken(path) from exc
    except OSError as exc:
        raise _place_error(exc, path) from exc
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
