"""The road as a user walks it: import, simplify, quantize, verify, inspect, benchmark, recipe."""

import json

import pytest

from deploykit.artifact import Artifact


def test_chain(cli, conv_model, tmp_path):
    for args in (
        ["export", conv_model, "-o", "a"],
        ["simplify", "-m", "a", "-o", "b"],
        ["quantize", "static", "-m", "b", "--data", "calib.npz", "-o", "c"],
        ["verify", "-m", "a"],
        ["verify", "-m", "c", "--against", "a", "--min-cosine", "0.98", "--data", "calib.npz"],
    ):
        done = cli(*args)
        assert done.returncode == 0, (args, done.stderr)
    steps = [s.step for s in Artifact.open(tmp_path / "c").manifest.lineage]
    assert steps == ["export", "simplify", "quantize-static"]
    lineage = Artifact.open(tmp_path / "c").manifest.lineage
    assert lineage[1].parent == Artifact.open(tmp_path / "a").digest
    assert lineage[2].parent == Artifact.open(tmp_path / "b").digest
    assert lineage[1].params["nodes_after"] < lineage[1].params["nodes_before"]
    shown = cli("inspect", "c").stdout
    assert "QuantizeLinear" in shown and "quantize-static" in shown
    strict = cli("verify", "-m", "c", "--against", "a", "--data", "calib.npz")
    assert strict.returncode == 1
    assert "failed" in strict.stderr and "--min-cosine" in strict.stderr


def test_verify_finds_a_different_model(cli, conv_model, tmp_path):
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(conv_model))
    weight = model.graph.initializer[1]
    changed = numpy_helper.to_array(weight).copy()
    changed[0, 0] += 0.5
    weight.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), weight.name))
    onnx.save(model, str(tmp_path / "other.onnx"))
    done = cli("verify", "-m", "other.onnx", "--against", conv_model)
    assert done.returncode == 1
    assert "failed on ort:cpu" in done.stdout


def test_dynamic_int8(cli, tmp_path, conv_model):
    done = cli("quantize", "dynamic", "-m", conv_model, "-o", "d", "--data", "calib.npz")
    assert done.returncode == 0, done.stderr
    assert Artifact.open(tmp_path / "d").manifest.lineage[-1].params["integer_nodes"] == 1


