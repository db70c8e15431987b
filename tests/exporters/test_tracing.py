"""Decisions on data: compiled, harmless, or refused with their line; never frozen without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.data import load_object
from deploykit.errors import ExportError
from deploykit.exporters import Way, export
from deploykit.exporters.tracing import frozen_decisions, tracer_warnings
from deploykit.modelfile import read_model
from deploykit.runtimes import open_session

SCRIPT = Way("torchscript", True)


def line_of(build: Any, text: str) -> str:
    lines = build.zoo.read_text().splitlines()
    return f"zoo.py:{next(i for i, line in enumerate(lines, 1) if text in line)}"


def run(path: Path, **feeds: Any) -> Any:
    with open_session(path, "ort:cpu") as session:
        return session.run(feeds)["output"]


@pytest.mark.parametrize("way", [Way("torch.export", True)])
def test_torch_export_names_the_line(opened: Any, message: Any, build: Any, tmp_path: Path, way: Way) -> None:
    text = message(ExportError, lambda: export(opened("branches"), way, tmp_path / "m.onnx"))
    assert f"control flow depends on data ({line_of(build, 'if x.sum() > -1e6')})" in text


@pytest.mark.parametrize("factory", ["branches", "scripted_branches"])
def test_both_branches_are_in_the_graph(opened: Any, tmp_path: Path, factory: str) -> None:
    """All examples take the first branch; a trace would hold for them, and be wrong for others."""
    source = opened(factory)
    export(source, SCRIPT, tmp_path / "m.onnx")
    assert "If" in {node.op_type for node in read_model(tmp_path / "m.onnx").graph.node}
    low = np.full((2, 4), -1e7, np.float32)
    assert (run(tmp_path / "m.onnx", x=low) == low - 1).all()
    assert (run(tmp_path / "m.onnx", x=-low) == -low + 1).all()


def test_what_was_compiled_is_said(opened: Any, build: Any, tmp_path: Path) -> None:
    source = opened("branches")
    export(source, SCRIPT, tmp_path / "m.onnx")
    assert any(line_of(build, "if x.sum() > -1e6") in note for note in source.notes_on(SCRIPT))


def test_what_does_not_compile_is_refused_with_its_line(opened: Any, message: Any, build: Any, tmp_path: Path) -> None:
    source = opened("frozen")
    text = message(ExportError, lambda: export(source, SCRIPT, tmp_path / "m.onnx"))
    assert f"freeze the decision that forward takes on its inputs' values at {line_of(build, '.item() > 100')}" in text
    assert "torch.where" in text


def test_a_decision_that_makes_no_difference_is_no_objection(opened: Any, tmp_path: Path) -> None:
    source = opened("shortcut")
    export(source, SCRIPT, tmp_path / "m.onnx")
    assert source.notes_on(SCRIPT) == ()
    x = np.ones((3, 4), np.float32)
    assert np.allclose(run(tmp_path / "m.onnx", x=x, mask=np.zeros((3, 4), bool)), np.tanh(x))


def test_a_decision_that_makes_no_difference_for_the_example_only(opened: Any, build: Any, tmp_path: Path) -> None:
    """The example's mask is full, so that skipping it is right: for the example."""
    source = opened("skips")
    export(source, SCRIPT, tmp_path / "m.onnx")
    assert any("TorchScript compiled it" in note for note in source.notes_on(SCRIPT))
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]], bool)
    for given in (mask, mask[:1].repeat(3, 0)):
        assert np.allclose(run(tmp_path / "m.onnx", x=x, mask=given), (np.tanh(x) * given).sum(1), atol=1e-5)


def test_a_decision_that_no_inputs_turn_is_said(opened: Any, build: Any, tmp_path: Path) -> None:
    source = opened("unseen")
    export(source, SCRIPT, tmp_path / "m.onnx")
    (note,) = source.notes_on(SCRIPT)
    assert "held as the example decides it" in note and line_of(build, "x.new_ones") in note


def traced(build: Any, factory: str) -> Any:
    import torch

    module, example = load_object(f"{build.zoo}:{factory}")()
    tensors = example if isinstance(example, tuple) else (example,)
    flat = lambda *given: (module(*given),)  # noqa: E731
    with tracer_warnings() as warned:
        torch.jit.trace(module, tensors, check_trace=False)
    return frozen_decisions(flat, tensors, warned)


def test_checks_are_told_from_branches(build: Any) -> None:
    assert [str(p) for p in traced(build, "checks").checks] == [line_of(build, "torch.isnan(x).any()")]
    assert traced(build, "checks").wrong == ()
    assert [str(p) for p in traced(build, "frozen").wrong] == [line_of(build, ".item() > 100")]
    assert traced(build, "shortcut").wrong == traced(build, "shortcut").checks == ()
    assert traced(build, "specializes").wrong == ()  # by the shape, which the cases cover


def test_arithmetic_on_sizes_stays_in_the_graph(opened: Any, tmp_path: Path) -> None:
    before = (max, min)
    source = opened("same_padding", dynamic=("input:0=batch,2=height,3=width",))
    export(source, SCRIPT, tmp_path / "m.onnx")
    assert len({case.feeds["input"].shape[2] % 2 for case in source.cases}) == 2
    for case in source.cases:
        assert np.allclose(run(tmp_path / "m.onnx", **case.feeds), case.outputs["output"], atol=1e-5)
    assert (max, min) == before
