"""Results of jobs by what they follow from: nothing is done twice, and a killed run loses the job in flight.

    root/
    ├── entries/<key>/entry.json    what came of the job, sha256 of every file, and of the entry itself
    │                 files/        what the job wrote
    ├── staging/                    entries in the making, and those on their way out
    └── uses/<name>/<key>           which living process uses which entries

An entry is written in `staging` and renamed when it is whole. Directories in `staging` and `uses` are locked by the
process that made them; the lock dies with it, so that the next one can tell what a killed one left.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from deploykit.errors import StorageError
from deploykit.progress import Progress
from deploykit.search.entries import ENTRY, FILES, Entry, describe_entry, read_entry, write_entry
from deploykit.search.jobs import Done
from deploykit.staging import flush_tree, free_lock, sweep, take_lock

_PREFIX = "of-"


def default_root() -> Path:
    """Where the cache is: $DEPLOYKIT_CACHE, else $XDG_CACHE_HOME/deploykit, else ~/.cache/deploykit."""
    if own := os.environ.get("DEPLOYKIT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return Path(shared or "~/.cache").expanduser() / "deploykit"


class Cache:
    """Results of jobs on disk.

    Where the directory cannot be used, nothing is found and nothing is kept, which is said once. What was found or made
    stays until `close`; `prune`, of this process or another, leaves it alone. May be used by several threads.

    Args:
        root: The directory; None for `default_root`. It is made when something is kept.
        progress: Told once where the directory cannot be used.
    """

    def __init__(self, root: str | Path | None = None, *, progress: Progress | None = None) -> None:
        self.root = Path(root).expanduser().absolute() if root is not None else default_root().absolute()
        self._told = progress or Progress()
        self._guard = threading.RLock()
        self._use: Path | None = None
        self._lock: int | None = None
        self._off = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what was used; the folders of results may be pruned from now on."""
        with self._guard:
            if self._use is not None:
                shutil.rmtree(self._use, ignore_errors=True)
            if self._lock is not None:
                free_lock(self._lock)
            self._use = self._lock = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user was told."""
        return tuple(self._told.notes)

    def give_up(self, exc: OSError | StorageError) -> None:
        """Do without the cache from now on, because its directory cannot be used."""
        with self._guard:
            if not self._off:
                self._off = True
                cause = exc if isinstance(exc, OSError) else exc.__cause__
                why = (isinstance(cause, OSError) and cause.strerror) or str(exc)
                self._told.note(f"results are not kept: the cache {self.root} cannot be used ({why})")

    # --- reading -----------------------------------------------------------------------------------------------------

    def find(self, key: str) -> Done | None:
        """A result that is there and whole; `folder` lies in the cache, and must not be written to.

        One with a missing, added or changed file is removed.
        """
        place = self.root / "entries" / key
        if self._off:
            return None
        try:
            if not place.is_dir() or not self._mark(key):
                return None
            done = read_entry(place)
            if done is None:
                self._remove([key], damaged=True)
                return None
            os.utime(place / ENTRY)
        except OSError as exc:
            self.give_up(exc)
            return None
        return done

    def entries(self) -> list[Entry]:
        """What is kept, last used first; their files are not looked into.

        Raises:
            StorageError: The directory cannot be read.
        """
        return self._scan()[0]

    def _scan(self) -> tuple[list[Entry], list[str]]:
        """The entries, last used first, and the keys of those that cannot be read."""
        try:
            places = sorted((self.root / "entries").iterdir())
        except FileNotFoundError:
            return [], []
        except OSError as exc:
            raise StorageError(f"cannot read the cache {self.root}: {exc.strerror or exc}") from exc
        found = [(place.name, describe_entry(place)) for place in places]
        entries = [entry for _, entry in found if entry is not None]
        return sorted(entries, key=lambda e: (-e.used, e.key)), [key for key, entry in found if entry is None]

    # --- writing -----------------------------------------------------------------------------------------------------

    def begin(self, key: str, *, replace: bool = False) -> Writing:
        """A context manager that gives an empty directory for what a job writes; see `Writing.commit`.

        Args:
            key: See `key_of`.
            replace: Whether an entry that is there gives way.
        """
        return Writing(self, key, replace=replace)

    def prune(
        self,
        max_bytes: int | None = None,
        older_than_s: float | None = None,
        everything: bool = False,
        *,
        dry_run: bool = False,
    ) -> list[Entry]:
        """Remove entries, least recently used first, but none that is being used; and what is damaged or was left.

        Args:
            max_bytes: Remove until the rest is not larger.
            older_than_s: Remove what was not used for so long.
            everything: Remove all.
            dry_run: Remove nothing.

        Returns:
            What was removed, or would be.

        Raises:
            StorageError: The directory cannot be read or written.
        """
        known, damaged = self._scan()
        total, now = sum(e.bytes for e in known), time.time()
        held = self._held()
        chosen = []
        for entry in reversed(known):
            old = older_than_s is not None and now - entry.used > older_than_s
            large = max_bytes is not None and total > max_bytes
            if (everything or old or large) and entry.key not in held:
                chosen.append(entry)
                total -= entry.bytes
        if dry_run or not self.root.is_dir():
            return chosen
        try:
            self._sweep()
            removed = self._remove([*(e.key for e in chosen), *damaged])
        except OSError as exc:
            raise StorageError(
                f"cannot prune the cache {self.root}: {exc.strerror or exc}", hint="remove it by hand, or its owner can"
            ) from exc
        return [e for e in chosen if e.key in removed]

    # --- who uses what -----------------------------------------------------------------------------------------------

    def _mark(self, key: str) -> bool:
        """Keep others from pruning an entry; False where there is none by now."""
        with self._guard:
            if self._use is None:
                for name in ("entries", "staging", "uses"):
                    (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
                self._sweep()
                use = self.root / "uses" / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
                use.mkdir(mode=0o700)
                self._use, self._lock = use, take_lock(use, wait=True)  # `_held` tries it too
                if self._lock is None:
                    raise OSError(0, "its file system has no locks")
            with self._gate(shared=True):
                (self._use / key).touch()
                return (self.root / "entries" / key).is_dir()

    def _held(self, *, by_others: bool = False) -> set[str]:
        """The keys that are used by living processes."""
        held: set[str] = set()
        for use in (self.root / "uses").glob(f"{_PREFIX}*"):
            if by_others and use == self._use:
                continue
            lock = take_lock(use)
            if lock is None:
                with contextlib.suppress(FileNotFoundError):
                    held |= {p.name for p in use.iterdir()}
            else:
                free_lock(lock)
        return held

    @contextlib.contextmanager
    def _gate(self, *, shared: bool) -> Iterator[None]:
        """Between the look at who uses an entry and its removal nobody may begin to use it."""
        lock = take_lock(self.root / "entries", shared=shared, wait=True)
        try:
            yield
        finally:
            if lock is not None:
                free_lock(lock)

    def _remove(self, keys: list[str], *, damaged: bool = False, own: bool = False) -> set[str]:
        """Remove entries that nobody uses, or whoever uses them where they are damaged; which it were."""
        removed: set[str] = set()
        bin_ = self.root / "staging" / f"{_PREFIX}removed-{secrets.token_hex(8)}"
        if not keys:
            return removed
        bin_.mkdir(mode=0o700, parents=True)
        lock = take_lock(bin_)
        try:
            with self._gate(shared=False):
                held = set() if damaged else self._held(by_others=own)
                for key in keys:
                    # Another may have removed the damaged one meanwhile, and put a good one there.
                    if key not in held and not (damaged and read_entry(self.root / "entries" / key)):
                        with contextlib.suppress(FileNotFoundError):  # another one was faster
                            (self.root / "entries" / key).rename(bin_ / key)
                            removed.add(key)
        finally:
            shutil.rmtree(bin_, ignore_errors=True)
            if lock is not None:
                free_lock(lock)
        return removed

    def _sweep(self) -> None:
        for name in ("staging", "uses"):
            sweep(self.root / name, _PREFIX)


class Writing:
    """An entry in the making: a context manager. Without `commit`, and on every error, nothing of it is left.

    Attributes:
        folder: An empty directory for what the job writes.
    """

    def __init__(self, cache: Cache, key: str, *, replace: bool) -> None:
        self._cache = cache
        self._key = key
        self._replace = replace
        self._dir = Path()
        self._lock: int | None = None
        self.folder = Path()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def open(self) -> None:
        """Make the directory.

        Raises:
            StorageError: The cache cannot be written.
        """
        if self._cache._off:
            raise StorageError(f"the cache {self._cache.root} cannot be used")
        try:
            self._cache._mark(self._key)
            self._dir = self._cache.root / "staging" / f"{_PREFIX}{self._key[:16]}-{secrets.token_hex(8)}"
            self._dir.mkdir(mode=0o700)
            self._lock = take_lock(self._dir)
            self.folder = self._dir / FILES
            self.folder.mkdir()
        except OSError as exc:
            self.close()
            raise StorageError(f"cannot write to the cache {self._cache.root}: {exc.strerror or exc}") from exc
        except BaseException:
            self.close()
            raise

    def commit(self, done: Done, *, deed: str, label: str = "") -> Done | None:
        """Flush what was written and give it its place.

        Where another process was faster with the same key, its result is the one that counts.

        Returns:
            The result as it lies in the cache; None where one that had to give way is being used by another process.

        Raises:
            StorageError: The file system refused; `folder` is as it was.
        """
        cache, place = self._cache, self._cache.root / "entries" / self._key
        try:
            write_entry(self._dir, done, key=self._key, deed=deed, label=label)
            flush_tree(self._dir)
            while not self._publish(place):
                if self._replace:
                    if not cache._remove([self._key], own=True) and place.exists():
                        return None
                    continue
                first = cache.find(self._key)
                if first is not None:
                    return first
                if place.exists():
                    raise StorageError(f"cannot write {place}", hint="deploykit cache prune --all")
        except OSError as exc:
            raise StorageError(f"cannot write to the cache {cache.root}: {exc.strerror or exc}") from exc
        return replace(done, folder=place / FILES)

    def _publish(self, place: Path) -> bool:
        """Whether it got its place, which may be taken."""
        try:
            self._dir.rename(place)
        except OSError:
            if place.exists():
                return False
            raise
        return True

    def close(self) -> None:
        """Remove what was not committed."""
        if self._dir != Path():
            shutil.rmtree(self._dir, ignore_errors=True)
            self._dir = Path()
        if self._lock is not None:
            free_lock(self._lock)
            self._lock = None
