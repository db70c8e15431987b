"""Bundles: what `package` writes for a serving target, and how it is known again.

    bundle/
    ├── deploykit.json    target, model, settings, contract, what was replayed, sha256 and size of every other file
    ├── golden.npz        golden requests that the server has to answer
    ├── README.md         how to start it
    ├── models/NAME/      the model as the target wants it
    └── ...               the target's own files

A bundle is staged beside its place and renamed when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from deploykit.artifact import FileEntry, TensorEntry, read_golden, sha256_of
from deploykit.errors import PackageError, first_line
from deploykit.runtimes.settings import RuntimeSettings
from deploykit.specs import Array, Signature, TensorSpec

SCHEMA_VERSION: Literal[1] = 1
BUNDLE = "deploykit.json"
README = "README.md"
MODELS = "models"
_LIMIT_BYTES = 16 * 2**20
_AGAIN = "package the artifact again"

Protocol = Literal["v2", "mlflow", "bentoml"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Contract(_Model):
    """When an answer counts as the golden one.

    Attributes:
        min_cosine: For models whose numbers were changed on purpose; None for equality within the tolerances of
            `benchmarks.parity`.
        bounded: Outputs that the graph makes by Sigmoid or Softmax, see `benchmarks.parity.compare`.
        unverifiable: The artifact's own evidence says that equal outputs prove nothing of it.
    """

    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    bounded: list[str] = []
    unverifiable: bool = False


class BundleManifest(_Model):
    """`deploykit.json`.

    Attributes:
        model: The file that is opened for a replay in process.
        columns: Tensors [batch] that the server takes and gives as [batch, 1].
        replay: What the golden requests gave when the bundle was made, with this very model file.
        notes: What the user has to know, such as tuned settings that the target cannot take.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    deploykit: str
    created: str
    target: str
    name: str
    protocol: Protocol
    artifact: str
    model: str
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    columns: list[str] = []
    max_batch: int = Field(ge=0)
    settings: dict[str, JsonValue]
    contract: Contract
    replay: dict[str, JsonValue]
    notes: list[str] = []
    files: dict[str, FileEntry] = {}


def bundle_schema() -> dict[str, Any]:
    """The JSON Schema of `deploykit.json`."""
    return BundleManifest.model_json_schema()


def is_bundle(path: Path) -> bool:
    """Whether a directory is a bundle."""
    return (path / BUNDLE).is_file()


class Bundle:
    """A bundle on disk. Made by `Bundle.open`.

    Attributes:
        path: Its directory.
        manifest: What `deploykit.json` says.
        edited: Configuration files that are not as they were written; for a person to change, so no error.
    """

    def __init__(self, path: Path, manifest: BundleManifest, edited: tuple[str, ...]) -> None:
        self.path = path
        self.manifest = manifest
        self.edited = edited

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest and check the files.

        Raises:
            PackageError: No bundle, or a model or a golden request that is missing or was changed.
        """
        root = Path(path)
        try:
            manifest = _read(root)
            return cls(root, manifest, _check_files(root, manifest))
        except OSError as exc:
            raise PackageError(f"cannot read {exc.filename or root}: {exc.strerror or exc}") from exc

    @property
    def signature(self) -> Signature:
        """Inputs and outputs."""
        return Signature(
            tuple(TensorSpec(t.name, t.dtype, t.shape) for t in self.manifest.inputs),
            tuple(TensorSpec(t.name, t.dtype, t.shape) for t in self.manifest.outputs),
        )

    @property
    def model_path(self) -> Path:
        """The file, or the artifact's directory, that is opened for a replay in process."""
        return self.path / self.manifest.model

    @property
    def settings(self) -> RuntimeSettings:
        """How the model is opened."""
        return RuntimeSettings.from_dict(self.manifest.settings, f"settings in {self.path / BUNDLE}")

    def golden(self) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        """The golden requests: inputs and outputs.

        Raises:
            DataError: They cannot be read.
        """
        return read_golden(self.path / "golden.npz")


def _read(root: Path) -> BundleManifest:
    file = root / BUNDLE
    if not file.is_file() or file.is_symlink():
        raise PackageError(
            f"{root} is no bundle: it has no {BUNDLE}", hint=f"make one: deploykit package ARTIFACT -o {root}"
        )
    if file.stat().st_size > _LIMIT_BYTES:
        raise PackageError(f"{file} is larger than {_LIMIT_BYTES} bytes", hint=_AGAIN)
    raw = file.read_bytes()
    try:
        version = json.loads(raw).get("schema_version")
    except (ValueError, AttributeError, RecursionError) as exc:
        raise PackageError(f"{file} is not JSON ({first_line(exc)})", hint=_AGAIN) from exc
    if version != SCHEMA_VERSION:
        raise PackageError(f"{file} has schema {version!r}", expected=f"schema {SCHEMA_VERSION}", hint=_AGAIN)
    try:
        manifest = BundleManifest.model_validate_json(raw)
    except ValidationError as exc:
        error = exc.errors()[0]
        where = ".".join(str(p)[:80] for p in error["loc"])
        raise PackageError(f"{file}: {where}: {error['msg']}", hint=_AGAIN) from exc
    for name in (*manifest.files, manifest.model):
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
            raise PackageError(f"{file} names {name!r:.200}", expected="files below the bundle", hint=_AGAIN)
    return manifest


def _check_files(root: Path, manifest: BundleManifest) -> tuple[str, ...]:
    """Refuse data that were changed; say which configuration was."""
    edited = []
    for name, entry in manifest.files.items():
        data = name == "golden.npz" or _below(name, manifest.model)
        path = root / name
        real = path.is_file() and not any(p.is_symlink() for p in (path, *path.parents) if p.is_relative_to(root))
        same = real and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256
        if same:
            continue
        if data:
            found = "does not have the sha256 that it was written with" if real else "is missing, or a link"
            raise PackageError(f"{path} {found}", expected="the model and its golden requests as packaged", hint=_AGAIN)
        if real:
            edited.append(name)
    if not any(name == manifest.model or name.startswith(f"{manifest.model}/") for name in manifest.files):
        raise PackageError(f"{root / BUNDLE} does not list its model {manifest.model!r}", hint=_AGAIN)
    return tuple(edited)


def _below(name: str, model: str) -> bool:
    """Whether a file is the model, is inside of it, or lies beside it, as weights do."""
    folder = str(PurePosixPath(model).parent)
    return name == model or name.startswith(f"{model}/") or name.startswith(f"{folder}/")


def entries_of(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file below a directory, the manifest left aside."""
    return {
        p.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(p), bytes=p.stat().st_size)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p != folder / BUNDLE
    }


def tensor_entries(specs: Iterable[TensorSpec]) -> list[TensorEntry]:
    """Specifications as JSON."""
    return [TensorEntry(name=s.name, dtype=s.dtype, shape=s.shape) for s in specs]
