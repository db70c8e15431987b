"""Zip archives from elsewhere: their members are looked at before anything is unpacked.

Regular files with plain names, each once; no links (CVE-2024-5187, CVE-2025-4517 were archives that wrote elsewhere);
and no more than a file of its size can hold where nothing was made to explode.
"""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path, PurePosixPath

# An archive may grow to this whatever its ratio is, and above it to so many times its size.
FREE_BYTES = 256 * 2**20
RATIO = 200
MEMBERS = 100_000


def unsafe_archive(path: Path, *, unpacked: bool = True) -> str:
    """What is wrong with the members of a zip archive, as a sentence about it; empty where nothing is.

    Args:
        path: The archive.
        unpacked: Whether members may become files of their names. In archives of arrays, names are any text.

    Raises:
        zipfile.BadZipFile: It is none, or is damaged.
        OSError: It cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) > MEMBERS:
        return f"holds {len(members)} members, more than {MEMBERS}"
    seen: set[str] = set()
    for member in members:
        if why := _unsafe(member, unpacked):
            return f"holds {member.filename!r:.200}, which {why}"
        if member.filename in seen:
            return f"holds two members of the name {member.filename!r:.200}"
        seen.add(member.filename)
    size, total = path.stat().st_size, sum(member.file_size for member in members)
    if total > max(FREE_BYTES, RATIO * size):
        return f"would grow from {size} to {total} bytes"
    return ""


def _unsafe(member: zipfile.ZipInfo, unpacked: bool) -> str:
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    parts = PurePosixPath(name).parts
    if unpacked and (
        not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in parts[0]
    ):
        return "leaves the archive's folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    return "is encrypted" if member.flag_bits & 1 else ""
