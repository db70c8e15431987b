"""`deploykit quantize weights`, `half` and `sweep` as commands, and as steps of a recipe."""

from __future__ import annotations

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import deploykit

RECIPE = """
[small]
step = "quantize-weights"
model = "net.onnx"
block = 16
form = "nbits"
min_cosine = 0.9
gate_seconds = 0

[half]
step = "quantize-half"
model = "net.onnx"
precision = "bf16"
gate_seconds = 0
"""


def test_steps_of_a_recipe(run_cli, tmp_path):
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((64, 64), np.float32) / 8, f"w{i}") for i in range(2)]
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y"])]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 64]) for n in "xy"]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "net.onnx"
    )
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = run_cli("run", "recipe.toml", "-o", "out")
    assert done.returncode == 0, done.stderr
    last = {name: deploykit.Artifact.open(tmp_path / "out" / name).manifest.lineage[-1] for name in ("small", "half")}
    assert (last["small"].params["block"], last["small"].params["form"]) == (16, "nbits")
    assert last["small"].params["quantized_nodes"] == 2
    assert (last["half"].params["precision"], last["half"].params["stored"]) == ("bf16", 2)


def test_half_has_no_other_settings_to_try(cli, conv_model):
    done = cli("quantize", "half", "-m", conv_model, "-o", "x", "--no-escalation")
    assert done.returncode == 2 and "--no-escalation" in done.stderr


def test_a_sweep_prints_a_row_for_what_failed_too(run_cli, cli, conv_model, tmp_path):
    done = run_cli(
        "quantize", "sweep", "-m", conv_model, "--data", "calib.npz", "-o", "swept", "--scheme", "static",
        "--scheme", "weights8", "--rounds", 3, "--seconds", 0.02, "--device", "ort:cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split()[:1] == ["static"] and "2/2 Conv" in line for line in lines)
    assert any(line.split()[:1] == ["weights8"] and "nothing to quantize" in line for line in lines)
    assert lines[-1].startswith("ort:cpu: ")
    report = json.loads((tmp_path / "swept" / "sweep.json").read_text())
    assert [row["scheme"] for row in report["rows"]] == ["parent", "static", "weights8"]
    again = cli("quantize", "sweep", "-m", conv_model, "-o", "swept")
    assert again.returncode == 1 and again.stderr.count("error:") == 1


def test_wrong_usage(cli, conv_model):
    for args in (
        ["weights", "--bits", "5"], ["weights", "--block", "48"], ["half", "--precision", "fp8"],
        ["sweep", "--rounds", "1"],
    ):  # fmt: skip
        done = cli("quantize", *args, "-m", conv_model, "-o", "x")
        assert done.returncode == 2 and "Traceback" not in done.stderr
