"""`fuse` as a verb: MiniLM with its real weights, what a contract allows, and results that are not faster."""

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


@pytest.fixture(scope="module")
def exported(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return deploykit.export(minilm_dir, tmp_path_factory.mktemp("minilm") / "fp32", devices=["ort:cpu"])


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


def test_minilm(exported: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, ort="faster", openvino="tie")
    made = deploykit.fuse(exported.path, tmp_path / "fused")
    step = made.manifest.lineage[-1]
    assert step.step == "fuse" and step.parent == exported.digest
    assert (step.params["passes"], step.params["changed"]) == ("transformers", True)
    assert step.params["fused"] == {"Attention": 6, "BiasGelu": 6, "SkipLayerNormalization": 12}
    assert step.params["nodes_after"] < step.params["nodes_before"] / 3
    assert made.manifest.evidence.parity[0]["verdict"] == "passed"
    assert [r["verdict"] for r in made.manifest.evidence.benchmark] == ["faster", "tie"]
    # A row of which the mask hides all is what it was, and so is one of which it hides the end.
    ids = np.arange(21).reshape(3, 7) + 1000
    mask = np.array([[1] * 7, [1] * 3 + [0] * 4, [0] * 7], np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    with deploykit.open_session(exported) as old, deploykit.open_session(made) as new:
        want, have = old.run(feeds)["last_hidden_state"], new.run(feeds)["last_hidden_state"]
    assert np.isfinite(want).all()
    np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-4)


def test_minilm_for_other_runtimes_keeps_to_the_standard(exported: Artifact, tmp_path: Path) -> None:
    made = deploykit.fuse(exported.path, tmp_path / "held", contract=["openvino:2026.4"], gate_seconds=0)
    assert made.manifest.lineage[-1].params["passes"] == "onnxscript"
    assert {n.domain for n in read_model(made.path / "model.onnx", weights=False).graph.node} == {""}


def test_what_auto_and_attention_depend_on(exported: Artifact) -> None:
    path = exported.path / "model.onnx"
    for contract, passes, attention in (
        ([], "transformers", True),
        (["ort:1.22"], "transformers", True),
        (["ort:1.20"], "transformers", False),
        (["triton:24.08"], "transformers", False),
        (["ort:1.24", "openvino:2026.4"], "onnxscript", False),
    ):
        held = parse_targets(contract)
        assert fusing.choose_passes(path, held) == passes
        assert fusing.runs_attention(held) == attention


def test_contract_that_lacks_an_operator_refuses_it(
    exported: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table says what a runtime reads; where it lacks an operator, the graph stays as it was, with the reason."""
    from dataclasses import replace

    from deploykit import deriving

    (target,) = parse_targets(["openvino:2026.4"])
    less = replace(target, contrib=target.contrib - {"BiasGelu"})
    monkeypatch.setattr(deriving, "contract_of", lambda lineage, asked: (less,))
    made = deploykit.fuse(exported.path, tmp_path / "f", passes="transformers", gate_seconds=0)
    step = made.manifest.lineage[-1]
    assert not step.params["changed"]
    assert any("breaks the contract" in note and "com.microsoft.BiasGelu" in note for note in step.notes)


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
    with pytest.raises(SpeedError, match="the fused model is not faster than its parent: ort:cpu tie 1.00x"):
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
