"""Models of unknown origin are parsed, loaded and warmed up in a process of their own, within limits."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from deploykit.errors import DeploykitError
from deploykit.serving.dispatch import hire
from deploykit.serving.loaded import Options, Source, load

MIB = 2**20


def started(path: Path, read=lambda pid: None, **options):
    """What a worker says of a model, and what is read of its process while it lives."""

    async def run():
        given = Options(instances=1, threads=1, arena_bytes=MIB, **options)
        worker = hire(load(Source.at(path), given), given, lambda: None, lambda worker: None)
        try:
            return await worker.start(), read(worker.pid)
        finally:
            worker.close()
            await worker.wait()
            assert not Path(f"/proc/{worker.pid}").exists() or worker.pid == 0

    return asyncio.run(run())


def refused(path, **options):
    with pytest.raises(DeploykitError) as caught:
        started(path, **options)
    line = str(caught.value)
    assert line.isprintable() and "Traceback" not in line
    return line


@pytest.fixture
def place(tmp_path, model):
    def write(made):
        path = tmp_path / "m.onnx"
        path.write_bytes(made.SerializeToString())
        return path

    return write


def test_limits_of_a_worker(place, model):
    found, limits = started(
        place(model()), lambda pid: Path(f"/proc/{pid}/limits").read_text(), memory_bytes=2048 * MIB
    )
    rows = {line[:26].strip(): line[26:].split() for line in limits.splitlines()}
    assert rows["Max data size"][:2] == [str(2048 * MIB)] * 2
    assert rows["Max core file size"][:2] == ["0", "0"]
    assert found["signature"]["inputs"] == [["x", "float32", [4]]]


def test_memory_that_a_model_may_not_have(place, model):
    """Its shape is small in the file, and half a GiB in memory."""
    nodes = [
        helper.make_node("Constant", [], ["n"], value_ints=[2**27]),
        helper.make_node("Expand", ["x", "n"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["y"], keepdims=1),
    ]
    path = place(model(nodes, [], [1]))
    (note,) = started(path, memory_bytes=512 * MIB)[0]["notes"]
    assert "Failed to allocate" in note or "bad_alloc" in note
    assert started(path)[0]["notes"] == []


def test_a_model_that_never_ends(place, model):
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Tanh", ["s"], ["t"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [4]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, [4]),
        ],
    )  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["n"], value=helper.make_tensor("n", TensorProto.INT64, [], [2**62])),
        helper.make_node("Loop", ["n", "", "x"], ["y"], body=body),
    ]
    assert "not loaded and warm within 3 s" in refused(place(model(nodes, [])), load_s=3.0)


def test_inputs_of_impossible_size(place, model):
    nodes = [helper.make_node("Tanh", ["x"], ["y"])]
    line = refused(place(model(nodes, [], [2**20, 2**20])))
    assert "cannot be loaded and warmed up" in line


def test_external_data_of_a_bare_file(secret, tmp_path, model):
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="hard.bin")
    os.link(secret.path / "w.bin", tmp_path / "model" / "hard.bin")
    secret.touched()
    path = tmp_path / "model" / "m.onnx"
    path.write_bytes(model(weights=[tensor]).SerializeToString())
    assert "is a hard link" in refused(path)
