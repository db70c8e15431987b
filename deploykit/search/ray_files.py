"""Files on their way through a Ray cluster: by content, so that none travels twice, and without copies in memory.

A file is an array over its bytes, mapped into memory: Ray copies it once, into the shared memory of a node, and the
other side writes it from there to its disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import sha256_of
from deploykit.specs import Array

# What stays in the cluster's memory although no job that is under way needs it.
_KEPT_BYTES = 2 << 30
# A run that was killed leaves its files on the nodes.
_STALE_S = 7 * 24 * 3600.0
_PREFIX = "deploykit-ray-"


class Store:
    """Puts each file into the cluster once.

    Args:
        put: `ray.put`.
    """

    def __init__(self, put: Callable[[Array], Any]) -> None:
        self._put = put
        self._lock = threading.Lock()
        self._digests: dict[tuple[str, int, int, int], str] = {}
        self._refs: OrderedDict[str, tuple[int, Any]] = OrderedDict()
        self._used: Counter[str] = Counter()

    def pack(self, inputs: Mapping[str, Path]) -> dict[str, Any]:
        """Inputs as `unpack` takes them; they stay in the cluster until `release`."""
        packed = {}
        for name, path in inputs.items():
            root = path if path.is_dir() else path.parent
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            packed[name] = {
                "name": path.name, "tree": path.is_dir(),
                "files": {p.relative_to(root).as_posix(): self._hold(p) for p in files},
                "folders": [p.relative_to(root).as_posix() for p in sorted(path.rglob("*")) if p.is_dir()],
            }  # fmt: skip
        return packed

    def _hold(self, path: Path) -> tuple[str, Any]:
        stat = path.stat()
        stamp = str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns
        with self._lock:
            digest = self._digests.get(stamp)
            if digest is None:
                digest = self._digests[stamp] = sha256_of(path)
            if digest not in self._refs:
                self._refs[digest] = stat.st_size, self._put(read_bytes(path))
            self._refs.move_to_end(digest)
            self._used[digest] += 1
            return digest, self._refs[digest][1]

    def release(self, packed: Mapping[str, Any]) -> None:
        """The job is over: its files may go where others need the memory."""
        with self._lock:
            for one in packed.values():
                self._used.subtract(digest for digest, _ in one["files"].values())
            kept = sum(size for size, _ in self._refs.values())
            for digest in list(self._refs):
                if kept <= _KEPT_BYTES:
                    return
                if self._used[digest] <= 0:
                    kept -= self._refs.pop(digest)[0]


def read_bytes(path: Path) -> Array:
    """A file as uint8 [bytes], mapped into memory."""
    if not path.stat().st_size:
        return np.zeros(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


def pack_folder(folder: Path) -> dict[str, Any]:
    """What a job wrote, as `unpack_folder` takes it."""
    found = sorted(folder.rglob("*"))
    return {
        "folders": [p.relative_to(folder).as_posix() for p in found if p.is_dir()],
        "files": {p.relative_to(folder).as_posix(): read_bytes(p) for p in found if p.is_file()},
    }


def unpack_folder(packed: Mapping[str, Any], folder: Path) -> None:
    """Write what another machine's job wrote."""
    for name in packed["folders"]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, data in packed["files"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.data)


class Cache:
    """The files of one run on a node, by content.

    Args:
        run: Name of the run.
    """

    def __init__(self, run: str) -> None:
        self.root = Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getuid()}-{run}"

    def unpack(self, packed: Mapping[str, Any], fetch: Callable[[Any], Array], place: Path) -> dict[str, Path]:
        """Have a job's inputs at hand.

        Args:
            packed: By `Store.pack`.
            fetch: `ray.get`; asked for what is not here yet.
            place: Where its inputs are to stand; they are links to the cache.

        Returns:
            The inputs by name.
        """
        found = {}
        for name, one in packed.items():
            root = place / name / one["name"] if one["tree"] else place / name
            root.mkdir(parents=True)
            for folder in one["folders"]:
                (root / folder).mkdir(parents=True, exist_ok=True)
            for file, (digest, ref) in one["files"].items():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                _link(self._have(digest, ref, fetch), root / file)
            found[name] = root if one["tree"] else root / one["name"]
        return found

    def job(self) -> Path:
        """A new folder for a job."""
        self.root.mkdir(mode=0o700, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="job-", dir=self.root))

    def _have(self, digest: str, ref: Any, fetch: Callable[[Any], Array]) -> Path:
        import fcntl

        files = self.root / "files"
        files.mkdir(exist_ok=True)
        path = files / digest
        if path.exists():
            return path
        # Jobs beside it may need the same large file: one of them writes it.
        with (files / f"{digest}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                part = files / f"{digest}.part"
                part.write_bytes(fetch(ref).data)
                part.chmod(0o444)
                part.replace(path)
        return path

    def clear(self) -> None:
        """Remove this run's files, and those of runs that ended long ago without doing it."""
        shutil.rmtree(self.root, ignore_errors=True)
        for other in _stale(self.root.parent.glob(f"{_PREFIX}{os.getuid()}-*")):
            shutil.rmtree(other, ignore_errors=True)


def _stale(folders: Iterable[Path]) -> list[Path]:
    found = []
    for folder in folders:
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_S:
                found.append(folder)
    return found


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
