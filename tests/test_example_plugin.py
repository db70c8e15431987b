"""The distribution in examples/plugin: installed into a folder of its own, and used by the commands of its README."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss

from deploykit import Artifact, open_session
from deploykit.errors import SourceError
from deploykit.exporters import ExportOptions

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "plugin"
TOOLS = {"deploykit-example": "0.1.0"}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built from a copy (building leaves files behind) and installed without the network."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(folder / "site")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *flags, str(folder / "source")],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def run(site: Path, work: Path) -> Run:
    """Run `python -m ...` in the working folder, with the example installed."""

    def call(
        *args: object, module: str = "deploykit", cwd: Path = work, **env: str
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, args)],
            capture_output=True, text=True, check=False, cwd=cwd, timeout=300,
            env={**os.environ, "PYTHONPATH": path, **env},
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any, Any]:
    """A classifier of handwritten digits, trained here; pixels and labels that it has not seen."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.astype(np.float32)
    return LogisticRegression(max_iter=300).fit(pixels[:1200] / 16, labels[:1200]), pixels[1200:], labels[1200:]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, digits: tuple[Any, Any, Any]) -> Path:
    """A folder with the classifier in the example's format, and data."""
    folder = tmp_path_factory.mktemp("work")
    classifier, pixels, labels = digits
    record = {
        "format": "linear/1", "scale": [16.0] * 64,
        "weights": classifier.coef_.tolist(), "bias": classifier.intercept_.tolist(),
    }  # fmt: skip
    (folder / "digits.linear.json").write_text(json.dumps(record))
    np.savez(folder / "calib.npz", x=pixels[:200])
    np.savez(folder / "eval.npz", x=pixels[200:], labels=labels[200:])
    return folder


@pytest.fixture(scope="module")
def linear(run: Run, work: Path) -> Path:
    """The classifier, exported."""
    done = run("export", "digits.linear.json", "-o", "linear")
    assert done.returncode == 0, done.stderr
    return work / "linear"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import a module of the example, in this process and for one test."""
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    yield lambda name: importlib.import_module(f"deploykit_example.{name}")
    for name in [n for n in sys.modules if n.startswith("deploykit_example")]:
        del sys.modules[name]


@pytest.fixture
def here(site: Path, work: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """What `run` does, in this process."""
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(site))
    yield cli
    for name in [n for n in sys.modules if n.startswith("deploykit_example")]:
        del sys.modules[name]


def test_the_doctor_lists_all_five(run: Run) -> None:
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stdout
    found = {(p["kind"], p["name"]): p for p in json.loads(done.stdout)["plugins"]}
    assert set(found) == {
        ("exporters", "linear-json"), ("optimizers", "merge-transposes"), ("runtimes", "reference"),
        ("metrics", "balanced-accuracy"), ("metrics", "log-loss"),
    }  # fmt: skip
    assert all(p["usable"] and {p["distribution"]: p["version"]} == TOOLS for p in found.values())


# --- the exporter ----------------------------------------------------------------------------------------------------


def test_export_gives_what_scikit_learn_gave(linear: Path, digits: tuple[Any, Any, Any]) -> None:
    artifact = Artifact.open(linear)
    step = artifact.manifest.lineage[0]
    assert step.params["kind"] == "linear-json"
    assert TOOLS.items() <= step.tools.items()
    assert {r["verdict"] for r in artifact.manifest.evidence.parity} == {"passed"}
    assert len({feeds["x"].shape for feeds, _ in artifact.golden()}) > 1  # several batches were compared
    classifier, pixels, _ = digits
    with open_session(linear) as session:
        found = session.run({"x": pixels})["probabilities"]
    np.testing.assert_allclose(found, classifier.predict_proba(pixels / 16), atol=1e-5)


def test_bad_files_are_one_line(here: Any, work: Path) -> None:
    (work / "bad.linear.json").write_text("{")
    done = here("export", "bad.linear.json", "-o", "none")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read bad.linear.json")
    assert not (work / "none").exists()


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ([], "not of the format"),
        ({"format": "linear/2", "weights": [[1, 2], [3, 4]], "bias": [1, 2]}, "not of the format"),
        ({"format": "linear/1", "weights": [[1, 2], [3, 4]], "bias": [1, 2], "biass": 1}, "not of the format"),
        ({"format": "linear/1"}, "'weights'"),
        ({"format": "linear/1", "weights": [1, 2], "bias": [1, 2]}, "not enough values"),
        ({"format": "linear/1", "weights": [[1, 2], [3, 4]], "bias": [1]}, "bias has shape"),
        ({"format": "linear/1", "weights": [[1, 2], [3, "a"]], "bias": [1, 2]}, "could not convert"),
        ({"format": "linear/1", "weights": [[1, 2]], "bias": [1]}, "no classifier"),
        ({"format": "linear/1", "weights": [[1, 2], [3, 4]], "bias": [1, 2], "scale": [0, 1]}, "no classifier"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(example: Any, tmp_path: Path, record: Any, word: str) -> None:
    (tmp_path / "bad.linear.json").write_text(json.dumps(record))
    with pytest.raises(SourceError, match=word):
        example("linear_json").exporter.open(str(tmp_path / "bad.linear.json"), ExportOptions())


def test_without_the_example_nobody_knows_the_file(work: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", "export", "digits.linear.json", "-o", "none"],
        capture_output=True, text=True, check=False, cwd=work,
    )  # fmt: skip
    assert done.returncode == 1
    assert "of no known kind" in done.stderr


# --- the optimizer ---------------------------------------------------------------------------------------------------


def graph_of(nodes: list[onnx.NodeProto], shape: list[int], path: Path) -> onnx.ModelProto:
    """Nodes from `x` to `y`; the shape of `y` is inferred."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float32(3), "three"), numpy_helper.from_array(np.array(True), "yes")],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = onnx.shape_inference.infer_shapes(made, strict_mode=True)
    onnx.save(made, path)
    return made


