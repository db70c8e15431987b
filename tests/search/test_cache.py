"""The cache: nothing is done twice, nothing half-written is found, and nothing in use is removed."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from deploykit.errors import ModelError, StorageError
from deploykit.progress import Progress
from deploykit.search.cache import Cache, CachedExecutor, copy_files, default_root
from deploykit.search.jobs import Done, Job

KEY = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "cache") as opened:
        yield opened


def keep(cache: Cache, key: str = KEY, data: bytes = b"12345", **given: Any) -> Done:
    with cache.begin(key) as writing:
        (writing.folder / "sub").mkdir()
        (writing.folder / "sub" / "f.bin").write_bytes(data)
        (writing.folder / "empty").mkdir()
        done = Done({"n": [1, 2.5, None]}, writing.folder, 1.5, ("a note",), {"cpu": "x"})
        kept = writing.commit(done, deed="m:f", label="export it", **given)
    assert kept is not None
    return kept


def leftovers(cache: Cache) -> list[Path]:
    return sorted((cache.root / "staging").iterdir())


def old(path: Path, seconds: float = 3600.0) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


# --- keeping and finding ---------------------------------------------------------------------------------------------


def test_what_was_kept_is_found(cache: Cache) -> None:
    assert cache.find(KEY) is None
    assert not cache.root.exists()  # a look makes nothing
    kept = keep(cache)
    assert not kept.cached
    assert leftovers(cache) == []
    with Cache(cache.root) as another:
        found = another.find(KEY)
        assert found is not None
        assert (found.value, found.seconds, found.notes, found.machine, found.cached) == (
            {"n": [1, 2.5, None]}, 1.5, ("a note",), {"cpu": "x"}, True,
        )  # fmt: skip
        assert found.folder == kept.folder
        assert (found.folder / "sub" / "f.bin").read_bytes() == b"12345"
        assert (found.folder / "empty").is_dir()
        assert another.find(OTHER) is None
    assert cache.notes == ()


def test_without_commit_and_on_errors_nothing_is_kept(cache: Cache) -> None:
    with cache.begin(KEY) as writing:
        (writing.folder / "f").write_bytes(b"1")
    with pytest.raises(ZeroDivisionError), cache.begin(KEY) as writing:
        raise ZeroDivisionError
    assert cache.find(KEY) is None
    assert leftovers(cache) == []


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DEPLOYKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == tmp_path / ".cache" / "deploykit"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_root() == Path("/xdg/deploykit")
    monkeypatch.setenv("DEPLOYKIT_CACHE", "/own")
    assert default_root() == Path("/own")
    assert Cache().root == Path("/own")


def drop(place: Path) -> None:
    (place / "files" / "sub" / "f.bin").unlink()


def change(place: Path) -> None:
    (place / "files" / "sub" / "f.bin").write_bytes(b"12346")


def add(place: Path) -> None:
    (place / "files" / "more").write_bytes(b"")


def link(place: Path) -> None:
    (place / "files" / "sub" / "f.bin").rename(place.parent.parent / "f.bin")
    (place / "files" / "sub" / "f.bin").symlink_to(place.parent.parent / "f.bin")


def drop_directory(place: Path) -> None:
    (place / "files" / "empty").rmdir()


def cut(place: Path) -> None:
    file = place / "entry.json"
    file.write_bytes(file.read_bytes()[:-20])


def edit(place: Path) -> None:
    file = place / "entry.json"
    file.write_text(file.read_text().replace("2.5", "2.6"))


def no_entry(place: Path) -> None:
    (place / "entry.json").unlink()


def no_json(place: Path) -> None:
    (place / "entry.json").write_bytes(b"\0" * 100)


def no_object(place: Path) -> None:
    (place / "entry.json").write_text("[]")


DAMAGES = [drop, change, add, link, drop_directory, cut, edit, no_entry, no_json, no_object]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_entry_counts_as_not_there_and_is_removed(cache: Cache, damage: Callable[[Path], None]) -> None:
    keep(cache)
    keep(cache, OTHER)
    place = cache.root / "entries" / KEY
    damage(place)
    assert cache.find(KEY) is None
    assert not place.exists()
    assert cache.find(OTHER) is not None
    keep(cache)
    assert cache.find(KEY) is not None
    assert cache.notes == ()


def test_a_damaged_entry_that_another_made_good_meanwhile_stays(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit.search import store

    keep(cache)
    change(cache.root / "entries" / KEY)
    read = store.read_entry

    def slow(place: Path) -> Done | None:
        found = read(place)
        if found is None:
            monkeypatch.setattr(store, "read_entry", read)
            with Cache(cache.root) as other:
                assert other.find(KEY) is None
                keep(other)
        return found

    monkeypatch.setattr(store, "read_entry", slow)
    assert cache.find(KEY) is None
    assert cache.find(KEY) is not None


def test_an_entry_that_was_renamed_is_not_another(cache: Cache) -> None:
    keep(cache)
    (cache.root / "entries" / KEY).rename(cache.root / "entries" / OTHER)
    assert cache.find(OTHER) is None


# --- several writers, killed ones ------------------------------------------------------------------------------------


def test_the_first_of_two_writers_wins_and_the_second_uses_its_result(tmp_path: Path) -> None:
    with Cache(tmp_path / "c") as one, Cache(tmp_path / "c") as two, two.begin(KEY) as late:
        (late.folder / "mine").write_bytes(b"2")
        keep(one)
        done = late.commit(Done({"n": 2}, late.folder, 2.0), deed="m:f")
        assert done is not None
        assert done.value == {"n": [1, 2.5, None]}
        assert done.folder == one.root / "entries" / KEY / "files"
        assert not (done.folder / "mine").exists()


def test_a_writer_replaces_a_damaged_entry_that_is_in_its_way(cache: Cache) -> None:
    with cache.begin(KEY) as writing:
        with Cache(cache.root) as other:
            keep(other)
        change(cache.root / "entries" / KEY)
        done = writing.commit(Done({"n": 2}, writing.folder, 2.0), deed="m:f")
    assert done is not None
    assert done.value == {"n": 2}
    assert cache.find(KEY) is not None


_WRITERS = """
import sys
from deploykit.search.cache import Cache
from deploykit.search.jobs import Done

