"""ONNX files: read safely, described, copied whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit import modelfile
from deploykit.errors import ModelError
from deploykit.modelfile import (
    check_model,
    copy_model,
    dtype_name,
    external_files,
    model_bytes,
    read_model,
    rename_dimensions,
    signature_of,
    write_model,
)
from deploykit.specs import TensorSpec

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def external(location: str, name: str = "w", **extra: str) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[3, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **extra}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def matmul(weight: onnx.TensorProto | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [weight or numpy_helper.from_array(WEIGHT, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the weights of `external("w.bin")`, and some more just outside."""
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for name in ("w.bin", "sub/w.bin"):
        (inside / name).write_bytes(WEIGHT.tobytes())
    return inside


def save(model: onnx.ModelProto, folder: Path) -> Path:
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as caught:
        call()
    text = str(caught.value)
    assert text.isprintable()
    return text


# --- external data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        external("w.bin"),
        external("./w.bin"),
        external("sub/w.bin", offset="0", length="48"),
        external("w.bin", length="48"),
    ],
)
def test_good_external_data(folder: Path, tensor: onnx.TensorProto) -> None:
    path = save(matmul(tensor), folder)
    np.testing.assert_array_equal(numpy_helper.to_array(read_model(path).graph.initializer[0]), WEIGHT)
    assert read_model(path, weights=False).graph.initializer[0].data_location == TensorProto.EXTERNAL
    assert model_bytes(path) == path.stat().st_size + 48


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("", "no location"),
        (".", "no location"),
        ("./", "no location"),
        ("..", "leaves"),
        ("../w.bin", "leaves"),
        ("sub/../w.bin", "leaves"),
        ("sub/../../w.bin", "leaves"),
        ("/etc/hostname", "leaves"),
        ("..\\w.bin", "backslash"),
        ("sub\\w.bin", "backslash"),
        ("C:\\w.bin", "backslash"),
        ("none.bin", "does not exist"),
        ("w.bin/x", "does not exist"),
        ("sub", "not a regular file"),
        ("w.bin\0.txt", "no location"),
        ("*/_ORT_MEM_ADDR_/*", "does not exist"),
        ("link.bin", "symbolic link"),
        ("linked/w.bin", "symbolic link"),
        ("hard.bin", "hard link"),
        ("pipe", "not a regular file"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_unsafe_external_data(folder: Path, location: str, why: str, weights: bool) -> None:
    (folder / "link.bin").symlink_to(folder.parent / "w.bin")
    (folder / "linked").symlink_to(folder.parent)
    os.link(folder.parent / "w.bin", folder / "hard.bin")
    os.mkfifo(folder / "pipe")
    path = save(matmul(external(location)), folder)
    assert why in refused(lambda: read_model(path, weights=weights))
    target = folder.parent / "copy.onnx"
    assert why in refused(lambda: copy_model(path, target))
    assert not target.exists()


@pytest.mark.parametrize(
    "extra",
    [
        {"length": "49"},
        {"offset": "1", "length": "48"},
        {"offset": "49"},
        {"offset": "-1"},
        {"length": "-1"},
        {"length": "many"},
        {"offset": "99999999999999999999999"},
    ],
)
def test_external_data_that_are_too_short(folder: Path, extra: dict[str, str]) -> None:
    path = save(matmul(external("w.bin", **extra)), folder)
    assert "has 48 bytes" in refused(lambda: read_model(path, weights=False))


def test_a_key_given_twice_is_refused(folder: Path) -> None:
    tensor = external("w.bin")
    tensor.external_data.add(key="location", value="../w.bin")
    refused(lambda: read_model(save(matmul(tensor), folder)))


def in_attribute(model: onnx.ModelProto, bad: onnx.TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=bad))


def in_subgraph(model: onnx.ModelProto, bad: onnx.TensorProto) -> None:
    branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("w2", TensorProto.FLOAT, [3, 4])])
    branch.initializer.append(bad)
    node = helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=helper.make_graph([], "e", [], []))
    model.graph.node.append(node)


def in_function(model: onnx.ModelProto, bad: onnx.TensorProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=bad)
    model.functions.append(helper.make_function("own", "F", [], ["c"], [node], [helper.make_opsetid("", 17)]))


def in_sparse_values(model: onnx.ModelProto, bad: onnx.TensorProto) -> None:
    sparse = onnx.SparseTensorProto(dims=[3, 4])
    sparse.values.CopyFrom(bad)
    model.graph.sparse_initializer.append(sparse)


def in_sparse_attribute(model: onnx.ModelProto, bad: onnx.TensorProto) -> None:
    sparse = onnx.SparseTensorProto(dims=[3, 4])
    sparse.indices.CopyFrom(bad)
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.CopyFrom(sparse)
    model.graph.node.append(node)


def in_training_graph(model: onnx.ModelProto, bad: onnx.TensorProto) -> None:
    model.training_info.add().initialization.initializer.append(bad)


@pytest.mark.parametrize(
    "place", [in_attribute, in_subgraph, in_function, in_sparse_values, in_sparse_attribute, in_training_graph]
)
def test_external_data_are_found_everywhere(
    folder: Path, place: Callable[[onnx.ModelProto, onnx.TensorProto], None]
) -> None:
    model = matmul()
    place(model, external("../w.bin", "hidden"))
    assert external_files(model) == {"../w.bin"}
    assert "'hidden'" in refused(lambda: read_model(save(model, folder)))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"no protobuf at all", b"\x08\x08", b"\xff" * 1000])
def test_what_is_no_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    refused(lambda: read_model(tmp_path / "m.onnx"))