def transpose(source: str, result: str, perm: list[int] | None) -> onnx.NodeProto:
    return helper.make_node("Transpose", [source], [result], name=result, **({} if perm is None else {"perm": perm}))


CROSSED = [
    transpose("x", "a", [0, 2, 1, 3]),
    transpose("a", "b", [0, 3, 1, 2]),
    helper.make_node("Relu", ["b"], ["c"]),
    transpose("c", "d", [0, 2, 3, 1]),
    transpose("d", "e", [0, 3, 1, 2]),  # d and e cancel out
    helper.make_node("Mul", ["e", "three"], ["y"]),
]


def test_apply(run: Run, here: Any, work: Path) -> None:
    graph_of(CROSSED, [2, 3, 4, 5], work / "crossed.onnx")
    done = run("apply", "merge-transposes", "-m", "crossed.onnx", "-o", "merged")
    assert done.returncode == 0, done.stderr
    artifact = Artifact.open(work / "merged")
    step = artifact.manifest.lineage[-1]
    assert (step.step, step.params["name"], step.params["changed"]) == ("apply", "merge-transposes", True)
    assert step.params["options"] == {"remove_identity": True, "keep": []}
    assert TOOLS.items() <= step.tools.items()
    assert {r["verdict"] for r in artifact.manifest.evidence.parity} == {"passed"}
    assert [n.op_type for n in onnx.load(artifact.model_path).graph.node] == ["Transpose", "Relu", "Mul"]
    dry = here("apply", "merge-transposes", "-m", "crossed.onnx", "-o", "dry", "--set", "keep=b,e", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    (work / "dry.toml").write_text(dry.stdout)
    done = here("run", "dry.toml", "-o", "dry")
    assert done.returncode == 0, done.stderr
    params = Artifact.open(work / "dry" / "apply").manifest.lineage[-1].params
    assert (params["changed"], params["options"]["keep"]) == (False, ["b", "e"])


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["merge-transposes", "--set", "keep"], 2, "KEY=VALUE"),
        (["merge-transposes", "--set", "keep=a", "--set", "keep=b"], 2, "twice"),
        (["merge-transposes", "--set", "drop=a"], 1, "no option 'drop'"),
    ],
)
def test_apply_says_what_is_wrong(here: Any, linear: Path, args: list[str], code: int, word: str) -> None:
    done = here("apply", *args, "-m", "linear", "-o", "none")
    assert done.returncode == code
    assert word in done.stderr


@pytest.fixture
def merge(example: Any) -> Any:
    return example("merge_transposes")


def applied(merge: Any, model: onnx.ModelProto, folder: Path, **options: Any) -> onnx.ModelProto:
    """Apply the step, see that the bits stay the same, and return the result."""
    merge.step.apply(folder / "m.onnx", merge.MergeConfig(**options), folder / "out.onnx")
    found = onnx.load(folder / "out.onnx")
    onnx.checker.check_model(found, full_check=True)
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": np.random.default_rng(0).normal(size=dims).astype(np.float32)}
    (expected,), (made,) = ReferenceEvaluator(model).run(None, feeds), ReferenceEvaluator(found).run(None, feeds)
    np.testing.assert_array_equal(made, expected)
    return found


def test_chains_of_transposes_become_one(merge: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for length in (2, 3, 5, 5, 5):
        perms = [rng.permutation(4).tolist() for _ in range(length)]
        perms[rng.integers(length)] = None  # reversed
        ends = ["x", *(f"t{i}" for i in range(length - 1)), "y"]
        nodes = [transpose(a, b, p) for a, b, p in zip(ends, ends[1:], perms, strict=False)]
        found = applied(merge, graph_of(nodes, [2, 3, 4, 5], tmp_path / "m.onnx"), tmp_path)
        assert len(found.graph.node) == 1


def test_what_others_read_stays(merge: Any, tmp_path: Path) -> None:
    """A tensor with a second reader, one inside an If, and an Identity whose tensor a branch gives as it is."""
    branch = [
        helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(result, TensorProto.FLOAT, [3, 2])])
        for name, nodes, result in (
            ("then", [helper.make_node("Mul", ["a", "three"], ["scaled"])], "scaled"),
            ("else", [helper.make_node("Neg", ["i"], ["negative"])], "negative"),
        )
    ]
    nodes = [
        transpose("x", "a", None),
        transpose("a", "b", [1, 0]),
        helper.make_node("Identity", ["a"], ["i"]),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=branch[0], else_branch=branch[1]),
        transpose("chosen", "turned", [1, 0]),
        helper.make_node("Add", ["turned", "b"], ["y"]),
    ]
    model = graph_of(nodes, [2, 3], tmp_path / "m.onnx")
    found = applied(merge, model, tmp_path)
    assert [n.op_type for n in found.graph.node] == ["Transpose", "If", "Transpose", "Add"]
    found = applied(merge, model, tmp_path, remove_identity=False)
    assert [n.op_type for n in found.graph.node].count("Identity") == 2


