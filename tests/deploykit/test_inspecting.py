"""`inspect_model`: what a model is, told without running it, whatever shape it is in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import DataError, ModelError
from deploykit.inspecting import inspect_model

F32 = np.float32
KEYS = {
    "schema", "model", "format", "invalid", "files", "ir_version", "producer", "opsets", "inputs", "outputs",
    "dynamic_axes", "nodes", "custom_ops", "parameters", "compute", "memory", "quantized", "unshaped", "contract",
    "runtimes", "artifact",
}  # fmt: skip


def look(path: Path, **options: Any) -> dict[str, Any]:
    found = inspect_model(path, **{"load": False, **options})
    assert set(found) == KEYS
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_the_whole_of_a_small_model(linear: Any, save: Any, tmp_path: Path) -> None:
    path = save(linear(), tmp_path)
    found = look(path, dims={"n": 5})
    assert found["schema"] == 1
    assert (found["format"], found["invalid"], found["ir_version"], found["opsets"]) == ("onnx", None, 8, {"": 18})
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["n", 4]}]
    assert found["dynamic_axes"] == [
        {"tensor": "x", "axis": 0, "name": "n", "size": 5}, {"tensor": "y", "axis": 0, "name": "n", "size": 5}
    ]  # fmt: skip
    assert found["nodes"]["by_op"] == {"MatMul": 1} and found["nodes"]["names"] == ["product"]
    assert found["parameters"] == {
        "count": 12, "bytes": 48, "by_dtype": {"float32": {"count": 12, "bytes": 48}}, "shared_tensors": 0
    }  # fmt: skip
    assert found["compute"] == {
        "sizes": {"n": 5},
        "macs": 60,
        "by_op": {"MatMul": 60},
        "nodes": 1,
        "uncounted": [],
        "notes": [],
    }
    assert found["memory"] == {
        "weight_bytes": 48, "peak_activation_bytes": 5 * 7 * 4, "total_bytes": 48 + 140, "at_node": "'product'",
        "unknown_tensors": 0,
    }  # fmt: skip
    assert found["files"] == {"bytes": path.stat().st_size, "external": 0, "sizes": {"model.onnx": path.stat().st_size}}
    assert found["artifact"] is None


def test_sizes_that_nobody_gave_are_said(build: Any, save: Any, tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    model = build(nodes, {"x": ["b", 3, "h", "width"]}, {"y": None}, {"w": np.ones((2, 3, 1, 1), F32)})
    path = save(model, tmp_path)
    assert look(path)["compute"]["sizes"] == {"b": 1, "h": 224, "width": 224}
    given = look(path, dims={"h": 8})
    assert given["compute"]["sizes"] == {"h": 8, "b": 1, "width": 224}
    assert given["compute"]["macs"] == 8 * 224 * 6
    with pytest.raises(DataError, match=r"'nosuch'.*b, h, width"):
        look(path, dims={"nosuch": 3})


def test_a_cache_of_keys_is_no_image(build: Any, save: Any, tmp_path: Path) -> None:
    nodes = [helper.make_node("Concat", ["past", "new"], ["y"], axis=2)]
    model = build(nodes, {"past": ["b", 4, "past_sequence", 8], "new": ["b", 4, "sequence", 8]},
                  {"y": ["b", 4, "past_sequence + sequence", 8]})  # fmt: skip
    found = look(save(model, tmp_path))
    assert found["compute"]["sizes"] == {"b": 1, "past_sequence": 128, "sequence": 128}
    assert found["dynamic_axes"][-1]["size"] == 256


def test_smaller_sizes_are_tried_where_the_graph_cannot_take_the_first(build: Any, save: Any, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Slice", ["table", "zero", "s", "axis"], ["part"]),
        helper.make_node("Add", ["x", "part"], ["y"]),
    ]
    weights = {"table": np.ones(64, F32), "zero": np.array([0]), "axis": np.array([0])}
    found = look(save(build(nodes, {"x": ["length"]}, {"y": None}, weights), tmp_path))
    assert found["unshaped"] == []
    assert found["compute"]["sizes"] == {"length": 1}  # a first axis is a batch
    two = build(
        [
            helper.make_node("Shape", ["x"], ["s"], start=1),
            helper.make_node("Slice", ["table", "zero", "s", "axis"], ["part"]),
            helper.make_node("Add", ["x", "part"], ["y"]),
        ],
        {"x": ["b", "length"]}, {"y": None}, weights,
    )  # fmt: skip
    assert look(save(two, tmp_path))["compute"]["sizes"] == {"b": 1, "length": 16}


def test_subgraphs_functions_and_custom_operators_are_counted(build: Any, save: Any, tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["b"])], "b", [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((4, 4), F32), "w")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18)]
    function = helper.make_function("own", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)
    nodes = [
        helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch),
        helper.make_node("F", ["z"], ["f"], domain="own"),
        helper.make_node("Gelu", ["f"], ["y"], domain="com.microsoft"),
    ]
    model = build(nodes, {"x": [2, 4]}, {"y": None}, {"c": np.array(True)}, domains={"own": 1, "com.microsoft": 1},
                  functions=[function])  # fmt: skip
    found = look(save(model, tmp_path))
    nodes_found = found["nodes"]
    assert (nodes_found["main"], nodes_found["subgraphs"], nodes_found["functions"]) == (3, 2, 1)
    assert nodes_found["by_op"] == {"MatMul": 2, "If": 1, "own.F": 1, "com.microsoft.Gelu": 1, "Relu": 1}
    assert nodes_found["local_functions"] == ["own.F"]
    assert found["custom_ops"] == [{"domain": "com.microsoft", "op": "Gelu", "count": 1}]
    assert found["parameters"]["by_dtype"]["float32"]["count"] == 32
    assert found["compute"]["macs"] == 2 * 4 * 4


def test_broken_models_are_described_as_far_as_they_go(build: Any, save: Any, tmp_path: Path) -> None:
    # An input that nobody makes: ONNX's checker refuses it.
    model = build([helper.make_node("MatMul", ["x", "nothing"], ["y"], name="m")], {"x": [2, 4]}, {"y": [2, 3]})
    found = look(save(model, tmp_path))
    assert "nothing" in found["invalid"]
    assert found["compute"]["uncounted"][0]["node"] == "'m'"
    (tmp_path / "junk.onnx").write_bytes(b"\x08\x09 junk")
    with pytest.raises(ModelError):
        look(tmp_path / "junk.onnx")
    with pytest.raises(ModelError, match="does not exist"):
        look(tmp_path / "nosuch.onnx")


def test_sequences_unknown_ranks_and_old_files_with_weights_among_the_inputs(
    build: Any, save: Any, tmp_path: Path
) -> None:
    model = build([helper.make_node("SequenceConstruct", ["x"], ["s"])], {"x": None}, {})
    model.graph.output.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))
    found = look(save(model, tmp_path))
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": None}]
    assert found["outputs"] == [{"name": "s", "dtype": "sequence", "shape": None}]
    assert {"tensor": "x", "axis": None, "name": None, "size": None} in found["dynamic_axes"]
    assert found["memory"]["unknown_tensors"] >= 1
    old = build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [2, 4], "w": [4, 3]}, {"y": [2, 3]},
                {"w": np.ones((4, 3), F32)}, opset=9, ir_version=3)  # fmt: skip
    found = look(save(old, tmp_path))
    assert [v["name"] for v in found["inputs"]] == ["x"]
    assert found["compute"]["macs"] == 24


def test_elements_narrower_than_a_byte(build: Any, save: Any, tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.INT4, [5], [1, 2, 3, 4, 5])
    model = build([helper.make_node("DequantizeLinear", ["w", "s"], ["y"])], {"x": [1]}, {"y": [5]},
                  {"s": F32(1)}, opset=21, ir_version=10)  # fmt: skip
    model.graph.initializer.append(weight)
    assert look(save(model, tmp_path))["parameters"]["by_dtype"]["int4"] == {"count": 5, "bytes": 3}


def sparse_model(folder: Path, gigabytes: int) -> Path:
    """A model whose weights lie in a file with a hole: no disk, and no memory unless somebody reads them."""
    side, names = 2**14, [f"w{i}" for i in range(gigabytes)]
    nodes = [
        helper.make_node("MatMul", ["x" if i == 0 else f"h{i - 1}", name], [f"h{i}"]) for i, name in enumerate(names)
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", side])],
        [helper.make_tensor_value_info(f"h{gigabytes - 1}", TensorProto.FLOAT, ["n", side])],
    )  # fmt: skip
    for index, name in enumerate([*names, "tied"]):
        tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[side, side])
        tensor.data_location = TensorProto.EXTERNAL
        offset = (index % gigabytes) * 2**30  # the last one shares the bytes of the first
        for key, value in (("location", "w.data"), ("offset", str(offset)), ("length", str(2**30))):
            tensor.external_data.add(key=key, value=value)
        graph.initializer.append(tensor)
    path = folder / "large.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), str(path))
    with (folder / "w.data").open("wb") as stream:
        stream.truncate(gigabytes * 2**30)
    return path


def test_a_model_of_3_gb_is_inspected_in_little_memory(tmp_path: Path) -> None:
    path = sparse_model(tmp_path, 3)
    script = (
        "import json, re, sys; from deploykit.inspecting import inspect_model; "
        "found = inspect_model(sys.argv[1], contract=['triton:24.08']); "
        # Not ru_maxrss: a process that was just started inherits its parent's.
        "status = open('/proc/self/status').read(); "
        "print(json.dumps([found, int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1])]))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})  # fmt: skip
    found, peak_kib = json.loads(done.stdout)
    assert peak_kib * 1024 < 0.5e9
    assert found["parameters"]["bytes"] == 3 * 2**30
    assert found["parameters"]["shared_tensors"] == 1
    assert found["files"]["external"] == 1 and found["files"]["bytes"] > 3 * 2**30
    assert found["compute"]["macs"] == 3 * 2**28
    assert all(r["loads"] is None and "--load" in r["reason"] for r in found["runtimes"])


def test_runtimes_are_really_tried(build: Any, linear: Any, save: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    good = inspect_model(save(linear(), tmp_path))["runtimes"]
    assert {r["device"]: r["loads"] for r in good if r["version"]} and all(r["loads"] for r in good if r["version"])
    custom = build([helper.make_node("Foo", ["x"], ["y"], domain="my.company")], {"x": [2]}, {"y": [2]},
                   domains={"my.company": 1})  # fmt: skip
    for result in inspect_model(save(custom, tmp_path))["runtimes"]:
        if result["version"]:
            assert result["loads"] is False and "Foo" in result["reason"]


def test_contracts_are_those_asked_for(linear: Any, save: Any, tmp_path: Path) -> None:
    path = save(linear(ir_version=10), tmp_path)
    contract = look(path, contract=["triton:24.04", "openvino:2024.6"])["contract"]
    assert contract["targets"] == ["triton:24.04", "openvino:2024.6"]
    assert [(v["target"], v["kind"]) for v in contract["violations"]] == [("triton:24.04", "ir_version")]
    assert any("not" in n or "no limit" in n for n in contract["notes"])
    assert any("triton-inference-server" in s for s in contract["sources"])
