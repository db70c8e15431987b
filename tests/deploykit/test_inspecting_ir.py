"""OpenVINO IR, described with the same keys and the same numbers as the ONNX file that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from deploykit.diffing import diff_models
from deploykit.errors import DataError, ModelError
from deploykit.inspecting import inspect_model

openvino = pytest.importorskip("openvino")
F32 = np.float32


@pytest.fixture
def pair(build: Any, save: Any, tmp_path: Path) -> tuple[Path, Path]:
    """The same net as ONNX and as IR: a plain, a grouped and a transposed convolution, and a product."""
    rng = np.random.default_rng(0)
    weights = {
        "w0": rng.standard_normal((8, 3, 3, 3)), "w1": rng.standard_normal((8, 2, 3, 3)),
        "w2": rng.standard_normal((8, 4, 2, 2)), "w3": rng.standard_normal((4, 5)), "b": rng.standard_normal(5),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"]),
        helper.make_node("Conv", ["a", "w1"], ["b1"], group=4),
        helper.make_node("ConvTranspose", ["b1", "w2"], ["c"], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "w3", "b"], ["y"]),
    ]
    model = build(nodes, {"x": ["n", 3, 12, 12]}, {"y": ["n", 5]}, {k: v.astype(F32) for k, v in weights.items()})
    onnx_path = save(model, tmp_path)
    openvino.save_model(openvino.convert_model(str(onnx_path)), str(tmp_path / "model.xml"), compress_to_fp16=False)
    return onnx_path, tmp_path / "model.xml"


def test_the_same_keys_and_numbers(pair: tuple[Path, Path]) -> None:
    onnx_found = inspect_model(pair[0], dims={"n": 2}, load=False)
    found = inspect_model(pair[1], dims={"x_dim0": 2}, load=False)
    assert set(found) == set(onnx_found)
    for key in ("compute", "memory", "nodes", "parameters", "files", "contract"):
        assert set(found[key]) == set(onnx_found[key]), key
    assert found["format"] == "openvino"
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["x_dim0", 3, 12, 12]}]
    assert found["compute"]["macs"] == onnx_found["compute"]["macs"] > 0
    assert found["compute"]["uncounted"] == []
    floats = found["parameters"]["by_dtype"]["float32"]
    assert floats["count"] == onnx_found["parameters"]["by_dtype"]["float32"]["count"]
    assert found["files"]["external"] == 1


def test_contracts_and_differences(pair: tuple[Path, Path]) -> None:
    found = inspect_model(pair[1], contract=["ort:1.18", "openvino:2024.6"], load=False)["contract"]
    assert [(v["target"], v["kind"]) for v in found["violations"]] == [("ort:1.18", "format")]
    difference = diff_models(*pair)
    assert difference["initializers"] is None
    assert difference["macs"]["delta"] == 0


def test_files_that_are_no_ir(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "junk.xml").write_bytes(b"\x00junk")
    with pytest.raises(ModelError, match="not XML"):
        inspect_model(tmp_path / "junk.xml", load=False)
    (tmp_path / "other.xml").write_text("<html></html>")
    with pytest.raises(ModelError, match="OpenVINO cannot read"):
        inspect_model(tmp_path / "other.xml", load=False)
    with pytest.raises(DataError, match=r"nosuch.*x_dim0"):
        inspect_model(pair[1], dims={"nosuch": 1}, load=False)
