"""Artifacts: round trip, tampering, and that a crash leaves nothing or everything."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.artifact import (
    Artifact,
    Evidence,
    StepRecord,
    is_artifact,
    manifest_schema,
    write_golden,
)
from deploykit.data import ValueRange
from deploykit.errors import (
    ArtifactError,
    DataError,
    DeploykitError,
    OutputExistsError,
    StorageError,
)
from deploykit.specs import Signature, TensorSpec
from deploykit.staging import ArtifactWriter, free_lock, take_lock, write_file

SIGNATURE = Signature(
    (TensorSpec("ids", "int64", ("batch", 8)), TensorSpec("mask", "bool", None)),
    (TensorSpec("logits", "float32", ("batch", "classes")),),
)
STEP = StepRecord(step="export", params={"opset": 18}, tools={"torch": "2"}, parent=None, seconds=1.5, notes=["a note"])


def make(output: Path, content: bytes = b"weights") -> Artifact:
    with ArtifactWriter(output) as writer:
        (writer.dir / "model.onnx").write_bytes(content)
        (writer.dir / "model.onnx.data").write_bytes(b"12345")
        (writer.dir / "export.log").write_bytes(b"talk")
        (writer.dir / "assets").mkdir()
        (writer.dir / "assets" / "model.txt").write_text("hello")
        write_golden(
            writer.dir / "golden.npz",
            [({"ids": np.arange(8).reshape(1, 8)}, {"logits": np.float32([[0.5, 2]])})],
        )
        return writer.commit(
            model="model.onnx",
            signature=SIGNATURE,
            lineage=[STEP],
            evidence=Evidence(parity=[{"verdict": "passed"}]),
            ranges={"ids": ValueRange(0, 99)},
        )


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return make(tmp_path / "out")


def refused(path: Path) -> str:
    """The message of the ArtifactError that opening gives."""
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(path)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 2000
    return text


# --- reading ---------------------------------------------------------------------------------------------------------


def test_round_trip(artifact: Artifact) -> None:
    again = Artifact.open(artifact.path)
    assert again.manifest == artifact.manifest
    assert again.digest == artifact.digest
    assert again.signature == SIGNATURE
    assert again.ranges == {"ids": ValueRange(0, 99)}
    assert again.manifest.lineage == [STEP]
    assert again.manifest.evidence.parity == [{"verdict": "passed"}]
    assert again.model_path.read_bytes() == b"weights"
    [(inputs, outputs)] = again.golden()
    np.testing.assert_array_equal(inputs["ids"], np.arange(8).reshape(1, 8))
    assert outputs["logits"].dtype == np.float32
    assert is_artifact(artifact.path)
    assert not is_artifact(artifact.path.parent)


def test_size_is_that_of_model_and_weights(artifact: Artifact, tmp_path: Path) -> None:
    assert artifact.size_bytes == len(b"weights") + len(b"12345")
    with ArtifactWriter(tmp_path / "other") as writer:
        (writer.dir / "model.onnx").write_bytes(b"123")
        (writer.dir / "weights.bin").write_bytes(b"1234")
        made = writer.commit(model="model.onnx", signature=SIGNATURE, lineage=[], evidence=Evidence())
    assert made.size_bytes == 7


def test_no_golden_cases(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        (writer.dir / "model.onnx").write_bytes(b"")
        made = writer.commit(model="model.onnx", signature=SIGNATURE, lineage=[], evidence=Evidence())
    assert made.golden() == []
    assert Artifact.open(made.path).golden() == []


def test_manifest_is_json_that_fits_the_schema(artifact: Artifact) -> None:
    raw = json.loads((artifact.path / "manifest.json").read_text())
    schema = manifest_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["required"]) <= set(raw) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert fits(raw, schema, schema)
    for change in SCHEMA_VIOLATIONS:
        spoilt = json.loads(json.dumps(raw))
        change(spoilt)
        assert not fits(spoilt, schema, schema)


SCHEMA_VIOLATIONS: list[Callable[[dict[str, Any]], Any]] = [
    lambda m: m["files"]["model.onnx"].update(sha256="abc"),
    lambda m: m["files"]["model.onnx"].update(bytes=-1),
    lambda m: m["inputs"][0].update(shape=[None]),
    lambda m: m["inputs"][0].update(range=[1]),
    lambda m: m["lineage"][0].update(parent=3),
    lambda m: m.update(schema_version=2),
    lambda m: m.update(more=2),
    lambda m: m.pop("model"),
]
_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None),
    "boolean": bool,
}  # fmt: skip
_SAY_NOTHING = {"title", "description", "default", "$defs"}


def fits(data: Any, schema: dict[str, Any] | bool, root: dict[str, Any]) -> bool:
    """Enough of JSON Schema 2020-12 for the manifest's; a keyword it does not know is an error."""
    if isinstance(schema, bool):
        return schema
    known: dict[str, Callable[[Any], bool]] = {
        "$ref": lambda ref: fits(data, root["$defs"][ref.removeprefix("#/$defs/")], root),
        "type": lambda kind: isinstance(data, _TYPES[kind]),
        "const": lambda wanted: data == wanted,
        "anyOf": lambda options: any(fits(data, o, root) for o in options),
        "properties": lambda named: all(fits(data[n], s, root) for n, s in named.items() if n in data),
        "required": lambda names: all(n in data for n in names),
        "additionalProperties": lambda s: all(
            fits(v, s, root) for n, v in data.items() if n not in schema.get("properties", {})
        ),
        "items": lambda s: all(fits(v, s, root) for v in data[len(schema.get("prefixItems", [])) :]),
        "prefixItems": lambda each: all(fits(v, s, root) for v, s in zip(data, each, strict=False)),
        "minItems": lambda n: len(data) >= n,
        "maxItems": lambda n: len(data) <= n,
        "minimum": lambda n: data >= n,
        "pattern": lambda p: re.search(p, data) is not None,
    }
    # The type first: what follows relies on it.
    words = sorted(schema.keys() - _SAY_NOTHING, key=lambda k: k != "type")
    return all(known[word](schema[word]) for word in words)


