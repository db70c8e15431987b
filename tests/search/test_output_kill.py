"""The output of a search names a whole artifact at every moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.artifact import Artifact, Evidence, StepRecord
from deploykit.errors import ArtifactError, OutputExistsError, SearchError
from deploykit.runtimes.settings import RuntimeSettings
from deploykit.search.output import Output, Sealed
from deploykit.specs import Signature, TensorSpec
from deploykit.staging import ArtifactWriter

WISH = {"source": "net.py:make", "budget_s": 10.0}


def write_artifact(place: Path, weight: float = 1.0) -> Artifact:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [info("x", TensorProto.FLOAT, ["n", 2])],
        [info("y", TensorProto.FLOAT, ["n", 2])], [numpy_helper.from_array(np.full((2, 2), weight, np.float32), "w")],
    )  # fmt: skip
    with ArtifactWriter(place) as writer:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(model, str(writer.dir / "model.onnx"))
        x, y = (TensorSpec(name, "float32", ("n", 2)) for name in "xy")
        record = StepRecord(step="export", params={}, tools={}, parent=None, seconds=0.0)
        return writer.commit(model="model.onnx", signature=Signature((x,), (y,)), lineage=[record], evidence=Evidence())


def sealed(made: Artifact, name: str) -> Sealed:
    record = StepRecord(step="optimize", params={"seat": name}, tools={}, parent=made.digest, seconds=1.0)
    evidence: dict[str, Any] = {"benchmark": [{"device": "ort:cpu", "ratio": 2.0}]}
    return Sealed(name, made, RuntimeSettings("ort:cpu", threads=1), record, evidence)


def test_the_directory_stands_for_the_best_so_far_and_then_for_the_winner(tmp_path: Path) -> None:
    first, second = write_artifact(tmp_path / "a"), write_artifact(tmp_path / "b", 2.0)
    with Output(tmp_path / "best", WISH, resume=False) as out:
        with pytest.raises(ArtifactError):
            Artifact.open(tmp_path / "best")
        out.publish_interim(sealed(first, "export"), {})
        assert Artifact.open(tmp_path / "best").manifest.lineage[-1].params == {"seat": "export"}
        out.publish_interim(sealed(second, "static"), {})
        found = Artifact.open(tmp_path / "best")
        assert found.manifest.lineage[-1].params == {"seat": "static"}
        assert len(list((tmp_path / "best" / "interim").iterdir())) == 1
        out.publish([sealed(second, "static"), sealed(first, "export")], "static", {"state": "done"}, {"a.txt": b"b"})
    found = Artifact.open(tmp_path / "best")
    assert found.path == tmp_path / "best" / "front" / "static"
    assert found.manifest.evidence.benchmark == [{"device": "ort:cpu", "ratio": 2.0}]
    assert json.loads((found.path / "settings.json").read_text())["threads"] == 1
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["a.txt", "front", "optimize.json"]


def test_nothing_is_left_where_nothing_was_found(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="nothing"), Output(tmp_path / "best", WISH, resume=False):
        raise SearchError("nothing")
    assert not (tmp_path / "best").exists()


def test_an_output_is_never_overwritten_and_resumed_for_the_same_wish_only(tmp_path: Path) -> None:
    made = write_artifact(tmp_path / "a")
    with Output(tmp_path / "best", WISH, resume=False) as out:
        out.publish_interim(sealed(made, "export"), {})
        run = out.run
    with pytest.raises(OutputExistsError, match="--resume"), Output(tmp_path / "best", WISH, resume=False):
        pass
    with pytest.raises(OutputExistsError, match="something else"), Output(
        tmp_path / "best", {**WISH, "objective": "size"}, resume=True
    ):  # fmt: skip
        pass
    with Output(tmp_path / "best", WISH, resume=True) as out:
        assert out.run == run and out.resumed
        with pytest.raises(SearchError, match="another search works"), Output(tmp_path / "best", WISH, resume=True):
            pass
        out.publish([sealed(made, "export")], "export", {"state": "done"}, {})
    with pytest.raises(OutputExistsError, match="finished"), Output(tmp_path / "best", WISH, resume=True):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(OutputExistsError, match="not left by a search"), Output(tmp_path / "other", WISH, resume=True):
        pass


def publish_for_ever(folder: Path) -> None:
    made = [Artifact.open(folder / "a"), Artifact.open(folder / "b")]
    with Output(folder / "best", WISH, resume=True) as out:
        number = 0
        while True:
            number += 1
            out.publish_interim(sealed(made[number % 2], f"n{number}"), {})
            if number % 5 == 0:
                front = [sealed(m, f"f{i}") for i, m in enumerate(made)]
                out.publish(front, f"f{number % 2}", {"state": "running"}, {"report.html": b"x"})


def test_a_kill_at_any_moment_leaves_a_whole_winner(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a")
    write_artifact(tmp_path / "b", 2.0)
    with Output(tmp_path / "best", WISH, resume=False) as out:
        out.publish_interim(sealed(Artifact.open(tmp_path / "a"), "first"), {})
    context = multiprocessing.get_context("fork")
    for number in range(25):
        child = context.Process(target=publish_for_ever, args=(tmp_path,))
        child.start()
        child.join(0.02 + 0.013 * number)
        assert child.pid is not None and child.is_alive()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        Artifact.open(tmp_path / "best")  # verified: every file, every hash
    with Output(tmp_path / "best", WISH, resume=True) as out:
        out.publish([sealed(Artifact.open(tmp_path / "a"), "end")], "end", {"state": "done"}, {})
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["front", "optimize.json"]
    assert [p.name for p in (tmp_path / "best" / "front").iterdir()] == ["end"]
