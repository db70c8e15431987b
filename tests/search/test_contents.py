"""What tells one content from another, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploykit.artifact import Artifact, Evidence, StepRecord
from deploykit.data import ValueRange
from deploykit.errors import ArtifactError, ModelError, SearchError
from deploykit.search import contents
from deploykit.search.contents import Contents, content_of, key_of
from deploykit.search.jobs import Job
from deploykit.specs import Signature, TensorSpec
from deploykit.staging import ArtifactWriter

STEP = StepRecord(step="export", params={"opset": 18}, tools={"torch": "2"}, parent=None, seconds=1.5)


def artifact(
    place: Path,
    *,
    model: bytes = b"weights",
    log: bytes = b"12:01",
    shape: tuple[int | str, ...] = ("batch", 8),
    limits: ValueRange | None = None,
    step: StepRecord = STEP,
    evidence: Evidence | None = None,
    more: str | None = None,
) -> Path:
    with ArtifactWriter(place) as writer:
        (writer.dir / "model.onnx").write_bytes(model)
        (writer.dir / "export.log").write_bytes(log)
        if more:
            (writer.dir / more).write_bytes(b"{}")
        return writer.commit(
            model="model.onnx",
            signature=Signature((TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", ("batch",)),)),
            lineage=[step],
            evidence=evidence or Evidence(),
            ranges={"x": limits} if limits else None,
        ).path


def test_an_artifact_is_what_it_holds_and_how_it_was_made(tmp_path: Path) -> None:
    first = content_of(artifact(tmp_path / "a"))
    other_day = STEP.model_copy(update={"seconds": 9.0, "notes": ["slow"], "tools": {"torch": "3"}, "parent": "f" * 64})
    measured = Evidence(benchmark=[{"ratio": 2.0}])
    assert content_of(artifact(tmp_path / "b", log=b"12:02", step=other_day, evidence=measured)) == first
    different: list[dict[str, Any]] = [
        {"model": b"Weights"},
        {"more": "settings.json"},
        {"shape": ("batch", 9)},
        {"limits": ValueRange(0, 1)},
        {"step": STEP.model_copy(update={"params": {"opset": 17}})},
        {"step": STEP.model_copy(update={"step": "simplify"})},
    ]
    digests = {content_of(artifact(tmp_path / f"d{n}", **change)) for n, change in enumerate(different)}
    assert len(digests | {first}) == len(different) + 1


def test_a_changed_artifact_has_no_content(tmp_path: Path) -> None:
    path = artifact(tmp_path / "a")
    (path / "model.onnx").write_bytes(b"WEIGHTS")
    with pytest.raises(ArtifactError):
        content_of(path)


def test_a_file_is_its_bytes_and_its_suffix(tmp_path: Path) -> None:
    for name, data in {"a.npz": b"1", "b.npz": b"1", "c.npz": b"2", "d.bin": b"1"}.items():
        (tmp_path / name).write_bytes(data)
    a, b, c, d = (content_of(tmp_path / n) for n in ("a.npz", "b.npz", "c.npz", "d.bin"))
    assert a == b
    assert len({a, c, d}) == 3


def test_a_directory_is_its_names_and_bytes(tmp_path: Path) -> None:
    def make(name: str, files: dict[str, bytes]) -> Path:
        for file, data in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(data)
        return tmp_path / name

    first = content_of(make("a", {"x/1": b"1", "y/1": b"2"}))
    assert content_of(make("b", {"x/1": b"1", "y/1": b"2"})) == first
    assert content_of(make("c", {"x/1": b"2", "y/1": b"1"})) != first  # the same files, the other way round
    assert content_of(make("d", {"x/1": b"1", "z/1": b"2"})) != first


def test_links_are_followed_and_do_not_go_in_circles(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "f").write_bytes(b"1")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "d" / "round").symlink_to(tmp_path / "d")
    first = content_of(tmp_path / "d")
    (tmp_path / "far" / "f").write_bytes(b"2")
    assert content_of(tmp_path / "d") != first


def external(folder: Path, value: float) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir()
    weight = numpy_helper.from_array(np.full((64, 64), value, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "m.onnx"), save_as_external_data=True, location="w.data", size_threshold=0)
    return folder / "m.onnx"


def test_an_onnx_file_is_its_weights_too(tmp_path: Path) -> None:
    one, same, other = external(tmp_path / "1", 1.0), external(tmp_path / "2", 1.0), external(tmp_path / "3", 2.0)
    assert one.read_bytes() == other.read_bytes()
    assert content_of(one) == content_of(same) != content_of(other)
    (tmp_path / "1" / "unrelated").write_bytes(b"")
    assert content_of(one) == content_of(same)
    (tmp_path / "1" / "w.data").unlink()
    with pytest.raises(ModelError):
        content_of(one)


def test_openvino_ir_is_its_weights_too(tmp_path: Path) -> None:
    (tmp_path / "m.xml").write_text("<net/>")
    (tmp_path / "m.bin").write_bytes(b"1")
    first = content_of(tmp_path / "m.xml")
    (tmp_path / "m.bin").write_bytes(b"2")
    assert content_of(tmp_path / "m.xml") != first


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="does not exist"):
        content_of(tmp_path / "gone")


def test_contents_are_read_again_only_where_something_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return content_of(path)

    monkeypatch.setattr("deploykit.search.contents.content_of", counted)
    model, directory, contents = external(tmp_path / "m", 1.0), tmp_path / "d", Contents()
    directory.mkdir()
    (directory / "a").write_bytes(b"1")

    def again(path: Path, change: Callable[[], Any] | None) -> bool:
        before = len(read)
        if change:
            change()
        assert contents(path) == content_of(path)
        return len(read) > before

    assert again(model, None)
    assert not again(model, None)
    assert again(model, lambda: (tmp_path / "m" / "w.data").write_bytes(bytes(4 * 64 * 64)))
    assert again(directory, None)
    assert not again(directory, None)
    assert again(directory, lambda: (directory / "b").write_bytes(b""))
    assert again(directory, lambda: (directory / "b").unlink())
    with pytest.raises(SearchError):
        contents(tmp_path / "gone")


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    (tmp_path / "c").write_bytes(b"2")

    def key(tools: Any = None, machine: Any = None, **change: Any) -> str:
        job = Job(**({"deed": "m:f", "params": {"n": 1}, "inputs": {"model": tmp_path / "a"}} | change))
        return key_of(job, tools=tools or {"onnx": "1"}, machine=machine)

    first = key()
    assert key(inputs={"model": tmp_path / "b"}, label="other", timeout_s=3.0, retries=4) == first
    assert key(machine={"cpu": "x"}) == first  # counts where time is measured
    changes: list[dict[str, Any]] = [
        {"deed": "m:g"},
        {"params": {"n": 2}},
        {"inputs": {"model": tmp_path / "c"}},
        {"inputs": {"parent": tmp_path / "a"}},
        {"tools": {"onnx": "2"}},
        {"exclusive": True, "machine": {"cpu": "x"}},
        {"exclusive": True, "machine": {"cpu": "y"}},
    ]
    assert len({key(**c) for c in changes} | {first}) == len(changes) + 1


def test_numbers_hang_on_instruction_sets_and_not_on_the_processor() -> None:
    """Without VNNI the same int8 model saturates, and is judged otherwise."""
    here = {"cpu": "x", "architecture": "x86_64", "flags": ["avx2", "vnni"]}
    first = key_of(Job("m:f"), tools={}, machine=here)
    assert key_of(Job("m:f"), tools={}, machine=here | {"cpu": "y"}) == first
    assert key_of(Job("m:f"), tools={}, machine=here | {"flags": ["avx2"]}) != first


def test_plugins_and_our_own_sources_are_among_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents.tools_here()
    plugin = SimpleNamespace(distribution="deploykit-other", version="3")
    monkeypatch.setattr(contents, "installed", lambda kind: (plugin,) if kind == "metrics" else ())
    assert contents.tools_here()["deploykit-other"] == "3"
    assert len(before["sources of deploykit"]) == 64
    contents._sources.cache_clear()
    monkeypatch.setattr(contents, "sha256_of", lambda path: "changed" if path.name == "goals.py" else "as it was")
    changed = contents.tools_here()["sources of deploykit"]
    contents._sources.cache_clear()
    monkeypatch.setattr(contents, "sha256_of", lambda path: "as it was")
    assert contents.tools_here()["sources of deploykit"] != changed
    contents._sources.cache_clear()


def test_another_deploykit_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(Job("m:f"), tools={}, machine=None)
    monkeypatch.setattr("deploykit.search.contents.__version__", "9")
    assert key_of(Job("m:f"), tools={}, machine=None) != before


def test_the_artifact_is_read_as_any_other(tmp_path: Path) -> None:
    """A link to an artifact is the artifact."""
    path = artifact(tmp_path / "a")
    (tmp_path / "link").symlink_to(path)
    assert content_of(tmp_path / "link") == content_of(path)
    assert Artifact.open(path).manifest.created
