"""Writing: an output appears whole or not at all, and never replaces what is there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from deploykit.artifact import MANIFEST, Artifact, Evidence, FileEntry, Manifest, StepRecord, TensorEntry, sha256_of
from deploykit.data import ValueRange
from deploykit.errors import OutputExistsError, StorageError, storage_error
from deploykit.specs import Signature, TensorSpec

# A writer takes its lock a moment after it made the directory; nobody may sweep it in between.
_LOCK_GRACE_S = 2.0
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


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
            sweep(self.output.parent, self._prefix())
            # Its name is known before it is there: an interrupt in between leaves nothing that nobody removes.
            self.dir = self.output.parent / f"{self._prefix()}{secrets.token_hex(8)}"
            self.dir.mkdir(mode=0o700)
            self._lock = take_lock(self.dir)
        except OSError as exc:
            self._discard()
            raise _place_error(exc, self.output) from exc
        except BaseException:
            self._discard()
            raise
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
        flush_tree(self.dir)
        self._publish()
        return Artifact(self.output, manifest, hashlib.sha256(raw).hexdigest())

    def commit_parts(self, parts: Mapping[str, Artifact]) -> dict[str, Artifact]:
        """Rename a staging directory that holds whole artifacts, and nothing else, to its place.

        Args:
            parts: Artifacts that other writers committed into `dir`, by the name of their directory.

        Returns:
            The same artifacts at the place where they stand now.

        Raises:
            OutputExistsError: Somebody put something there in the meantime.
        """
        _fsync(self.dir)
        self._publish()
        return {name: Artifact(self.output / name, part.manifest, part.digest) for name, part in parts.items()}

    def publish(self) -> None:
        """Flush what was written below `dir`, and rename it to its place without a manifest.

        Raises:
            OutputExistsError: Somebody put something there in the meantime.
        """
        flush_tree(self.dir)
        self._publish()

    def _publish(self) -> None:
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

    def _discard(self) -> None:
        if self.dir != Path():
            shutil.rmtree(self.dir, ignore_errors=True)
            self.dir = Path()
        if self._lock is not None:
            free_lock(self._lock)
            self._lock = None
        for folder in reversed(self._made_parents):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made_parents.clear()


@contextlib.contextmanager
def staged(output: str | Path) -> Iterator[Path]:
    """A directory that is filled, flushed and renamed to its place; on every error nothing is left.

    Args:
        output: Where it will stand; nothing may be there.

    Raises:
        OutputExistsError: Something is there.
        StorageError: The place cannot be written.
    """
    with ArtifactWriter(output) as writer:
        yield writer.dir
        writer.publish()


@contextlib.contextmanager
def staged_file(output: str | Path) -> Iterator[Path]:
    """As `staged`, a file: written, flushed and named; on every error, and where the process is killed, there is none.

    Raises:
        OutputExistsError: As there, and so is the next.
        StorageError: See there.
    """
    with ArtifactWriter(output) as writer:
        made = writer.dir / writer.output.name
        yield made
        made.chmod(0o666 & ~_umask())
        _fsync(made)
        try:
            _place(made, writer.output)
        except FileExistsError as exc:
            raise _taken(writer.output) from exc
        _fsync(writer.output.parent)


def check_free(output: Path, option: str = "-o") -> None:
    """Refuse an output path that is taken.

    Raises:
        OutputExistsError: Something is there, be it an empty directory or a dangling link.
    """
    if os.path.lexists(output):
        raise _taken(output, option)


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


def _taken(output: Path, option: str = "-o") -> OutputExistsError:
    return OutputExistsError(
        f"{output} exists and is left as it is", hint=f"choose another {option}, or remove it first"
    )


def _entry(spec: TensorSpec, limits: ValueRange | None) -> TensorEntry:
    return TensorEntry(
        name=spec.name,
        dtype=spec.dtype,
        shape=spec.shape,
        range=(limits.low, limits.high) if limits else None,
    )


def _escape(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)


def take_lock(folder: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """A lock on a directory, released by the kernel when its process ends.

    Args:
        folder: What is locked.
        shared: Whether others may hold it too, if they also ask for a shared one.
        wait: Whether to wait for those who hold it.

    Returns:
        For `free_lock`; None where the lock is taken or cannot be had.
    """
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    except BaseException:  # interrupted while it waited
        os.close(handle)
        raise
    return handle


def free_lock(handle: int) -> None:
    """Give a lock back, also where a forked child has inherited it."""
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the directories below ``parent`` whose owner is gone: nobody holds the lock on them."""
    for stale in parent.glob(f"{_escape(prefix)}*"):
        with contextlib.suppress(FileNotFoundError):  # another one swept it
            if time.time() - stale.lstat().st_mtime < _LOCK_GRACE_S:
                continue
        lock = take_lock(stale)
        if lock is not None:
            shutil.rmtree(stale, ignore_errors=True)
            free_lock(lock)


def flush_tree(folder: Path) -> None:
    """Have the disk take over everything below a directory that holds no links."""
    below = sorted(folder.rglob("*"))
    for path in (*(p for p in below if p.is_file()), *(p for p in below if p.is_dir()), folder):
        _fsync(path)


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


def write_file(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a single file (a report) atomically; refuses to overwrite.

    Args:
        path: Where.
        data: What.
        replace: Whether a file that is there gives way; for those that are our own.

    Raises:
        OutputExistsError: Something is there.
        StorageError: The file system refused.
    """
    if not replace:
        check_free(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        if replace:
            Path(temporary).replace(path)
        else:
            _place(Path(temporary), path)
    except FileExistsError as exc:
        raise _taken(path) from exc
    except OSError as exc:
        raise _place_error(exc, path) from exc
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _place(temporary: Path, path: Path) -> None:
    """Give a finished file its name; unlike rename, refuses to replace.

    Raises:
        FileExistsError: Something is there.
    """
    try:
        os.link(temporary, path)
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        # FAT, some network and FUSE file systems have no hard links: the name is taken first, then filled.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        temporary.replace(path)
