"""`deploykit quantize weights`, `half` and `sweep` as commands, and as steps of a recipe."""

from __future__ import annotations

import json

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
gate_seconds = 0
"""


def test_steps_of_a_recipe(run_cli, conv_model, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("net.onnx", conv_model.name))
    done = run_cli("run", "recipe.toml", "-o", "out")
    # The convolutional net has one product of 80 weights, too small for blocks.
    assert done.returncode == 1 and "convolutional models want" in done.stderr
    (tmp_path / "recipe.toml").write_text("[half]" + RECIPE.replace("net.onnx", conv_model.name).split("[half]")[1])
    done = run_cli("run", "recipe.toml", "-o", "out2")
    assert done.returncode == 1 and "nothing to store" in done.stderr
    assert not (tmp_path / "out2").exists()


def test_a_sweep_prints_a_row_for_what_failed_too(run_cli, conv_model, tmp_path):
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
    again = run_cli("quantize", "sweep", "-m", conv_model, "-o", "swept")
    assert again.returncode == 1 and again.stderr.count("error:") == 1


def test_wrong_usage(run_cli, conv_model):
    for args in (
        ["weights", "--bits", "5"], ["weights", "--block", "48"], ["half", "--precision", "fp8"],
        ["sweep", "--rounds", "1"],
    ):  # fmt: skip
        done = run_cli("quantize", *args, "-m", conv_model, "-o", "x")
        assert done.returncode == 2 and "Traceback" not in done.stderr
