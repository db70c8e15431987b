"""Tasks: inferred from the class, or asked for; inputs of every kind of model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.errors import ExportError, SourceError
from deploykit.exporters.hf_tasks import Task, task_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "suite"))
zoo: Any = importlib.import_module("hf_zoo")
sys.path.pop(0)

EXPECTED = {
    "ResNet": "image-classification", "ViT": "image-classification", "SegFormer": "semantic-segmentation",
    "DETR": "object-detection", "BERT": "text-classification", "DistilBERT": "token-classification",
    "RoBERTa": "fill-mask", "ALBERT": "question-answering", "T5": "text2text-generation", "GPT-2": "text-generation",
    "Llama": "text-generation", "Wav2Vec2": "automatic-speech-recognition", "HuBERT": "audio-classification",
    "Whisper": "automatic-speech-recognition", "CLIP": "feature-extraction",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, Path] = {}

    def save(name: str) -> Path:
        return known.setdefault(name, zoo.save(name, tmp_path_factory.mktemp("hf") / name))

    return save


@pytest.mark.parametrize("name", EXPECTED)
def test_the_class_tells_the_task(name: str) -> None:
    assert task_of(zoo.ARCHITECTURES[name]()) == EXPECTED[name]


def test_another_task_takes_the_weights_it_needs(saved: Any, opened: Any) -> None:
    source = opened(saved("BERT"), task="feature-extraction")
    assert [s.name for s in source.signature.outputs] == ["last_hidden_state", "pooler_output"]
    assert any("BertModel, for feature-extraction" in note for note in source.notes)


def test_a_task_whose_head_was_never_trained(saved: Any, opened: Any, message: Any) -> None:
    text = message(SourceError, lambda: opened(saved("BERT"), task="question-answering"))
    assert "qa_outputs" in text
    assert "--task" in text


def test_tasks_that_are_none(saved: Any, opened: Any, message: Any, build: Any) -> None:
    assert "there is no task 'sorting'" in message(ExportError, lambda: opened(saved("BERT"), task="sorting"))
    text = message(ExportError, lambda: opened(saved("BERT"), task="object-detection"))
    assert "bert do no object-detection; expected one of" in text
    assert "text-classification" in text
    assert "--task applies to" in message(ExportError, lambda: opened("classifier", task="fill-mask"))
    assert "--part applies to" in message(ExportError, lambda: opened("classifier", part="encoder"))
    assert "the model is one graph" in message(ExportError, lambda: opened(saved("BERT"), part="encoder"))


def test_towers_and_their_joint_graph(saved: Any, opened: Any) -> None:
    text = opened(saved("CLIP"), part="text")
    assert [str(s) for s in text.signature.outputs] == ["text_embeds: float32[batch, 16]"]
    joint = opened(saved("CLIP"), task="zero-shot-image-classification")
    assert [s.shape for s in joint.signature.outputs[:2]] == [
        ("image_batch", "text_batch"),
        ("text_batch", "image_batch"),
    ]


def test_sound(saved: Any, opened: Any) -> None:
    source = opened(saved("Wav2Vec2"))
    assert [str(s) for s in source.signature.inputs] == [
        "input_values: float32[batch, samples]", "attention_mask: int64[batch, samples]",
    ]  # fmt: skip
    assert any((case.feeds["attention_mask"] == 0).any() for case in source.cases)
    folder = saved("HuBERT")
    assert [s.name for s in opened(folder).signature.inputs] == ["input_values"]
    (folder / "preprocessor_config.json").write_text(json.dumps({"return_attention_mask": True}))
    assert [s.name for s in opened(folder).signature.inputs] == ["input_values", "attention_mask"]


def test_sizes_of_images(saved: Any, opened: Any) -> None:
    folder = saved("ResNet")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 48}}))
    assert opened(folder).signature.inputs[0].shape == ("batch", 3, 48, 48)
    assert opened(folder, dims={"height": 40, "width": 56}).signature.inputs[0].shape == ("batch", 3, 40, 56)
    (folder / "preprocessor_config.json").unlink()


def test_dynamic_pictures(saved: Any, opened: Any) -> None:
    source = opened(saved("ResNet"), dynamic=("pixel_values:0=n,2=height,3=width",), dims={"height": 64, "width": 64})
    assert source.signature.inputs[0].shape == ("n", 3, "height", "width")
    sizes = {case.feeds["pixel_values"].shape[2:] for case in source.cases}
    assert len(sizes) > 1, "the pictures have one size"


def test_unknown_sizes(saved: Any, opened: Any, message: Any) -> None:
    assert "--dim names 'depth'" in message(ExportError, lambda: opened(saved("BERT"), dims={"depth": 3}))
    assert "--dim sequence=4096" in message(ExportError, lambda: opened(saved("BERT"), dims={"sequence": 4096}))
    assert opened(saved("BERT"), dims={"sequence": 11}).cases[0].feeds["input_ids"].shape == (4, 11)


def test_eager_attention_is_said(saved: Any, opened: Any, tmp_path: Path) -> None:
    source = opened(saved("T5"), part="decoder", way="torch.export")
    assert [str(way) for way in source.ways][:2] == ["torch.export", "torch.export with eager attention"]
    own = source._model.config._attn_implementation
    with source._attention("eager"):
        assert source._model.config._attn_implementation == "eager"
    assert source._model.config._attn_implementation == own != "eager"


def test_values_differ_from_case_to_case(saved: Any, opened: Any) -> None:
    cases = opened(saved("ViT")).cases
    spread = np.stack([case.feeds["pixel_values"][0].mean((1, 2)) for case in cases]).std(0)
    assert (spread > 0.1).all(), "pictures of one brightness are all the same to a network that averages"


def test_every_task_has_a_loader() -> None:
    import transformers

    from deploykit.exporters import hf_tasks

    for task in Task:
        for loader in hf_tasks._LOADERS[task]:
            assert hasattr(transformers, loader), f"{task}: {loader}"