# --- metrics and runtime ---------------------------------------------------------------------------------------------


def test_quantized_to_a_metric_on_outputs_of_which_less_is_better(
    run: Run, work: Path, linear: Path, digits: tuple[Any, Any, Any]
) -> None:
    options = ("--eval", "eval.npz", "--output-name", "probabilities", "--allow-slower", "--gate-seconds", 0)
    done = run(
        "quantize", "dynamic", "-m", "linear", "-o", "dynamic", *options, "--metric", "log-loss", "--max-drop", "5%"
    )
    assert done.returncode == 0, done.stderr
    artifact = Artifact.open(work / "dynamic")
    assert TOOLS.items() <= artifact.manifest.lineage[-1].tools.items()
    (record,) = artifact.manifest.evidence.accuracy
    _, pixels, labels = digits
    with open_session(linear) as session:
        probabilities = session.run({"x": pixels[200:]})["probabilities"].astype(np.float64)
    probabilities /= probabilities.sum(1, keepdims=True)
    assert "log-loss up by at most" in str(record["target"])
    assert record["certified"] is True
    assert record["parent"] == pytest.approx(log_loss(labels[200:], probabilities), abs=1e-3)
    assert record["value"] != record["parent"]


def test_metrics_nobody_has_are_wrong_usage(here: Any) -> None:
    done = here("quantize", "dynamic", "-m", "linear", "-o", "none", "--metric", "nope")
    assert done.returncode == 2
    assert "balanced-accuracy" in done.stderr


def test_benchmark_of_the_reference_beside_onnx_runtime(run: Run, linear: Path) -> None:
    devices = ("--device", "ort:cpu", "--device", "reference:cpu")
    short = ("--rounds", 3, "--seconds", 0.05, "--warmup", 0.05, "--no-confirm", "--data", "eval.npz", "--json")
    done = run("benchmark", "-m", "linear", *devices, *short)
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads(done.stdout)["candidates"]
    assert (ours["device"], theirs["device"]) == ("ort:cpu", "reference:cpu")
    assert theirs["outputs"]["verdict"] == "passed", theirs["outputs"]
    assert theirs["accuracy"] == ours["accuracy"]
    assert theirs["placement"]["ops"] == {"Sub": 1, "Div": 1, "Gemm": 1, "Softmax": 1}
    assert "deploykit-example 0.1.0" in json.dumps(theirs["settings"])


def test_verify_and_unknown_targets(run: Run, here: Any, linear: Path) -> None:
    done = run("verify", "-m", "linear", "--device", "reference:cpu")
    assert done.returncode == 0, done.stderr
    assert "passed on reference:cpu" in done.stdout
    done = here("verify", "-m", "linear", "--device", "reference:gpu")
    assert done.returncode == 1
    assert "expected reference:cpu" in done.stderr


def test_the_reference_passes_the_contract_of_runtimes(run: Run) -> None:
    suite = ROOT / "tests" / "runtimes" / "test_contract.py"
    done = run(
        "-q", "-p", "no:cacheprovider", "-k", "reference", suite,
        module="pytest", cwd=ROOT, DEPLOYKIT_CONTRACT_DEVICES="reference:cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted is not None
    assert int(counted[1]) >= 35


def test_the_recipe_of_the_readme(run: Run, here: Any, work: Path, digits: tuple[Any, Any, Any]) -> None:
    (recipe,) = re.findall(r"```toml\n(.*?)```", (EXAMPLE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (work / "recipe.toml").write_text(recipe + "allow_slower = true\ngate_seconds = 0.0\n")
    done = run("run", "recipe.toml", "-o", "chain")
    assert done.returncode == 0, done.stderr
    artifact = Artifact.open(work / "chain" / "int8")
    lineage = artifact.manifest.lineage
    assert [step.step for step in lineage] == ["export", "apply", "quantize-static"]
    assert all(TOOLS.items() <= step.tools.items() for step in lineage)
    (record,) = artifact.manifest.evidence.accuracy
    _, pixels, labels = digits
    with open_session(artifact) as session:
        guesses = session.run({"x": pixels[200:]})["probabilities"].argmax(1)
    assert (record["metric"], record["certified"]) == ("balanced-accuracy", True)
    assert record["value"] == pytest.approx(balanced_accuracy_score(labels[200:], guesses), abs=1e-4)
    resumed = here("run", "recipe.toml", "-o", "chain", "--resume")
    assert resumed.stderr.count("is kept") == 3
