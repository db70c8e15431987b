"""`deploykit inspect` and `--for`, as a user meets them."""

import json

import pytest

from deploykit.artifact import Artifact


def test_inspect_shows_everything_and_takes_both_spellings(cli, conv_model):
    done = cli("inspect", "-m", conv_model, "--dim", "batch=2", "--for", "triton:24.08")
    assert done.returncode == 0, done.stderr
    macs = 2 * (12 * 12 * 8 * 27 + 12 * 12 * 8 * 8 * 9 + 8 * 10)
    for text in ("input     x: float32[batch, 3, 12, 12]", "opset ai.onnx 17, IR 9", "Conv 2", "at batch=2",
                 "runtime   ort:cpu", "loads", "contract  triton:24.08: kept", "0% of nodes", "memory"):  # fmt: skip
        assert text in done.stdout, (text, done.stdout)
    assert f"macs      {macs:,}" in done.stdout
    assert cli("inspect", conv_model, "--no-load").returncode == 0
    for wrong in ([], [conv_model, "-m", conv_model], ["-m", conv_model, "--diff", conv_model, "--for", "ort:1.18"]):
        assert cli("inspect", *wrong).returncode == 2


def test_json_is_json_and_has_the_artifacts_facts(cli, conv_model, tmp_path):
    assert cli("export", conv_model, "-o", "a", "--for", "ort:1.18").returncode == 0
    done = cli("inspect", "-m", "a", "--json", "--no-load")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    assert found["artifact"]["sha256"] == Artifact.open(tmp_path / "a").digest
    assert found["artifact"]["lineage"][0]["params"]["contract"] == ["ort:1.18"]
    assert found["artifact"]["evidence"]["parity"][0]["verdict"] == "passed"
    assert found["contract"]["targets"] == ["ort:1.18"]


def test_a_broken_contract_is_exit_code_1_and_names_the_node(cli, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    nodes = [helper.make_node("NhwcFusedConv", ["x", "w"], ["y"], name="bound", domain="com.microsoft")]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 4, 1]) for n in ("x", "w", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:2], values[2:]), ir_version=9,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )  # fmt: skip
    onnx.save(model, str(tmp_path / "fused.onnx"))
    done = cli("inspect", "-m", "fused.onnx", "--for", "ort:1.18", "--no-load")
    assert done.returncode == 1
    assert "node 'bound' (com.microsoft.NhwcFusedConv)" in done.stdout
    assert done.stderr.startswith("error: ") and "ort:1.18" in done.stderr
    in_json = cli("inspect", "-m", "fused.onnx", "--for", "ort:1.18", "--no-load", "--json")
    assert in_json.returncode == 1
    assert json.loads(in_json.stdout)["contract"]["violations"][0]["node"] == "'bound'"


def test_diff(cli, conv_model, tmp_path):
    assert cli("quantize", "static", "-m", conv_model, "--data", "calib.npz", "-o", "q").returncode == 0
    done = cli("inspect", "-m", conv_model, "--diff", "q")
    assert done.returncode == 0, done.stderr
    assert "signature the same" in done.stdout
    for text in ("QuantizeLinear", "int8", "MACs", "dequantized", "SQNR dB"):
        assert text in done.stdout
    found = json.loads(cli("inspect", "-m", conv_model, "--diff", "q", "--json").stdout)
    assert found["macs"]["delta"] == 0
    assert {r["name"] for r in found["initializers"]["changed"]} >= {"w0", "w1", "w2"}
    assert all(r["sqnr_db"] > 30 for r in found["initializers"]["changed"] if r["name"] in ("w0", "w1", "w2"))


@pytest.mark.parametrize(
    ("target", "words"),
    [("ort:1.13", "ort:1.14"), ("triton:25.08", "--for ort:VERSION"), ("nonsense", "triton:YY.MM")],
)
def test_an_unknown_target_is_an_error_that_says_what_is_known(cli, conv_model, tmp_path, target, words):
    done = cli("export", conv_model, "-o", "out", "--for", target)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_a_contract(cli, conv_model):
    done = cli("export", conv_model, "-o", "out", "--for", "triton:24.08", "--for", "openvino:2024.6", "--dry-run")
    assert 'contract = ["triton:24.08", "openvino:2024.6"]' in done.stdout
