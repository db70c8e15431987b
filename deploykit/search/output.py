"""The output of a search: at every moment a directory whose winner is a whole artifact.

    best/
    ├── optimize.json     what was asked, tried and found; "winner" names the artifact that the directory stands for
    ├── front/NAME/       artifacts of the Pareto front, each with the settings to open it with
    ├── benchmark.json    the measurement that decided
    ├── recipe.toml       the winner's steps, without the search
    ├── source/           the export of a live module, which the recipe begins with
    └── report.html       all of that for a person

While the search goes on, the best so far is below `interim/`. `optimize.json` is replaced atomically, after what it
names is there and before what it no longer names is removed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, Evidence, StepRecord
from deploykit.benchmarks.report import finite
from deploykit.errors import OutputExistsError, SearchError, StorageError, storage_error
from deploykit.runtimes.settings import RuntimeSettings
from deploykit.staging import ArtifactWriter, check_free, take_lock, write_file

DOCUMENT, REPORT, PAGE, RECIPE, SETTINGS = (
    "optimize.json",
    "benchmark.json",
    "report.html",
    "recipe.toml",
    "settings.json",
)
FRONT, INTERIM, WORK, SOURCE = "front", "interim", ".work", "source"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Sealed:
    """An artifact as the search hands it over.

    Attributes:
        name: Of its directory.
        made: The artifact of a step.
        settings: How to open it.
        record: What the search adds to its lineage.
        evidence: What the search measured.
    """

    name: str
    made: Artifact
    settings: RuntimeSettings
    record: StepRecord
    evidence: Mapping[str, list[dict[str, Any]]]


class Output:
    """The directory. Use as a context manager: it is locked meanwhile, and scratch files are removed at the end.

    Args:
        path: Where.
        wish: What is searched for, JSON-ready.
        resume: Go on in a directory that an interrupted search for the same left.

    Attributes:
        run: Names this search; the same when it goes on.
        resumed: Whether it goes on.
    """

    def __init__(self, path: str | Path, wish: Mapping[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        self._wish = json.loads(json.dumps(wish))
        self._resume = resume
        self._lock: int | None = None
        self._interims = 0
        self._published = False
        self._winner: str | None = None
        self.run = secrets.token_hex(8)
        self.resumed = False

    def __enter__(self) -> Output:
        """Create the directory, or go on in it.

        Raises:
            OutputExistsError: It is there, and is not what an interrupted search for the same left.
            StorageError: It cannot be written.
            SearchError: Another process searches there.
        """
        if self._resume and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()  # killed in the very first moment
        going_on = self._resume and self.path.exists()
        if not going_on:
            self._create()
        self._lock = take_lock(self.path)
        try:
            if self._lock is None and self.path.is_dir():
                raise SearchError(f"another search works in {self.path}", hint="wait for it, or choose another -o")
            if going_on:  # looked at under the lock: another search may just have come to its end
                self._go_on()
                for half in self.path.glob(".*.tmp-*"):  # of a file that a kill came before the end of
                    if half.is_file():
                        half.unlink(missing_ok=True)
            shutil.rmtree(self.path / WORK, ignore_errors=True)
            (self.path / WORK).mkdir()
        except BaseException:
            self._free()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove scratch files; and the directory, where nothing was published."""
        shutil.rmtree(self.path / WORK, ignore_errors=True)
        if not self._published and not self.resumed:
            shutil.rmtree(self.path, ignore_errors=True)
        self._free()

    def abandon(self) -> None:
        """Nothing may be kept of it, not even the best so far: it is not what was asked for."""
        self._published = self.resumed = False

    def _free(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _create(self) -> None:
        try:
            check_free(self.path)
        except OutputExistsError as exc:
            hint = "add --resume to go on with it" if (self.path / DOCUMENT).is_file() else exc.hint
            raise OutputExistsError(exc.what, hint=hint) from exc
        try:
            self.path.mkdir(parents=True)
            self.write({"state": "running", "winner": None})
        except OSError as exc:
            told = storage_error(exc, self.path) or StorageError(
                f"cannot write {self.path}: {exc.strerror or exc}", hint="choose an -o that you may write to"
            )
            raise told from exc

    def _go_on(self) -> None:
        try:
            found = json.loads((self.path / DOCUMENT).read_text(encoding="utf-8"))
            same, state, run = _same(found["wish"], self._wish), found["state"], str(found["run"])
            self._winner = found.get("winner")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
            raise OutputExistsError(
                f"{self.path} was not left by a search", hint="choose another -o, or leave --resume out"
            ) from exc
        if not same:
            raise OutputExistsError(
                f"{self.path} was left by a search for something else",
                hint="give the same options (only the budget may be another), or choose another -o",
            )
        if state == "done":
            raise OutputExistsError(
                f"{self.path} holds a finished search",
                hint="choose another -o: what was done here comes from the cache, unless --no-cache was given",
            )
        self.run, self.resumed = run, True
        self._interims = 1 + max(
            (int(p.name.partition("-")[0]) for p in (self.path / INTERIM).glob("[0-9]*-*")), default=0
        )

    def source(self) -> Path:
        """Where the export of a live module may stand, beyond the search; nothing is there."""
        shutil.rmtree(self.path / SOURCE, ignore_errors=True)  # of a run that is gone on with
        return self.path / SOURCE

    def scratch(self) -> Path:
        """A new directory for files of a job."""
        folder = self.path / WORK / secrets.token_hex(6)
        folder.mkdir()
        return folder

    def write(self, document: Mapping[str, Any]) -> None:
        """Replace `optimize.json`."""
        whole = self.whole(document)
        text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
        write_file(self.path / DOCUMENT, text.encode(), replace=True)
        self._winner = whole["winner"]

    def whole(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """A document with what the output adds to it, as it can be written."""
        found = {"schema_version": SCHEMA_VERSION, "run": self.run, "wish": self._wish, "winner": None, **document}
        return dict(finite(found))

    def publish_interim(self, best: Sealed, document: Mapping[str, Any]) -> None:
        """Make an artifact the best so far."""
        place = f"{INTERIM}/{self._interims}-{best.name}"
        self._interims += 1
        seal(best, self.path / place)
        self.write({**document, "state": "running", "winner": place})
        self._published = True
        for other in (self.path / INTERIM).iterdir():
            if other.name != Path(place).name:
                shutil.rmtree(other, ignore_errors=True)

    def publish(
        self, front: Sequence[Sealed], winner: str, document: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> None:
        """Write the result.

        Args:
            front: Artifacts to keep, the winner among them.
            winner: Its name.
            document: For `optimize.json`.
            files: What else, by name; the document comes after them.
        """
        if str(self._winner).startswith(FRONT):  # of an interrupted search that goes on
            self.publish_interim(next(s for s in front if s.name == winner), document)
        shutil.rmtree(self.path / FRONT, ignore_errors=True)  # of a run that was killed while it wrote this
        for sealed in front:
            seal(sealed, self.path / FRONT / sealed.name)
        for name in {RECIPE, REPORT, PAGE} - files.keys():
            (self.path / name).unlink(missing_ok=True)  # what an interrupted search had, and this one has not
        for name, data in files.items():
            write_file(self.path / name, data, replace=True)
        self.write({**document, "winner": f"{FRONT}/{winner}"})
        self._published = True
        shutil.rmtree(self.path / INTERIM, ignore_errors=True)


def seal(sealed: Sealed, target: Path) -> Artifact:
    """Write an artifact anew, with its settings and with what the search found out about it."""
    made = sealed.made
    with ArtifactWriter(target) as writer:
        for name in made.manifest.files:
            if name == SETTINGS:  # of an earlier search
                continue
            (writer.dir / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made.path / name, writer.dir / name)
        text = json.dumps(sealed.settings.as_dict(), indent=1) + "\n"
        (writer.dir / SETTINGS).write_text(text, encoding="utf-8")
        known = made.manifest.evidence
        evidence = Evidence(
            parity=known.parity,
            accuracy=[*known.accuracy, *sealed.evidence.get("accuracy", [])],
            placement=[*known.placement, *sealed.evidence.get("placement", [])],
            benchmark=[*known.benchmark, *sealed.evidence.get("benchmark", [])],
        )
        return writer.commit(
            model=made.manifest.model, signature=made.signature,
            lineage=[*made.manifest.lineage, sealed.record], evidence=evidence, ranges=made.ranges,
        )  # fmt: skip


def _same(left: Mapping[str, Any], wish: Mapping[str, Any]) -> bool:
    """Whether two searches look for the same, however long."""
    return {**left, "budget_s": None} == {**wish, "budget_s": None}
