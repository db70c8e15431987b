"""Sources of every kind, and what the tests of exporters share.

Helpers are handed out as fixtures, because test files of pytest's importlib mode cannot import each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.data import load_object
from deploykit.errors import DeploykitError
from deploykit.exporters import ExportOptions, Source, open_source
from deploykit.runtimes import open_session

ZOO = Path(__file__).with_name("zoo.py")
TRAINED = Path(__file__).with_name("trained.py")


def run_onnx(path: Path) -> Any:
    """Opens a model as the pipeline does for the reference outputs of an ONNX file."""
    return open_session(path, "ort:cpu", optimize=False).run


def open_from_zoo(source: object, **options: Any) -> Source:
    """A loaded source; a bare name is a function in zoo.py."""
    text = str(source)
    return open_source(f"{ZOO}:{text}" if text.isidentifier() else text, ExportOptions(**options), run_onnx)


def one_line(kind: type[DeploykitError], call: Callable[[], Any]) -> str:
    """The one line of the error that a call raises."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert text, "the error says nothing"
    assert "\n" not in text, f"an error is one line: {text!r}"
    return text


@pytest.fixture(scope="session")
def opened() -> Any:
    """`opened(source, **options)`: see `open_from_zoo`."""
    return open_from_zoo


@pytest.fixture(scope="session")
def message() -> Any:
    """`message(kind, call)`: see `one_line`."""
    return one_line


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """Builders of models on disk and in memory."""
    return SimpleNamespace(
        zoo=ZOO,
        trained=sys.modules[load_object(f"{TRAINED}:forest").__module__],
        text_model=text_model,
        external=external_model,
        image=small_image_model,
        text=small_text_model,
        pt2=exported_program,
    )


def text_model(vocabulary: int = 40) -> onnx.ModelProto:
    """Token ids [batch, sequence] through a table of embeddings and a matrix."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((vocabulary, 16)).astype(np.float32)
    matrix = rng.standard_normal((16, 6)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "wide"], ["embedded"]),
            helper.make_node("MatMul", ["embedded", "matrix"], ["scores"]),
        ],
        "text",
        [helper.make_tensor_value_info("ids", TensorProto.INT32, ["batch", "sequence"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", "sequence", 6])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(matrix, "matrix")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external_model(folder: Path) -> Path:
    """A model whose weights lie in weights.bin beside it."""
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(text_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def small_image_model(folder: Path, kind: str) -> Path:
    """A Hugging Face image classifier with few weights, written by save_pretrained."""
    import torch
    import transformers

    torch.manual_seed(0)
    model: Any
    if kind == "vit":
        vit = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
        vit.num_labels = 5
        model = transformers.ViTForImageClassification(vit)
    else:
        resnet = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
        )
        resnet.image_size = 32
        model = transformers.ResNetForImageClassification(resnet)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(folder)
    return folder


def small_text_model(folder: Path, **changes: Any) -> Path:
    """A BERT with few weights and without a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        **changes,
    )
    transformers.BertForSequenceClassification(config).eval().save_pretrained(folder)
    return folder


def exported_program(path: Path) -> Path:
    """A `.pt2` with constants among its inputs, two symbols, and tensors by keyword."""
    import torch

    options = load_object(f"{ZOO}:Options")
    dims = {
        "x": {0: torch.export.Dim.DYNAMIC},
        "mask": None,
        "power": None,
        "bias": {0: torch.export.Dim.DYNAMIC},
    }
    example = (torch.randn(4, 6), None, 3), {"bias": torch.randn(4, 6)}
    program = torch.export.export(options(), *example, dynamic_shapes=dims)
    torch.export.save(program, path)
    return path