key = "ab" * 32
with Cache(sys.argv[1]) as cache, cache.begin(key) as writing:
    for n in range(20):
        (writing.folder / f"{n}.bin").write_bytes(sys.argv[2].encode() * 1000)
    print("ready", flush=True)
    sys.stdin.readline()
    done = writing.commit(Done({"who": sys.argv[2]}, writing.folder, 1.0), deed="m:f")
    read = {p.read_bytes()[:1].decode() for p in done.folder.iterdir()}
    print(done.value["who"], *read, flush=True)
"""


def test_processes_that_write_the_same_at_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITERS, str(tmp_path / "c"), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in "abcd"
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len({tuple(words) for words in said}) == 1  # all of them go on with the same result
    assert said[0][0] == said[0][1] and len(said[0]) == 2
    with Cache(tmp_path / "c") as cache:
        assert cache.find(KEY) is not None
        assert leftovers(cache) == []


_VICTIM = """
import sys, time
from deploykit import staging
from deploykit.search import store
from deploykit.search.cache import Cache
from deploykit.search.jobs import Done

stop = sys.argv[2]
def at(moment):
    if moment == stop:
        print(moment, flush=True)
        time.sleep(60)

write, flush = store.write_entry, store.flush_tree
def writing_entry(*args, **named):
    at("files")
    write(*args, **named)
    at("entry")
def flushing(folder):
    flush(folder)
    at("flushed")
store.write_entry, store.flush_tree = writing_entry, flushing
with Cache(sys.argv[1]) as cache, cache.begin("ab" * 32) as writing:
    at("begun")
    (writing.folder / "f").write_bytes(b"x" * 1000)
    writing.commit(Done({"n": 1}, writing.folder, 1.0), deed="m:f")
    at("committed")
