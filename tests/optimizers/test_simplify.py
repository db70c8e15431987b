"""Simplification, and tools that crash, hang, fail, lie or make the graph larger."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import ModelError
from deploykit.modelfile import read_model
from deploykit.optimizers import SimplifierProcess, SimplifyConfig, StepResult, optimize, simplifier_process, simplify
from deploykit.runtimes import open_session

FEEDS = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}


def save(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, Any] | None = None) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def redundant(tmp_path: Path) -> Path:
    """y = x + 2, in five nodes of which one is needed."""
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[1, 0]),
        helper.make_node("Add", ["one", "one"], ["two"]),
        helper.make_node("Add", ["c", "two"], ["y"]),
    ]
    return save(tmp_path / "model.onnx", nodes, {"one": np.float32([1])})


def accept(candidate: Path) -> str | None:
    return None


def run(model: Path, target: Path, check: Callable[[Path], str | None] = accept, timeout_s: float = 60) -> StepResult:
    before = model.read_bytes()
    result = optimize(model, SimplifyConfig(timeout_s=timeout_s), target, check=check)
    assert model.read_bytes() == before
    assert target.is_file()
    assert result.changed == (target.read_bytes() != before)
    return result


def outputs(model: Path) -> Any:
    with open_session(model, threads=1) as session:
        return session.run(FEEDS)["y"]


def nodes(model: Path) -> int:
    return len(onnx.load(model).graph.node)


TOOLS = pytest.mark.parametrize("tool", ["onnxsim", "onnxslim"])


@TOOLS
def test_redundant_nodes_go(redundant: Path, tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "_TOOLS", (tool,))
    result = run(redundant, tmp_path / "out.onnx")
    assert result.changed
    assert result.notes == ()
    assert nodes(tmp_path / "out.onnx") == 1
    assert (result.params["tool"], result.params["nodes_before"], result.params["nodes_after"]) == (tool, 5, 1)
    assert re.match(r"\d+\.\d+", result.tools[tool])
    np.testing.assert_allclose(outputs(tmp_path / "out.onnx"), FEEDS["x"] + 2, rtol=1e-6)
    assert read_model(tmp_path / "out.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_tools_are_those_of_the_worker() -> None:
    assert simplify._TOOLS == ("onnxsim", "onnxslim")
    assert simplifier_process._WORKER.is_file()


# --- tools that fail -------------------------------------------------------------------------------------------------

# Stands for simplify_worker.py; the first tool misbehaves, the second copies.
_WORKER = """
import json, os, shutil, signal, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    tool, source, target, limit = json.loads(line).values()
    failed = None
    if tool in ("bad", "worse"):
        {deed}
    else:
        shutil.copyfile(source, target)
    answers.write(json.dumps({{"failed": failed}}) + "\\n")
    answers.flush()
