"""Simplify and quantize as verbs: what they compare with, and at which shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import deploykit.weights
from deploykit import deriving
from deploykit.errors import InferenceError
from deploykit.machine import free_memory
from deploykit.models import load_model
from deploykit.optimizers import SimplifierProcess, simplifier_process, simplify
from deploykit.pipeline import quantize_dynamic
from deploykit.reference import run_parent
from deploykit.runtimes import parse_device

ORT = parse_device("ort:cpu")


def save(folder: Path, text: str, **weights: Any) -> Path:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> ' + text)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_every_dynamic_dimension_varies(tmp_path: Path) -> None:
    path = save(tmp_path, "g (float[n,t,4] x) => (float[n,t,4] y) { y = Relu(x) }")
    found = run_parent(load_model(path), ORT, None, {})
    shapes = {f["x"].shape for f in found.feeds}
    assert len({n for n, _, _ in shapes}) > 2
    assert len({t for _, t, _ in shapes}) > 2
    assert len(found.feeds) == len(found.outputs)
    chosen = run_parent(load_model(path), ORT, None, {"t": 7})
    assert {f["x"].shape[1] for f in chosen.feeds} == {7}


def test_shapes_that_the_model_refuses_are_left_out(tmp_path: Path) -> None:
    path = save(tmp_path, "g (float[n,4] x) => (float[1,4] y) { y = Reshape(x, s) }", s=np.int64([1, 4]))
    found = run_parent(load_model(path), ORT, None, {})
    assert [f["x"].shape for f in found.feeds] == [(1, 4)] * 3
    assert len({o["y"].tobytes() for o in found.outputs}) == 3
    assert "not compared at" in found.notes[0]
    with pytest.raises(InferenceError, match="does not run on made-up inputs"):
        run_parent(load_model(path), ORT, None, {"n": 3})


def test_simplifier_that_freezes_a_dimension_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that writes the example's sequence length into the graph gives the right numbers at that length only."""
    path = save(tmp_path, "g (float[n,t,4] x) => (float[n,t,4] y) { y = Relu(x) }")
    frozen = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n,t,4] x) => (float[n,t,4] y) '
        "{ r = Relu(x) y = Reshape(r, s) }"
    )
    frozen.graph.initializer.append(numpy_helper.from_array(np.int64([-1, 16, 4]), "s"))
    onnx.save(frozen, tmp_path / "frozen.onnx")
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, shutil, sys\nfor line in sys.stdin:\n"
        f"    shutil.copyfile({str(tmp_path / 'frozen.onnx')!r}, json.loads(line)['target'])\n"
        "    print(json.dumps({'failed': None}), flush=True)\n"
    )
    monkeypatch.setattr(simplifier_process, "_WORKER", worker)
    monkeypatch.setattr(simplify, "_grown", lambda *args: None)
    with SimplifierProcess() as process:
        made = deriving.simplify(path, tmp_path / "out", process=process)
    notes = made.manifest.lineage[-1].notes
    assert made.manifest.lineage[-1].params["tool"] == "none"
    assert sum("was not used" in note for note in notes) == 2
    assert process.starts == 1


def test_large_weights_are_set_aside_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploykit.weights, "WHOLE_LIMIT_BYTES", 0)
    text = (
        "g (float[n,512] x) => (float[n,520] y) { i = Identity(x) two = Add(one, one) h = MatMul(i, w) "
        "a = Identity(h) y = Mul(a, two) }"
    )
    weights = {"w": normal(512, 520) / 20, "one": np.float32(1)}
    made = deriving.simplify(save(tmp_path, text, **weights), tmp_path / "out")
    params = made.manifest.lineage[-1].params
    assert (params["tool"], params["weights_set_aside"], params["nodes_after"]) == ("onnxsim", 1, 2)
    assert {p.name for p in made.path.glob("model*")} == {"model.onnx", "model.onnx.data"}
    model = onnx.load(made.model_path)
    [large] = [t for t in model.graph.initializer if t.name == "w"]
    np.testing.assert_array_equal(numpy_helper.to_array(large), weights["w"])
    assert [v.name for v in model.graph.input] == ["x"]


def test_openvino_is_left_out_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (free_memory() or 0) > 2**20
    path = save(tmp_path, "g (float[n,32] x) => (float[n,64] y) { y = MatMul(x, w) }", w=normal(32, 64) / 6)
    monkeypatch.setattr(deriving, "free_memory", lambda: 1000)
    made = quantize_dynamic(path, tmp_path / "out")
    verdicts = {r["device"]: r["verdict"] for r in made.manifest.evidence.parity}
    assert verdicts == {"ort:cpu": "passed", "openvino:cpu": "not compared"}
    assert not load_model(made.path).unverifiable
    assert any("not compared in openvino:cpu" in note for note in made.manifest.lineage[-1].notes)
