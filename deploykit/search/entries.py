"""One entry of the cache on disk: `entry.json`, which vouches for itself and for every file, and the files."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploykit.artifact import sha256_of
from deploykit.errors import StorageError, first_line
from deploykit.search.jobs import Done

SCHEMA_VERSION = 1
ENTRY = "entry.json"
FILES = "files"


@dataclass(frozen=True, slots=True)
class Entry:
    """A result that is kept.

    Attributes:
        key: See `key_of`.
        deed: The job's function.
        label: For people.
        bytes: Of all its files.
        created: When it was made, in seconds since 1970.
        used: When it was last found, in seconds since 1970.
    """

    key: str
    deed: str
    label: str
    bytes: int
    created: float
    used: float


def write_entry(folder: Path, done: Done, *, key: str, deed: str, label: str) -> None:
    """Write `entry.json` beside the files that are there already."""
    files = folder / FILES
    raw = json.dumps(
        {
            "schema_version": SCHEMA_VERSION, "key": key, "deed": deed, "label": label, "created": time.time(),
            "value": done.value, "seconds": done.seconds, "notes": list(done.notes), "machine": dict(done.machine),
            "files": _hashes(files), "directories": _directories(files),
        }
    )  # fmt: skip
    (folder / ENTRY).write_text(json.dumps({"sha256": _sha256(raw), "entry": raw}), encoding="utf-8")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if not p.is_dir()}


def _directories(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_dir()]


def _load(place: Path) -> dict[str, Any] | None:
    """What `entry.json` says; None where it is not whole, or of another version."""
    try:
        outer = json.loads((place / ENTRY).read_bytes())
        if _sha256(outer["entry"]) != outer["sha256"]:
            return None
        found = json.loads(outer["entry"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    whole = isinstance(found, dict) and found.get("schema_version") == SCHEMA_VERSION and found["key"] == place.name
    return found if whole else None


def read_entry(place: Path) -> Done | None:
    """A result; None unless every file of it is as it was written."""
    found, folder = _load(place), place / FILES
    try:
        if found is None or any(p.is_symlink() for p in (folder, *folder.rglob("*"))):
            return None
        if _directories(folder) != found["directories"] or _hashes(folder) != found["files"]:
            return None
    except OSError:  # unreadable is as bad as changed
        return None
    return Done(found["value"], folder, found["seconds"], tuple(found["notes"]), found["machine"], cached=True)


def describe_entry(place: Path) -> Entry | None:
    """What is known of an entry without a look into its files; None where that cannot be read."""
    found = _load(place)
    if found is None:
        return None
    try:
        size = sum(p.lstat().st_size for p in place.rglob("*") if not p.is_dir())
        used = (place / ENTRY).stat().st_mtime
    except OSError:  # removed meanwhile
        return None
    return Entry(found["key"], found["deed"], found["label"], size, found["created"], used)


def copy_files(done: Done, target: Path) -> Done:
    """Copy what a job wrote to an empty or new directory: what lies in the cache is never given away itself.

    Returns:
        The result with its copy.

    Raises:
        StorageError: The file system refused.
    """
    try:
        shutil.copytree(done.folder, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
    except (OSError, shutil.Error) as exc:
        raise StorageError(f"cannot copy {done.folder} to {target} ({first_line(exc)})") from exc
    return replace(done, folder=target)