"""


@pytest.mark.parametrize("moment", ["begun", "files", "entry", "flushed", "committed"])
def test_a_killed_writer_leaves_nothing_or_the_whole(tmp_path: Path, moment: str) -> None:
    root = tmp_path / "c"
    child = subprocess.Popen([sys.executable, "-c", _VICTIM, str(root), moment], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == moment
        # While it lives, nobody takes what it is at.
        for path in (*(root / "staging").iterdir(), *(root / "uses").iterdir()):
            old(path)
        before = sorted(p for p in root.rglob("*") if p.is_file())
        with Cache(root) as cache:
            assert cache.prune(everything=True) == []
        assert sorted(p for p in root.rglob("*") if p.is_file()) == before
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    for path in (*(root / "staging").iterdir(), *(root / "uses").iterdir()):
        old(path)
    with Cache(root) as cache:
        assert (cache.find(KEY) is not None) == (moment == "committed")
        keep(cache, OTHER)  # which sweeps
        assert leftovers(cache) == []
        assert len(list((root / "uses").iterdir())) == 1
        assert {e.key for e in cache.entries()} == ({KEY, OTHER} if moment == "committed" else {OTHER})


# --- pruning ---------------------------------------------------------------------------------------------------------


def filled(root: Path) -> list[str]:
    """Four entries, the first of them used last, each an hour before the one before it."""
    keys = [c * 64 for c in "0123"]
    with Cache(root) as cache:
        for n, key in enumerate(keys):
            keep(cache, key, bytes(100_000))
            old(root / "entries" / key / "entry.json", 3600.0 * n)
    return keys


def test_entries(tmp_path: Path) -> None:
    keys = filled(tmp_path / "c")
    with Cache(tmp_path / "c") as cache:
        entries = cache.entries()
        assert [e.key for e in entries] == keys
        assert {(e.deed, e.label) for e in entries} == {("m:f", "export it")}
        assert all(100_000 < e.bytes < 105_000 and e.used <= e.created + 60 for e in entries)
        cache.find(keys[3])
        assert cache.entries()[0].key == keys[3]
    assert Cache(tmp_path / "nothing").entries() == []


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ({"max_bytes": 250_000}, 2),
        ({"max_bytes": 10**9}, 4),
        ({"max_bytes": 0}, 0),
        ({"older_than_s": 5400.0}, 2),
        ({"older_than_s": 5400.0, "max_bytes": 110_000}, 1),
        ({"everything": True}, 0),
        ({}, 4),
    ],
)
def test_prune(tmp_path: Path, how: dict[str, Any], left: int) -> None:
    keys = filled(tmp_path / "c")
    with Cache(tmp_path / "c") as cache:
        said = cache.prune(**how, dry_run=True)
        assert len(cache.entries()) == 4
        assert cache.prune(**how) == said
        assert [e.key for e in cache.entries()] == keys[:left]
        assert [e.key for e in said] == keys[left:][::-1]
        assert leftovers(cache) == []


def test_what_is_used_is_not_pruned(tmp_path: Path) -> None:
    keys = filled(tmp_path / "c")
    with Cache(tmp_path / "c") as cache:
        with Cache(tmp_path / "c") as user:
            assert user.find(keys[2]) is not None
            assert [e.key for e in cache.prune(everything=True)] == [keys[3], keys[1], keys[0]]
            assert user.find(keys[2]) is not None
        assert [e.key for e in cache.prune(everything=True)] == [keys[2]]


def test_prune_removes_what_cannot_be_read(tmp_path: Path) -> None:
    keys = filled(tmp_path / "c")
    with Cache(tmp_path / "c") as cache:
        cut(cache.root / "entries" / keys[1])
        assert len(cache.entries()) == 3
        assert cache.prune(max_bytes=10**9) == []
        assert len(list((cache.root / "entries").iterdir())) == 3


def test_a_cache_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    cache = Cache(tmp_path / "file")
    for verb in (cache.entries, cache.prune):
        with pytest.raises(StorageError, match="cannot read the cache"):
            verb()
    assert cache.find(KEY) is None


# --- before an executor ----------------------------------------------------------------------------------------------


class Threads:
    """Does jobs in threads of this process."""

    slots = 2

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self._pool = ThreadPoolExecutor(2)

    def submit(self, job: Job, folder: Path) -> Future[Done]:
        def work() -> Done:
            self.folders.append(folder)
            value = job.load()(job.params, job.inputs, folder, Progress())
            return Done(value, folder, 0.5, ("said",), {"cpu": "here"})

        return self._pool.submit(work)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


MADE: list[str] = []
GATE = threading.Event()


def copy(params: Any, inputs: Any, folder: Path, told: Progress) -> dict[str, Any]:
    MADE.append(params["name"])
    (folder / "out.bin").write_bytes(inputs["model"].read_bytes() * params.get("times", 1))
    return {"name": params["name"]}


def fail(params: Any, inputs: Any, folder: Path, told: Progress) -> dict[str, Any]:
    MADE.append("fail")
    (folder / "half").write_bytes(b"1")
    raise ModelError("it does not load")


def wait(params: Any, inputs: Any, folder: Path, told: Progress) -> dict[str, Any]:
    MADE.append("wait")
    assert GATE.wait(30)
    return {}


@pytest.fixture
def deeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Job]:
    """Jobs of this file's functions."""
    MADE.clear()
    GATE.clear()
    monkeypatch.setitem(sys.modules, "_deeds", sys.modules[__name__])
    (tmp_path / "model").write_bytes(b"weights")

    def job(deed: str = "copy", name: str = "a", exclusive: bool = False, **params: Any) -> Job:
        return Job(
            f"_deeds:{deed}", {"name": name, **params}, {"model": tmp_path / "model"}, f"{deed} {name}", exclusive
        )

    return job


