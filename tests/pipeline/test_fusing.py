"""`fuse` as a verb: what a contract allows, results that are not faster, and models with nothing to fuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import deploykit
from deploykit import fusing, gating
from deploykit.artifact import Artifact
from deploykit.errors import OptimizationError, SpeedError
from deploykit.modelfile import read_model
from deploykit.recipe import Recipe
from deploykit.targets import parse_targets


@pytest.fixture
def block(tmp_path: Path) -> Path:
    """Attention without a mask, and a Gelu behind it."""
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[b,t,8] x) => (float[b,t,8] z) {
        lq = MatMul(x, wq) rq = Reshape(lq, heads) tq = Transpose<perm = [0, 2, 1, 3]>(rq)
        lk = MatMul(x, wk) rk = Reshape(lk, heads) tk = Transpose<perm = [0, 2, 3, 1]>(rk)
        lv = MatMul(x, wv) rv = Reshape(lv, heads) tv = Transpose<perm = [0, 2, 1, 3]>(rv)
        dots = MatMul(tq, tk) scores = Mul(dots, half) weights = Softmax<axis = -1>(scores)
        mixed = MatMul(weights, tv) back = Transpose<perm = [0, 2, 1, 3]>(mixed) joined = Reshape(back, whole)
        e1 = Div(joined, root) e2 = Erf(e1) e3 = Add(e2, one) e4 = Mul(joined, e3) z = Mul(e4, half)
    }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    weights = {f"w{n}": rng.standard_normal((8, 8)).astype(np.float32) for n in "qkv"}
    weights |= {n: np.float32(a) for n, a in (("root", 2**0.5), ("one", 1), ("half", 0.5))}
    weights |= {"heads": np.int64([0, 0, 2, 4]), "whole": np.int64([0, 0, 8])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    onnx.save(model, tmp_path / "block.onnx")
    return tmp_path / "block.onnx"


@pytest.fixture
def convs(tmp_path: Path) -> Path:
    """A network in which there is nothing to fuse."""
    text = "g (float[n,1,8,8] x) => (float[n,2,4,4] y) { a = Conv(x, w) b = Relu(a) y = Conv(b, v) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    for name, shape in (("w", (2, 1, 3, 3)), ("v", (2, 2, 3, 3))):
        values = np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def redundant(tmp_path: Path) -> Path:
    """Two nodes of three are needed."""
    text = "g (float[n,4] x) => (float[n,4] y) { a = Identity(x) b = MatMul(a, w) y = Relu(b) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    values = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def judged(monkeypatch: pytest.MonkeyPatch, **verdicts: str) -> None:
    """Let timing give these verdicts, by runtime."""

    def time_pair(parent: Any, model: Any, feeds: Any, settings: Any) -> dict[str, Any]:
        verdict = verdicts[parent.device.split(":")[0]]
        ratio = {"faster": 2.0, "tie": 1.0, "slower": 0.5}[verdict]
        return {"verdict": verdict, "ratio": ratio, "low": ratio, "high": ratio, "parent_ms": 1.0, "ms": 1 / ratio}

    monkeypatch.setattr(gating, "SMALLEST_MS", 0.0)
    monkeypatch.setattr(gating, "time_pair", time_pair)


def test_attention_gelu_and_speed(block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, ort="faster", openvino="tie")
    made = deploykit.fuse(block, tmp_path / "fused")
    step = made.manifest.lineage[-1]
    assert (step.step, step.params["passes"], step.params["changed"]) == ("fuse", "transformers", True)
    assert step.params["fused"] == {"Attention": 1, "Gelu": 1}
    assert [r["verdict"] for r in made.manifest.evidence.benchmark] == ["faster", "tie"]
    # OpenVINO reads these operators of ONNX Runtime.
    assert [r["verdict"] for r in made.manifest.evidence.parity] == ["passed", "passed"]


def test_contract_with_another_runtime_keeps_to_the_standard(block: Path, tmp_path: Path) -> None:
    made = deploykit.fuse(block, tmp_path / "held", contract=["openvino:2026.4"], gate_seconds=0)
    assert made.manifest.lineage[-1].params["passes"] == "onnxscript"
    assert {n.domain for n in read_model(made.path / "model.onnx", weights=False).graph.node} == {""}
    old = deploykit.fuse(block, tmp_path / "old", contract=["triton:24.08"], gate_seconds=0)
    assert old.manifest.lineage[-1].params["fused"] == {"Gelu": 1}


def test_what_auto_and_attention_depend_on(block: Path) -> None:
    for contract, passes, attention in (
        ([], "transformers", True),
        (["ort:1.22"], "transformers", True),
        (["ort:1.20"], "transformers", False),
        (["triton:24.08"], "transformers", False),
        (["ort:1.24", "openvino:2026.4"], "onnxscript", False),
    ):
        held = parse_targets(contract)
        assert fusing.choose_passes(block, held) == passes
        assert fusing.runs_attention(held) == attention


def test_contract_that_lacks_an_operator_refuses_it(
    block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table says what a runtime reads; where it lacks an operator, the graph stays as it was, with the reason."""
    from dataclasses import replace

    from deploykit import deriving

    (target,) = parse_targets(["openvino:2026.4"])
    less = replace(target, contrib=target.contrib - {"Gelu"})
    monkeypatch.setattr(deriving, "contract_of", lambda lineage, asked: (less,))
    made = deploykit.fuse(block, tmp_path / "f", passes="transformers", gate_seconds=0)
    step = made.manifest.lineage[-1]
    assert not step.params["changed"]
    assert any("breaks the contract" in note and "com.microsoft.Gelu" in note for note in step.notes)


