"""Large weights stay on disk: what is read, what is written, and that values survive."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit import weights
from deploykit.errors import ModelError
from deploykit.modelfile import tensor_bytes
from deploykit.weights import LightModel, is_external, open_light, put_back, set_aside, write_light

BIG = np.random.default_rng(0).standard_normal((512, 520)).astype(np.float32)  # more than 1 MiB
SMALL = np.float32([1, 2, 3])


def model(external: Path | None = None, ir_version: int = 8) -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "big"], ["h"]),
            helper.make_node("Add", ["h", "row"], ["a"]),
            helper.make_node("Constant", [], ["unused"], value=numpy_helper.from_array(SMALL)),
            helper.make_node("Relu", ["a"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 520])],
        [numpy_helper.from_array(BIG, "big"), numpy_helper.from_array(BIG[0], "row")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=ir_version)
    if ir_version < 4:
        for tensor in made.graph.initializer:
            made.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return made


@pytest.fixture(params=["inline", "floats", "external"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / "source" / "m.onnx"
    file.parent.mkdir()
    made = model()
    if request.param == "floats":  # values in a repeated field, as old exporters write them
        for tensor in made.graph.initializer:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, values.shape, values.ravel()))
    if request.param == "external":
        onnx.save(made, file, save_as_external_data=True, location="w.bin", size_threshold=0)
    else:
        onnx.save(made, file)
    return file


def values(file: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}


def test_small_models_are_held_whole(path: Path, tmp_path: Path) -> None:
    light = open_light(path, tmp_path)
    assert light.whole
    np.testing.assert_array_equal(numpy_helper.to_array(light.proto.graph.initializer[0]), BIG)


def test_large_weights_stay_on_disk_and_come_back(path: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    light = open_light(path, tmp_path / "scratch", whole_limit=0)
    assert [is_external(t) for t in light.proto.graph.initializer] == [True, False]
    assert light.proto.ByteSize() < 10_000
    assert tensor_bytes(light.proto.graph.initializer[0]) == BIG.nbytes
    (tmp_path / "out").mkdir()
    write_light(light, tmp_path / "out" / "model.onnx")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]
    found = values(tmp_path / "out" / "model.onnx")
    np.testing.assert_array_equal(found["big"], BIG)
    np.testing.assert_array_equal(found["row"], BIG[0])
    np.testing.assert_array_equal(values(path)["big"], BIG)  # the source is as it was


@pytest.mark.parametrize("ir_version", [3, 8])
def test_set_aside_and_put_back(tmp_path: Path, ir_version: int) -> None:
    onnx.save(model(ir_version=ir_version), tmp_path / "m.onnx")
    light = open_light(tmp_path / "m.onnx", tmp_path, whole_limit=0)
    aside = set_aside(light.proto)
    assert [t.name for t in aside] == ["big"]
    assert [v.name for v in light.proto.graph.input].count("big") == 1
    onnx.checker.check_model(light.proto)
    put_back(light.proto, aside)
    assert "big" not in [v.name for v in light.proto.graph.input]
    write_light(light, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    np.testing.assert_array_equal(values(tmp_path / "out.onnx")["big"], BIG)


def test_weights_that_are_not_needed_any_more_are_left_out(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    light = open_light(tmp_path / "m.onnx", tmp_path, whole_limit=0)
    aside = set_aside(light.proto)
    kept = [v for v in light.proto.graph.input if v.name != "big"]
    del light.proto.graph.input[:]
    light.proto.graph.input.extend(kept)
    put_back(light.proto, aside)
    assert [t.name for t in light.proto.graph.initializer] == ["row"]


def test_inline_weights_of_two_gigabytes_leave_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "INLINE_LIMIT_BYTES", 1_000_000)
    write_light(LightModel(model(), tmp_path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < 10_000
    np.testing.assert_array_equal(values(tmp_path / "out.onnx")["big"], BIG)


def test_large_weights_in_nodes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    made.graph.node[2].attribute[0].t.CopyFrom(numpy_helper.from_array(BIG))
    onnx.save(made, tmp_path / "m.onnx")
    monkeypatch.setattr(weights, "INLINE_LIMIT_BYTES", 1_000_000)
    with pytest.raises(ModelError, match="are in Constant nodes or subgraphs"):
        open_light(tmp_path / "m.onnx", tmp_path, whole_limit=0)


def test_weights_begin_where_they_can_be_mapped(tmp_path: Path) -> None:
    made = model()
    made.graph.initializer.append(numpy_helper.from_array(BIG[:, :519], "other"))
    onnx.save(made, tmp_path / "m.onnx")
    light = open_light(tmp_path / "m.onnx", tmp_path, whole_limit=0)
    write_light(light, tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    offsets = [int(e.value) for t in proto.graph.initializer for e in t.external_data if e.key == "offset"]
    assert offsets == [0, -(-BIG.nbytes // 65536) * 65536]


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (np.zeros((3, 5), np.float16), 30),
        (np.zeros((3, 5), ml_dtypes.bfloat16), 30),
        (np.zeros((3, 5), ml_dtypes.float8_e4m3fn), 15),
        (np.zeros((3, 5), ml_dtypes.int4), 8),
        (np.zeros((), np.int64), 8),
        (np.zeros((0, 4), np.float32), 0),
        (np.array(["text"], object), 0),
    ],
)
def test_sizes(array: np.ndarray, size: int) -> None:
    assert tensor_bytes(numpy_helper.from_array(array)) == size
