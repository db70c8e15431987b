"""Small ONNX models: `build`, `linear` and `save` are functions that tests ask for as fixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str] | None],
    outputs: Mapping[str, Sequence[int | str] | None],
    weights: Mapping[str, Any] | None = None,
    *,
    opset: int = 18,
    ir_version: int = 8,
    domains: Mapping[str, int] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model of float32 inputs and outputs."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(k, FLOAT, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, FLOAT, v) for k, v in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid(d, v) for d, v in {"": opset, **(domains or {})}.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=functions)


def write_model(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """Write a model."""
    path = folder / name
    onnx.save(model, str(path))
    return path


def make_linear(**options: Any) -> onnx.ModelProto:
    """One matrix product with four rows and three columns."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    return make_model([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], {"x": ["n", 4]}, {"y": ["n", 3]},
                 {"w": weight}, **options)  # fmt: skip


@pytest.fixture(scope="session")
def build() -> Any:
    """`make_model`."""
    return make_model


@pytest.fixture(scope="session")
def linear() -> Any:
    """`make_linear`."""
    return make_linear


@pytest.fixture(scope="session")
def save() -> Any:
    """`write_model`."""
    return write_model
