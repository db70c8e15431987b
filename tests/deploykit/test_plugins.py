"""Plugins that are broken, clash or shadow: each is an error that names its distribution, and none is loaded early."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import deploykit
from deploykit.benchmarks.metrics import find_metric
from deploykit.errors import (
    DataError,
    DeviceError,
    InferenceError,
    OptimizationError,
    ParityError,
    PluginError,
    RecipeError,
    SourceError,
)
from deploykit.exporters import ExportOptions, open_source
from deploykit.goals import Goal
from deploykit.plugins import find, installed, names, survey
from deploykit.recipe import Recipe
from deploykit.runtimes import open_session, parse_device, require_device

Announce = Callable[..., str]
_numbers = itertools.count()


@pytest.fixture
def announce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Announce:
    """Put a distribution on the path: `announce(group, name, code)`, whose object is `it`."""

    def put(group: str, name: str, code: str, *, dist: str | None = None) -> str:
        module = f"plugin_under_test_{next(_numbers)}"
        dist = dist or module.replace("_", "-")
        site = tmp_path / "sites" / module
        info = site / f"{dist.replace('-', '_')}-1.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[deploykit.{group}]\n{name} = {module}:it\n")
        (site / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))
        return dist

    return put


METRIC = """
class It:
    higher_is_better = True
    takes = "predictions"
    def score(self, labels, predictions):
        return {value}
it = It()
"""
STEP = """
import shutil
from dataclasses import dataclass
from deploykit.optimizers.base import StepResult

@dataclass(frozen=True)
class Config:
    factor: float = 1.0
    count: int = 0
    flag: bool = False
    word: str = ""
    parts: tuple[str, ...] = ()
    def __post_init__(self):
        if self.count > 9:
            raise ValueError("count is at most 9")

class It:
    config = Config
    min_cosine = {cosine}
    def apply(self, model, config, target):
        {body}
it = It()
"""
COPY = "shutil.copyfile(model, target); return StepResult(False)"
SCALE = """
        import onnx
        from onnx import numpy_helper
        made = onnx.load(model)
        weight = made.graph.initializer[0]
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * config.factor, weight.name))
        onnx.save(made, target)
        return StepResult(True, params={"factor": config.factor})
"""
RUNTIME = """
class It:
    reads = (".onnx",)
    concurrent = False
    def check(self, target):
        {check}
    def open(self, path, device, options):
        {open}
it = It()
"""
EXPORTER = """
class It:
    def opens(self, source):
        return {opens}
    def open(self, source, options):
        {open}
it = It()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


# --- finding ---------------------------------------------------------------------------------------------------------


def test_help_looks_for_no_plugin(tmp_path: Path) -> None:
    for command in ([], ["apply"], ["quantize", "static"], ["benchmark"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "deploykit", *command, "--help"],
            capture_output=True, text=True, check=True, cwd=tmp_path,
        )  # fmt: skip
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        assert "click" in imported
        assert not imported & {"importlib.metadata", "deploykit.plugins"}


def test_our_own_names_are_found_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(**_: object) -> None:
        raise AssertionError("looked for plugins")

    monkeypatch.setattr("importlib.metadata.entry_points", forbidden)
    monkeypatch.syspath_prepend("/nowhere")  # nothing remembered
    for device in ("ort:cpu", "openvino:gpu", "torch:cpu", "CUDAExecutionProvider"):
        parse_device(device)
    assert find_metric("f1").plugin is None
    Recipe.from_tables({"quantize-dynamic": {"model": "m", "metric": "recall"}}, Path())


def test_a_plugin_is_found_by_name_and_not_loaded(announce: Announce) -> None:
    dist = announce("metrics", "half", "raise AssertionError('loaded')")
    found = find("metrics", "half")
    assert found is not None
    assert (found.distribution, found.version, found.tools) == (dist, "1.5", {dist: "1.5"})
    assert "half" in names("metrics")
    assert find("metrics", "whole") is None


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("1/0", "division by zero"),
        ("it = 1 +", "invalid syntax"),
        ("other = 1", "no attribute 'it'"),
    ],
)
def test_what_does_not_load_names_its_distribution(announce: Announce, code: str, word: str) -> None:
    dist = announce("metrics", "half", code)
    with pytest.raises(PluginError, match=word) as caught:
        find_metric("half")
    assert f"'half' of {dist} 1.5" in str(caught.value)