def test_benchmark_report(cli, conv_model, tmp_path):
    """Of three kinds of model; the first, OpenVINO's own, runs in OpenVINO only."""
    import openvino

    openvino.save_model(openvino.convert_model(str(conv_model)), str(tmp_path / "ir.xml"), compress_to_fp16=False)
    assert cli("quantize", "static", "-m", conv_model, "--data", "calib.npz", "-o", "q").returncode == 0
    done = cli(
        "benchmark", "-m", "ir.xml", "-m", conv_model, "-m", "q", "--data", "labelled.npz", "--rounds", 3,
        "--seconds", 0.1, "--warmup", 0, "-o", "report.json", "--json", "--batch", 2, "--threads", 1, "--no-confirm",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["winner"]["verdict"] in ("winner", "tie")
    both = ("ort:cpu", "openvino:cpu")
    assert [(c["name"], c["device"]) for c in report["candidates"]] == [
        ("ir.xml", "openvino:cpu"), *(("net.onnx", d) for d in both), *(("q", d) for d in both),
    ]  # fmt: skip
    assert not report["settings"]["confirm"]
    reference = report["candidates"][0]
    assert reference["outputs"] is None
    for candidate in report["candidates"]:
        assert candidate["status"] == "ok" or "accuracy" in candidate["status"]
        assert len(candidate["rounds"]) == 3
        assert candidate["samples"] == sum(len(r["samples_ns"]) for r in candidate["rounds"])
        assert 0 <= candidate["accuracy"]["accuracy"] <= 1
        assert candidate["peak_memory_bytes"] > 1e6
        assert candidate["placement"]["share_of_nodes"] == 1.0
        assert (
            candidate["settings"][
                "intra_op_num_threads" if candidate["device"] == "ort:cpu" else "INFERENCE_NUM_THREADS"
            ]
            == "1"
        )
    assert sorted(r["position"] for c in report["candidates"] for r in c["rounds"][:1]) != [0, 0, 0, 0, 0]
    int8 = [c for c in report["candidates"] if c["name"] == "q"]
    assert all(c["placement"]["compute_precisions"].get("int8", 0) >= 2 for c in int8)
    again = cli("benchmark", "-m", conv_model, "-o", "report.json")
    assert again.returncode == 1 and "exists" in again.stderr


RECIPE = """
[import]
step = "export"
source = "net.onnx"

[simplify]

[int8]
step = "quantize-static"
data = "calib.npz"

[benchmark]
devices = ["ort:cpu"]
rounds = 3
seconds = 0.05
warmup_s = 0.0
"""


def test_recipe(cli, conv_model, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    dry = cli("run", "recipe.toml", "--dry-run")
    assert dry.returncode == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "full.toml").write_text(dry.stdout)
    assert cli("run", "full.toml", "--dry-run").stdout == dry.stdout
    done = cli("run", "recipe.toml", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert "tie" in done.stdout or "winner" in done.stdout
    for name in ("import", "simplify", "int8"):
        Artifact.open(tmp_path / "out" / name)
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [c["name"] for c in report["candidates"]] == ["import", "simplify", "int8"]
    assert report["settings"]["confirm"]
    assert cli("run", "recipe.toml", "-o", "out").returncode == 1
    resumed = cli("run", "recipe.toml", "-o", "out", "--resume")
    assert resumed.returncode == 0
    assert resumed.stderr.count("is kept") == 4


@pytest.mark.parametrize(
    "args",
    [
        ["export", "net.onnx", "-o", "x"],
        ["simplify", "-m", "net.onnx", "-o", "x"],
        ["fuse", "-m", "net.onnx", "-o", "x", "--passes", "onnxscript", "--device", "ort:cpu", "--allow-slower"],
        ["quantize", "dynamic", "-m", "net.onnx", "-o", "x", "--exclude", "n", "--smooth", "off"],
        ["quantize", "static", "-m", "net.onnx", "-o", "x", "--data", "calib.npz"],
        ["quantize", "static", "-m", "net.onnx", "-o", "x", "--data", "calib.npz", "--smooth", "auto", "--equalize"],
        ["quantize", "static", "-m", "a.onnx", "-o", "x", "--data", "d.npz", "--bias-correction", "full"],
        ["quantize", "weights", "-m", "a.onnx", "-o", "x", "--bits", "4", "--block", "64", "--form", "nbits"],
        ["quantize", "half", "-m", "a.onnx", "-o", "x", "--precision", "bf16", "--compute", "storage"],
        ["quantize", "static", "-m", "a.onnx", "-o", "x", "--data", "d.npz", "--engine", "both"],
        ["quantize", "static", "-m", "a.onnx", "-o", "x", "--data", "d.npz", "--smooth=.2", "--rounding", "adaround"],
        ["apply", "some-step", "-m", "net.onnx", "-o", "x", "--set", "depth=3", "--set", "keep=a,b"],
        ["benchmark", "-m", "net.onnx", "--dim", "sequence=9", "--device", "ort:cpu"],
    ],
    ids=lambda a: "-".join(a[:2] + a[-1:]),
)
def test_dry_run_prints_a_recipe_that_loads(cli, args, tmp_path):
    from deploykit.recipe import Recipe

    done = cli(*args, "--dry-run")
    assert done.returncode == 0, done.stderr
    (tmp_path / "r.toml").write_text(done.stdout)
    assert len(Recipe.load(tmp_path / "r.toml").steps) == 1


def test_resume_makes_again_what_followed_from_something_else(cli, conv_model, tmp_path):
    import shutil

    (tmp_path / "recipe.toml").write_text(RECIPE.split("[benchmark]")[0])
    assert cli("run", "recipe.toml", "-o", "out").returncode == 0
    before = {n: Artifact.open(tmp_path / "out" / n).digest for n in ("import", "simplify", "int8")}
    shutil.rmtree(tmp_path / "out" / "import")
    done = cli("run", "recipe.toml", "-o", "out", "--resume")
    assert done.returncode == 0, done.stderr
    lineage = Artifact.open(tmp_path / "out" / "int8").manifest.lineage
    assert lineage[-1].parent == Artifact.open(tmp_path / "out" / "simplify").digest
    assert lineage[1].parent == Artifact.open(tmp_path / "out" / "import").digest
    assert before != {n: Artifact.open(tmp_path / "out" / n).digest for n in before}


def test_a_recipe_whose_first_step_fails_leaves_nothing(cli, tmp_path):
    (tmp_path / "recipe.toml").write_text('[export]\nsource = "nope.onnx"\n')
    assert cli("run", "recipe.toml", "-o", "out").returncode == 1
    assert not (tmp_path / "out").exists()


def fixed_batch(path):
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 64])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


