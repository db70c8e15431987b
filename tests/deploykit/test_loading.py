"""Which runtimes load a model: tried in processes of their own, whose death is a finding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploykit import loading
from deploykit.loading import reason_of, try_loading


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts other code in the worker's place."""

    def replace(code: str) -> Path:
        path = tmp_path / "worker.py"
        path.write_text(code, encoding="utf-8")
        monkeypatch.setattr(loading, "_WORKER", path)
        return tmp_path / "model.onnx"

    return replace


def reasons(path: Path, **options: Any) -> set[tuple[bool | None, str | None]]:
    return {(r.loads, r.reason) for r in try_loading(path, **options) if r.version}


def test_a_runtime_that_crashes_is_a_finding(worker: Any) -> None:
    assert reasons(worker("import os; os.kill(os.getpid(), 11)")) == {(False, "it crashed (SIGSEGV)")}


def test_a_runtime_that_hangs_is_a_finding(worker: Any) -> None:
    assert reasons(worker("import time; time.sleep(60)"), timeout_s=0.5) == {(False, "it took more than 0.5 s")}


def test_a_runtime_that_dies_without_a_word_is_a_finding(worker: Any) -> None:
    assert reasons(worker("import sys; sys.exit(3)")) == {(False, "it said nothing")}
    assert reasons(worker("import sys; print('oh no', file=sys.stderr); sys.exit(3)")) == {(False, "oh no")}


def test_a_runtime_that_is_not_installed_is_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "available", lambda name: False)
    found = try_loading(tmp_path / "model.onnx")
    assert [(r.version, r.loads) for r in found] == [(None, None)] * 2
    assert all(r.reason and "pip install" in r.reason for r in found)


def test_the_worker_imports_nothing_of_ours() -> None:
    text = loading._WORKER.read_text(encoding="utf-8")
    assert "import deploykit" not in text and "from deploykit" not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[ONNXRuntimeError] : 1 : FAIL : Fatal error: my:Foo(-1) is not a registered function/op",
         "Fatal error: my:Foo(-1) is not a registered function/op"),
        ("Exception from src/inference/src/cpp/core.cpp:94:\nCheck 'false' failed at src/x.cpp:161:\n"
         "FrontEnd API failed with GeneralFailure:\nOpenVINO does not support the following ONNX operations: my.Foo\n",
         "OpenVINO does not support the following ONNX operations: my.Foo"),
        ("plain", "plain"),
        ("", ""),
        ("x" * 400, "x" * 297 + "..."),
    ],
)  # fmt: skip
def test_the_sentence_that_says_why(text: str, said: str) -> None:
    assert reason_of(text) == said