@pytest.mark.parametrize(
    ("group", "code", "word"),
    [
        ("metrics", METRIC.format(value=1).replace("it = It()", "it = It"), "is a class"),
        ("metrics", METRIC.format(value=1).replace("True", "1"), "'higher_is_better'"),
        ("metrics", METRIC.format(value=1).replace('predictions"', 'classes"'), "'takes'"),
        ("metrics", "it = object()", "'higher_is_better'"),
        ("optimizers", STEP.format(cosine=None, body=COPY).replace("(frozen=True)", ""), "frozen dataclass"),
        ("optimizers", STEP.format(cosine="'no'", body=COPY), "'min_cosine'"),
        ("optimizers", STEP.format(cosine=2, body=COPY), "'min_cosine'"),
        ("runtimes", RUNTIME.format(check="pass", open="pass").replace('(".onnx",)', '".onnx"'), "'reads'"),
        ("runtimes", RUNTIME.format(check="pass", open="pass").replace("def check", "def look"), "'check'"),
        ("exporters", "class It: opens = 'yes'\nit = It()", "'opens'"),
    ],
)
def test_what_has_another_shape_says_what_is_wrong(announce: Announce, group: str, code: str, word: str) -> None:
    dist = announce(group, "half", code)
    found = find(group, "half")
    assert found is not None
    with pytest.raises(PluginError, match=word) as caught:
        found.load()
    assert dist in str(caught.value)
    assert [(s.plugin.distribution, bool(s.problem)) for s in survey() if s.plugin.name == "half"] == [(dist, True)]


def test_two_of_one_name_clash(announce: Announce) -> None:
    first = announce("metrics", "half", METRIC.format(value=0.25))
    assert find_metric("half").score(np.array([1]), np.array([1])) == 0.25
    second = announce("metrics", "half", METRIC.format(value=0.75))
    with pytest.raises(PluginError) as caught:
        find_metric("half")
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert sum(bool(s.problem) for s in survey() if s.plugin.name == "half") == 2


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("metrics", "accuracy"),
        ("runtimes", "ort"),
        ("runtimes", "ov"),
        ("optimizers", "simplify"),
        ("exporters", "onnx"),
    ],
)
def test_our_own_names_cannot_be_taken(announce: Announce, group: str, name: str) -> None:
    dist = announce(group, name, "raise AssertionError('loaded')")
    assert find(group, name) is None
    assert name not in names(group)
    (status,) = (s for s in survey() if s.plugin.distribution == dist)
    assert "DeployKit's own" in status.problem
    assert find_metric("accuracy").plugin is None
    assert str(parse_device("ort:cpu")) == "ort:cpu"


def test_names_that_nobody_could_write(announce: Announce) -> None:
    announce("metrics", "Half Of It", METRIC.format(value=1))
    (status,) = (s for s in survey() if s.plugin.name == "Half Of It")
    assert "lower-case" in status.problem


def test_the_doctor_tells_the_broken_from_the_good(announce: Announce) -> None:
    from click.testing import CliRunner

    from deploykit.cli.doctor import command

    good = announce("metrics", "half", METRIC.format(value=0.5))
    bad = announce("runtimes", "cloud", "import no_such_module_anywhere")
    done = CliRunner().invoke(command)
    assert done.exit_code == 1
    assert f"plugin   metrics half: usable ({good} 1.5)" in done.output
    assert f"plugin   runtimes cloud: broken ({bad} 1.5)" in done.output
    assert "problem  the runtime 'cloud'" in done.output


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_give_numbers_or_are_blamed(announce: Announce) -> None:
    dist = announce("metrics", "half", METRIC.format(value="float('nan')"))
    with pytest.raises(PluginError, match=f"{dist} 1.5 scored nan"):
        find_metric("half").score(np.array([0, 1]), np.array([0, 1]))
    announce("metrics", "third", METRIC.format(value="labels.nope"))
    with pytest.raises(PluginError, match="failed while it scored"):
        find_metric("third").score(np.array([0, 1]), np.array([0, 1]))


