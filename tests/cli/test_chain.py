"""The road as a user walks it: import, simplify, quantize, verify, inspect, benchmark, recipe."""

import json

import pytest

from deploykit.artifact import Artifact


def test_chain(run_cli, conv_model, tmp_path):
    for args in (
        ["export", conv_model, "-o", "a"],
        ["simplify", "-m", "a", "-o", "b"],
        ["quantize", "static", "-m", "b", "--data", "calib.npz", "-o", "c"],
        ["verify", "-m", "a"],
        ["verify", "-m", "c", "--against", "a", "--min-cosine", "0.98", "--data", "calib.npz"],
    ):
        done = run_cli(*args)
        assert done.returncode == 0, (args, done.stderr)
    steps = [s.step for s in Artifact.open(tmp_path / "c").manifest.lineage]
    assert steps == ["export", "simplify", "quantize-static"]
    lineage = Artifact.open(tmp_path / "c").manifest.lineage
    assert lineage[1].parent == Artifact.open(tmp_path / "a").digest
    assert lineage[2].parent == Artifact.open(tmp_path / "b").digest
    assert lineage[1].params["nodes_after"] < lineage[1].params["nodes_before"]
    shown = run_cli("inspect", "c").stdout
    assert "QuantizeLinear" in shown and "quantize-static" in shown
    strict = run_cli("verify", "-m", "c", "--against", "a", "--data", "calib.npz")
    assert strict.returncode == 1
    assert "failed" in strict.stderr and "--min-cosine" in strict.stderr


def test_verify_finds_a_different_model(run_cli, conv_model, tmp_path):
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(conv_model))
    weight = model.graph.initializer[1]
    changed = numpy_helper.to_array(weight).copy()
    changed[0, 0] += 0.5
    weight.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), weight.name))
    onnx.save(model, str(tmp_path / "other.onnx"))
    done = run_cli("verify", "-m", "other.onnx", "--against", conv_model)
    assert done.returncode == 1
    assert "failed on ort:cpu" in done.stdout


def test_dynamic_int8(run_cli, tmp_path, conv_model):
    done = run_cli("quantize", "dynamic", "-m", conv_model, "-o", "d", "--data", "calib.npz")
    assert done.returncode == 0, done.stderr
    assert Artifact.open(tmp_path / "d").manifest.lineage[-1].params["integer_nodes"] == 1


def test_benchmark_report(run_cli, conv_model, tmp_path):
    assert run_cli("quantize", "static", "-m", conv_model, "--data", "calib.npz", "-o", "q").returncode == 0
    done = run_cli(
        "benchmark", "-m", conv_model, "-m", "q", "--data", "labelled.npz", "--rounds", 3, "--seconds", 0.1,
        "--warmup", 0, "-o", "report.json", "--json", "--batch", 2, "--threads", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["winner"]["verdict"] in ("winner", "tie")
    assert len(report["candidates"]) == 4
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
    assert sorted(r["position"] for c in report["candidates"] for r in c["rounds"][:1]) != [0, 0, 0, 0]
    int8 = [c for c in report["candidates"] if c["name"] == "q"]
    assert all(c["placement"]["compute_precisions"].get("int8", 0) >= 2 for c in int8)
    again = run_cli("benchmark", "-m", conv_model, "-o", "report.json")
    assert again.returncode == 1 and "exists" in again.stderr


def test_benchmark_leaves_wrong_candidates_out(run_cli, conv_model, tmp_path):
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(conv_model))
    for weight in model.graph.initializer:
        values = np.random.default_rng(7).standard_normal(tuple(weight.dims)).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, str(tmp_path / "wrong.onnx"))
    done = run_cli(
        "benchmark", "-m", conv_model, "-m", "wrong.onnx", "--device", "ort:cpu", "--rounds", 3, "--seconds", 0.05,
        "--warmup", 0, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["candidates"][1]["status"].startswith("wrong outputs")
    assert "rounds" not in report["candidates"][1]
    assert report["winner"]["candidates"] == ["net.onnx on ort:cpu"]


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


def test_recipe(run_cli, conv_model, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    dry = run_cli("run", "recipe.toml", "--dry-run")
    assert dry.returncode == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "full.toml").write_text(dry.stdout)
    assert run_cli("run", "full.toml", "--dry-run").stdout == dry.stdout
    done = run_cli("run", "recipe.toml", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert "tie" in done.stdout or "winner" in done.stdout
    for name in ("import", "simplify", "int8"):
        Artifact.open(tmp_path / "out" / name)
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [c["name"] for c in report["candidates"]] == ["import", "simplify", "int8"]
    assert run_cli("run", "recipe.toml", "-o", "out").returncode == 1
    resumed = run_cli("run", "recipe.toml", "-o", "out", "--resume")
    assert resumed.returncode == 0
    assert resumed.stderr.count("is kept") == 4


@pytest.mark.parametrize(
    "args",
    [
        ["export", "net.onnx", "-o", "x"],
        ["simplify", "-m", "net.onnx", "-o", "x"],
        ["quantize", "dynamic", "-m", "net.onnx", "-o", "x", "--exclude", "n"],
        ["quantize", "static", "-m", "net.onnx", "-o", "x", "--data", "calib.npz"],
        ["benchmark", "-m", "net.onnx", "--dim", "sequence=9", "--device", "ort:cpu"],
    ],
    ids=lambda a: a[0] + a[1],
)
def test_dry_run_prints_a_recipe_that_loads(run_cli, args, tmp_path):
    from deploykit.recipe import Recipe

    done = run_cli(*args, "--dry-run")
    assert done.returncode == 0, done.stderr
    (tmp_path / "r.toml").write_text(done.stdout)
    assert len(Recipe.load(tmp_path / "r.toml").steps) == 1
