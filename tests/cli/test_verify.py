"""`deploykit verify`: the table, the exit codes, the bisection and its report, and a source as the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def change(source: Path, target: Path, edit: Any) -> Path:
    model = onnx.load(str(source))
    edit(model)
    onnx.save(model, str(target))
    return target


def scale_conv(model: Any) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "w1")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), "w1"))


@pytest.fixture
def wrong(conv_model: Path, tmp_path: Path) -> Path:
    return change(conv_model, tmp_path / "wrong.onnx", scale_conv)


def test_equal_models(cli: Any, conv_model: Path) -> None:
    done = cli("verify", "-m", conv_model, "--against", conv_model)
    assert done.returncode == 0, done.stderr
    assert "passed on ort:cpu" in done.stdout and "passed on openvino:cpu" in done.stdout
    assert "top-1 agreement 100.00%" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["output", "max", "abs", "max", "rel", "cosine", "SQNR", "dB", "top-1"] in lines
    assert any(line[:2] == ["y", "equal"] for line in lines)
    assert "bisection" not in done.stdout


def test_first_wrong_node_is_named_and_saved(cli: Any, conv_model: Path, wrong: Path, tmp_path: Path) -> None:
    done = cli("verify", "-m", wrong, "--against", conv_model, "--device", "ort:cpu", "--report", "found", "--json")
    assert done.returncode == 1
    assert "not verified: failed on ort:cpu" in done.stderr
    (record,) = json.loads(done.stdout)
    found = record["bisection"]
    assert (found["kind"], found["node"], found["op"], found["nodes"]) == ("node", "c1", "Conv", 8)
    assert found["agreeing"] == ["r0"]
    assert record["report"] == "found"
    assert {"node.onnx", "reference_node.onnx", "inputs.npz", "candidate.npz", "reference.npz", "report.json",
            "README.md", "replay.py", "tensors.json"} == {p.name for p in (tmp_path / "found").iterdir()}  # fmt: skip
    assert json.loads((tmp_path / "found" / "report.json").read_text())["case"] == record["outputs"][0]["case"]
    again = cli("verify", "-m", wrong, "--against", conv_model, "--report", "found")
    assert again.returncode == 1 and "found exists" in again.stderr and "Traceback" not in again.stderr


def test_text_output_of_a_failure(cli: Any, conv_model: Path, wrong: Path, tmp_path: Path) -> None:
    done = cli("verify", "-m", wrong, "--against", conv_model)
    assert done.returncode == 1
    assert "bisection: the first node that diverges is 'c1' (Conv)" in done.stdout
    assert "constant 'w1' (input 1) has other values" in done.stdout
    assert "the last tensors that agree: r0" in done.stdout
    assert any(line.split()[:2] == ["y", "DIFFERS"] for line in done.stdout.splitlines())
    assert not list(tmp_path.glob("*bisect*"))
    plain = cli("verify", "-m", wrong, "--against", conv_model, "--no-bisect", "--device", "ort:cpu")
    assert plain.returncode == 1 and "bisection" not in plain.stdout


@pytest.mark.parametrize("args", [[], ["--against", "net.onnx", "--no-bisect"]])
def test_report_without_anything_to_bisect(cli: Any, conv_model: Path, tmp_path: Path, args: list[str]) -> None:
    done = cli("verify", "-m", conv_model, *args, "--report", "out")
    assert done.returncode == 1 and "--against" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_nan_is_located(cli: Any, conv_model: Path, tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        bias = next(t for t in model.graph.initializer if t.name == "b2")
        values = numpy_helper.to_array(bias).copy()
        values[7] = np.nan
        bias.CopyFrom(numpy_helper.from_array(values, "b2"))

    bad = change(conv_model, tmp_path / "nan.onnx", poison)
    done = cli("verify", "-m", bad, "--against", conv_model, "--device", "ort:cpu", "--json")
    (output,) = json.loads(done.stdout)[0]["outputs"]
    assert (output["case"], output["index"]) == (0, [0, 7])
    assert "NaN on one side only at 1 of 10 places, first at [0, 7]" in output["reason"]


def test_outputs_that_do_not_react_are_unverifiable(cli: Any, conv_model: Path, tmp_path: Path) -> None:
    def silence(model: Any) -> None:
        weight = next(t for t in model.graph.initializer if t.name == "w2")
        weight.CopyFrom(numpy_helper.from_array(np.zeros((10, 8), np.float32), "w2"))

    dull = change(conv_model, tmp_path / "dull.onnx", silence)
    done = cli("verify", "-m", dull, "--against", dull)
    assert done.returncode == 1
    assert "unverifiable on ort:cpu" in done.stdout


def test_ties_are_said(cli: Any, tmp_path: Path) -> None:
    def picker(path: str, tilt: float) -> None:
        graph = helper.make_graph(
            [
                helper.make_node("Add", ["x", "tilt"], ["scores"]),
                helper.make_node("TopK", ["scores", "k"], ["values", "places"], name="pick"),
            ],
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 12])],
            [
                helper.make_tensor_value_info("values", TensorProto.FLOAT, ["rows", 3]),
                helper.make_tensor_value_info("places", TensorProto.INT64, ["rows", 3]),
            ],
            [
                numpy_helper.from_array(np.array([3]), "k"),
                numpy_helper.from_array((np.arange(12) * tilt).astype(np.float32), "tilt"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, str(tmp_path / path))

    picker("a.onnx", 0.0)
    picker("b.onnx", 1e-6)
    picker("c.onnx", 0.5)
    rows = np.random.default_rng(0).integers(1, 5, (28, 12)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=rows)
    done = cli("verify", "-m", "b.onnx", "--against", "a.onnx", "--data", "data.npz", "--device", "ort:cpu")
    assert done.returncode == 0, done.stdout
    assert "relaxed: case 0: pick (TopK): ties in" in done.stdout
    wrong = cli("verify", "-m", "c.onnx", "--against", "a.onnx", "--data", "data.npz", "--device", "ort:cpu")
    assert wrong.returncode == 1 and "relaxed:" not in wrong.stdout


FACTORY = """
import torch
from torch import nn


