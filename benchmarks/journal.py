"""What an interrupted measurement leaves, so that it can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deploykit
from deploykit.benchmarks.environment import environment
from deploykit.benchmarks.plan import Entry, Settings
from deploykit.errors import BenchmarkError, first_line
from deploykit.machine import inspect_machine
from deploykit.specs import Feeds
from deploykit.staging import write_file

_SCHEMA = 1
_KEPT = ("probe", "status", "parity", "rounds", "again")


class Journal:
    """A file beside the report, written after every round and gone when the report is whole.

    Args:
        path: Of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @staticmethod
    def beside(report: Path) -> Path:
        """Where the journal of a report lies."""
        return report.with_name(report.name + ".partial")

    def resume(self, entries: Sequence[Entry], key: dict[str, Any]) -> dict[str, Any] | None:
        """Give entries back what was measured of them.

        Args:
            entries: Fresh ones.
            key: See `key_of`.

        Returns:
            "elapsed_s" and "notes" of the run so far; None where there is no journal.

        Raises:
            BenchmarkError: It is damaged, or of another measurement.
        """
        if self._path is None or not self._path.exists():
            return None
        again = f"remove {self._path} to begin anew"
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            different = [name for name, value in key.items() if kept["key"][name] != value]
            about = {"elapsed_s": float(kept["elapsed_s"]), "notes": [str(note) for note in kept["notes"]]}
            states = [{name: state[name] for name in _KEPT} for state in kept["entries"]]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise BenchmarkError(f"cannot read {self._path} ({first_line(exc)})", hint=again) from exc
        if different or len(states) != len(entries):
            what = " and ".join(different) or "candidates"
            raise BenchmarkError(
                f"{self._path} is of another measurement: other {what}",
                expected="the same models, devices, inputs, settings and machine",
                hint=f"repeat the command as it was, or {again}",
            )
        for entry, state in zip(entries, states, strict=True):
            for name, value in state.items():
                setattr(entry, name, value)
        return about

    def write(self, entries: Sequence[Entry], key: dict[str, Any], *, elapsed_s: float, notes: Sequence[str]) -> None:
        """Keep what was measured so far.

        Raises:
            StorageError: It cannot be written.
        """
        if self._path is not None:
            states = [{name: getattr(entry, name) for name in _KEPT} for entry in entries]
            text = json.dumps(
                {"schema": _SCHEMA, "key": key, "elapsed_s": elapsed_s, "notes": list(notes), "entries": states}
            )
            write_file(self._path, text.encode(), replace=True)


def key_of(
    entries: Sequence[Entry], feeds: Sequence[Feeds], settings: Settings, labelled: str | None
) -> dict[str, Any]:
    """What has to be the same for two measurements to be one: JSON-ready."""
    digest = hashlib.sha256()
    for case in feeds:
        for name in sorted(case):
            array = case[name]
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes() if array.dtype.kind != "O" else repr(array.tolist()).encode())
    machine = inspect_machine()
    sizes = [entry.candidate.size_bytes for entry in entries]
    return {
        "schema": _SCHEMA,
        "candidates": [entry.candidate.identity | {"bytes": n} for entry, n in zip(entries, sizes, strict=True)],
        "versions": environment()["packages"] | {"deploykit": deploykit.__version__},
        "labels": labelled,
        "settings": settings.as_dict(),
        "inputs": digest.hexdigest(),
        "machine": [machine.cpu, machine.cores_allowed],
    }
