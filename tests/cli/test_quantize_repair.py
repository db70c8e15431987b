"""`deploykit quantize repair`: the verb, the command and the recipe's step."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import quantize_static

import deploykit
from deploykit.errors import OptimizationError, ParityError
from deploykit.optimizers import RepairConfig
from deploykit.runtimes import open_session


class Reader:
    def __init__(self, images):
        self.feeds = iter([{"x": images[i : i + 8]} for i in range(0, len(images), 8)])

    def get_next(self):
        return next(self.feeds, None)


@pytest.fixture
def theirs(conv_model, tmp_path):
    """A residual net with onnxruntime's default quantization: int8 activations."""
    path = tmp_path / "theirs.onnx"
    quantize_static(str(conv_model), str(path), Reader(np.load(tmp_path / "calib.npz")["x"]))
    return path


def test_the_command_says_what_it_did(run_cli, theirs, tmp_path):
    data = tmp_path / "calib.npz"
    done = run_cli("quantize", "repair", "-m", theirs, "-o", tmp_path / "made", "--data", data, "--json")
    assert done.returncode == 0, done.stderr
    assert "bit-exact: " in done.stderr
    manifest = json.loads(done.stdout)["manifest"]
    step = manifest["lineage"][-1]
    assert step["step"] == "quantize-repair"
    assert step["params"]["changed"] and step["params"]["bits_compared"]
    placed = {record["device"]: record for record in manifest["evidence"]["placement"]}
    assert placed["ort:cpu"]["before"]["integer"] < placed["ort:cpu"]["before"]["all"] == 3
    assert placed["ort:cpu"]["after"]["integer"] == placed["ort:cpu"]["after"]["all"] == 3
    assert placed["openvino:cpu"]["after"]["integer"] == 3
    assert any("ran on integers before, 3 of 3 now" in note for note in step["notes"])
    assert {record["verdict"] for record in manifest["evidence"]["parity"]} == {"passed"}


def test_again_nothing_changes(theirs, tmp_path):
    first = deploykit.quantize_repair(theirs, tmp_path / "first", data=tmp_path / "calib.npz")
    second = deploykit.quantize_repair(first.path, tmp_path / "second")
    assert first.manifest.lineage[-1].params["changed"]
    assert not second.manifest.lineage[-1].params["changed"]
    assert onnx.load(first.model_path) == onnx.load(second.model_path)
    assert second.manifest.lineage[-1].parent == first.digest


def test_our_own_files_need_no_repair(conv_model, tmp_path):
    made = deploykit.quantize_static(conv_model, tmp_path / "int8", data=tmp_path / "calib.npz")
    again = deploykit.quantize_repair(made.path, tmp_path / "repaired")
    assert not again.manifest.lineage[-1].params["changed"]


def test_the_very_bits_without_fusions(theirs, tmp_path):
    images = np.load(tmp_path / "calib.npz")["x"]
    made = deploykit.quantize_repair(theirs, tmp_path / "made", config=RepairConfig(exact=True))
    assert made.manifest.lineage[-1].params["within_a_step"] == {}
    found = []
    for model in (theirs, made.model_path):
        with open_session(model, "ort:cpu", optimize=False) as session:
            found.append(session.run({"x": images})["y"].tobytes())
    assert found[0] == found[1]


def test_recipe(cli, theirs, tmp_path):
    done = cli("quantize", "repair", "-m", theirs, "-o", "unused", "--exact", "--min-cosine", "0.9", "--dry-run")
    (tmp_path / "recipe.toml").write_text(done.stdout)
    done = cli("run", "recipe.toml", "-o", "out")
    assert done.returncode == 0, done.stderr
    made = deploykit.Artifact.open(tmp_path / "out" / "quantize-repair")
    assert made.manifest.lineage[-1].params["exact_only"]


def test_floats_are_refused_with_the_next_command(cli, conv_model, tmp_path):
    done = cli("quantize", "repair", "-m", conv_model, "-o", tmp_path / "made")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) <= 2
    assert "deploykit quantize static -m MODEL --data FILE" in done.stderr
    assert not (tmp_path / "made").exists()
    with pytest.raises(OptimizationError, match="deploykit quantize repair"):
        quantized = tmp_path / "quantized.onnx"
        quantize_static(str(conv_model), str(quantized), Reader(np.load(tmp_path / "calib.npz")["x"]))
        deploykit.quantize_static(quantized, tmp_path / "made", data=tmp_path / "calib.npz")


def test_too_far_is_no_result(theirs, tmp_path, monkeypatch):
    def wrong(graph):
        node = next(n for n in graph.nodes if n.op_type == "QuantizeLinear")
        params = graph.params(node)
        graph.set_params(node, replace(params, scale=params.scale * np.float32(40)))
        return 1

    monkeypatch.setattr("deploykit.optimizers.repair._MOVED", ((wrong, "{} things broken"),))
    with pytest.raises(ParityError, match="--exact"):
        deploykit.quantize_repair(theirs, tmp_path / "made", data=tmp_path / "calib.npz")
    assert not (tmp_path / "made").exists()


def test_a_model_that_onnxruntime_fuses_and_cannot_run(tmp_path):
    """NNCF's scales a channel, directly behind a convolution: onnxruntime makes a QLinearConv that fails."""
    rng = np.random.default_rng(0)
    weights = {
        "s": np.float32(0.03), "z": np.uint8(128), "ws": np.full(8, 0.01, np.float32), "wz": np.zeros(8, np.int8),
        "cs": np.linspace(0.02, 0.05, 8).astype(np.float32), "cz": np.full(8, 128, np.uint8),
        "w": rng.integers(-127, 128, (8, 3, 1, 1)).astype(np.int8),
        "d": rng.integers(-127, 128, (8, 1, 3, 3)).astype(np.int8), "ys": np.float32(0.05),
    }  # fmt: skip
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[n,3,8,8] x) => (float[n,8,6,6] y) {
        q = QuantizeLinear(x, s, z)  f = DequantizeLinear(q, s, z)
        wf = DequantizeLinear<axis = 0>(w, ws, wz)  df = DequantizeLinear<axis = 0>(d, ws, wz)
        c = Conv(f, wf)  cq = QuantizeLinear<axis = 1>(c, cs, cz)  cf = DequantizeLinear<axis = 1>(cq, cs, cz)
        h = Conv<group = 8>(cf, df)  hq = QuantizeLinear(h, ys, z)  y = DequantizeLinear(hq, ys, z) }"""
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    onnx.save(model, tmp_path / "m.onnx")
    made = deploykit.quantize_repair(tmp_path / "m.onnx", tmp_path / "made")
    step = made.manifest.lineage[-1]
    assert any("runs without fusions only" in note for note in step.notes)
    placed = {record["device"]: record for record in made.manifest.evidence.placement}
    assert "failed" in placed["ort:cpu"]["before"]
    assert placed["ort:cpu"]["after"]["integer"] == 2