def test_nothing_to_fuse(convs: Path, tmp_path: Path) -> None:
    made = deploykit.fuse(convs, tmp_path / "out")
    step = made.manifest.lineage[-1]
    assert (step.params["changed"], step.params["tool"], step.params["passes"]) == (False, "none", "onnxscript")
    assert step.notes[-1] == "nothing was fused; the graph is left as it was"
    assert (made.path / "model.onnx").read_bytes() == convs.read_bytes()
    assert made.manifest.evidence.benchmark == []  # it is the parent's file
    assert [r["verdict"] for r in made.manifest.evidence.parity] == ["passed", "passed"]


def test_not_faster_is_refused(redundant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, ort="tie", openvino="faster")
    with pytest.raises(SpeedError, match=r"the fused model is not faster than its parent: ort:cpu tie 1.00x"):
        deploykit.fuse(redundant, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = deploykit.fuse(redundant, tmp_path / "out", allow_slower=True)
    assert any("allowed, though it is not faster" in note for note in made.manifest.lineage[-1].notes)


def test_runtime_that_cannot_run_the_result_is_recorded(
    redundant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploykit import deriving
    from deploykit.errors import InferenceError

    real = deriving.outputs_of

    def outputs_of(model: Path, device: Any, feeds: Any) -> Any:
        if device.runtime == "openvino":
            raise InferenceError("no such operator")
        return real(model, device, feeds)

    monkeypatch.setattr(deriving, "outputs_of", outputs_of)
    made = deploykit.fuse(redundant, tmp_path / "out", gate_seconds=0)
    assert [r["verdict"] for r in made.manifest.evidence.parity] == ["passed", "failed"]
    assert "openvino:cpu cannot run the result: no such operator" in made.manifest.lineage[-1].notes


def test_unknown_passes(redundant: Path, tmp_path: Path) -> None:
    with pytest.raises(OptimizationError, match="unknown passes 'all'"):
        deploykit.fuse(redundant, tmp_path / "out", passes="all")


def test_recipe(convs: Path, tmp_path: Path) -> None:
    tables = {"fuse": {"model": "net.onnx", "passes": "onnxscript", "gate_seconds": 0.0}}
    deploykit.run(Recipe.from_tables(tables, tmp_path), tmp_path / "out")
    step = Artifact.open(tmp_path / "out" / "fuse").manifest.lineage[-1]
    assert (step.step, step.params["passes"]) == ("fuse", "onnxscript")
