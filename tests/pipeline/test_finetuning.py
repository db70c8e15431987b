"""`finetune`: from a module to a verified artifact that is better, with the training as its evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import deploykit
from deploykit.errors import (
    ContractError,
    DataError,
    ExportError,
    OptimizationError,
    OutputExistsError,
    SourceError,
    UnverifiableError,
)
from deploykit.optimizers.training import TrainConfig
from deploykit.progress import Progress
from deploykit.trainable import find_score, known_as, open_trainable

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 48)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(48, 10)

    def forward(self, image, scale):
        return self.out(self.drop(torch.relu(self.hidden(image.flatten(1) * scale))))


def make():
    torch.manual_seed(0)
    return Net(), (torch.zeros(2, 8, 8), torch.ones(2, 1))
"""
CONFIG = TrainConfig(epochs=5, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("finetune")
    (made / "net.py").write_text(SOURCE)
    rows, labels = load_digits(return_X_y=True)
    images = (rows / 16).astype(np.float32).reshape(-1, 8, 8)
    ones = np.ones((len(labels), 1), np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    for name, index in (("train", order[:800]), ("eval", order[800:1200])):
        # Named out of order, with a column that the module does not take.
        np.savez(
            made / f"{name}.npz", scale=ones[index], spare=ones[index], image=images[index], labels=labels[index]
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def tuned(folder):
    told = Progress()
    artifact = deploykit.finetune(
        f"{folder / 'net.py'}:make", folder / "tuned", data=folder / "train.npz", eval_data=folder / "eval.npz",
        config=CONFIG, devices=["ort:cpu"], progress=told,
    )  # fmt: skip
    return artifact, told


def test_the_artifact_is_the_trained_module(folder, tuned):
    artifact = deploykit.Artifact.open(tuned[0].path)
    state = torch.load(folder / "tuned.training" / "weights.pt", weights_only=True)
    module = open_trainable(f"{folder / 'net.py'}:make").module
    module.load_state_dict(state)
    held_out = np.load(folder / "eval.npz")
    feeds = {"image": held_out["image"], "scale": held_out["scale"]}
    with deploykit.open_session(artifact.path, "ort:cpu") as session, torch.no_grad():
        found = next(iter(session.run(feeds).values()))
        want = module(*(torch.tensor(feeds[name]) for name in ("image", "scale")))
    np.testing.assert_allclose(found, want.numpy(), atol=1e-4)
    accuracy = np.mean(found.argmax(1) == held_out["labels"])
    assert accuracy > 0.9
    (record,) = artifact.manifest.evidence.accuracy
    assert record["value"] == pytest.approx(accuracy, abs=1e-6)
    assert record["before"] < 0.3
    assert artifact.manifest.evidence.parity[0]["verdict"] == "passed"


def test_the_lineage_tells_how_it_was_trained(folder, tuned):
    trained, exported = tuned[0].manifest.lineage
    assert (trained.step, exported.step) == ("finetune", "export")
    params = trained.params
    assert params["config"]["learning_rate"] == 1e-2
    assert params["before"] < 0.3 < 0.9 < params["after"] == max(e["accuracy"] for e in params["history"])
    assert params["history"] == json.loads((folder / "tuned.training" / "history.json").read_text())
    assert (params["metric"], params["epochs"], params["stopped"]) == ("accuracy", 5, "epochs")
    assert {"torch", "pytorch-lightning"} <= set(trained.tools)


def test_the_result_is_quantized_like_any_artifact(folder, tuned):
    made = deploykit.quantize_dynamic(tuned[0].path, folder / "int8", allow_slower=True, gate_seconds=0)
    assert [step.step for step in made.manifest.lineage] == ["finetune", "export", "quantize-dynamic"]


def test_a_model_of_transformers_is_kept_as_a_directory(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, num_labels=3,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "special_tokens_map.json").write_text("{}")
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 7, 64)
    mask = (np.arange(12) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(1, 40, mask.shape)
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids, "labels": ids[:, 1] % 3}
    np.savez(tmp_path / "text.npz", **arrays)
    artifact = deploykit.finetune(
        tmp_path / "start", tmp_path / "tuned", data=tmp_path / "text.npz", eval_data=tmp_path / "text.npz",
        config=TrainConfig(epochs=3, batch_size=16, learning_rate=1e-2, trim_padding=True), devices=["ort:cpu"],
    )  # fmt: skip
    kept = tmp_path / "tuned.training" / "model"
    assert (kept / "special_tokens_map.json").read_text() == "{}"
    model = transformers.BertForSequenceClassification.from_pretrained(kept).eval()
    (feeds, outputs), *_ = artifact.golden()
    with torch.no_grad():
        found = model(**{name: torch.tensor(array) for name, array in feeds.items()}).logits
    np.testing.assert_allclose(found, outputs["logits"], atol=1e-4)


def test_nothing_is_overwritten(folder, tuned):
    options: dict[str, Any] = {"data": folder / "train.npz", "config": CONFIG}
    source = f"{folder / 'net.py'}:make"
    with pytest.raises(OutputExistsError, match="left as it is"):
        deploykit.finetune(source, folder / "tuned", **options)
    (folder / "other.training").mkdir()
    (folder / "other.training" / "mine").write_text("x")
    with pytest.raises(OutputExistsError, match="left as it is"):
        deploykit.finetune(source, folder / "other", **options)
    (folder / "tuned").rename(folder / "moved")
    with pytest.raises(OutputExistsError, match="--resume"):
        deploykit.finetune(source, folder / "tuned", **options)
    # Another training is told from this one before anything is loaded.
    with pytest.raises(OptimizationError, match=r"begun with source 'net\.py:make', not 'other\.py:make'"):
        (folder / "other.py").write_text("raise SystemExit")
        deploykit.finetune(f"{folder / 'other.py'}:make", folder / "tuned", resume=True, **options)
    with pytest.raises(OptimizationError, match="begun with epochs 5, not 6"):
        deploykit.finetune(
            source, folder / "tuned", resume=True, data=folder / "nosuch.npz", config=TrainConfig(epochs=6)
        )
    (folder / "moved").rename(folder / "tuned")
    assert [p.name for p in (folder / "other.training").iterdir()] == ["mine"]


def test_a_training_outlives_a_failed_export(folder, monkeypatch):
    options: dict[str, Any] = {
        "data": folder / "train.npz", "eval_data": folder / "eval.npz", "config": TrainConfig(epochs=1),
        "devices": ["ort:cpu"],
    }  # fmt: skip
    source = f"{folder / 'net.py'}:make"
    given: list[Any] = []

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ExportError("planned")

    def keep(opened: Any, output: Path, *, steps: Any, **options: Any) -> None:
        given.extend([opened, *steps])

    monkeypatch.setattr("deploykit.finetuning.export_source", fail)
    with pytest.raises(ExportError, match="planned"):
        deploykit.finetune(source, folder / "late", **options)
    before = (folder / "late.training" / "weights.pt").read_bytes()
    monkeypatch.setattr("deploykit.finetuning.export_source", keep)
    deploykit.finetune(source, folder / "late", resume=True, **options)
    opened, step = given
    assert step.params["epochs"] == 1
    assert (folder / "late.training" / "weights.pt").read_bytes() == before
    state = torch.load(folder / "late.training" / "weights.pt", weights_only=True)
    assert torch.equal(opened.module.out.weight, state["out.weight"])


def test_a_source_is_known_from_where_its_output_stands(folder, tmp_path, monkeypatch):
    """So that a project may be moved as a whole, and be called from anywhere in it."""
    file = folder / "net.py"
    assert known_as(f"{file}:make", folder / "tuned") == "net.py:make"
    monkeypatch.chdir(folder)
    assert known_as("net.py:make", folder / "tuned") == "net.py:make"
    assert known_as(folder, folder / "tuned") == "."
    assert known_as("package.module:make", folder / "tuned") == "package.module:make"
    assert known_as("derive:layers=2", folder / "tuned") == "derive:layers=2"
    assert known_as(nn.Linear(2, 2), folder / "tuned").startswith("module Linear of")


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, rows):
        return self.out(0 * rows)


def test_a_trained_module_that_answers_the_same_to_all_is_told_what_this_command_can_do(tmp_path):
    np.savez(tmp_path / "train.npz", rows=np.ones((8, 4), np.float32), labels=np.arange(8) % 3)
    with pytest.raises(UnverifiableError, match=r"example inputs that differ .* or train longer") as caught:
        deploykit.finetune(
            Constant(), tmp_path / "tuned", torch.ones(2, 4), data=tmp_path / "train.npz", config=TrainConfig(epochs=1)
        )
    assert "--allow-unverified" not in str(caught.value), "an option that it has not got"
    assert (tmp_path / "tuned.training" / "weights.pt").is_file() and not (tmp_path / "tuned").exists()


def test_a_training_that_does_not_begin_leaves_nothing(folder):
    with pytest.raises(DataError, match="no data for input 'image'"):
        np.savez(folder / "bare.npz", scale=np.ones((4, 1), np.float32), labels=np.zeros(4, np.int64))
        deploykit.finetune(
            f"{folder / 'net.py'}:make", folder / "none", data=folder / "bare.npz", eval_data=folder / "eval.npz"
        )  # fmt: skip
    assert not list(folder.glob("none*"))


def test_a_training_without_a_checkpoint_gives_way(folder, monkeypatch):
    options: dict[str, Any] = {"data": folder / "train.npz", "eval_data": folder / "eval.npz"}
    source = f"{folder / 'net.py'}:make"
    wild = TrainConfig(optimizer="sgd", learning_rate=1e18, clip_norm=None)
    with pytest.raises(OptimizationError, match="lower the learning rate"):
        deploykit.finetune(source, folder / "wild", config=wild, **options)
    monkeypatch.setattr("deploykit.finetuning.export_source", lambda opened, output, *, steps, **rest: steps)
    (step,) = deploykit.finetune(source, folder / "wild", config=TrainConfig(epochs=1), **options)
    assert step.params["before"] < 0.3


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        ({"config": TrainConfig(metric="bleu"), "eval_data": "eval.npz"}, DataError, "unknown metric"),
        ({"config": TrainConfig(learning_rate=-1.0)}, OptimizationError, "learning rate"),
        ({"data": "nosuch.npz"}, DataError, "does not exist"),
        ({"source": "nosuch.py:make"}, SourceError, "does not exist"),
        ({"source": "nosuch.py:make", "contract": ["ort:0.1"]}, ContractError, "ort"),
        ({"eval_data": "wide.npz"}, DataError, "has label 12"),
        ({"eval_data": "bare.npz"}, DataError, "no data for input 'image'"),
    ],
)
def test_errors_come_before_the_work(folder, monkeypatch, options, kind, word):
    monkeypatch.chdir(folder)
    ones = np.ones((13, 1), np.float32)
    np.savez("bare.npz", scale=ones, labels=np.zeros(13, np.int64))
    np.savez("wide.npz", image=np.zeros((13, 8, 8), np.float32), scale=ones, labels=np.arange(13))
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", None)  # nothing is trained
    with pytest.raises(kind) as caught:
        deploykit.finetune(**{"source": "net.py:make", "output": "x", "data": "train.npz", **options})
    assert word in str(caught.value)
    assert not list(folder.glob("x*"))