def test_directory_may_be_moved_and_reached_by_a_link(artifact: Artifact, tmp_path: Path) -> None:
    artifact.path.rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("elsewhere")
    assert Artifact.open(tmp_path / "link").digest == artifact.digest


# --- tampering -------------------------------------------------------------------------------------------------------

FILES = ["model.onnx", "model.onnx.data", "export.log", "golden.npz", "assets/model.txt"]


@pytest.mark.parametrize("name", FILES)
def test_changed_byte(artifact: Artifact, name: str) -> None:
    file = artifact.path / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert name in refused(artifact.path)


@pytest.mark.parametrize("name", FILES)
def test_other_length(artifact: Artifact, name: str) -> None:
    with (artifact.path / name).open("ab") as stream:
        stream.write(b"\0")
    assert name in refused(artifact.path)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(artifact: Artifact, name: str) -> None:
    (artifact.path / name).unlink()
    assert f"lacks {name}" in refused(artifact.path)


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "assets/deep/er", "assets/manifest.json"])
def test_added_file(artifact: Artifact, name: str) -> None:
    file = artifact.path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    assert name in refused(artifact.path)


def test_links_and_special_files(artifact: Artifact, tmp_path: Path) -> None:
    def link_to_the_same_bytes() -> Path:
        copy = tmp_path / "copy"
        copy.write_bytes((artifact.path / "model.onnx").read_bytes())
        (artifact.path / "model.onnx").unlink()
        (artifact.path / "model.onnx").symlink_to(copy)
        return artifact.path / "model.onnx"

    def dangling() -> Path:
        (artifact.path / "gone").symlink_to("nowhere")
        return artifact.path / "gone"

    def folder() -> Path:
        (artifact.path / "loop").symlink_to(".")
        return artifact.path / "loop"

    def fifo() -> Path:
        os.mkfifo(artifact.path / "pipe")
        return artifact.path / "pipe"

    for spoil in (dangling, folder, fifo, link_to_the_same_bytes):
        path = spoil()
        assert "is a link or a special file" in refused(artifact.path)
        path.unlink()


