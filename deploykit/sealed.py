"""Files that must not change between the check and the use: hashed through one descriptor, and stamped.

A runtime opens a file by its path, after it was checked. Its stamp (device, inode, size, times of change) tells
afterwards whether what was opened is what was checked; only root can set the time of the last change back.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from deploykit.errors import ArtifactError

Stamp = tuple[int, int, int, int, int]


def hash_regular(path: Path) -> tuple[str, Stamp]:
    """Hex sha256 of a regular file, and the stamp of the very file that was read; links are not followed.

    Raises:
        ArtifactError: It is no regular file, or changed while it was read.
        OSError: It cannot be read.
    """
    # A pipe that was put in its place must not block.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb") as stream:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ArtifactError(f"{path} is a link or a special file", expected="regular files only")
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if _stamp(before) != _stamp(os.fstat(descriptor)):
            raise _changed(path)
    return digest, _stamp(before)


class Seal:
    """Stamps of files that were checked.

    Args:
        stamps: By path.
    """

    def __init__(self, stamps: Mapping[Path, Stamp] | None = None) -> None:
        self._stamps = dict(stamps or {})

    def add(self, paths: Iterable[Path]) -> None:
        """Stamp files as they are now, before they are checked.

        Raises:
            OSError: One is not there.
        """
        for path in paths:
            self._stamps.setdefault(path, _stamp(path.stat()))

    def check(self) -> None:
        """Compare the stamps with the files as they are now.

        Raises:
            ArtifactError: A file is another one, or was written to.
        """
        for path, stamp in self._stamps.items():
            try:
                now = _stamp(path.stat())
            except OSError as exc:
                raise _changed(path) from exc
            if now != stamp:
                raise _changed(path)


def _stamp(info: os.stat_result) -> Stamp:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _changed(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} changed while it was being opened", hint="let nothing write to it, and try again")
