"""A contract chosen at export holds for every step after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit import quantizer
from deploykit.artifact import Artifact
from deploykit.errors import ContractError
from deploykit.optimizers import StepConfig, StepResult
from deploykit.pipeline import export, quantize_dynamic, run, simplify

F32 = np.float32


def net(folder: Path, *, opset: int = 17, ir_version: int = 10, act: str = "Relu") -> Path:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node(act, ["a"], ["b"], name="act"),
        helper.make_node("MatMul", ["b", "w1"], ["y"], name="second"),
    ]
    weights = {"w0": (32, 32), "w1": (32, 8)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(rng.standard_normal(s).astype(F32) / 4, n) for n, s in weights.items()],
    )  # fmt: skip
    path = folder / "net.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version), str(path)
    )
    return path


def ir_version(artifact: Artifact) -> int:
    return int(onnx.load(str(artifact.model_path)).ir_version)


def contract(artifact: Artifact) -> Any:
    return artifact.manifest.lineage[-1].params["contract"]


def test_every_step_keeps_the_contract(tmp_path: Path) -> None:
    exported = export(net(tmp_path), tmp_path / "a", contract=["ort:1.17"])
    assert (ir_version(exported), contract(exported)) == (9, ["ort:1.17"])
    assert any("IR version lowered from 10 to 9" in n for n in exported.manifest.lineage[0].notes)
    simple = simplify(exported.path, tmp_path / "b", contract=["openvino:2024.6"])
    assert ir_version(simple) <= 9
    assert contract(simple) == ["ort:1.17", "openvino:2024.6"]
    small = quantize_dynamic(simple.path, tmp_path / "c", min_cosine=0.9)
    assert ir_version(small) <= 9
    assert contract(small) == ["ort:1.17", "openvino:2024.6"]
    free = export(net(tmp_path), tmp_path / "free")
    assert (ir_version(free), contract(free)) == (10, [])


def test_a_newer_opset_is_converted_and_compared_with_the_source(tmp_path: Path) -> None:
    made = export(net(tmp_path, opset=21), tmp_path / "a", contract=["triton:24.04"])
    model = onnx.load(str(made.model_path))
    assert {o.version for o in model.opset_import if o.domain == ""} == {20}
    assert made.manifest.evidence.parity[0]["verdict"] == "passed"


def test_what_cannot_be_lowered_is_refused_with_its_node_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"node 'act' \(Gelu-20\).*opset 19"):
        export(net(tmp_path, opset=20, act="Gelu"), tmp_path / "a", contract=["ort:1.16"])
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("domain", ["com.microsoft", "my.company"])
def test_an_optimizer_that_breaks_the_contract_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, domain: str
) -> None:
    """A quantizer that adds a fused operator of the runtime gives right numbers, and is refused all the same."""
    exported = export(net(tmp_path), tmp_path / "a", contract=["ort:1.17"])

    def fuse(model: Path, config: StepConfig, target: Path, **_: Any) -> StepResult:
        proto = onnx.load(str(model))
        proto.graph.node[0].op_type, proto.graph.node[0].domain = "FusedMatMul", domain
        if domain == "com.microsoft":
            proto.graph.node[1].op_type, proto.graph.node[1].domain = "QGemm", domain
        proto.opset_import.append(helper.make_opsetid(domain, 1))
        onnx.save(proto, str(target))
        return StepResult(changed=True)

    monkeypatch.setattr(quantizer, "optimize", fuse)
    with pytest.raises(ContractError, match="QGemm" if domain == "com.microsoft" else "first.*my.company"):
        quantize_dynamic(exported.path, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.glob(".b*"))


def test_recipes_carry_contracts(tmp_path: Path) -> None:
    net(tmp_path)
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(0).standard_normal((16, 32)).astype(F32))
    (tmp_path / "recipe.toml").write_text(
        '[export]\nsource = "net.onnx"\ncontract = ["ort:1.17"]\n\n[simplify]\ncontract = ["openvino:2024.6"]\n\n'
        '[int8]\nstep = "quantize-static"\ndata = "calib.npz"\ncontract = ["triton:24.08"]\n\n'
        '[dynamic]\nstep = "quantize-dynamic"\nmodel = "simplify"\ncontract = ["ort:1.20"]\nmin_cosine = 0.9\n'
    )
    made = run(tmp_path / "recipe.toml", tmp_path / "out")
    assert contract(made["int8"]) == ["ort:1.17", "openvino:2024.6", "triton:24.08"]
    assert contract(made["dynamic"]) == ["ort:1.17", "openvino:2024.6", "ort:1.20"]
    assert max(ir_version(artifact) for artifact in made.values()) <= 9