def test_every_cut_is_noticed_or_harmless(tmp_path: Path) -> None:
    whole = matmul().SerializeToString()
    for length in range(len(whole)):
        (tmp_path / "m.onnx").write_bytes(whole[:length])
        try:
            read_model(tmp_path / "m.onnx")
        except ModelError:
            continue
        pytest.fail(f"a model cut to {length} of {len(whole)} bytes was read")


def test_missing_and_directory(tmp_path: Path) -> None:
    assert "does not exist" in refused(lambda: read_model(tmp_path / "m.onnx"))
    assert "is a directory" in refused(lambda: read_model(tmp_path))


def test_checker(tmp_path: Path) -> None:
    check_model(matmul(), tmp_path / "m.onnx")
    bad = matmul()
    bad.graph.node[0].op_type = "NoSuchThing"
    assert "NoSuchThing" in refused(lambda: check_model(bad, tmp_path / "m.onnx"))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_write_and_read(tmp_path: Path) -> None:
    write_model(matmul(), tmp_path / "m.onnx")
    assert read_model(tmp_path / "m.onnx") == matmul()
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_large_model_goes_to_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelfile, "INLINE_LIMIT_BYTES", 4096)
    weight = np.random.default_rng(0).normal(size=(3, 4000)).astype(np.float32)
    write_model(matmul(numpy_helper.from_array(weight, "w")), tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx").stat().st_size < 4096
    again = read_model(tmp_path / "m.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(again.graph.initializer[0]), weight)
    assert model_bytes(tmp_path / "m.onnx") == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_copy_with_external_data(folder: Path, tmp_path: Path) -> None:
    source = save(matmul(external("sub/w.bin")), folder)
    (tmp_path / "new").mkdir()
    copy_model(source, tmp_path / "new" / "model.onnx")
    assert (tmp_path / "new" / "model.onnx").read_bytes() == source.read_bytes()
    np.testing.assert_array_equal(
        numpy_helper.to_array(read_model(tmp_path / "new" / "model.onnx").graph.initializer[0]), WEIGHT
    )


def test_copy_never_writes_a_file_over_another(folder: Path, tmp_path: Path) -> None:
    """The source's weights have the name that its copy is to have."""
    (folder / "w.bin").rename(folder / "model.onnx")
    source = save(matmul(external("model.onnx")), folder)
    (tmp_path / "new").mkdir()
    refused(lambda: copy_model(source, tmp_path / "new" / "model.onnx"))
    assert list((tmp_path / "new").iterdir()) == []


def test_bytes_of_openvino_model(tmp_path: Path) -> None:
    (tmp_path / "m.xml").write_bytes(b"12")
    assert model_bytes(tmp_path / "m.xml") == 2
    (tmp_path / "m.bin").write_bytes(b"345")
    assert model_bytes(tmp_path / "m.xml") == 5


# --- signatures ------------------------------------------------------------------------------------------------------


def test_signature() -> None:
    model = matmul()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 4]))  # a weight, listed
    model.graph.input.append(helper.make_tensor_value_info("s", TensorProto.STRING, []))
    model.graph.input.append(helper.make_tensor_value_info("h", TensorProto.BFLOAT16, None))
    model.graph.input.append(helper.make_tensor_value_info("b", TensorProto.BOOL, [None, -1, 0]))
    signature = signature_of(model)
    assert signature.inputs == (
        TensorSpec("x", "float32", ("batch", 3)),
        TensorSpec("s", "string", ()),
        TensorSpec("h", "bfloat16", None),
        TensorSpec("b", "bool", ("b_dim0", "b_dim1", 0)),
    )
    assert signature.outputs == (TensorSpec("y", "float32", ("batch", 4)),)


def test_sequences_are_no_tensors() -> None:
    model = matmul()
    model.graph.output.append(helper.make_tensor_sequence_value_info("zipmap", TensorProto.FLOAT, ["n"]))
    assert "zipmap=False" in refused(lambda: signature_of(model))


def test_dtype_names() -> None:
    assert dtype_name(TensorProto.FLOAT16) == "float16"
    assert dtype_name(TensorProto.STRING) == "string"
    refused(lambda: dtype_name(999))


def test_rename_dimensions() -> None:
    model = matmul()
    model.graph.value_info.append(helper.make_tensor_value_info("kept", TensorProto.FLOAT, ["batch", 7]))
    model.graph.value_info.append(helper.make_tensor_value_info("fixed", TensorProto.FLOAT, [7]))
    model.graph.value_info.append(helper.make_tensor_value_info("stale", TensorProto.FLOAT, ["u0 + 1"]))
    rename_dimensions(model, {"x": ("n", 3), "y": ("n", "width")})
    signature = signature_of(model)
    assert signature.inputs[0].shape == ("n", 3)
    assert signature.outputs[0].shape == ("n", "width")
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info
    }
    assert shapes == {"kept": ["n", 7], "fixed": [7]}


def test_outputs_that_are_probabilities(tmp_path: Path) -> None:
    from onnx import parser

    from deploykit.nodes import bounded_outputs

    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18]>
        g (float[n,4] x) => (float[n,4] p, float[4,n] q, float[n,8] r, float[n,8] s, float[n,4] t) {
            p = Sigmoid(x)
            z = Softmax(x)
            q = Transpose(z)
            r = Concat<axis=1>(p, z)
            s = Concat<axis=1>(p, x)
            t = Relu(x)
        }""")
    onnx.save(model, tmp_path / "m.onnx")
    assert bounded_outputs(tmp_path / "m.onnx") == {"p", "q", "r"}
    assert bounded_outputs(tmp_path / "m.xml") == frozenset()
