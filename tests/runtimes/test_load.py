"""`load`: an artifact, or what `optimize` wrote, opened as it was found to be fastest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deploykit
from deploykit.artifact import Artifact, Evidence, is_artifact
from deploykit.errors import ArtifactError, DataError, DeviceError
from deploykit.modelfile import read_model, signature_of
from deploykit.models import load_model
from deploykit.runtimes import RuntimeSettings, open_session
from deploykit.runtimes.settings import machine_fingerprint
from deploykit.staging import ArtifactWriter

IMAGE = {"image": np.ones((2, 3, 8, 8), np.float32)}


def make(net: Path, place: Path, settings: RuntimeSettings | None = None) -> Path:
    with ArtifactWriter(place) as writer:
        shutil.copyfile(net, writer.dir / "model.onnx")
        if settings:
            settings.save(writer.dir / "settings.json")
        signature = signature_of(read_model(net))
        return writer.commit(model="model.onnx", signature=signature, lineage=[], evidence=Evidence()).path


@pytest.fixture
def tuned() -> RuntimeSettings:
    return RuntimeSettings("ort:cpu", threads=2, optimize="basic", machine=machine_fingerprint("ort:cpu"))


@pytest.fixture
def best(net: Path, tuned: RuntimeSettings, tmp_path: Path) -> Path:
    """What `optimize` writes, as far as it matters here."""
    make(net, tmp_path / "best" / "front" / "static", tuned)
    make(net, tmp_path / "best" / "front" / "fp32")
    result(tmp_path / "best", "front/static")
    return tmp_path / "best"


def result(root: Path, winner: Any) -> None:
    (root / "optimize.json").write_text(json.dumps({"schema_version": 1, "winner": winner}))


def test_the_winner_is_opened_with_its_settings(best: Path, net: Path) -> None:
    with open_session(net) as plain:
        expected = plain.run(IMAGE)["feat"]
    for path in (best, str(best), best / "front" / "static", Artifact.open(best)):
        with deploykit.load(path) as session:
            assert session.settings["intra_op_num_threads"] == 2
            assert session.settings["graph_optimization_level"] == "basic"
            assert session.settings["tuned_notes"] == []
            np.testing.assert_allclose(session.run(IMAGE)["feat"], expected, rtol=1e-5)


def test_what_is_given_wins(best: Path, net: Path, tuned: RuntimeSettings) -> None:
    with deploykit.load(best, "ort:cpu", threads=1) as session:
        assert session.settings["intra_op_num_threads"] == 1
        assert session.settings["graph_optimization_level"] == "basic"
    with deploykit.load(best, tuned=RuntimeSettings("ort:cpu", threads=1, optimize=False)) as session:
        assert session.settings["graph_optimization_level"] == "disabled"


def test_another_device_does_without_the_settings(best: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    with deploykit.load(best, "openvino:cpu") as session:
        assert str(session.device) == "openvino:cpu"
        assert "tuned_notes" not in session.settings
        assert session.run(IMAGE)["feat"].shape == (2, 8)


def test_without_settings_it_is_open_session(best: Path, net: Path) -> None:
    for path in (net, best / "front" / "fp32"):
        with deploykit.load(path) as session:
            assert str(session.device) == "ort:cpu"
            assert "tuned_notes" not in session.settings
    with pytest.raises(DeviceError, match="unknown precision"):
        deploykit.load(net, precision="half")


def test_another_machine_is_noted(net: Path, tuned: RuntimeSettings, tmp_path: Path) -> None:
    elsewhere = RuntimeSettings("ort:cpu", machine={**tuned.machine, "cpu": "Elbrus"})
    with deploykit.load(make(net, tmp_path / "a", elsewhere)) as session:
        (note,) = session.settings["tuned_notes"]
        assert "Elbrus" in note


def test_settings_that_are_none_are_refused(net: Path, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "a") as writer:
        shutil.copyfile(net, writer.dir / "model.onnx")
        (writer.dir / "settings.json").write_text("[]")
        writer.commit(
            model="model.onnx", signature=signature_of(read_model(net)), lineage=[], evidence=Evidence()
        )  # fmt: skip
    with pytest.raises(DataError, match="no JSON object"):
        deploykit.load(tmp_path / "a")


def test_the_directory_of_a_search_is_its_winner_everywhere(best: Path) -> None:
    winner = best / "front" / "static"
    assert is_artifact(best)
    assert Artifact.open(best).path == winner
    assert load_model(best).path == winner / "model.onnx"
    assert load_model(best).size_bytes == (winner / "model.onnx").stat().st_size
    with open_session(best) as session:
        assert session.run(IMAGE)["feat"].shape == (2, 8)
    moved = best.rename(best.with_name("elsewhere"))
    assert Artifact.open(moved).path == moved / "front" / "static"


def secret(best: Path) -> None:
    shutil.copytree(best / "front" / "fp32", best.parent / "secret")
    result(best, "../secret")


def absolute(best: Path) -> None:
    result(best, str(best / "front" / "static"))


def linked(best: Path) -> None:
    shutil.copytree(best / "front" / "fp32", best.parent / "secret")
    (best / "front" / "link").symlink_to(best.parent / "secret")
    result(best, "front/link")


def through_a_link(best: Path) -> None:
    (best / "front").rename(best.parent / "front")
    (best / "front").symlink_to(best.parent / "front")


def linked_result(best: Path) -> None:
    (best / "optimize.json").rename(best.parent / "optimize.json")
    (best / "optimize.json").symlink_to(best.parent / "optimize.json")


def huge(best: Path) -> None:
    with (best / "optimize.json").open("ab") as stream:
        stream.truncate(17 * 2**20)


UNSAFE: list[Callable[[Path], None]] = [
    secret, absolute, linked, through_a_link, linked_result, huge,
    lambda best: result(best, "front/../../best/front/static"),
    lambda best: result(best, "front\\static"),
    lambda best: result(best, "front/st\0atic"),
    lambda best: result(best, "."),
    lambda best: result(best, "front"),
    lambda best: result(best, "front/gone"),
    lambda best: result(best, ""),
    lambda best: result(best, None),
    lambda best: result(best, ["front/static"]),
    lambda best: (best / "optimize.json").write_text("[1]"),
    lambda best: (best / "optimize.json").write_text("{"),
    lambda best: (best / "optimize.json").write_bytes(b"[" * 100_000),
    lambda best: (best / "front" / "static" / "model.onnx").write_bytes(b"changed"),
]  # fmt: skip


@pytest.mark.parametrize("spoil", UNSAFE, ids=range(len(UNSAFE)))
def test_a_result_that_leads_elsewhere_is_refused(best: Path, spoil: Callable[[Path], None]) -> None:
    assert Artifact.open(best)
    spoil(best)
    for verb in (Artifact.open, deploykit.load, load_model):
        with pytest.raises(ArtifactError) as caught:
            verb(best)
        assert str(caught.value).isprintable()


def test_an_artifact_goes_before_a_result(best: Path) -> None:
    """The manifest lists all files of an artifact; a result among them was added."""
    result(best / "front" / "static", "../fp32")
    with pytest.raises(ArtifactError, match="does not list"):
        Artifact.open(best / "front" / "static")


def test_a_model_file_is_loaded_with_numpy_and_the_runtime_alone(net: Path) -> None:
    code = (
        "import sys, numpy as np, deploykit\n"
        f"with deploykit.load({str(net)!r}) as s: s.run({{'image': np.ones((1, 3, 8, 8), np.float32)}})\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'pydantic', 'torch', 'openvino', 'click', 'rich', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