def test_throughput_counts_the_samples_of_a_fixed_batch(cli, conv_model, tmp_path):
    fixed_batch(tmp_path / "four.onnx")
    quick = ["--device", "ort:cpu", "--rounds", 3, "--seconds", 0.05, "--warmup", 0]
    done = cli("benchmark", "-m", "four.onnx", *quick, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["batch"] == 4
    (found,) = report["candidates"]
    wall = sum(r["wall_ns"] for r in found["rounds"]) / 1e9
    assert found["throughput_per_s"] == pytest.approx(4 * found["samples"] / wall)
    for wrong in (["--dim", "batch=512"], ["--dim", "bogus=3"], ["--dim", "batch=²"], ["--seconds", "inf"]):
        done = cli("benchmark", "-m", conv_model, *quick, *wrong)
        assert done.returncode == 1 and "Traceback" not in done.stderr, (wrong, done.stderr)


def test_a_failing_reference_is_one_line(cli, conv_model, tmp_path):
    import numpy as np

    np.savez(tmp_path / "long.npz", x=np.zeros((8, 3, 12, 12), np.float32), labels=np.zeros((8, 2), np.int64))
    done = cli("benchmark", "-m", conv_model, "-m", conv_model, "--data", "long.npz")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "the reference" in done.stderr


def test_an_accepted_unverifiable_model_stays_unverifiable(cli, conv_model, tmp_path):
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(conv_model))
    for weight in model.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(np.zeros(tuple(weight.dims), np.float32), weight.name))
    onnx.save(model, str(tmp_path / "zero.onnx"))
    refused = cli("simplify", "-m", "zero.onnx", "-o", "out")
    assert refused.returncode == 1 and "--allow-unverified" in refused.stderr
    assert cli("export", "zero.onnx", "-o", "a", "--allow-unverified").returncode == 0
    assert cli("simplify", "-m", "a", "-o", "b").returncode == 0
    verdicts = {r["verdict"] for r in Artifact.open(tmp_path / "b").manifest.evidence.parity}
    assert verdicts == {"unverifiable"}
    replayed = cli("verify", "-m", "b")
    assert replayed.returncode == 1 and "unverifiable" in replayed.stdout


def test_an_interrupt_keeps_the_rounds_and_says_so(conv_model, tmp_path):
    import signal
    import subprocess
    import sys
    import time

    command = [
        sys.executable, "-m", "deploykit", "benchmark", "-m", "net.onnx", "--device", "ort:cpu", "--rounds", "500",
        "--seconds", "0.01", "--warmup", "0", "-o", "report.json",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal, end = tmp_path / "report.json.partial", time.monotonic() + 120
    # Three rounds are the fewest that become a report.
    while time.monotonic() < end and process.poll() is None and (not journal.exists() or kept_rounds(journal) < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"] and 3 <= len(report["candidates"][0]["rounds"]) < 500
    assert "interrupted:" in errors and "rounds of" in out


def kept_rounds(journal):
    return len(json.loads(journal.read_text())["entries"][0]["rounds"])