def test_metrics_see_no_padding(announce: Announce) -> None:
    announce("metrics", "half", METRIC.format(value="float((labels == predictions).sum()) / len(labels)"))
    labels, found = np.array([[1, -100], [2, 0]]), np.array([[1, 5], [2, 1]])
    assert find_metric("half").score(labels, found) == pytest.approx(2 / 3)
    with pytest.raises(DataError):
        find_metric("half").score(labels, found[:1])


def test_unknown_metrics_name_the_known(announce: Announce) -> None:
    announce("metrics", "half", METRIC.format(value=1).replace("True", "False"))
    with pytest.raises(DataError, match="recall, half"):
        find_metric("quarter")
    with pytest.raises(RecipeError, match="unknown metric 'quarter'"):
        Recipe.from_tables({"quantize-dynamic": {"model": "m", "metric": "quarter"}}, Path())
    assert Goal("half", 0.5).describe() == "half up by at most 0.5"
    assert Goal("f1", 0.5).describe() == "f1 down by at most 0.5"


# --- optimizers ------------------------------------------------------------------------------------------------------


def test_a_step_is_compared_with_its_parent(announce: Announce, model: Path, tmp_path: Path) -> None:
    dist = announce("optimizers", "scale", STEP.format(cosine=None, body=SCALE))
    made = deploykit.apply("scale", model, tmp_path / "same")
    record = made.manifest.lineage[-1]
    assert record.step == "apply"
    assert record.tools == {dist: "1.5"}
    assert record.params["name"] == "scale"
    assert record.params["changed"] is True
    assert {r["verdict"] for r in made.manifest.evidence.parity} == {"passed"}
    with pytest.raises(ParityError, match="is not its parent") as caught:
        deploykit.apply("scale", model, tmp_path / "other", options={"factor": 1.5})
    assert dist in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_step_that_changes_numbers_is_held_to_its_cosine(announce: Announce, model: Path, tmp_path: Path) -> None:
    announce("optimizers", "scale", STEP.format(cosine=0.99, body=SCALE))
    made = deploykit.apply("scale", model, tmp_path / "near", options={"factor": "1.02"})
    assert made.manifest.lineage[-1].params["options"]["factor"] == 1.02
    with pytest.raises(ParityError):
        deploykit.apply("scale", model, tmp_path / "far", options={"factor": -1.0})


@pytest.mark.parametrize(
    ("body", "error", "word"),
    [
        ("return StepResult(False)", PluginError, "wrote no model"),
        ("shutil.copyfile(model, target)", PluginError, "returned NoneType"),
        ("raise KeyError('axis')", OptimizationError, "KeyError"),
        (
            "open(model, 'ab').write(b'  '); shutil.copyfile(model, target); return StepResult(True)",
            PluginError,
            "changed",
        ),
    ],
)
def test_steps_that_break_the_contract(
    announce: Announce, model: Path, tmp_path: Path, body: str, error: type[Exception], word: str
) -> None:
    dist = announce("optimizers", "scale", STEP.format(cosine=None, body=body))
    with pytest.raises(error, match=word) as caught:
        deploykit.apply("scale", model, tmp_path / "out")
    assert dist in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_are_read_by_the_type_of_their_field(announce: Announce, model: Path, tmp_path: Path) -> None:
    announce("optimizers", "scale", STEP.format(cosine=None, body=COPY))
    texts = {"factor": "0.5", "count": "3", "flag": "true", "word": "a,b", "parts": "a,b"}
    made = deploykit.apply("scale", model, tmp_path / "texts", options=texts)
    params = made.manifest.lineage[-1].params
    assert params["options"] == {"factor": 0.5, "count": 3, "flag": True, "word": "a,b", "parts": ["a", "b"]}
    values = {"factor": 2, "count": 3, "flag": False, "word": "w", "parts": ["a"]}
    made = deploykit.apply("scale", model, tmp_path / "values", options=values)
    assert made.manifest.lineage[-1].params["options"] == {**values, "factor": 2.0}
    for options, word in (
        ({"nope": 1}, "no option 'nope'"),
        ({"flag": "maybe"}, "expected bool"),
        ({"count": 1.5}, "expected int"),
        ({"count": True}, "expected int"),
        ({"factor": "x"}, "expected float"),
        ({"word": 1}, "expected str"),
        ({"parts": [1]}, "tuple"),
        ({"count": 10}, "at most 9"),
    ):
        with pytest.raises(OptimizationError, match=word):
            deploykit.apply("scale", model, tmp_path / "bad", options=options)
    with pytest.raises(OptimizationError, match="scale"):
        deploykit.apply("nope", model, tmp_path / "bad")