def test_linked_manifest(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "manifest.json").rename(tmp_path / "manifest.json")
    (artifact.path / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert "is a link" in refused(artifact.path)


def test_file_that_cannot_be_read(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("deploykit.artifact.hash_regular", denied)
    assert "Permission denied" in refused(artifact.path)


def edit(artifact: Artifact, change: Callable[[dict[str, Any]], Any]) -> None:
    file = artifact.path / "manifest.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], {}, 1e400])
def test_other_schema_version(artifact: Artifact, version: Any) -> None:
    edit(artifact, lambda m: m.update(schema_version=version))
    assert "schema" in refused(artifact.path)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe", b"\0" * 10, b"[" * 100_000,
        b'{"schema_version": 1}', b'{"schema_version": ' + b"1" * 10_000 + b"}", b"{'schema_version': 1}",
        b'{"schema_version": 1, "evidence": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
    ids=range(14),
)  # fmt: skip
def test_manifest_that_is_none(artifact: Artifact, text: bytes) -> None:
    (artifact.path / "manifest.json").write_bytes(text)
    refused(artifact.path)


def test_huge_manifest(artifact: Artifact) -> None:
    with (artifact.path / "manifest.json").open("ab") as stream:
        stream.truncate(17 * 2**20)
    assert "larger than" in refused(artifact.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("files"),
        lambda m: m.pop("evidence"),
        lambda m: m.update(surprise=1),
        lambda m: m.update(files=[]),
        lambda m: m["inputs"][0].update(shape=[1.5]),
        lambda m: m["inputs"][0].update(name=None),
        lambda m: m["files"]["model.onnx"].update(bytes=-1),
        lambda m: m["files"]["model.onnx"].update(sha256="A" * 64),
        lambda m: m["files"].update({"x" * 100_000 + "\n": 1}),
        lambda m: m["files"].update({"\ud800": m["files"]["model.onnx"]}),
    ],
    ids=range(10),
)
def test_manifest_of_another_shape(artifact: Artifact, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(artifact, change)
    refused(artifact.path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "assets/../../secret", "./model.onnx", "", ".", "a\0b"])
def test_names_that_leave_the_artifact(artifact: Artifact, tmp_path: Path, name: str) -> None:
    """Even where size and hash are right."""
    (tmp_path / "secret").write_bytes(b"weights")
    edit(artifact, lambda m: m["files"].update({name: m["files"]["model.onnx"]}))
    assert "lacks" in refused(artifact.path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "manifest.json", "nothing.onnx", ""])
def test_model_that_is_not_among_the_files(artifact: Artifact, name: str) -> None:
    edit(artifact, lambda m: m.update(model=name))
    assert "not among its files" in refused(artifact.path)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "full" / "manifest.json").mkdir(parents=True)
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path, tmp_path / "full"):
        assert "is no artifact" in refused(path)


@pytest.mark.parametrize("spoil", [lambda d: b"", lambda d: d[:-30], lambda d: b"PK" + d[:20], lambda d: b"no"])
def test_golden_cases_that_cannot_be_read(artifact: Artifact, spoil: Callable[[bytes], bytes]) -> None:
    """The hash would have told; this is for one who changed the manifest as well."""
    file = artifact.path / "golden.npz"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DataError):
        artifact.golden()


def test_golden_cases_run_no_code(artifact: Artifact) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("a pickle was loaded",)

    np.savez(artifact.path / "golden.npz", **{"0/in/ids": np.array([Trap()], object)})  # type: ignore[arg-type]
    with pytest.raises(DataError):
        artifact.golden()


def test_golden_names_and_dtypes(tmp_path: Path) -> None:
    inputs = {
        "a/b.c": np.float16([1, 2]),
        "../up": np.array([True]),
        "text": np.array(["é", "longer"], object),
        "scalar": np.array(3),
        "file": np.zeros((0, 2), np.float32),
    }
    with ArtifactWriter(tmp_path / "out") as writer:
        (writer.dir / "model.onnx").write_bytes(b"")
        assert write_golden(writer.dir / "golden.npz", [(inputs, {}), (inputs, {"y": np.int8([1])})]) == 2
        made = writer.commit(model="model.onnx", signature=SIGNATURE, lineage=[], evidence=Evidence())
    for found, _ in made.golden():
        assert found.keys() == inputs.keys()
        for name, array in inputs.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype or name == "text"
    assert [list(o) for _, o in made.golden()] == [[], ["y"]]


