"""The command that has other tools make files: what fails in a child process is a reason, never a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

SUITE = Path(__file__).parents[2] / "benchmarks" / "suite"
PLANTED = f"""
import shutil, signal, os, sys, time
sys.path.insert(0, {str(SUITE)!r})
import foreign_files

def broken(model, data, folder):
    raise ValueError("made-up")

def unreadable(model, data, folder):
    (folder / "model.onnx").write_bytes(b"no model")

recipes = {{
    "whole": lambda model, data, folder: shutil.copy(model, folder / "model.onnx"),
    "broken": broken,
    "killed": lambda model, data, folder: os.kill(os.getpid(), signal.SIGKILL),
    "unreadable": unreadable,
    "nothing": lambda model, data, folder: None,
}}
slow = {{"slow": lambda model, data, folder: time.sleep(600)}}
foreign_files.__file__ = __file__
foreign_files.recipes = lambda products: slow if products else recipes
if __name__ == "__main__":
    sys.exit(foreign_files.main())
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)
    return file


def run(script: Path, folder: Path, operator: str, *args: object) -> dict[str, Any]:
    """The report for a model of that operator."""
    shape = [2, 2]
    node = helper.make_node(operator, ["x", "x"], ["y"])
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )  # fmt: skip
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(folder / "model.onnx"))
    np.savez(folder / "data.npz", x=np.ones(shape, np.float32), other=np.ones(2))
    done = subprocess.run(
        [sys.executable, str(script), *map(str, (folder / "model.onnx", folder / "data.npz", folder / "made", *args))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((folder / "made" / "report.json").read_text())
    return report


def test_failure_is_a_reason(script: Path, tmp_path: Path) -> None:
    report = run(script, tmp_path, "Add")
    assert {label: Path(file).parent.name for label, file in report["files"].items()} == {"whole": "whole"}
    why = report["missing"]
    assert list(why) == ["broken", "killed", "unreadable", "nothing"]
    assert why["broken"] == "exit 1: ValueError: made-up"
    assert why["killed"].startswith("exit -9")
    assert "INVALID_PROTOBUF" in why["unreadable"]
    assert why["nothing"] == "exit 1: RuntimeError: 0 ONNX files were written"


def test_time_limit_is_a_reason(script: Path, tmp_path: Path) -> None:
    report = run(script, tmp_path, "MatMul", "--timeout", 0.5)
    assert report["files"] == {}
    assert report["missing"] == {"slow": "not done after 0.5 s"}


def test_python_that_is_not_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SUITE))
    import foreign_files

    files, missing = foreign_files.made_by(str(tmp_path / "python"), tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path)
    assert files == {}
    (why,) = missing.values()
    assert why.startswith("FileNotFoundError")
