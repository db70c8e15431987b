"""The verb `distill`: real students of real teachers, their evidence, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deploykit
from deploykit import distilling
from deploykit.errors import AccuracyError, DataError, OptimizationError, OutputExistsError, SourceError
from deploykit.optimizers.distillation import DistillConfig
from deploykit.optimizers.training import TrainConfig
from deploykit.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Sequential):
    """Rows of 64 pixels to 10 digits."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, pixels: Any) -> Any:
        return super().forward(pixels)


@pytest.fixture(scope="module")
def digits(digit_files: Callable[..., Path]) -> Path:
    """Training rows without labels, and labelled ones that nobody learns from."""
    return digit_files("pixels", 64)


@pytest.fixture(scope="module")
def teacher(digits: Path, taught: Callable[[Any, Path, int], Any]) -> Net:
    torch.manual_seed(0)
    return taught(Net(256), digits, 8)


def accuracy(net: nn.Module, digits: Path) -> float:
    with np.load(digits / "eval.npz") as data, torch.no_grad():
        return float((net(torch.tensor(data["pixels"])).argmax(1).numpy() == data["labels"]).mean())


def test_a_small_student_learns_from_answers_alone(teacher: Net, digits: Path, tmp_path: Path) -> None:
    """The student sees no label: what it knows, it has from the teacher."""
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(1)
    student = Net(16)
    untrained, first = accuracy(student, digits), copy.deepcopy(student.state_dict())
    told = Progress()
    artifact = deploykit.distill(
        teacher, tmp_path / "out", student=student, data=digits / "unlabelled.npz", eval_data=digits / "eval.npz",
        max_drop=0.05, teacher_inputs=torch.rand(4, 64), training=TrainConfig(epochs=12, learning_rate=1e-2),
        config=DistillConfig(temperature=2.0), devices=["ort:cpu"], progress=told,
    )  # fmt: skip
    assert untrained < 0.3
    # Neither the teacher nor the module that was given is touched: copies learn and teach.
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(torch.equal(tensor, first[name]) for name, tensor in student.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())

    (record,) = artifact.manifest.evidence.accuracy
    assert record["metric"] == "accuracy"
    assert record["parent"] == pytest.approx(accuracy(teacher, digits), abs=1e-6)
    assert record["value"] > 0.9
    assert record["value"] >= record["parent"] - 0.05
    assert record["agreement"] > 0.9
    assert (record["teacher_parameters"], record["parameters"]) == tuple(
        sum(p.numel() for p in net.parameters()) for net in (teacher, student)
    )
    assert record["ratio"] == pytest.approx(19722 / 1242, rel=1e-3)
    assert "15.9 times fewer" in record["summary"]
    assert record["certified"]

    taught, exported = artifact.manifest.lineage
    assert (taught.step, exported.step) == ("distill", "export")
    assert taught.params["weights"] == {"logits": 1.0}
    assert taught.params["kind"] == "classification"
    assert taught.params["epochs"] == 12

    # The weights beside the artifact are those of the model in it.
    again = Net(16)
    again.load_state_dict(torch.load(tmp_path / "out.training" / "student" / "weights.pt", weights_only=True))
    assert accuracy(again.eval(), digits) == pytest.approx(record["value"], abs=2e-3)
    (feeds, outputs), *_ = artifact.golden()
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(feeds["pixels"])), *outputs.values(), atol=1e-4)
    losses = [entry["logits"] for entry in json.loads((tmp_path / "out.training" / "history.json").read_bytes())]
    assert losses[-1] < losses[0] / 4


FACTORIES = '''
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, pixels):
        return super().forward(pixels)

class Linear(nn.Linear):
    def forward(self, pixels):
        return super().forward(pixels)

def large():
    """Least squares: right nine times in ten."""
    rows, labels = load_digits(return_X_y=True)
    net = Linear(64, 10)
    with torch.no_grad():
        weights = np.linalg.lstsq(rows[:1200] / 16, 8 * np.eye(10)[labels[:1200]], rcond=None)[0]
        net.weight.copy_(torch.tensor(weights.T))
        net.bias.zero_()
    return net, (torch.rand(4, 64),)

def small():
    torch.manual_seed(1)
    return Net(8), (torch.rand(4, 64),)

def wide():
    return nn.Linear(64, 12), (torch.rand(4, 64),)

def estimator():
    from sklearn.tree import DecisionTreeClassifier
    return DecisionTreeClassifier().fit([[0.0] * 64, [1.0] * 64], [0, 1])
'''


