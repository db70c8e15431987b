"""Modules with wrappers, odd weights and recurrent layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from deploykit.benchmarks.parity import Tolerance, Verdict, compare
from deploykit.errors import ExportError, SourceError
from deploykit.exporters import Source, Way, export
from deploykit.modelfile import read_model
from deploykit.runtimes import open_session

SCRIPT = Way("torchscript", True)


def operators(source: Source, way: Way, path: Path) -> list[str]:
    """Export and compare; the operators of the graph."""
    export(source, way, path)
    tolerance = Tolerance.for_dtype(source.precision) if source.precision else None
    with open_session(path, "ort:cpu") as session:
        found = [session.run(case.feeds) for case in source.cases]
    parity = compare([case.outputs for case in source.cases], found, tolerance)
    assert parity.verdict is Verdict.PASSED, parity.reason
    return [node.op_type for node in read_model(path).graph.node]


@pytest.mark.parametrize(("factory", "operator", "count"), [("lstm", "LSTM", 2), ("gru_steps_first", "GRU", 1)])
def test_recurrent_layers_stay_one_operator_each(
    opened: Any, tmp_path: Path, factory: str, operator: str, count: int
) -> None:
    source = opened(factory)
    assert source.ways[0].name == "torchscript"
    assert any("TorchScript goes first" in note for note in source.notes)
    assert operators(source, source.ways[0], tmp_path / "m.onnx").count(operator) == count


def test_the_user_still_chooses(opened: Any) -> None:
    source = opened("lstm", way="torch.export")
    assert {way.name for way in source.ways} == {"torch.export"}
    assert not any("TorchScript goes first" in note for note in source.notes)


def test_projections_become_matrix_products(opened: Any, message: Any, tmp_path: Path) -> None:
    source = opened("lstm_with_projections")
    assert "no ONNX form" in message(ExportError, lambda: export(source, source.ways[0], tmp_path / "m.onnx"))
    assert "LSTM" not in operators(source, source.ways[1], tmp_path / "m.onnx")


def test_tied_weights_are_stored_once(opened: Any, tmp_path: Path) -> None:
    for way in (SCRIPT, Way("torch.export", True)):
        operators(opened("tied"), way, tmp_path / "m.onnx")
        assert (tmp_path / "m.onnx").stat().st_size < 1.1 * 500 * 32 * 4, way


def test_float16_weights_stay_and_widen_the_tolerance(opened: Any, tmp_path: Path) -> None:
    source = opened("half")
    assert source.precision == "float16"
    operators(source, SCRIPT, tmp_path / "m.onnx")
    assert {t.data_type for t in read_model(tmp_path / "m.onnx").graph.initializer} == {10}


def test_bfloat16_weights_become_float32_and_it_is_said(opened: Any, tmp_path: Path) -> None:
    source = opened("bfloat16")
    assert source.precision is None
    assert any("bfloat16" in note and "float32" in note for note in source.notes)
    operators(source, SCRIPT, tmp_path / "m.onnx")


def test_autocast_to_bfloat16_is_switched_off_and_it_is_said(opened: Any, tmp_path: Path) -> None:
    source = opened("autocast")
    assert any("autocast in forward is switched off" in note for note in source.notes)
    operators(source, SCRIPT, tmp_path / "m.onnx")
    casts = [node for node in read_model(tmp_path / "m.onnx").graph.node if node.op_type == "Cast"]
    assert {node.attribute[0].i for node in casts} <= {onnx.TensorProto.FLOAT}


def test_wrappers_are_taken_off(opened: Any, tmp_path: Path) -> None:
    source = opened("compiled")
    assert [s.name for s in source.signature.inputs] == ["input"]
    operators(source, SCRIPT, tmp_path / "m.onnx")


def test_torchscript_modules_go_through_torchscript(opened: Any, message: Any, tmp_path: Path) -> None:
    source = opened("scripted")
    assert {way.name for way in source.ways} == {"torchscript"}
    assert [s.name for s in source.signature.inputs] == ["input"]
    operators(source, SCRIPT, tmp_path / "m.onnx")
    text = message(ExportError, lambda: opened("scripted", way="torch.export"))
    assert "is TorchScript, which torch.export cannot read" in text


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("quantized", ["quantized already", "dynamic", "deploykit quantize"]),
        ("lazy", ["0.weight has no shape yet", "run it once"]),
        ("on_meta", ["cannot be moved to the CPU", "meta device"]),
        ("sparse_weight", ["matrix is sparse", "to_dense"]),
    ],
)
def test_weights_that_cannot_be_exported(opened: Any, message: Any, factory: str, said: list[str]) -> None:
    text = message(SourceError, lambda: opened(factory))
    assert [part for part in said if part not in text] == [], text


def test_a_table_in_float16_does_not_loosen_the_comparison(opened: Any) -> None:
    assert opened("half_table").precision is None
    assert opened("half_product").precision == "float16"
