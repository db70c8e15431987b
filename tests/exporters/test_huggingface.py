"""Hugging Face directories: real text, refused directories, dimensions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.errors import ExportError, SourceError


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory, build: Any) -> Path:
    path: Path = build.text(tmp_path_factory.mktemp("hf") / "text", num_labels=4)
    return path


@pytest.fixture
def copy(text_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_dir, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_real_sentences_are_the_reference(opened: Any, minilm_dir: Path) -> None:
    source = opened(minilm_dir)
    assert (source.kind, source.data) == ("huggingface", "text")
    assert {asset.name for asset in source.assets} >= {"config.json", "tokenizer.json", "vocab.txt"}
    assert source.ranges["input_ids"].high == 30521
    masks = [case.feeds["attention_mask"] for case in source.cases]
    assert any((mask == 0).any() for mask in masks), "no case has padding"
    assert all(mask.any(axis=1).all() for mask in masks), "a row without tokens"
    assert all((case.feeds["input_ids"][:, 0] == 101).all() for case in source.cases), "[CLS] comes first"
    alone = next(case for case in source.cases if case.sizes["batch"] == 1)
    assert alone.feeds["attention_mask"].mean() > 0.9


def test_without_a_tokenizer_tokens_are_drawn(opened: Any, text_dir: Path) -> None:
    source = opened(text_dir)
    assert source.data == "generated"
    assert [s.name for s in source.signature.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert max(case.sizes["sequence"] for case in source.cases) <= 40
    assert all(case.feeds["input_ids"].max() < 60 for case in source.cases)


@pytest.mark.parametrize(
    ("dynamic", "shape"),
    [
        (("batch",), ("batch", 24)),
        (("none",), (4, 24)),
        (tuple(f"{n}:0=rows,1=length" for n in ("input_ids", "attention_mask", "token_type_ids")), ("rows", "length")),
    ],
)
def test_dimensions_are_the_users_choice(opened: Any, text_dir: Path, dynamic: Any, shape: Any) -> None:
    source = opened(text_dir, dynamic=dynamic)
    assert {s.shape for s in source.signature.inputs} == {shape}
    assert len(source.cases) >= 3
    ids = [case.feeds["input_ids"].tobytes() for case in source.cases]
    assert len(set(ids)) == len(ids), "cases repeat each other"


def test_fixed_cases_differ_and_have_tokens_in_every_row(opened: Any, text_dir: Path) -> None:
    source = opened(text_dir)
    cases = source.cases_for(source.ways[-1])
    assert {case.feeds["input_ids"].shape for case in cases} == {(4, 24)}
    assert len({case.feeds["input_ids"].tobytes() for case in cases}) == len(cases) >= 3
    assert all(case.feeds["attention_mask"][:, 0].all() for case in cases)


def test_inputs_of_unequal_shape(opened: Any, message: Any, text_dir: Path) -> None:
    call = lambda: opened(text_dir, dynamic=("input_ids:0=batch",))  # noqa: E731
    assert "inputs share it" in message(ExportError, call)


def test_images_follow_the_config(opened: Any, build: Any, tmp_path: Path) -> None:
    source = opened(build.image(tmp_path / "vit", "vit"))
    assert source.signature.inputs[0].shape == ("batch", 3, 32, 32)
    assert len({np.asarray(case.outputs["logits"]).tobytes() for case in source.cases}) == len(source.cases)


def test_missing_weights(opened: Any, message: Any, copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    text = message(SourceError, lambda: opened(copy))
    assert "lacks 1 weights" in text
    assert "classifier.weight" in text


def test_weights_of_another_shape(opened: Any, message: Any, copy: Path) -> None:
    change_config(copy, hidden_size=32)
    message(SourceError, lambda: opened(copy))


def test_no_safetensors(opened: Any, message: Any, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "has no *.safetensors" in message(SourceError, lambda: opened(copy))


def test_cut_off_safetensors(opened: Any, message: Any, copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cannot load" in message(SourceError, lambda: opened(copy))


@pytest.mark.parametrize("name", ["NoSuchModel", "pipeline", "AutoTokenizer", "utils"])
def test_architectures_that_are_no_models(opened: Any, message: Any, copy: Path, name: str) -> None:
    change_config(copy, architectures=[name])
    assert f"has no model {name}" in message(SourceError, lambda: opened(copy))


@pytest.mark.parametrize("config", ["", "{", "[]", '{"model_type": "no-such-type"}', "{}"])
def test_unreadable_configs(opened: Any, message: Any, copy: Path, config: str) -> None:
    (copy / "config.json").write_text(config)
    assert "config.json" in message(SourceError, lambda: opened(copy))


def test_code_in_the_directory_does_not_run(opened: Any, message: Any, copy: Path) -> None:
    change_config(copy, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    (copy / "mine.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    message(SourceError, lambda: opened(copy))
    assert not (copy / "ran").exists()


def test_caches_that_tensors_cannot_stand_for(opened: Any, message: Any, tmp_path: Path) -> None:
    import transformers

    config = transformers.FalconMambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.FalconMambaForCausalLM(config)
    model.save_pretrained(tmp_path / "mamba")
    source = opened(tmp_path / "mamba", way="torchscript")
    assert not any("past" in spec.name for spec in source.signature.inputs)
    assert any("has no key-value cache" in note for note in source.notes)


def test_inputs_do_not_apply(opened: Any, message: Any, text_dir: Path) -> None:
    call = lambda: opened(text_dir, inputs=("input_ids=int64[1,8]",))  # noqa: E731
    assert "--input does not apply" in message(ExportError, call)


def test_directories_without_config(opened: Any, message: Any, tmp_path: Path) -> None:
    assert "no config.json" in message(SourceError, lambda: opened(tmp_path))
    (tmp_path / "model.onnx").touch()
    assert "model.onnx" in message(SourceError, lambda: opened(tmp_path))