@pytest.fixture
def factories(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(FACTORIES, encoding="utf-8")
    return str(tmp_path / "nets.py")


def test_a_training_is_gone_on_with_only_if_it_is_the_same(
    factories: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student misses its target; the training stays, and serves the next try."""
    asked: dict[str, Any] = {
        "student": f"{factories}:small", "data": digits / "train.npz", "eval_data": digits / "eval.npz",
        "training": TrainConfig(epochs=1), "devices": ["ort:cpu"],
    }  # fmt: skip
    with pytest.raises(AccuracyError, match="the student's accuracy"):
        deploykit.distill(f"{factories}:large", tmp_path / "out", **asked, metric="accuracy", max_drop=0.0)
    assert not (tmp_path / "out").exists()
    # Before anything is loaded.
    with pytest.raises(OutputExistsError, match="--resume"):
        deploykit.distill("nosuch.py:large", tmp_path / "out", **asked)
    for teacher, changes, said in (
        ("large", {"config": DistillConfig(temperature=9.0)}, "temperature 4.0, not 9.0"),
        ("nosuch", {}, "teacher 'nets.py:large', not 'nets.py:nosuch'"),
        ("large", {"student": f"{factories}:nosuch"}, "student 'nets.py:small', not 'nets.py:nosuch'"),
        ("large", {"training": TrainConfig(epochs=2)}, "epochs 1, not 2"),
        ("large", {"metric": "f1"}, "metric 'accuracy', not 'f1'"),
        ("large", {"data": digits / "eval.npz"}, "data rows 1200, not 597"),
        ("large", {"eval_data": digits / "train.npz"}, "eval data rows 597, not 1200"),
    ):
        with pytest.raises(OptimizationError) as caught:
            deploykit.distill(f"{factories}:{teacher}", tmp_path / "out", **{**asked, **changes}, resume=True)
        assert said in str(caught.value)
    # The same again is judged the same, without being trained again; where the answers are kept makes no difference.
    weights = (tmp_path / "out.training" / "weights.pt").stat().st_mtime_ns
    monkeypatch.setattr(distilling, "export_source", lambda source, place, **told: told["steps"])
    (step,) = deploykit.distill(
        f"{factories}:large", tmp_path / "out", **asked, resume=True, config=DistillConfig(cache="off")
    )
    assert (step.params["weights"], step.params["epochs"]) == ({"logits": 0.9, "task": 0.1}, 1)
    assert (tmp_path / "out.training" / "weights.pt").stat().st_mtime_ns == weights


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    for parameter in model.parameters():  # outputs that react
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("bert") / "teacher"
    model.save_pretrained(folder)
    return folder


def test_a_derived_student_of_a_transformer(bert_dir: Path, tmp_path: Path) -> None:
    import transformers

    rng = np.random.default_rng(0)
    ids = rng.integers(1, 40, (48, 10))
    mask = np.ones_like(ids)
    mask[::2, 6:] = 0
    np.savez(tmp_path / "text.npz", input_ids=ids, attention_mask=mask, token_type_ids=np.zeros_like(ids))
    files = {path.name: path.read_bytes() for path in bert_dir.iterdir()}
    artifact = deploykit.distill(
        bert_dir, tmp_path / "out", student="derive:layers=2,ffn=0.5", data=tmp_path / "text.npz",
        eval_data=tmp_path / "text.npz", training=TrainConfig(epochs=2, batch_size=16, learning_rate=1e-4),
        config=DistillConfig(features=0.5, attention=0.5, attention_layers="all"), devices=["ort:cpu"],
    )  # fmt: skip
    assert {path.name: path.read_bytes() for path in bert_dir.iterdir()} == files
    params = artifact.manifest.lineage[0].params
    assert params["student"] == f"derive:layers=2,ffn=0.5 of {bert_dir}"
    layer = "bert.encoder.layer"
    assert params["features"] == [f"{layer}.0={layer}.0", f"{layer}.2={layer}.1"]
    assert [pair.split("=")[0].rsplit(".", 2)[0] for pair in params["attention"]] == [f"{layer}.0", f"{layer}.2"]
    assert {"logits", "features", "attention"} <= params["history"][0].keys()
    (record,) = artifact.manifest.evidence.accuracy
    assert "metric" not in record
    assert 0 <= record["agreement"] <= 1
    assert record["parameters"] < record["teacher_parameters"]

    # What stands beside the artifact is a model directory of the student, and its config is among the assets.
    for folder in (tmp_path / "out.training" / "student", tmp_path / "out" / "assets"):
        assert json.loads((folder / "config.json").read_bytes())["num_hidden_layers"] == 2
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out.training" / "student").eval()
    (feeds, outputs), *_ = artifact.golden()
    with torch.no_grad():
        found = model(**{name: torch.tensor(array) for name, array in feeds.items()}).logits
    np.testing.assert_allclose(found, outputs["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("teacher_name", "changes", "error", "said"),
    [
        ("large", {"student": "{}:wide"}, OptimizationError, "the student gives 12 classes, the teacher 10"),
        ("large", {"student": "derive:layers=1"}, OptimizationError, "--student file.py:factory"),
        ("large", {"student": "derive:depth=1"}, OptimizationError, "derive:layers=N"),
        ("estimator", {}, SourceError, "scikit-learn"),
        ("large", {"student": "{}:nosuch"}, SourceError, "has no 'nosuch'"),
        ("large", {"metric": "accuracy"}, DataError, "no data to judge on"),
        ("large", {"config": DistillConfig()}, OptimizationError, "--kind classification"),
        ("large", {"data": {"pixels": np.zeros((4, 64)), "labels": np.full(4, 11)}}, DataError, "label 11"),
        ("large", {"max_drop": 0.1}, OptimizationError, "no metric to hold to it"),
        ("large", {"max_drop": "much"}, DataError, "max drop"),
        ("large", {"data": {"other": np.zeros((4, 3), np.float32)}}, DataError, "does not fit"),
        ("large", {"data": {"a": np.zeros((4, 64)), "b": np.zeros((4, 64))}}, DataError, "no data for input 'pixels'"),
        ("large", {"config": DistillConfig(kind="classification", task=1.0)}, OptimizationError, "the data have none"),
        ("large", {"training": TrainConfig(mixup=0.3)}, OptimizationError, "mixup"),
        ("large", {"eval_data": {"pixels": np.zeros((4, 64))}, "metric": "f1"}, DataError, "has no 'labels'"),
        ("large", {"eval_data": {"pixels": np.zeros((4, 60))}}, DataError, "does not fit"),
        (
            "large", {"eval_data": {"pixels": np.zeros((4, 64)), "labels": np.zeros((4, 2), int)}, "metric": "f1"},
            DataError, "labels of shape [4, 2]",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_distilled(
    factories: str, tmp_path: Path, teacher_name: str, changes: dict[str, Any], error: Any, said: str
) -> None:
    asked: dict[str, Any] = {
        "student": "{}:small", "data": {"pixels": np.zeros((4, 64), np.float32)},
        "config": DistillConfig(kind="classification"), **changes,
    }  # fmt: skip
    asked["student"] = asked["student"].format(factories)
    for key in ("data", "eval_data"):
        if key in asked:
            asked[key] = deploykit.Dataset.from_arrays(asked[key])
    with pytest.raises(error) as caught:
        deploykit.distill(f"{factories}:{teacher_name}", tmp_path / "out", **asked)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_shared_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text(
        "import torch\nbody = torch.nn.Linear(64, 10)\n"
        "def make():\n    return torch.nn.Sequential(body), (torch.rand(2, 64),)\n"
    )
    source = f"{tmp_path / 'shared.py'}:make"
    data = deploykit.Dataset.from_arrays({"x": np.zeros((4, 64), np.float32)})
    with pytest.raises(SourceError, match="they share their memory"):
        deploykit.distill(source, tmp_path / "out", student=source, data=data)


def test_the_command_is_a_recipe(tmp_path: Path, asked_by_recipe: Callable[[Sequence[str]], dict[str, Any]]) -> None:
    seen = asked_by_recipe(
        ["distill", "nets.py:large", "--student", "derive:layers=2", "--data", "train.npz", "-o", "out",
         "--weight", "features=2", "--weight", "task=0", "--features", "body.1=body.0", "--temperature", "2",
         "--epochs", "3", "--max-drop", "1%"]
    )  # fmt: skip
    assert seen["config"] == DistillConfig(temperature=2.0, features=2.0, task=0.0, pairs=(("body.1", "body.0"),))
    assert seen["training"].epochs == 3
    assert (seen["source"], seen["student"]) == (f"{tmp_path / 'nets.py'}:large", "derive:layers=2")
    assert (seen["data"], seen["max_drop"]) == (str(tmp_path / "train.npz"), "1%")
    assert seen["output"] == tmp_path / "out" / "distill"


@pytest.mark.parametrize("option", [["--weight", "features"], ["--weight", "depth=1"], ["--features", "body"]])
def test_options_that_cannot_be_read(option: list[str]) -> None:
    from click.testing import CliRunner

    from deploykit.cli import cli

    given = ["distill", "nets.py:large", "--student", "nets.py:small", "--data", "train.npz", "-o", "out", *option]
    refused = CliRunner().invoke(cli, given)
    assert refused.exit_code == 2
    assert option[1] in refused.output