def test_golden_cases_keep_to_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.artifact._GOLDEN_LIMIT_BYTES", 100)
    sizes = [400, 40, 60, 8]
    cases = [({"x": np.zeros(n, np.uint8)}, {}) for n in sizes]
    assert write_golden(tmp_path / "few.npz", cases) == 2
    with np.load(tmp_path / "few.npz") as archive:
        assert sorted(len(archive[k]) for k in archive.files) == [8, 40]
    assert write_golden(tmp_path / "one.npz", cases[:1]) == 1


# --- writing ---------------------------------------------------------------------------------------------------------


def commit(writer: ArtifactWriter) -> Artifact:
    return writer.commit(model="model.onnx", signature=SIGNATURE, lineage=[], evidence=Evidence())


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ArtifactWriter(tmp_path / "new" / "er" / "out") as writer:
        (writer.dir / "model.onnx").write_bytes(b"x")
        assert any((tmp_path / "new" / "er").iterdir())
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_without_commit_nothing_stays(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "new" / "out") as writer:
        (writer.dir / "model.onnx").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_parents_that_others_use_stay(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyError), ArtifactWriter(tmp_path / "old" / "new" / "out"):
        (tmp_path / "old" / "new" / "theirs").write_bytes(b"")
        raise KeyError
    assert [p.name for p in (tmp_path / "old" / "new").iterdir()] == ["theirs"]


def test_success_leaves_the_artifact_only(tmp_path: Path) -> None:
    made = make(tmp_path / "new" / "out")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    assert Artifact.open(made.path).digest == made.digest
    mask = os.umask(0)
    os.umask(mask)
    assert made.path.stat().st_mode & 0o777 == 0o777 & ~mask


def test_names_with_pattern_characters(tmp_path: Path) -> None:
    assert make(tmp_path / "a[1]*? b").path.name == "a[1]*? b"
    assert [p.name for p in tmp_path.iterdir()] == ["a[1]*? b"]


