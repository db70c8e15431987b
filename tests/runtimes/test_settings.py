"""Tuned settings in a file: written, read, refused, and used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.artifact import sha256_of
from deploykit.errors import DataError, DeploykitError, DeviceError, OutputExistsError, StorageError
from deploykit.runtimes import RuntimeSettings, open_session
from deploykit.runtimes.settings import machine_fingerprint

IMAGE = {"image": np.ones((2, 3, 8, 8), np.float32)}


@pytest.fixture
def tuned(net: Path) -> RuntimeSettings:
    return RuntimeSettings(
        "ort:cpu", threads=2, sessions=2, batch=4, optimize="extended",
        settings={"session.intra_op.allow_spinning": "0"}, machine=machine_fingerprint("ort:cpu"),
        model_sha256=sha256_of(net),
    )  # fmt: skip


def test_a_file_holds_everything(tuned: RuntimeSettings, tmp_path: Path) -> None:
    tuned.save(tmp_path / "tuned.json")
    assert RuntimeSettings.load(tmp_path / "tuned.json") == tuned
    document = json.loads((tmp_path / "tuned.json").read_text())
    assert document["schema_version"] == 1
    assert set(document) == {
        "schema_version", "device", "threads", "sessions", "concurrency", "precision", "batch", "optimize",
        "settings", "machine", "model_sha256",
    }  # fmt: skip
    with pytest.raises(OutputExistsError):
        tuned.save(tmp_path / "tuned.json")
    with pytest.raises(StorageError):
        tuned.save(tmp_path / "no" / "tuned.json")


def test_sessions_are_opened_as_tuned(tuned: RuntimeSettings, net: Path, tmp_path: Path) -> None:
    tuned.save(tmp_path / "tuned.json")
    for given in (tuned, tmp_path / "tuned.json", str(tmp_path / "tuned.json")):
        with open_session(net, tuned=given) as session:
            assert str(session.device) == "ort:cpu"
            assert session.settings["intra_op_num_threads"] == 2
            assert session.settings["graph_optimization_level"] == "extended"
            assert session.settings["session.intra_op.allow_spinning"] == "0"
            assert session.settings["tuned_notes"] == []
            expected = session.run(IMAGE)["feat"]
    opened = tuned.open_all(net)
    assert len(opened) == 2
    for session in opened:
        np.testing.assert_array_equal(session.run(IMAGE)["feat"], expected)
        session.close()
    # What is given beside them wins.
    more = {"session.dynamic_block_base": 4}
    with open_session(net, "ort:cpu", tuned=tuned, threads=1, optimize="basic", settings=more) as session:
        assert session.settings["intra_op_num_threads"] == 1
        assert session.settings["graph_optimization_level"] == "basic"
        assert session.settings["session.intra_op.allow_spinning"] == "0"
        assert session.settings["session.dynamic_block_base"] == "4"


def test_openvino_with_streams(net: Path) -> None:
    made = RuntimeSettings("openvino:cpu", threads=1, precision="native", settings={"NUM_STREAMS": 2})
    with made.open(net) as session:
        assert session.settings["NUM_STREAMS"] == 2
        assert "INFERENCE_PRECISION_HINT" not in session.settings
        assert [r.run(IMAGE)["feat"].shape for r in session.requests(2)] == [(2, 8)] * 2


def test_another_device_is_an_error(tuned: RuntimeSettings, net: Path) -> None:
    with pytest.raises(DeviceError, match="tuned on ort:cpu, not on openvino:cpu"):
        open_session(net, "openvino:cpu", tuned=tuned)
    with pytest.raises(DeviceError, match="0 sessions"):
        replace(tuned, sessions=0).open_all(net)


def test_another_machine_or_model_is_a_note(tuned: RuntimeSettings, net: Path) -> None:
    moved = replace(tuned, machine={**tuned.machine, "cores_allowed": 64}, model_sha256="ab" * 32)
    with moved.open(net) as session:
        notes = session.settings["tuned_notes"]
        assert session.run(IMAGE)["feat"].shape == (2, 8)
    assert len(notes) == 2
    assert "cores_allowed was 64" in notes[0]
    assert "abababababab" in notes[1]
    with replace(tuned, machine={}, model_sha256=None).open(net) as session:
        assert session.settings["tuned_notes"] == []


GOOD: dict[str, Any] = {"schema_version": 1, "device": "ort:cpu", "threads": 1}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("\x00\xff", "JSON"),
        ("[1]", "no JSON object"),
        (json.dumps(GOOD | {"schema_version": 2}), "schema version 2"),
        (json.dumps({"device": "ort:cpu"}), "schema version None"),
        (json.dumps(GOOD | {"thread": 2}), "'thread'"),
        (json.dumps(GOOD | {"threads": "2"}), "threads is '2'"),
        (json.dumps(GOOD | {"threads": True}), "threads is True"),
        (json.dumps(GOOD | {"threads": 0}), "threads is 0"),
        (json.dumps(GOOD | {"sessions": -1}), "sessions is -1"),
        (json.dumps(GOOD | {"concurrency": 0}), "concurrency is 0"),
        (json.dumps(GOOD | {"settings": []}), "settings is []"),
        (json.dumps({"schema_version": 1}), "names no device"),
        (json.dumps(GOOD | {"device": "abacus"}), "unknown device"),
        (json.dumps(GOOD | {"precision": "fp8"}), "unknown precision"),
        (json.dumps(GOOD | {"settings": {"no_such": 1}}), "no_such"),
        (json.dumps(GOOD | {"optimize": "most"}), "most"),
    ],
)
def test_files_that_are_refused(net: Path, tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "tuned.json").write_text(text, encoding="latin-1")
    with pytest.raises(DeploykitError) as caught:
        open_session(net, tuned=tmp_path / "tuned.json")
    assert word in str(caught.value)
    assert str(caught.value).isprintable()


def test_files_that_are_not_there(net: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError):
            open_session(net, tuned=path)
