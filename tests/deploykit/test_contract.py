"""The target contract says which node breaks it, and lowers what changes no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit.artifact import StepRecord
from deploykit.contract import conform, contract_of, needed_ir, refuse, violations, why_not
from deploykit.errors import ContractError
from deploykit.targets import parse_targets


def kinds(model: onnx.ModelProto, *names: str) -> list[tuple[str, str | None]]:
    return [(v.kind, v.node) for v in violations(model, parse_targets(names))]


def test_a_plain_model_keeps_every_contract(linear: Any) -> None:
    assert kinds(linear(), "ort:1.14", "triton:24.08", "openvino:2023.3", "ort:1.32") == []


def test_newer_ir_version_and_opset_are_named(linear: Any) -> None:
    assert kinds(linear(ir_version=10), "ort:1.17") == [("ir_version", None)]
    assert kinds(linear(ir_version=10), "ort:1.18") == []
    found = violations(linear(opset=21), parse_targets(["ort:1.17"]))
    assert [v.kind for v in found] == ["opset"]
    assert "opset 21 of ai.onnx is newer than 20" in found[0].reason


def test_a_node_whose_form_is_newer_is_named(build: Any) -> None:
    gelu = build([helper.make_node("Gelu", ["x"], ["y"], name="act")], {"x": [2]}, {"y": [2]}, opset=20)
    found = [v for v in violations(gelu, parse_targets(["ort:1.16"])) if v.node]
    assert [(v.op, v.since, v.node) for v in found] == [("Gelu", 20, "'act'")]
    assert "--opset 19" in found[0].hint
    assert str(found[0]) == "node 'act' (Gelu-20): this form came with opset 20, and ONNX Runtime 1.16 reads 19"


@pytest.mark.parametrize(
    ("op", "domain", "kind"),
    [
        ("NhwcFusedConv", "com.microsoft", "hardware"),
        ("FusedConv", "com.microsoft", "hardware"),
        ("QLinearAdd", "com.microsoft", "hardware"),
        ("EPContext", "com.microsoft", "hardware"),
        ("Conv", "com.microsoft.nchwc", "hardware"),
        ("Anything", "trt.plugins", "hardware"),
        ("Anything", "my.company", "domain"),
        ("MatMulNBits", "com.microsoft", "operator"),
        ("NoSuchOp", "com.microsoft", "operator"),
        ("NoSuchOp", "", "operator"),
        ("Gelu", "com.microsoft", None),
        ("Scaler", "ai.onnx.ml", None),
    ],
)
def test_domains(build: Any, op: str, domain: str, kind: str | None) -> None:
    node = helper.make_node(op, ["x"], ["y"], name="it", domain=domain)
    domains = {domain: 3 if domain == "ai.onnx.ml" else 1} if domain else {}
    model = build([node], {"x": [2]}, {"y": [2]}, domains=domains)
    found = violations(model, parse_targets(["ort:1.15"]))
    assert [v.kind for v in found] == ([] if kind is None else [kind])
    for v in found:
        assert (v.node, v.op, v.domain) == ("'it'", op, domain)
        assert v.hint


def test_what_openvino_lacks_is_named_with_the_version_that_has_it(build: Any) -> None:
    node = helper.make_node("Attention", ["x", "x", "x"], ["y"], name="att")
    model = build([node], {"x": [1, 2, 3, 4]}, {"y": [1, 2, 3, 4]}, opset=23)
    found = violations(model, parse_targets(["openvino:2024.6"]))
    assert [(v.kind, v.node, v.since) for v in found] == [("operator", "'att'", 23)]
    assert found[0].hint.endswith("has it")
    scaler = build([helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[0.0], scale=[1.0])],
                   {"x": [2]}, {"y": [2]}, domains={"ai.onnx.ml": 3})  # fmt: skip
    assert [v.op for v in violations(scaler, parse_targets(["openvino:2024.6"]))] == ["Scaler"]


def test_nodes_of_branches_and_functions_are_found(build: Any) -> None:
    branch = helper.make_graph(
        [helper.make_node("Foo", ["x"], ["b"], name="inner", domain="my.company")], "b", [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    body = [helper.make_node("Bar", ["a"], ["b"], name="deep", domain="other.company")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("other.company", 1)]
    function = helper.make_function("own", "F", ["a"], ["b"], body, opsets)
    nodes = [
        helper.make_node("If", ["c"], ["z"], name="if", then_branch=branch, else_branch=branch),
        helper.make_node("F", ["z"], ["y"], name="call", domain="own"),
    ]
    model = build(nodes, {"x": [2]}, {"y": [2]}, {"c": np.array(True)}, domains={"my.company": 1, "own": 1},
                  functions=[function])  # fmt: skip
    found = [v.node for v in violations(model, parse_targets(["ort:1.18"]))]
    assert sorted(found) == [
        "'deep' in function own.F",
        "'inner' in If 'if'.else_branch",
        "'inner' in If 'if'.then_branch",
    ]


def test_narrow_types_need_their_ir_version(build: Any) -> None:
    weight = helper.make_tensor("w", TensorProto.INT4, [4, 2], [1, 2, 3, 4, 5, 6, 7, -8])
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    model = build(nodes, {"x": [1, 4]}, {"y": [1, 2]}, {"s": np.float32(0.5)}, opset=21, ir_version=10)
    model.graph.initializer.append(weight)
    assert needed_ir(model) == 10
    assert kinds(model, "ort:1.18") == []
    found = violations(model, parse_targets(["ort:1.17"]))
    assert {v.kind for v in found} == {"ir_version", "opset", "type"}
    assert "int4" in next(v.reason for v in found if v.kind == "type")


def test_the_ir_version_is_lowered_only_where_nothing_needs_it(
    build: Any, linear: Any, save: Any, tmp_path: Path
) -> None:
    path = save(linear(ir_version=10), tmp_path)
    notes = conform(path, parse_targets(["ort:1.17", "openvino:2024.6"]))
    assert notes == ["IR version lowered from 10 to 9, the newest that the target reads"]
    assert onnx.load(str(path)).ir_version == 9
    assert conform(path, parse_targets(["ort:1.17"])) == []
    cast = build([helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT8E5M2),
                  helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT)],
                 {"x": [2]}, {"y": [2]}, opset=19, ir_version=9)  # fmt: skip
    with pytest.raises(ContractError, match="float8e5m2"):
        conform(save(cast, tmp_path), parse_targets(["ort:1.15"]))


def test_an_opset_that_no_node_needs_is_written_lower(build: Any, save: Any, tmp_path: Path) -> None:
    import onnxruntime

    model = build([helper.make_node("Softplus", ["x"], ["y"])], {"x": [3]}, {"y": [3]}, opset=21, ir_version=10)
    path = save(model, tmp_path)
    feeds = {"x": np.array([-1, 0, 2], np.float32)}
    before = onnxruntime.InferenceSession(path).run(None, feeds)
    notes = conform(path, parse_targets(["ort:1.16"]))
    assert notes[0] == "opset 21 written as 19: no operator in it changed in between"
    assert {o.version for o in onnx.load(str(path)).opset_import} == {19}
    np.testing.assert_array_equal(onnxruntime.InferenceSession(path).run(None, feeds), before)


def test_an_opset_that_can_be_converted_is(build: Any, save: Any, tmp_path: Path) -> None:
    path = save(build([helper.make_node("Identity", ["x"], ["y"])], {"x": [3]}, {"y": [3]}, opset=21), tmp_path)
    notes = conform(path, parse_targets(["ort:1.17"]))
    assert notes == ["opset converted from 21 to 20, the newest that the target reads"]


def test_an_opset_that_cannot_be_lowered_is_refused_with_the_node(build: Any, save: Any, tmp_path: Path) -> None:
    gelu = build([helper.make_node("Gelu", ["x"], ["y"], name="act")], {"x": [2]}, {"y": [2]}, opset=20)
    path = save(gelu, tmp_path)
    raw = path.read_bytes()
    with pytest.raises(ContractError, match=r"'act'.*--opset 19"):
        conform(path, parse_targets(["ort:1.16"]))
    assert path.read_bytes() == raw


def test_external_weights_stay_where_they_are(linear: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear(ir_version=10), str(path), save_as_external_data=True, location="w.data", size_threshold=0)
    weights = (tmp_path / "w.data").read_bytes()
    conform(path, parse_targets(["ort:1.17"]))
    assert (tmp_path / "w.data").read_bytes() == weights
    loaded = onnx.load(str(path))
    assert loaded.ir_version == 9
    assert onnx.numpy_helper.to_array(loaded.graph.initializer[0]).tolist() == np.arange(12.0).reshape(4, 3).tolist()


def test_why_not_leaves_versions_aside(build: Any, linear: Any, save: Any, tmp_path: Path) -> None:
    targets = parse_targets(["ort:1.17"])
    assert why_not(save(linear(ir_version=10), tmp_path), targets) is None
    fused = build([helper.make_node("FusedConv", ["x", "w"], ["y"], name="f", domain="com.microsoft")],
                  {"x": [1, 1, 3, 3]}, {"y": [1, 1, 3, 3]}, {"w": np.ones((1, 1, 1, 1), np.float32)},
                  domains={"com.microsoft": 1})  # fmt: skip
    assert "node 'f' (com.microsoft.FusedConv)" in (why_not(save(fused, tmp_path), targets) or "")


def test_a_refusal_names_nodes_first_and_counts_the_rest(build: Any) -> None:
    nodes = [helper.make_node("Foo", ["x"], [f"y{i}"], name=f"n{i}", domain="my") for i in range(5)]
    model = build(nodes, {"x": [2]}, {"y0": [2]}, domains={"my": 1}, ir_version=10)
    with pytest.raises(ContractError, match=r"m breaks .*ort:1.17: node 'n0'.*'n1'.*'n2'.*and 3 more"):
        refuse(violations(model, parse_targets(["ort:1.17"])), "m")
    refuse([], "m")


def test_the_contract_of_a_lineage_is_kept_and_added_to() -> None:
    def record(step: str, **params: object) -> StepRecord:
        return StepRecord(step=step, params=params, tools={}, parent=None, seconds=0)  # type: ignore[arg-type]

    lineage = [record("export", contract=["ort:1.18"]), record("simplify"), record("x", contract=["openvino:2024.6"])]
    found = contract_of(lineage, ["triton:24.08", "ort:1.18"])
    assert [t.name for t in found] == ["ort:1.18", "openvino:2024.6", "triton:24.08"]
    assert contract_of([], []) == ()
