"""Child processes: what comes back, and what a way costs that hangs, crashes or takes for ever."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from deploykit.errors import ExportError, SourceError, TimeLimitError
from deploykit.exporters import Way, export
from deploykit.exporters.bounded import run_bounded
from deploykit.runtimes import open_session


def spin() -> None:
    while True:
        pass


def test_the_result_comes_back(tmp_path: Path) -> None:
    assert run_bounded(lambda: (os.getpid(), ["x" * 200_000]), 60)[1] == ["x" * 200_000]
    assert run_bounded(os.getpid, 60) != os.getpid()
    run_bounded(lambda: (tmp_path / "file").write_text("here"), 60)
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.parametrize("exc", [SourceError("what", expected="this", hint="that"), OSError(28, "No space left")])
def test_errors_come_back_whole(exc: Exception) -> None:
    def fail() -> None:
        raise exc

    with pytest.raises(type(exc)) as caught:
        run_bounded(fail, 60)
    assert str(caught.value) == str(exc)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_bounded(lambda: 1 / 0, 60)


def test_time_is_limited(message: Any) -> None:
    assert "more than 1 s" in message(TimeLimitError, lambda: run_bounded(spin, 1))


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGSEGV, "crashed with signal 11"), (signal.SIGKILL, "lack of memory")]
)
def test_a_crash_is_an_error(message: Any, number: int, said: str) -> None:
    assert said in message(ExportError, lambda: run_bounded(lambda: os.kill(os.getpid(), number), 60))


def test_an_exit_is_an_error(message: Any) -> None:
    assert "exit code 3" in message(ExportError, lambda: run_bounded(lambda: os._exit(3), 60))


def test_ctrl_c_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []

    def interrupted(descriptor: int, pid: int) -> bytes:
        children.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr("deploykit.exporters.bounded._read_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bounded(lambda: time.sleep(600), 60)
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


def test_a_child_does_not_collect_what_it_inherits(tmp_path: Path) -> None:
    """A session in a reference cycle: its destructor would wait for threads that only the parent has."""
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    gc.disable()
    try:
        cycle: list[Any] = [open_session(tmp_path / "m.onnx", "ort:cpu").__enter__()]
        cycle.append(cycle)
        del cycle
        assert run_bounded(lambda: gc.collect() >= 0, 60)
    finally:
        gc.enable()


def test_a_way_that_takes_for_ever_is_left(opened: Any, message: Any, tmp_path: Path) -> None:
    source = opened("sleeps", timeout_s=2)
    text = message(TimeLimitError, lambda: export(source, Way("torch.export", True), tmp_path / "m.onnx"))
    assert "more than 2 s" in text
    assert "--timeout 20" in text
    export(source, Way("torchscript", True), tmp_path / "m.onnx")


def test_a_way_that_crashes_is_left(opened: Any, message: Any, tmp_path: Path) -> None:
    source = opened("crashes")
    text = message(ExportError, lambda: export(source, Way("torch.export", True), tmp_path / "m.onnx"))
    assert "SIGSEGV" in text


def test_limits_grow_with_the_module_and_with_patience(opened: Any) -> None:
    source = opened("classifier")
    hasty, patient = (source._limit_s(Way("torch.export", True, patient=patient)) for patient in (False, True))
    assert 40 < hasty < 45
    assert patient == 5 * hasty
    assert [way.patient for way in source.ways] == [False] * 4
    assert all(way.patient for way in opened("classifier", way="torchscript").ways)
    assert all(way.patient for way in opened("classifier", timeout_s=5).ways)
