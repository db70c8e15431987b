"""What is served: an artifact, or a bare model file, with how it is to be opened."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from deploykit.artifact import MANIFEST, SETTINGS, Artifact, is_artifact, manifest_digest, sha256_of
from deploykit.errors import ArtifactError, ModelError
from deploykit.machine import allowed_cores
from deploykit.runtimes import RuntimeSettings, parse_device
from deploykit.serving.versions import VERSION, VersionPolicy
from deploykit.specs import Signature, TensorSpec, terms

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_THREADS = ("intra_op_num_threads", "INFERENCE_NUM_THREADS")
_BARE = (".onnx", ".xml")
_DEVICES = {".onnx": "ort:cpu", ".xml": "openvino:cpu", ".pt2": "torch:cpu"}
PLATFORMS = {"ort": "onnxruntime_onnx", "openvino": "openvino", "torch": "pytorch", "torch-compile": "pytorch"}


@dataclass(frozen=True, slots=True)
class Options:
    """How models are served; None lets the tuned settings decide, and then the defaults.

    Attributes:
        device: Where they run.
        tuned: File of tuned settings, in place of the artifact's own.
        instances: Processes a model, each with a session of its own.
        threads: Threads inside one request; all allowed cores, shared among the instances, by default.
        max_batch: Most rows of requests that are joined; what the settings were tuned for by default.
        force_batching: Join requests also where that changes their numbers.
        max_delay_s: Seconds that a request may wait for others to be joined with.
        queue: Most requests that wait for a model.
        timeout_s: Seconds that any request may take.
        load_s: Seconds that a worker may take to load a model and to warm up.
        arena_bytes: Most bytes of the inputs, and of the outputs, of one request.
        memory_bytes: Most memory of a worker of a CPU device; that of the machine by default.
        versions: Which versions of a directory of versions answer.
    """

    device: str | None = None
    tuned: str | None = None
    instances: int | None = None
    threads: int | None = None
    max_batch: int | None = None
    force_batching: bool = False
    max_delay_s: float = 0.0
    queue: int = 128
    timeout_s: float = 60.0
    load_s: float = 1800.0
    arena_bytes: int = 2**30
    memory_bytes: int | None = None
    versions: VersionPolicy = field(default_factory=VersionPolicy)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: What clients call it.
        path: An artifact's directory, a directory of versions, or a model file.
        versioned: Whether it is a directory of versions: `1/`, `2/`, ..., each an artifact.
    """

    name: str
    path: Path
    versioned: bool

    @classmethod
    def at(cls, path: str | Path, name: str | None = None) -> Source:
        """See what is at a path.

        Raises:
            ArtifactError: Nothing that can be served.
            ModelError: A file of another kind, or a name that no address can hold.
        """
        # A link keeps its own name, and may point to something else the next time that it is looked at.
        place = Path(path).absolute()
        called = name if name is not None else place.stem if place.is_file() else place.name or place.parent.name
        if not _NAME.fullmatch(called):
            raise ModelError(
                f"a model cannot be called {called!r}", expected="letters, digits, '.', '_' and '-'", hint="add --name"
            )
        if place.is_file():
            if place.suffix not in _BARE:
                raise ModelError(f"{place} cannot be served", expected="an artifact, an .onnx or an .xml file")
            return cls(called, place, versioned=False)
        if is_artifact(place):
            return cls(called, place, versioned=False)
        if place.is_dir() and versions_in(place):
            return cls(called, place, versioned=True)
        raise ArtifactError(
            f"{place} is no artifact" if place.exists() else f"{place} does not exist",
            expected=f"a directory with {MANIFEST}, a directory of versions 1/, 2/, ... of such, or an .onnx file",
            hint="make one: deploykit export SOURCE -o DIR",
        )

    def found(self) -> dict[str, Path]:
        """The versions that there are and where they are, oldest first.

        Raises:
            ArtifactError: There is none any more.
        """
        if not self.versioned:
            return {"1": self.path.resolve()}
        found = versions_in(self.path)
        if not found:
            raise ArtifactError(f"{self.path} holds no version any more", expected="1/, 2/, ..., each an artifact")
        return {version: (self.path / version).resolve() for version in found}

    def at_version(self, version: str | None = None) -> tuple[str, Path]:
        """A version and where it is; the newest where none is named.

        Raises:
            ArtifactError: It is not there.
        """
        found = self.found()
        if version is None:
            return list(found.items())[-1]
        if version not in found:
            raise ArtifactError(f"{self.path} holds no version {version}", expected=", ".join(found))
        return version, found[version]


def versions_in(path: Path) -> tuple[str, ...]:
    """Versions below a directory, oldest first; what has no manifest yet is still being copied."""
    try:
        found = [p.name for p in path.iterdir() if VERSION.fullmatch(p.name) and is_artifact(p)]
    except OSError:
        return ()
    return tuple(sorted(found, key=int))