"""


@pytest.fixture
def misbehave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def use(deed: str, tools: tuple[str, ...] = ("bad", "copier")) -> Path:
        worker = tmp_path / "worker.py"
        worker.write_text(_WORKER.format(deed=deed))
        monkeypatch.setattr(simplifier_process, "_WORKER", worker)
        monkeypatch.setattr(simplify, "_TOOLS", tools)
        return worker

    return use


DEEDS = {
    "crash": ("os.kill(os.getpid(), signal.SIGSEGV)", f"it crashed with signal {int(signal.SIGSEGV)}"),
    "last words": (
        "print('terminate called'); sys.stdout.flush(); os.abort()",
        f"it crashed with signal {int(signal.SIGABRT)} (terminate called)",
    ),
    "hang": ("time.sleep(600)", "it took more than 2 s"),
    "half an answer": ("answers.write('{'); answers.flush(); time.sleep(600)", "it took more than 2 s"),
    "reason": ("failed = 'ValueError: of its own'", "it failed (ValueError: of its own)"),
    "exit": ("os._exit(3)", "it ended with exit code 3"),
    "nothing": ("pass", "it failed (it wrote nothing)"),
    "no model": ("open(target, 'w').write('no model')", "it wrote no usable file"),
    "cut off": ("open(target, 'wb').write(open(source, 'rb').read()[:99])", "it wrote no usable file"),
    "talkative": ("print('x' * 10_000_000); sys.exit('the reason')", "it ended with exit code 1 (the reason)"),
    "renamed output": (
        "import onnx; m = onnx.load(source); m.graph.node[-1].output[0] = m.graph.output[0].name = 'z'; "
        "onnx.save(m, target)",
        "it changed y to z",
    ),
    "other type": (
        "import onnx; m = onnx.load(source); m.graph.input[0].type.tensor_type.elem_type = 11; onnx.save(m, target)",
        "it changed the type or rank of 'x'",
    ),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_next_tool_is_tried(redundant: Path, tmp_path: Path, misbehave: Any, deed: str) -> None:
    code, why = DEEDS[deed]
    misbehave(code)
    # A worker that is to be found hanging gets little time, one that imports onnx on a busy machine gets enough.
    result = run(redundant, tmp_path / "out.onnx", timeout_s=2 if "sleep" in code else 60)
    assert len(result.notes) == 1
    assert result.notes[0].startswith(f"bad was not used: {why}")
    assert result.notes[0].isprintable()
    assert result.params["tool"] == "copier"
    assert result.params["nodes_after"] == 5


def test_no_tool_works(redundant: Path, tmp_path: Path, misbehave: Any) -> None:
    misbehave("os._exit(1)", tools=("bad", "worse"))
    result = run(redundant, tmp_path / "out.onnx")
    assert not result.changed
    assert result.params == {"tool": "none", "nodes_before": 5, "nodes_after": 5}
    assert len(result.notes) == 3
    assert "left as it was" in result.notes[-1]


def test_larger_graph_is_no_simplification(redundant: Path, tmp_path: Path, misbehave: Any) -> None:
    grow = (
        "import onnx; m = onnx.load(source); n = m.graph.node.add(); n.op_type = 'Identity'; "
        "n.input.append('x'); n.output.append('unused'); onnx.save(m, target)"
    )
    misbehave(grow)
    seen: list[Path] = []

    def check(candidate: Path) -> str | None:
        seen.append(candidate)
        return None

    result = run(redundant, tmp_path / "out.onnx", check)
    assert result.notes == ("bad was not used: it made the graph larger: 6 nodes instead of 5",)
    assert len(seen) == 1  # such a candidate is not worth a comparison
    assert nodes(tmp_path / "out.onnx") == 5


def test_branch_in_place_of_its_condition_is_smaller(tmp_path: Path, misbehave: Any) -> None:
    """More nodes at the top, fewer in all."""

    def branch(name: str, value: float) -> onnx.GraphProto:
        made = [
            helper.make_node("Constant", [], [f"{name}0"], value_float=float(value)),
            helper.make_node("Add", ["x", f"{name}0"], [f"{name}1"]),
            helper.make_node("Relu", [f"{name}1"], [f"{name}2"]),
        ]
        out = helper.make_tensor_value_info(f"{name}2", TensorProto.FLOAT, ["batch", 4])
        return helper.make_graph(made, name, [], [out])

    condition = helper.make_node("If", ["yes"], ["y"], then_branch=branch("t", 1), else_branch=branch("e", 2))
    model = save(tmp_path / "model.onnx", [condition], {"yes": np.array(True)})
    flat = [
        helper.make_node("Constant", [], ["c"], value_float=1.0),
        helper.make_node("Add", ["x", "c"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    save(tmp_path / "flat.onnx", flat)
    misbehave(f"shutil.copyfile({str(tmp_path / 'flat.onnx')!r}, target)")
    result = run(model, tmp_path / "out.onnx")
    assert result.params["tool"] == "bad"
    assert (result.params["nodes_before"], result.params["nodes_after"]) == (7, 3)
    np.testing.assert_array_equal(outputs(model), outputs(tmp_path / "out.onnx"))


def test_one_process_serves_many_models_and_survives_crashes(redundant: Path, tmp_path: Path, misbehave: Any) -> None:
    misbehave("os.abort()")
    with SimplifierProcess() as process:
        for tool, starts in (("copier", 1), ("copier", 1), ("bad", 1), ("copier", 2), ("copier", 2)):
            why = process.run(tool, redundant, tmp_path / "out.onnx", 60)
            assert (why is not None) == (tool == "bad")
            assert process.starts == starts
        child = process._child
    assert child is not None and child.returncode is not None  # nothing is left running


def test_process_that_died_between_two_models(redundant: Path, tmp_path: Path, misbehave: Any) -> None:
    misbehave("pass")
    with SimplifierProcess() as process:
        assert process.run("copier", redundant, tmp_path / "a.onnx", 60) is None
        assert process._child is not None
        process._child.kill()
        process._child.wait()
        assert process.run("copier", redundant, tmp_path / "b.onnx", 60) is None


def test_real_tools_in_one_process(redundant: Path, tmp_path: Path) -> None:
    with SimplifierProcess() as process:
        for number, tool in enumerate(simplify._TOOLS * 2):
            assert process.run(tool, redundant, tmp_path / f"{number}.onnx", 60) is None
            assert nodes(tmp_path / f"{number}.onnx") == 1
        (tmp_path / "broken.onnx").write_bytes(b"no model")
        why = process.run("onnxsim", tmp_path / "broken.onnx", tmp_path / "out.onnx", 60)
        assert why is not None and why.startswith("it failed (")
        assert process.starts == 1


# --- results that the check refuses ----------------------------------------------------------------------------------


def test_unacceptable_result_then_the_next(redundant: Path, tmp_path: Path) -> None:
    answers = ["output y differs", None]
    seen: list[int] = []

    def check(candidate: Path) -> str | None:
        seen.append(nodes(candidate))
        return answers[len(seen) - 1]

    result = run(redundant, tmp_path / "out.onnx", check)
    assert seen == [1, 1]
    assert result.params["tool"] == "onnxslim"
    assert result.notes == ("onnxsim was not used: output y differs",)
    assert result.changed


def test_no_acceptable_result(redundant: Path, tmp_path: Path) -> None:
    result = run(redundant, tmp_path / "out.onnx", lambda candidate: "it does not load")
    assert not result.changed
    assert result.notes == (
        "onnxsim was not used: it does not load",
        "onnxslim was not used: it does not load",
        "no simplifier gave an acceptable result; the graph is left as it was",
    )
    assert (tmp_path / "out.onnx").read_bytes() == redundant.read_bytes()


def test_errors_of_the_check_are_not_swallowed(redundant: Path, tmp_path: Path, misbehave: Any) -> None:
    misbehave("shutil.copyfile(source, target)")

    def check(candidate: Path) -> str | None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimize(redundant, SimplifyConfig(), tmp_path / "out.onnx", check=check)
    assert not (tmp_path / "out.onnx").exists()


def test_external_data_come_along(redundant: Path, tmp_path: Path, misbehave: Any) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "result").mkdir()
    model = onnx.load(redundant)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "one"))
    onnx.save(model, tmp_path / "source" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    misbehave("os._exit(1)", tools=("bad",))
    result = run(tmp_path / "source" / "m.onnx", tmp_path / "result" / "model.onnx")
    assert not result.changed
    assert sorted(p.name for p in (tmp_path / "result").iterdir()) == ["model.onnx", "w.bin"]
    np.testing.assert_allclose(outputs(tmp_path / "result" / "model.onnx"), FEEDS["x"] + 2, rtol=1e-6)


def test_broken_source(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError):
        optimize(tmp_path / "m.onnx", SimplifyConfig(), tmp_path / "out.onnx", check=accept)
    assert not (tmp_path / "out.onnx").exists()
