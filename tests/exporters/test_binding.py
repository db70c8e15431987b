"""Example inputs of every form: how they are named, and how the module gets them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploykit.benchmarks.parity import Verdict, compare
from deploykit.errors import SourceError
from deploykit.exporters import Way, export
from deploykit.runtimes import open_session


@pytest.mark.parametrize(
    ("factory", "inputs", "outputs"),
    [
        ("takes_dict", ["batch_image"], ["image"]),
        ("takes_dataclass", ["batch_image", "batch_mask"], ["image", "mask"]),
        (
            "takes_nest",
            ["batch_image", "batch_mask", "features_0", "features_1", "scale_by_0"],
            ["image", "mask"],
        ),
        ("takes_list", ["maps_0", "maps_1"], ["output"]),
        ("lstm_with_state", ["x", "state_0", "state_1"], ["y", "state_0_out", "state_1_out"]),
    ],
)
def test_tensors_anywhere_in_a_nest_become_inputs(
    opened: Any, tmp_path: Path, factory: str, inputs: list[str], outputs: list[str]
) -> None:
    source = opened(factory)
    assert [s.name for s in source.signature.inputs] == inputs
    assert [s.name for s in source.signature.outputs] == outputs
    way = Way("torchscript", bool(source.signature.symbols))
    export(source, way, tmp_path / "m.onnx")
    with open_session(tmp_path / "m.onnx", "ort:cpu") as session:
        found = [session.run(case.feeds) for case in source.cases]
    assert compare([case.outputs for case in source.cases], found).verdict is Verdict.PASSED


def test_axes_are_named_by_the_flat_names(opened: Any) -> None:
    wish = ("x:0=batch,1=steps", "state_0:1=batch", "state_1:1=batch")
    inputs = opened("lstm_with_state", dynamic=wish).signature.inputs
    assert [s.shape for s in inputs] == [("batch", "steps", 4), (1, "batch", 6), (1, "batch", 6)]


def test_unequal_first_axes_are_noted(opened: Any) -> None:
    source = opened("lstm_with_state")
    assert source.signature.symbols == ()
    assert any("the first axes of the inputs differ" in note for note in source.notes)


def test_constants_in_a_nest_are_held_fixed_and_said(opened: Any) -> None:
    assert any("scale.by.1=3" in note for note in opened("takes_nest").notes)
    assert any("batch.mode=<Mode.SUM: 1>" in note for note in opened("takes_dataclass").notes)


def test_several_positional_tensors_without_examples(opened: Any) -> None:
    described = ("x=float32[n,4]", "mask=float32[n,4]", "bias=float32[n,4]")
    source = opened("options_alone", inputs=described)
    assert [str(s) for s in source.signature.inputs] == [
        "x: float32[n, 4]", "mask: float32[n, 4]", "bias: float32[n, 4]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("packed", ["'x'", "packed sequence", "padded tensor and its lengths"]),
        ("complex_input", ["'input'", "complex", "view_as_real"]),
    ],
)
def test_inputs_that_onnx_does_not_have(opened: Any, message: Any, factory: str, said: list[str]) -> None:
    text = message(SourceError, lambda: opened(factory))
    assert [part for part in said if part not in text] == [], text