@dataclass(frozen=True, slots=True)
class Loaded:
    """One version of a model, checked and ready to be opened.

    Attributes:
        name: What clients call it.
        version: A whole number.
        path: The artifact's directory or the model's file.
        digest: sha256 of the artifact's manifest, which holds those of all other files, or `digest_of` a bare file.
        signature: The artifact's; None of a bare file, which only a worker parses.
        settings: How it is opened.
        max_batch: Most rows that are joined, if its signature allows that.
        lanes: Requests that one process runs side by side.
    """

    name: str
    version: str
    path: Path
    digest: str
    signature: Signature | None
    settings: RuntimeSettings
    max_batch: int
    lanes: int

    @property
    def platform(self) -> str:
        """The runtime, by the name that clients of the protocol know."""
        runtime = parse_device(self.settings.device).runtime
        return PLATFORMS.get(runtime, runtime)

    def job(self) -> dict[str, Any]:
        """What a worker is told."""
        return {"path": str(self.path), "digest": self.digest, "settings": self.settings.as_dict()}


def load(source: Source, options: Options, version: str | None = None) -> Loaded:
    """Check a version of a model: every file against its sha256, and the settings.

    Args:
        source: The model.
        options: How it is served.
        version: Which; None for the newest.

    Raises:
        DeploykitError: It cannot be served.
    """
    version, path = source.at_version(version)
    if path.is_dir():
        artifact = Artifact.open(path)
        own = _own_settings(artifact, options.device)
        digest, signature, suffix = artifact.digest, artifact.signature, artifact.model_path.suffix
    else:
        own, signature, suffix = None, None, path.suffix
        try:
            digest = digest_of(path)
        except OSError as exc:
            raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    settings = _settings(own, options, _DEVICES.get(suffix, "ort:cpu"))
    lanes = max(1, -(-settings.concurrency // settings.sessions))
    return Loaded(source.name, version, path, digest, signature, settings, options.max_batch or settings.batch, lanes)


def bare_files(path: Path) -> list[Path]:
    """A bare model file, and what holds its weights by custom, if that is there."""
    names = [f"{path.stem}.bin"] if path.suffix == ".xml" else [f"{path.name}.data", f"{path.name}_data"]
    return [path, *(file for name in names if (file := path.with_name(name)).is_file())]


def digest_of(path: Path) -> str:
    """sha256 of a bare model file, and of the file beside it that holds its weights by custom, if there is one.

    Raises:
        OSError: One cannot be read.
    """
    found = [sha256_of(file) for file in bare_files(path)]
    return found[0] if len(found) == 1 else sha256(" ".join(found).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class State:
    """What would be loaded now, without a look into its files.

    Attributes:
        version: A whole number.
        digest: As of `Loaded`.
        stamp: Changes when any of its files does, as while they are still being copied.
    """

    version: str
    digest: str
    stamp: tuple[tuple[str, int, int], ...]


def state_now(source: Source, version: str | None = None) -> State:
    """What would be loaded now.

    Args:
        source: The model.
        version: Which; None for the newest.

    Raises:
        DeploykitError: There is nothing.
    """
    version, path = source.at_version(version)
    try:
        digest = digest_of(path) if path.is_file() else manifest_digest(path)
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        stamp = tuple((str(p), (found := p.stat()).st_size, found.st_mtime_ns) for p in files)
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    return State(version, digest, stamp)


def _own_settings(artifact: Artifact, device: str | None) -> RuntimeSettings | None:
    """The settings that an artifact brings, where they are for the device."""
    if SETTINGS not in artifact.manifest.files:
        return None
    own = RuntimeSettings.load(artifact.path / SETTINGS)
    own.check_contained(str(artifact.path / SETTINGS))
    return own if device is None or parse_device(own.device) == parse_device(device) else None


def _settings(own: RuntimeSettings | None, options: Options, usual: str) -> RuntimeSettings:
    from dataclasses import replace

    found = own
    if options.tuned is not None:
        found = RuntimeSettings.load(options.tuned)
        if options.device is not None:
            found.check_device(parse_device(options.device))
    if found is None:
        found = RuntimeSettings(str(parse_device(options.device or usual)))
    instances = options.instances or found.sessions
    threads, kept = options.threads, dict(found.settings)
    if threads is not None:
        for key in _THREADS:  # by the runtime's own names they would win
            kept.pop(key, None)
    else:
        # Tuned threads were tuned for the tuned number of sessions.
        tuned = found.threads if instances == found.sessions else None
        threads = tuned or max(1, allowed_cores() // instances)
    concurrency = max(found.concurrency, 1) if instances == found.sessions else instances
    return replace(found, sessions=instances, threads=threads, concurrency=max(concurrency, instances), settings=kept)


def batch_symbol(signature: Signature) -> str | None:
    """The symbol that is the first dimension of every input and output, and no other dimension; None without one."""
    specs = list(signature)
    if not signature.inputs or any(not spec.shape for spec in specs):
        return None
    firsts = {spec.shape[0] for spec in specs if spec.shape}
    symbol = next(iter(firsts))
    if len(firsts) != 1 or not isinstance(symbol, str) or len(terms(symbol)) != 1:
        return None
    others = (t for spec in specs for dim in (spec.shape or ())[1:] for t in terms(dim))
    return None if symbol in others else symbol


def signature_of(found: Mapping[str, Any]) -> Signature:
    """What `signature_as_json` made."""
    inputs, outputs = (
        tuple(TensorSpec(n, d, None if s is None else tuple(s)) for n, d, s in found[side])
        for side in ("inputs", "outputs")
    )
    return Signature(inputs, outputs)


def signature_as_json(signature: Signature) -> dict[str, Any]:
    """A signature, to be sent."""
    return {
        side: [(s.name, s.dtype, None if s.shape is None else list(s.shape)) for s in specs]
        for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs))
    }
