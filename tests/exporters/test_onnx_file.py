"""Imported ONNX files: copied byte for byte, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import ExportError, InferenceError, ModelError
from deploykit.exporters import Case, export
from deploykit.exporters.onnx_file import _refuse_random


def test_copy_is_byte_for_byte(opened: Any, build: Any, tmp_path: Path) -> None:
    path = build.external(tmp_path / "in")
    source = opened(path)
    (tmp_path / "out").mkdir()
    export(source, source.ways[0], tmp_path / "out" / "model.onnx")
    for name in ("model.onnx", "weights.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (path.parent / name).read_bytes()


def _with_quantized_table(model: onnx.ModelProto) -> None:
    table = next(w for w in model.graph.initializer if w.name == "table")
    values = np.clip(numpy_helper.to_array(table) * 40, -127, 127).astype(np.int8)
    model.graph.initializer.remove(table)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(values, "table_int8"),
            numpy_helper.from_array(np.float32(1 / 40), "scale"),
            numpy_helper.from_array(np.int8(0), "zero"),
        ]
    )
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["table_int8", "scale", "zero"], ["table"]))


@pytest.mark.parametrize("change", [lambda model: None, _with_quantized_table])
def test_token_ids_stay_below_the_vocabulary(
    opened: Any, build: Any, tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    model = build.text_model(vocabulary=17)
    change(model)
    onnx.save(model, tmp_path / "m.onnx")
    source = opened(tmp_path / "m.onnx")
    assert (source.ranges["ids"].low, source.ranges["ids"].high) == (0, 16)
    assert all(case.feeds["ids"].max() < 17 for case in source.cases)
    assert max(case.feeds["ids"].max() for case in source.cases) > 1


def test_dims_choose_the_sizes(opened: Any, build: Any, tmp_path: Path) -> None:
    onnx.save(build.text_model(), tmp_path / "m.onnx")
    source = opened(tmp_path / "m.onnx", dims={"batch": 6, "sequence": 11})
    assert source.cases[0].feeds["ids"].shape == (6, 11)


def test_open_dimensions_of_outputs_are_observed(opened: Any, build: Any, tmp_path: Path) -> None:
    model = build.text_model()
    for dim in model.graph.output[0].type.tensor_type.shape.dim:
        dim.Clear()
    onnx.save(model, tmp_path / "m.onnx")
    assert opened(tmp_path / "m.onnx").signature.outputs[0].shape == ("batch", "sequence", 6)


@pytest.mark.parametrize(
    "options",
    [{"dynamic": ("batch",)}, {"inputs": ("ids=int32[2,2]",)}, {"way": "torchscript"}, {"opset": 21}],
)
def test_options_for_a_made_graph(opened: Any, message: Any, build: Any, tmp_path: Path, options: Any) -> None:
    onnx.save(build.text_model(), tmp_path / "m.onnx")
    assert "cannot be applied" in message(ExportError, lambda: opened(tmp_path / "m.onnx", **options))


def test_the_same_opset_is_no_contradiction(opened: Any, build: Any, tmp_path: Path) -> None:
    onnx.save(build.text_model(), tmp_path / "m.onnx")
    assert opened(tmp_path / "m.onnx", opset=17).cases


@pytest.mark.parametrize("content", [b"", b"\x00", b"random", bytes(range(256)) * 40, b"PK\x03\x04zip"])
def test_files_that_are_no_onnx(opened: Any, message: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert "m.onnx" in message(ModelError, lambda: opened(tmp_path / "m.onnx"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_cut_off_files(opened: Any, message: Any, build: Any, tmp_path: Path, share: float) -> None:
    data = build.text_model().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * share)])
    message(ModelError, lambda: opened(tmp_path / "m.onnx"))


def test_missing_file(opened: Any, message: Any, tmp_path: Path) -> None:
    assert "does not exist" in message(ModelError, lambda: opened(tmp_path / "m.onnx"))


def test_invalid_graph(opened: Any, message: Any, build: Any, tmp_path: Path) -> None:
    model = build.text_model()
    model.graph.node[2].input[0] = "nowhere"
    onnx.save(model, tmp_path / "m.onnx")
    assert "not valid ONNX" in message(ModelError, lambda: opened(tmp_path / "m.onnx"))


def test_made_up_inputs_that_do_not_fit(opened: Any, message: Any, tmp_path: Path) -> None:
    """A hidden condition: the two symbols have to be equal."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, n * 2]) for n in "ab"]
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["a", "shape"], ["wide"]), helper.make_node("Add", ["wide", "b"], ["c"])],
        "g",
        values,
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [2, None])],
        [numpy_helper.from_array(np.array([2, 3]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    assert "--dim" in message(InferenceError, lambda: opened(tmp_path / "m.onnx"))
    source = opened(tmp_path / "m.onnx", dims={"aa": 3, "bb": 3})
    assert len(source.cases) >= 3
    assert any("one shape only" in note for note in source.notes)


def test_random_outputs_that_are_the_same_once(message: Any, tmp_path: Path) -> None:
    runs = iter([0.0, 0.0, 1.0])
    case = Case({}, {}, {"y": np.zeros(1, np.float32)})

    def run(_: Any) -> dict[str, Any]:
        return {"y": np.full(1, next(runs), np.float32)}

    assert "each time" in message(ExportError, lambda: _refuse_random(tmp_path, ["Bernoulli"], run, case))


def test_one_fixed_dimension_leaves_the_others_to_be_checked(opened: Any, tmp_path: Path) -> None:
    """The state in the graph is of one sample, whatever the file declares; the length is free all the same."""
    graph = helper.make_graph(
        [helper.make_node("Concat", ["x", "state"], ["both"], axis=1), helper.make_node("Tanh", ["both"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "frames", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None, 4])],
        [numpy_helper.from_array(np.ones((1, 2, 4), np.float32), "state")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    source = opened(tmp_path / "m.onnx")
    assert {case.sizes["batch"] for case in source.cases} == {1}
    assert len({case.sizes["frames"] for case in source.cases}) >= 3
    (note,) = source.notes
    assert note.startswith("checked at batch=1 only, because the source itself does not run at batch=3")


def _escape(path: Path) -> None:
    (path.parent / "weights.bin").rename(path.parent.parent / "weights.bin")
    _locate(path, "../weights.bin")


def _absolute(path: Path) -> None:
    _locate(path, str(path.parent / "weights.bin"))


def _symlink(path: Path) -> None:
    (path.parent / "weights.bin").rename(path.parent.parent / "elsewhere.bin")
    (path.parent / "weights.bin").symlink_to(path.parent.parent / "elsewhere.bin")


def _linked_folder(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (path.parent / "weights.bin").rename(elsewhere / "weights.bin")
    (path.parent / "inside").symlink_to(elsewhere)
    _locate(path, "inside/weights.bin")


def _hard_link(path: Path) -> None:
    os.link(path.parent / "weights.bin", path.parent.parent / "twin.bin")


def _too_short(path: Path) -> None:
    data = (path.parent / "weights.bin").read_bytes()
    (path.parent / "weights.bin").write_bytes(data[:-4])


def _missing(path: Path) -> None:
    (path.parent / "weights.bin").unlink()


def _directory(path: Path) -> None:
    _missing(path)
    (path.parent / "weights.bin").mkdir()


def _locate(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "damage",
    [_escape, _absolute, _symlink, _linked_folder, _hard_link, _too_short, _missing, _directory],
)
def test_unsafe_external_data(
    opened: Any, message: Any, build: Any, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = build.external(tmp_path / "in")
    damage(path)
    assert "external data" in message(ModelError, lambda: opened(path))


def test_sound_with_a_state_needs_no_options(opened: Any, tmp_path: Path) -> None:
    """A frame that is too short for the first filter, and a state whose batch has no name."""
    filters = np.random.default_rng(0).standard_normal((3, 1, 100)).astype(np.float32)
    nodes = [
        helper.make_node("Unsqueeze", ["sound", "one"], ["channel"]),
        helper.make_node("Conv", ["channel", "filters"], ["found"]),
        helper.make_node("ReduceMax", ["found"], ["loudest"], axes=[2], keepdims=0),
        helper.make_node("ReduceSum", ["state", "zero"], ["before"], keepdims=0),
        helper.make_node("Add", ["loudest", "before"], ["now"]),
    ]
    float_of = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    graph = helper.make_graph(
        nodes,
        "voice",
        [float_of("sound", ["batch", "samples"]), float_of("state", [2, None, 3])],
        [float_of("now", ["batch", 3])],
        [
            numpy_helper.from_array(filters, "filters"),
            numpy_helper.from_array(np.array([1]), "one"),
            numpy_helper.from_array(np.array([0]), "zero"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "v.onnx")
    source = opened(tmp_path / "v.onnx")
    batches = {case.feeds["sound"].shape[0] for case in source.cases}
    assert len(batches) > 1
    assert all(case.feeds["state"].shape[1] == case.feeds["sound"].shape[0] for case in source.cases)
    assert all(case.feeds["sound"].shape[1] >= 100 for case in source.cases)
