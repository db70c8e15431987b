"""Modules out of factories: how examples are bound, which ways there are, and what is said when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploykit.benchmarks.parity import Verdict, compare
from deploykit.data import load_object
from deploykit.errors import ExportError, SourceError
from deploykit.exporters import Source, Way, export
from deploykit.modelfile import read_model, signature_of
from deploykit.runtimes import open_session

SCRIPT = Way("torchscript", True)


def verdict(source: Source, way: Way, path: Path) -> Verdict:
    """Export, run in ONNX Runtime, compare."""
    export(source, way, path)
    cases = source.cases_for(way)
    with open_session(path, "ort:cpu") as session:
        found = [session.run(case.feeds) for case in cases]
    return compare([case.outputs for case in cases], found).verdict


@pytest.mark.parametrize(
    ("factory", "inputs", "outputs"),
    [
        ("classifier", ["image"], ["output"]),
        ("pair", ["linear", "add"], ["linear_out", "add_out", "mul_a_b", "mul_a_b_2"]),
        ("repeats", ["x"], ["output_0", "output_1_0", "output_1_1", "output_2"]),
        ("returns_dataclass", ["x"], ["logits", "features"]),
        ("returns_namedtuple", ["x"], ["low", "high"]),
        ("keywords", ["x", "bias"], ["output"]),
        ("constants_between", ["x", "y"], ["output"]),
        ("variadic", ["parts_0", "parts_1"], ["output"]),
        ("ignores_an_input", ["x", "unused"], ["output"]),
        ("writes_its_input", ["x"], ["output"]),
    ],
)
def test_inputs_and_outputs_are_named_after_the_module(
    opened: Any, tmp_path: Path, factory: str, inputs: list[str], outputs: list[str]
) -> None:
    source = opened(factory)
    assert verdict(source, SCRIPT, tmp_path / "m.onnx") is Verdict.PASSED
    signature = signature_of(read_model(tmp_path / "m.onnx"))
    assert [s.name for s in signature.inputs] == inputs
    assert [s.name for s in signature.outputs] == outputs
    assert signature == source.signature


@pytest.mark.parametrize("factory", ["repeats", "keywords", "ignores_an_input"])
def test_torch_export_agrees(opened: Any, tmp_path: Path, factory: str) -> None:
    source = opened(factory)
    assert verdict(source, source.ways[0], tmp_path / "m.onnx") is Verdict.PASSED
    assert signature_of(read_model(tmp_path / "m.onnx")) == source.signature


def test_two_exports_give_the_same_bytes(opened: Any, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        source = opened("classifier")
        export(source, source.ways[0], tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_constants_of_the_example_are_held_fixed(opened: Any) -> None:
    case = opened("keywords").cases[0]
    assert np.allclose(case.outputs["output"], case.feeds["x"] ** 3 + case.feeds["bias"], atol=1e-5)


def test_the_module_itself_is_not_changed(opened: Any, build: Any) -> None:
    module = load_object(f"{build.zoo}:shared")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    opened("shared", inputs=("image=float32[batch,3,16,16]",))
    assert module.training
    assert all((before[k] == v).all() for k, v in module.state_dict().items())


@pytest.mark.parametrize("factory", ["classifier_in_training", "classifier_partly_in_training"])
def test_training_mode_is_noted(opened: Any, factory: str) -> None:
    assert any("training mode" in note for note in opened(factory).notes)


def test_evaluation_mode_is_not_noted(opened: Any) -> None:
    assert opened("classifier").notes == ()


def test_example_of_one_still_gives_a_dynamic_batch(opened: Any) -> None:
    source = opened("classifier_of_one")
    assert source.cases[0].sizes == {"batch": 1}
    assert source.signature.inputs[0].shape == ("batch", 3, 16, 16)
    assert {case.sizes["batch"] for case in source.cases} >= {1, 2, 3, 5}


def test_equal_sizes_are_told_apart(opened: Any) -> None:
    """Height and width are 16 in the example; the outputs must not mix them up."""
    source = opened("fully_convolutional", dynamic=("image:0=batch,2=height,3=width",))
    assert any(case.sizes["height"] != case.sizes["width"] for case in source.cases)
    assert source.signature.outputs[0].shape == ("batch", 4, "output_dim2", "output_dim3")


def test_ways_end_with_fixed_shapes_unless_dynamic_ones_were_asked_for(opened: Any) -> None:
    names = [str(way) for way in opened("classifier").ways]
    assert names == [
        "torch.export",
        "torchscript",
        "torch.export with fixed shapes",
        "torchscript with fixed shapes",
    ]
    assert [str(way) for way in opened("classifier", dynamic=("batch",)).ways] == names[:2]
    assert [str(way) for way in opened("classifier", way="torchscript").ways] == [names[1], names[3]]
    described = opened("classifier_alone", inputs=("image=float32[n,3,16,16]",))
    assert [str(way) for way in described.ways] == names[:2]
    assert described.signature.symbols == ("n",)


def test_a_module_of_one_shape_gets_fixed_shapes_and_a_note(opened: Any, message: Any, tmp_path: Path) -> None:
    source = opened("fixed_batch")
    assert source.signature.inputs[0].shape == (2, 12)
    assert [way.dynamic for way in source.ways] == [False, False]
    assert any("the shapes are fixed" in note for note in source.notes)
    assert len(source.cases) >= 3
    assert verdict(source, Way("torchscript", False), tmp_path / "m.onnx") is Verdict.PASSED
    assert "one shape only" in message(ExportError, lambda: opened("fixed_batch", dynamic=("batch",)))


def test_a_trace_that_holds_for_one_batch_is_caught(opened: Any, message: Any, tmp_path: Path) -> None:
    source = opened("specializes")
    text = message(ExportError, lambda: export(source, Way("torch.export", True), tmp_path / "m.onnx"))
    assert "fixes axis 0 of 'x' at 2" in text
    assert verdict(source, SCRIPT, tmp_path / "m.onnx") is Verdict.FAILED
    assert verdict(source, Way("torchscript", False), tmp_path / "m.onnx") is Verdict.PASSED
    shapes = {case.feeds["x"].shape for case in source.cases_for(Way("torchscript", False))}
    assert shapes == {(2, 4)}


@pytest.mark.parametrize("way", ["torch.export", "torchscript"])
def test_operator_without_onnx_form_is_named(opened: Any, message: Any, tmp_path: Path, way: str) -> None:
    source = opened("unsupported", way=way)
    text = message(ExportError, lambda: export(source, source.ways[0], tmp_path / "m.onnx"))
    assert "bessel_j0 has no ONNX form" in text


def test_opset_is_the_one_asked_for(opened: Any, message: Any, tmp_path: Path) -> None:
    source = opened("classifier")
    export(source, SCRIPT, tmp_path / "m.onnx", opset=15)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 15
    # torch.export writes 18 at least, and only warns about it.
    text = message(ExportError, lambda: export(source, source.ways[0], tmp_path / "n.onnx", opset=99))
    assert "opset 18 instead of 99" in text


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("wrong_example", ["does not accept its example inputs image float32[2, 4, 16, 16]", "expected"]),
        ("too_many_examples", ["do not fit forward(image"]),
        ("no_tensor", ["hold no tensor"]),
        ("list_example", ["does not accept its example inputs image_0 float32[2, 3, 16, 16]"]),
        ("bad_keywords", ["Tensor as keyword arguments", "with a dictionary at the end"]),
        ("broken", ["ValueError: no weights", "zoo.py:"]),
        ("forty_two", ["returned int 42", "torch.nn.Module"]),
        ("a_number", ["is a int"]),
        ("missing_function", ["has no 'missing_function'"]),
        ("classifier_alone", ["without example inputs", "--input 'image=float32"]),
        ("on_meta", ["cannot be moved to the CPU"]),
        ("returns_nothing", ["returns no tensors"]),
        ("returns_opaque", ["output state is a Opaque"]),
        ("random", ["another 'output' when it runs again"]),
        ("keeps_first", ["another 'output' when it ran on other inputs before", "an input and an output of forward"]),
        ("remembers", ["keeps a state in 'cache'", "an input and an output of forward"]),
        ("missing_operator", ["the operator torchvision::nms", "install torchvision"]),
    ],
)
def test_unusable_factories(opened: Any, message: Any, factory: str, said: list[str]) -> None:
    text = message(SourceError, lambda: opened(factory))
    assert [part for part in said if part not in text] == [], text


def test_line_of_a_failing_factory_is_named(opened: Any, message: Any, build: Any) -> None:
    lines = build.zoo.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if 'ValueError("no weights' in line)
    assert f"zoo.py:{number}" in message(SourceError, lambda: opened("broken"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": ("image=float32[batch,3,16]",)}, "contradicts the example"),
        ({"inputs": ("image=float64[batch,3,16,16]",)}, "contradicts the example"),
        ({"inputs": ("picture=float32[batch,3,16,16]",)}, "--input names 'picture'"),
        ({"dynamic": ("image:9=batch",)}, "axis 9"),
        ({"dynamic": ("picture:0=batch",)}, "'picture', which is no input"),
    ],
)
def test_options_that_contradict_the_module(opened: Any, message: Any, options: dict[str, Any], said: str) -> None:
    assert said in message(ExportError, lambda: opened("classifier", **options))


def test_described_inputs_that_the_module_does_not_take(opened: Any, message: Any) -> None:
    wrong = ("picture=float32[batch,3,16,16]",)
    assert "do not fit forward" in message(SourceError, lambda: opened("classifier_alone", inputs=wrong))


def test_described_ranges_are_kept(opened: Any) -> None:
    source = opened("tokens_alone", inputs=("ids=int64[batch,9]:10..49",))
    assert source.data == "generated"
    assert (source.ranges["ids"].low, source.ranges["ids"].high) == (10, 49)
    assert all(c.feeds["ids"].min() >= 10 and c.feeds["ids"].max() <= 49 for c in source.cases)


def test_a_table_that_is_made_when_needed_is_no_state(opened: Any, tmp_path: Path) -> None:
    source = opened("keeps_table")
    assert verdict(source, source.ways[0], tmp_path / "m.onnx") is Verdict.PASSED


def test_buffers_that_forward_writes_are_noted_and_restored(opened: Any, tmp_path: Path) -> None:
    source = opened("counts")
    assert any("writes to calls, on which no output depends" in note for note in source.notes)
    assert verdict(source, SCRIPT, tmp_path / "m.onnx") is Verdict.PASSED


def test_numbers_among_the_outputs_are_named(opened: Any) -> None:
    assert any("left out: " in note and "=2" in note for note in opened("repeats").notes)


def test_rank_that_depends_on_the_batch_is_noted(opened: Any, tmp_path: Path) -> None:
    source = opened("squeezes")
    assert any("has 1 or 2 dimensions" in note for note in source.notes)
    assert verdict(source, source.ways[0], tmp_path / "m.onnx") is Verdict.PASSED


def test_padded_positions_are_compared_without_the_fast_path(opened: Any, tmp_path: Path) -> None:
    source = opened("masked")
    assert any("fast path" in note for note in source.notes)
    assert verdict(source, SCRIPT, tmp_path / "m.onnx") is Verdict.PASSED


def test_real_data_become_the_cases(opened: Any, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((9, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "d.npz", image=images, labels=np.zeros(9, np.int64))
    source = opened("classifier", data=str(tmp_path / "d.npz"))
    assert source.data == str(tmp_path / "d.npz")
    assert [case.sizes["batch"] for case in source.cases] == [1, 3, 5]
    assert (source.cases[1].feeds["image"] == images[1:4]).all()