class Picker(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 9)

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)))


def make():
    torch.manual_seed(0)
    return Picker().eval(), (torch.randn(3, 6),)


def bare():
    return make()[0]
"""


def test_against_the_source(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY)
    assert cli("export", "net.py:make", "-o", "a", "--device", "ort:cpu").returncode == 0
    for source in ("net.py:make", "net.py:bare"):
        done = cli("verify", "-m", "a", "--against", source)
        assert done.returncode == 0, done.stderr + done.stdout
        assert "passed on openvino:cpu" in done.stdout

    def corrupt(model: Any) -> None:
        node = next(n for n in model.graph.node if n.op_type == "Erf")
        node.op_type = "Tanh"
        node.name = "planted"

    bad = change(tmp_path / "a" / "model.onnx", tmp_path / "bad.onnx", corrupt)
    found = cli("verify", "-m", bad, "--against", "net.py:make", "--device", "ort:cpu", "--json", "--report", "found")
    assert found.returncode == 1
    (record,) = json.loads(found.stdout)
    assert record["against"] == "source"
    assert record["bisection"]["node"] == "planted", record["bisection"]
    assert not (tmp_path / "found" / "reference_node.onnx").exists()
    other = cli("verify", "-m", "a", "--against", "net.py:missing")
    assert other.returncode == 1 and "Traceback" not in other.stderr


def test_openvino_format_cannot_be_looked_into(cli: Any, conv_model: Path, wrong: Path, tmp_path: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(str(conv_model)), str(tmp_path / "ir.xml"), compress_to_fp16=False)
    done = cli("verify", "-m", wrong, "--against", "ir.xml", "--device", "openvino:cpu")
    assert done.returncode == 1
    assert "cannot be looked into" in done.stdout and "Traceback" not in done.stderr


def test_a_runtime_that_nobody_named_may_be_unable(cli: Any, tmp_path: Path) -> None:
    """OpenVINO has none of the operators of classical models."""
    node = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[0.5], scale=[2.0])
    graph = helper.make_graph(
        [node],
        "scaler",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "scaler.onnx")
    done = cli("verify", "-m", "scaler.onnx", "--against", "scaler.onnx")
    assert done.returncode == 0, done.stderr
    assert "passed on ort:cpu" in done.stdout and "not run on openvino:cpu" in done.stdout
    named = cli("verify", "-m", "scaler.onnx", "--against", "scaler.onnx", "--device", "openvino:cpu")
    assert named.returncode == 1 and named.stderr.count("error:") == 1 and "Traceback" not in named.stderr


def test_a_reference_with_other_inputs(cli: Any, conv_model: Path, tmp_path: Path) -> None:
    """Both sides are named, before anything runs."""

    def rename(model: Any) -> None:
        model.graph.input[0].name = "pixels"
        for node in model.graph.node:
            node.input[:] = ["pixels" if name == "x" else name for name in node.input]

    other = change(conv_model, tmp_path / "other.onnx", rename)
    (tmp_path / "words.py").write_text(WORDS, encoding="utf-8")
    for reference in (other, "words.py:make"):
        done = cli("verify", "-m", conv_model, "--against", reference)
        assert done.returncode == 1
        error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert "takes pixels: float32" in error or "takes ids: int64[batch, 6]" in error
        assert "the model takes x: float32[batch, 3, 12, 12]" in error


def means(length: float | None, rows: Any = "rows") -> Any:
    """The mean over the rows of x [batch, rows, 4], or their sum over a length that somebody took for constant."""
    nodes = [helper.make_node("ReduceSum", ["x", "axis"], ["sum"], keepdims=0)]
    weights = [numpy_helper.from_array(np.array([1]), "axis")]
    if length is None:
        nodes += [
            helper.make_node("Shape", ["x"], ["count"], start=1, end=2),
            helper.make_node("Cast", ["count"], ["length"], to=TensorProto.FLOAT),
        ]
    else:
        weights.append(numpy_helper.from_array(np.array([length], np.float32), "length"))
    nodes.append(helper.make_node("Div", ["sum", "length"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_every_dynamic_dimension_is_varied(cli: Any, tmp_path: Path) -> None:
    """A length frozen at the size that inputs are made up with is right there, and nowhere else."""
    from deploykit.models import load_model, probe_feeds

    onnx.save(means(None), tmp_path / "right.onnx")
    feeds, _ = probe_feeds(load_model(tmp_path / "right.onnx"), None, {})
    size = feeds[0]["x"].shape[1]
    onnx.save(means(size), tmp_path / "frozen.onnx")
    done = cli("verify", "-m", "frozen.onnx", "--against", "right.onnx", "--device", "ort:cpu")
    assert done.returncode == 1 and "the first node that diverges is 'y' (Div)" in done.stdout
    # Who declares one length is compared at that one.
    onnx.save(means(7, rows=7), tmp_path / "seven.onnx")
    done = cli("verify", "-m", "seven.onnx", "--against", "right.onnx", "--device", "ort:cpu")
    assert done.returncode == 0, done.stderr


def test_the_sizes_of_the_source_are_checked(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "mean.py").write_text(MEAN, encoding="utf-8")
    for length, code in ((None, 0), (16, 1)):
        onnx.save(means(length), tmp_path / "m.onnx")
        done = cli("verify", "-m", "m.onnx", "--against", "mean.py:make", "--device", "ort:cpu")
        assert done.returncode == code, done.stdout + done.stderr


def test_a_reference_that_is_not_there(cli: Any, conv_model: Path) -> None:
    done = cli("verify", "-m", conv_model, "--against", "nonsense")
    assert done.returncode == 1
    assert "the reference nonsense does not exist" in done.stderr and "file.py:factory" in done.stderr


WORDS = """
import torch

class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(9, 4)

    def forward(self, ids):
        return self.table(ids).mean(1)

def make():
    return Words(), torch.randint(0, 9, (2, 6))
"""

MEAN = """
import torch

class Mean(torch.nn.Module):
    def forward(self, x):
        return {"y": x.mean(1)}

def make():
    return Mean(), torch.randn(2, 5, 4)
"""