def test_sources_that_cannot_be_trained(folder):
    for module, word in (
        (torch.jit.script(nn.Linear(2, 2)), "TorchScript"),
        (nn.Linear(2, 2).half(), "16 bits"),
    ):
        with pytest.raises(SourceError, match=word):
            open_trainable(module, torch.zeros(2, 2, dtype=next(module.parameters()).dtype))


def test_a_module_of_this_process_stays_as_it_is(tmp_path):
    net = nn.Linear(64, 10)
    before = net.weight.detach().clone()
    model = open_trainable(net, torch.zeros(2, 64))
    model.module.weight.data.zero_()
    assert torch.equal(net.weight, before)
    for case in model.renewed().cases:
        (output,) = case.outputs.values()
        np.testing.assert_allclose(output, np.broadcast_to(net.bias.detach().numpy(), output.shape))


def test_scores_are_those_of_the_benchmarks():
    outputs = np.random.default_rng(0).standard_normal((90, 3)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 3, 90)
    pairs = [(outputs[i : i + 20], labels[i : i + 20]) for i in range(0, 90, 20)]
    from sklearn.metrics import f1_score

    assert find_score("accuracy").of(pairs) == pytest.approx(np.mean(outputs.argmax(1) == labels))
    assert find_score("f1").of(pairs) == pytest.approx(f1_score(labels, outputs.argmax(1), average="macro"))


def test_a_recipe_says_the_same(tmp_path, asked_by_recipe):
    seen = asked_by_recipe(
        ["finetune", "net.py:make", "-o", "out", "--data", "train.npz", "--eval", "eval.npz", "--metric", "f1",
         "--epochs", "3", "--clip-norm", "0", "--schedule", "one-cycle"]
    )  # fmt: skip
    assert seen["config"] == TrainConfig(epochs=3, clip_norm=None, schedule="one-cycle", metric="f1")
    assert seen["source"] == f"{tmp_path / 'net.py'}:make"
    assert (seen["data"], seen["eval_data"]) == (str(tmp_path / "train.npz"), str(tmp_path / "eval.npz"))
    assert seen["output"] == tmp_path / "out" / "finetune"