def run(root: Path, jobs: list[Job], **given: Any) -> list[Done]:
    with CachedExecutor(Threads(), Cache(root), **given) as executor:
        assert executor.slots == 2
        return [executor.submit(j, folder(root, n)).result(30) for n, j in enumerate(jobs)]


def folder(root: Path, number: int) -> Path:
    made = root.parent / f"out-{time.monotonic_ns()}-{number}"
    made.mkdir()
    return made


def test_a_job_is_done_once(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    root = tmp_path / "c"
    first = run(root, [deeds(), deeds(name="b"), deeds()])
    assert [d.cached for d in first] == [False, False, True]
    assert MADE == ["a", "b"]
    (again,) = run(root, [deeds()])
    assert again.cached
    assert MADE == ["a", "b"]
    assert (again.value, again.notes, again.machine, again.seconds) == ({"name": "a"}, ("said",), {"cpu": "here"}, 0.5)
    assert again.folder == first[0].folder
    assert root in again.folder.parents
    assert (again.folder / "out.bin").read_bytes() == b"weights"
    assert [list(p.iterdir()) for p in tmp_path.glob("out-*")] == [[]] * 4
    assert {e.label for e in Cache(root).entries()} == {"copy a", "copy b"}
    (tmp_path / "model").write_bytes(b"Weights")
    assert run(root, [deeds()])[0].cached is False


def test_versions_of_tools_count(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    said = [run(tmp_path / "c", [deeds()], tools={"onnx": v})[0].cached for v in ("1", "2", "1")]
    assert said == [False, False, True]


def test_a_failure_is_not_kept(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match="does not load"):
            run(tmp_path / "c", [deeds("fail")])
    assert MADE == ["fail", "fail"]
    assert Cache(tmp_path / "c").entries() == []
    assert list((tmp_path / "c" / "staging").iterdir()) == []


def test_fresh_measures_again_and_keeps_that(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    root, timed = tmp_path / "c", deeds(name="timed", exclusive=True)
    run(root, [timed, deeds()])
    before = {e.label: e.created for e in Cache(root).entries()}
    found = run(root, [timed, timed, deeds()], fresh=True)
    assert [d.cached for d in found] == [False, True, True]  # once a run is enough
    assert MADE == ["timed", "a", "timed"]
    after = {e.label: e.created for e in Cache(root).entries()}
    assert after["copy timed"] > before["copy timed"]
    assert after["copy a"] == before["copy a"]
    assert run(root, [timed])[0].cached
    assert MADE == ["timed", "a", "timed"]


def test_fresh_leaves_alone_what_another_uses(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    root, timed = tmp_path / "c", deeds(exclusive=True)
    (first,) = run(root, [timed])
    with Cache(root) as user:
        assert user.find(first.folder.parent.name) is not None
        (again,) = run(root, [timed], fresh=True)
        assert not again.cached
        assert root not in again.folder.parents  # it went where it was asked for
        assert (again.folder / "out.bin").read_bytes() == b"weights"
        assert user.find(first.folder.parent.name) is not None


def test_the_machine_counts_for_what_is_timed(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    root, jobs = tmp_path / "c", [deeds(name="timed", exclusive=True), deeds()]
    run(root, jobs, machine={"cpu": "one"})
    assert [d.cached for d in run(root, jobs, machine={"cpu": "two"})] == [False, True]
    assert [d.cached for d in run(root, jobs, machine=lambda job: {"cpu": "one"})] == [True, True]


def test_a_job_that_runs_is_not_begun_a_second_time(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    with CachedExecutor(Threads(), Cache(tmp_path / "c")) as executor:
        one = executor.submit(deeds("wait"), folder(tmp_path / "c", 1))
        two = executor.submit(deeds("wait"), folder(tmp_path / "c", 2))
        assert one is two
        GATE.set()
        assert one.result(30).value == {}
    assert MADE == ["wait"]


def test_cancelling_reaches_the_job(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    root = tmp_path / "c"
    with CachedExecutor(Threads(), Cache(root)) as executor:
        running = [executor.submit(deeds("wait", str(n)), folder(root, n)) for n in range(3)]
        assert running[2].cancel()  # two run, this one waits
        GATE.set()
        assert [f.result(30).value for f in running[:2]] == [{}, {}]
    assert MADE == ["wait", "wait"]
    assert list((root / "staging").iterdir()) == []


def test_an_input_that_is_wrong_is_for_the_job_to_say(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no")
    job = Job("_deeds:fail", {}, {"model": tmp_path / "bad.onnx"})
    with pytest.raises(ModelError, match="does not load"):
        run(tmp_path / "c", [job])


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A cache with one entry that cannot be written; for root a file system does not care about the mode."""
    root = tmp_path / "locked" / "c"
    filled(root)
    if os.geteuid() == 0:
        # Root writes anywhere but below a file.
        (root / "uses").rmdir()
        (root / "uses").write_bytes(b"")
        yield root
        return
    paths = [p for p in (root, *root.rglob("*")) if p.is_dir()]
    for path in paths:
        path.chmod(0o500)
    yield root
    for path in paths:
        path.chmod(0o700)


def test_a_cache_that_cannot_be_written_fails_nothing(
    tmp_path: Path, unwritable: Path, deeds: Callable[..., Job]
) -> None:
    told = Progress()
    with CachedExecutor(Threads(), Cache(unwritable, progress=told)) as executor:
        done = [executor.submit(deeds(name=n), folder(tmp_path / "c", 0)).result(30) for n in ("a", "b", "a")]
    assert [d.cached for d in done] == [False] * 3
    assert all((d.folder / "out.bin").read_bytes() == b"weights" and d.folder.parent == tmp_path for d in done)
    assert MADE == ["a", "b", "a"]
    (note,) = told.notes
    assert note.startswith("results are not kept: the cache ")


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of at most 64 KiB, in place of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_cache_that_fills_up_while_an_entry_is_written(
    tmp_path: Path, deeds: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deploykit.search.store.write_entry", full)
    told = Progress()
    with CachedExecutor(Threads(), Cache(tmp_path / "c", progress=told)) as executor:
        done = [executor.submit(deeds(name=n), folder(tmp_path / "c", 0)).result(30) for n in ("a", "b")]
    assert MADE == ["a", "b"]  # not a second time: what it wrote is there
    assert all((d.folder / "out.bin").read_bytes() == b"weights" and d.folder.parent == tmp_path for d in done)
    assert len(told.notes) == 1 and "No space left" in told.notes[0]
    assert list((tmp_path / "c" / "staging").iterdir()) == []


def full_there(params: Any, inputs: Any, folder: Path, told: Progress) -> dict[str, Any]:
    """Fails wherever a path holds the word, as a deed does whose disk is full."""
    MADE.append(params["name"])
    if params["word"] in str(folder):
        raise StorageError("cannot write: No space left on device")
    return {"fine": True}


@pytest.mark.parametrize(("word", "fails"), [("staging", False), ("/", True)])
def test_a_cache_that_fills_up_while_the_job_writes(
    tmp_path: Path, deeds: Callable[..., Job], word: str, fails: bool
) -> None:
    told = Progress()
    with CachedExecutor(Threads(), Cache(tmp_path / "c", progress=told)) as executor:
        asked = executor.submit(deeds("full_there", word=word), folder(tmp_path / "c", 0))
        if fails:
            with pytest.raises(StorageError):
                asked.result(30)
        else:
            assert asked.result(30).value == {"fine": True}
    assert MADE == ["a", "a"]
    assert len(told.notes) == (0 if fails else 1)  # where it fails anywhere, the cache is not to blame


@pytest.mark.usefixtures("small_files")
def test_a_user_gets_a_copy(tmp_path: Path, deeds: Callable[..., Job]) -> None:
    (done,) = run(tmp_path / "c", [deeds()])
    mine = copy_files(done, tmp_path / "mine")
    (mine.folder / "out.bin").write_bytes(b"changed")
    assert (mine.folder / "out.bin").stat().st_ino != (done.folder / "out.bin").stat().st_ino
    assert run(tmp_path / "c", [deeds()])[0].cached
    (tmp_path / "large").write_bytes(b"1")
    big = Done({}, tmp_path / "big", 0.0)
    big.folder.mkdir()
    with (big.folder / "f").open("wb") as stream:
        stream.write(bytes(60_000))
    with pytest.raises(StorageError, match="cannot copy"):
        copy_files(big, tmp_path / "large")


# --- the command -----------------------------------------------------------------------------------------------------


def in_a_process(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploykit", "cache", *args],
        capture_output=True, text=True, check=False, env={**os.environ, "DEPLOYKIT_CACHE": str(root)},
    )  # fmt: skip


@pytest.fixture
def deploykit(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`deploykit(root, ...)`: the command in this process."""

    def run(root: Path, *args: str) -> Any:
        monkeypatch.setenv("DEPLOYKIT_CACHE", str(root))
        return cli("cache", *args)

    return run


def test_the_command(tmp_path: Path, deploykit: Any) -> None:
    root = tmp_path / "c"
    keys = filled(root)
    assert in_a_process(root, "dir").stdout.strip() == str(root)
    listed = in_a_process(root)
    assert listed.stdout.count("export it") == deploykit(root, "list").stdout.count("export it") == 4
    assert listed.stdout.splitlines()[0].split() == ["what", "size", "age", "last", "used"]
    assert "4 results in" in listed.stdout
    assert [e["key"] for e in json.loads(deploykit(root, "list", "--json").stdout)["entries"]] == keys
    dry = deploykit(root, "prune", "--older-than", "1.5h", "--dry-run")
    assert "2 results would be removed" in dry.stdout
    assert len(Cache(root).entries()) == 4
    assert "2 results removed" in deploykit(root, "prune", "--older-than", "1.5h").stdout
    removed = json.loads(deploykit(root, "prune", "--max-size", "150kB", "--json").stdout)
    assert [e["key"] for e in removed["removed"]] == [keys[1]]
    assert "1 result removed" in deploykit(root, "prune", "--all").stdout
    assert deploykit(root).stdout.startswith("0 results in")


@pytest.mark.parametrize(
    "args",
    [["prune"], ["prune", "--max-size", "much"], ["prune", "--older-than", "-3d"], ["nosuch"], ["--json", "dir"]],
)
def test_wrong_usage(tmp_path: Path, deploykit: Any, args: list[str]) -> None:
    done = deploykit(tmp_path / "c", *args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "c").exists()


def test_a_file_in_the_place_of_the_cache_is_one_line(tmp_path: Path, deploykit: Any) -> None:
    (tmp_path / "file").write_bytes(b"")
    done = deploykit(tmp_path / "file")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read the cache") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("1.5 GiB", 1610612736), ("7", 7), ("3kb", 3000)])
def test_sizes(text: str, size: int) -> None:
    from deploykit.cli.common import size_bytes

    assert size_bytes(text) == size