@pytest.mark.parametrize("kind", ["artifact", "empty directory", "file", "dangling link"])
def test_existing_output_is_left_alone(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "artifact":
        make(output)
    elif kind == "empty directory":
        output.mkdir()
    elif kind == "file":
        output.write_bytes(b"mine")
    else:
        output.symlink_to("nowhere")
    before = snapshot(tmp_path)
    with pytest.raises(OutputExistsError), ArtifactWriter(output):
        pytest.fail("entered")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_output_that_appears_meanwhile(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    with pytest.raises(OutputExistsError), ArtifactWriter(output) as writer:
        (writer.dir / "model.onnx").write_bytes(b"x")
        if kind == "file":
            output.write_bytes(b"theirs")
        else:
            output.mkdir()
            (output / "theirs").write_bytes(b"")
        before = snapshot(output) if kind == "directory" else {output: b"theirs"}
        commit(writer)
    assert (snapshot(output) if kind == "directory" else {output: output.read_bytes()}) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def snapshot(folder: Path) -> dict[Path, bytes | str | None]:
    return {p: p.readlink() if p.is_symlink() else p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def old(path: Path) -> Path:
    then = time.time() - 3600
    os.utime(path, (then, then), follow_symlinks=False)
    return path


def test_stale_staging_directories_are_swept(tmp_path: Path) -> None:
    stale = tmp_path / ".out.tmp-dead"
    stale.mkdir()
    (stale / "model.onnx").write_bytes(b"x")
    old(stale)
    other = tmp_path / ".out2.tmp-dead"
    other.mkdir()
    old(other)
    fresh = tmp_path / ".out.tmp-fresh"
    fresh.mkdir()
    (tmp_path / ".out.tmp-link").symlink_to("nowhere")
    old(tmp_path / ".out.tmp-link")
    with ArtifactWriter(tmp_path / "out") as writer:
        names = {p.name for p in tmp_path.iterdir()}
        assert names == {other.name, fresh.name, ".out.tmp-link", writer.dir.name}


def test_living_writer_is_not_swept(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as first:
        (first.dir / "model.onnx").write_bytes(b"x")
        old(first.dir)
        with ArtifactWriter(tmp_path / "out") as second:
            (second.dir / "model.onnx").write_bytes(b"y")
            commit(second)
        with pytest.raises(OutputExistsError):
            commit(first)
    assert Artifact.open(tmp_path / "out").model_path.read_bytes() == b"y"


# Each line of its output is a moment at which the parent may kill it.
_VICTIM = """
import sys, time
from pathlib import Path
from deploykit import artifact as m
from deploykit import staging as a
from deploykit.specs import Signature

stop = sys.argv[2]
def at(moment):
    if moment == stop:
        print(moment, flush=True)
        time.sleep(60)

fsync = a._fsync
def slow_fsync(path):
    at("fsync of " + path.name if path.name == "model.onnx" else "")
    if path == Path(sys.argv[1]).parent:
        at("renamed")
    fsync(path)
a._fsync = slow_fsync
with a.ArtifactWriter(sys.argv[1]) as writer:
    at("entered")
    (writer.dir / "model.onnx").write_bytes(b"x" * 1000)
    at("written")
    writer.commit(model="model.onnx", signature=Signature((), ()), lineage=[], evidence=m.Evidence())
    at("committed")
"""


@pytest.mark.parametrize(
    ("moment", "whole"),
    [("entered", False), ("written", False), ("fsync of model.onnx", False), ("renamed", True), ("committed", True)],
)
def test_kill_leaves_nothing_or_the_whole(tmp_path: Path, moment: str, whole: bool) -> None:
    output = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", _VICTIM, str(output), moment], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == moment
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert output.exists() == whole
    if whole:
        assert len(Artifact.open(output).model_path.read_bytes()) == 1000
        return
    [stale] = tmp_path.iterdir()
    old(stale)
    make(output)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_files() -> Any:
    """Files of at most 64 KiB, in place of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.usefixtures("small_files")
def test_full_disk_while_the_model_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, ArtifactWriter(tmp_path / "new" / "out") as writer:
        (writer.dir / "model.onnx").write_bytes(b"x" * 100_000)
    assert "nothing was left behind" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_files")
def test_full_disk_while_the_manifest_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError), ArtifactWriter(tmp_path / "out") as writer:
        (writer.dir / "model.onnx").write_bytes(b"x")
        writer.commit(
            model="model.onnx",
            signature=SIGNATURE,
            lineage=[STEP.model_copy(update={"notes": ["n" * 100_000]})],
            evidence=Evidence(),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_files")
def test_full_disk_while_a_report_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write_file(tmp_path / "report.json", b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = snapshot(tmp_path)
    for output in ("file/out", "file/a/b/out", "n" * 300, "dangling/out", "dangling/a/out"):
        with pytest.raises(StorageError), ArtifactWriter(tmp_path / output):
            pytest.fail("entered")
        assert snapshot(tmp_path) == before
    for output in ("file/report", "n" * 300, "missing/report", "dangling/report"):
        with pytest.raises(StorageError):
            write_file(tmp_path / output, b"x")
        assert snapshot(tmp_path) == before


def test_other_os_errors_are_no_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), ArtifactWriter(tmp_path / "out") as writer:
        (writer.dir / "typo" / "model.onnx").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_write_file(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    write_file(report, b"first")
    with pytest.raises(OutputExistsError):
        write_file(report, b"second")
    assert report.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_write_file_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    report = tmp_path / "report.json"
    write_file(report, b"first")
    with pytest.raises(OutputExistsError):
        write_file(report, b"second")
    assert report.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_numbers_that_json_cannot_hold(tmp_path: Path) -> None:
    """What is written can be read, or is refused before."""
    try:
        with ArtifactWriter(tmp_path / "out") as writer:
            (writer.dir / "model.onnx").write_bytes(b"")
            made = writer.commit(
                model="model.onnx",
                signature=SIGNATURE,
                lineage=[],
                evidence=Evidence(benchmark=[{"ratio": float("nan"), "limit": float("inf")}]),
            )
    except (ValueError, DeploykitError):
        assert list(tmp_path.iterdir()) == []
        return
    json.loads((made.path / "manifest.json").read_text(), parse_constant=pytest.fail)
    Artifact.open(made.path)


def test_an_interrupt_while_the_staging_directory_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM can come between any two steps; here, before the lock is taken."""

    def interrupted(folder: Path) -> None:
        assert folder.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr("deploykit.staging.take_lock", interrupted)
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "deep" / "out"):
        pytest.fail("it never opens")
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_given_back_is_free_though_a_child_inherited_it(tmp_path: Path) -> None:
    lock = take_lock(tmp_path)
    assert lock is not None
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert take_lock(tmp_path) is None
        free_lock(lock)
        again = take_lock(tmp_path)
        assert again is not None
        free_lock(again)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