def test_options_that_no_command_line_can_give(announce: Announce, model: Path, tmp_path: Path) -> None:
    announce("optimizers", "scale", STEP.format(cosine=None, body=COPY).replace("word: str = ''", "").replace(
        'word: str = ""', "word: dict = None"
    ))  # fmt: skip
    with pytest.raises(PluginError, match="dict"):
        deploykit.apply("scale", model, tmp_path / "bad")


# --- runtimes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "opened", "error", "word"),
    [
        ("raise OSError('no driver')", "pass", DeviceError, "no driver"),
        ("pass", "return 3", PluginError, "as int"),
        ("pass", "raise RuntimeError('no kernel')", InferenceError, "no kernel"),
    ],
)
def test_runtimes_that_break_the_contract(
    announce: Announce, model: Path, check: str, opened: str, error: type[Exception], word: str
) -> None:
    dist = announce("runtimes", "cloud", RUNTIME.format(check=check, open=opened))
    assert str(parse_device("Cloud:Far")) == "cloud:far"
    with pytest.raises(error, match=word) as caught:
        open_session(model, "cloud:far")
    assert dist in str(caught.value)


def test_a_runtime_that_went_away(announce: Announce, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce("runtimes", "cloud", RUNTIME.format(check="pass", open="pass"))
    device = parse_device("cloud:far")
    monkeypatch.undo()
    with pytest.raises(DeviceError, match="no installed distribution has a runtime 'cloud'"):
        require_device(device)
    with pytest.raises(DeviceError, match="unknown device"):
        parse_device("cloud:far")


# --- exporters -------------------------------------------------------------------------------------------------------


def opened(path: Path) -> object:
    return open_source(str(path), ExportOptions(), lambda file: pytest.fail("ran ONNX"))


def test_exporters_that_break_the_contract(announce: Announce, tmp_path: Path) -> None:
    file = tmp_path / "model.odd"
    file.write_text("?")
    with pytest.raises(SourceError, match="of no known kind"):
        opened(file)
    announce("exporters", "none", EXPORTER.format(opens=False, open="pass"))
    with pytest.raises(SourceError, match="of no known kind"):
        opened(file)
    first = announce("exporters", "odd", EXPORTER.format(opens=True, open="return 3"))
    with pytest.raises(PluginError, match=rf"{first}.* as int"):
        opened(file)
    broken = announce("exporters", "broken", "import no_such_module_anywhere")
    with pytest.raises(PluginError, match=first):  # the broken one does not hinder the one that knows the file
        opened(file)
    second = announce("exporters", "other", EXPORTER.format(opens=True, open="raise KeyError(1)"))
    with pytest.raises(PluginError, match="is claimed by") as caught:
        opened(file)
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert len(installed("exporters")) == 4
    assert broken not in str(caught.value)


def test_a_broken_exporter_is_said_where_nobody_knows_the_file(announce: Announce, tmp_path: Path) -> None:
    file = tmp_path / "model.odd"
    file.write_text("?")
    broken = announce("exporters", "broken", "import no_such_module_anywhere")
    with pytest.raises(PluginError, match=broken):
        opened(file)
    with pytest.raises(SourceError, match="does not exist"):
        opened(tmp_path / "model.none")
