"""Whatever bytes come, they are understood or refused in our words: manifests, recipes, settings, requests, ONNX files.

Each fuzzer begins with a corpus of seeds, and changes them: bytes flipped, cut out, doubled, put elsewhere.
"""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploykit.artifact import Artifact, Evidence, Manifest, write_golden
from deploykit.errors import ArtifactError, DeploykitError, ModelError, RecipeError
from deploykit.modelfile import check_model, external_files, model_bytes, read_model, signature_of
from deploykit.onnx_wire import read_wire, scan
from deploykit.recipe import Recipe
from deploykit.runtimes import RuntimeSettings
from deploykit.serving.requests import RequestError
from deploykit.serving.v2_json import parse_request
from deploykit.serving.v2_types import Limits
from deploykit.specs import Signature, TensorSpec
from deploykit.staging import ArtifactWriter

short = settings(max_examples=100, deadline=None, derandomize=True, database=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
WORDS = [
    b"\xff" * 8,
    b"\x80" * 10,
    b"[" * 3000,
    b"{" * 3000,
    b"../",
    b"\0",
    b'"',
    b"9" * 5000,
    b"-1",
    b"1e999",
    b"\xed\xa0\x80",
]


def mutated(seeds):
    """One of the seeds, changed at up to four places."""
    change = st.tuples(
        st.sampled_from(["flip", "cut", "double", "put", "end"]), st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.one_of(st.binary(max_size=12), st.sampled_from(WORDS)),
    )  # fmt: skip

    def apply(picked):
        data = bytearray(picked[0])
        for kind, where, size, new in picked[1]:
            at = int(where * len(data))
            if kind == "flip" and data:
                data[at] ^= size or 1
            elif kind == "cut":
                del data[at : at + size]
            elif kind == "double":
                data[at:at] = data[at : at + size]
            elif kind == "put":
                data[at : at + len(new)] = new
            else:
                del data[at:]
        return bytes(data)

    return st.tuples(st.sampled_from(seeds), st.lists(change, max_size=4)).map(apply)


# --- ONNX ------------------------------------------------------------------------------------------------------------


def onnx_seeds():
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in "xy")
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    outside = TensorProto(name="w", data_type=1, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "64")):
        outside.external_data.add(key=key, value=value)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    branch = helper.make_graph([node], "branch", [], [y], [weight])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    opsets = [helper.make_opsetid("", 17)]
    graphs = [([node], [weight]), ([node], [outside]), ([choice], [])]
    made = [
        helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=opsets, ir_version=8)
        for nodes, weights in graphs
    ]
    made[0].functions.add(name="f", domain="d", output=["y"]).node.append(node)
    return [m.SerializeToString() for m in made]


@short
@given(mutated(onnx_seeds()))
def test_onnx(tmp_path, data):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    (tmp_path / "w.bin").write_bytes(bytes(64))
    with contextlib.suppress(DeploykitError):
        read_wire(path)
    try:
        proto = read_model(path)
        check_model(proto, path)
    except ModelError as exc:
        assert str(exc).isprintable()
        return
    with contextlib.suppress(ModelError):  # inputs that are no tensors
        signature_of(proto)
    assert model_bytes(path) >= len(data)


@short
@given(mutated(onnx_seeds()))
def test_what_onnx_sees_the_walk_sees(tmp_path, data):
    """No file whose external data only a library finds."""
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    (tmp_path / "w.bin").write_bytes(bytes(64))
    try:
        seen = external_files(read_model(path, weights=False))
    except ModelError:
        return
    try:
        walked = {entries.get("location") for _, entries in read_wire(path).external}
    except ModelError:
        return  # it is stricter, and refuses
    assert seen <= walked


@short
@given(st.binary(max_size=300))
def test_any_bytes_as_onnx(data):
    with contextlib.suppress(ValueError):
        scan(data)


# --- manifests, settings, recipes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    x = TensorSpec("x", "float32", ("n", 4))
    with ArtifactWriter(tmp_path_factory.mktemp("fuzz") / "a") as writer:
        (writer.dir / "model.onnx").write_bytes(onnx_seeds()[0])
        write_golden(writer.dir / "golden.npz", [({"x": np.ones((1, 4), "f")}, {"y": np.ones((1, 4), "f")})])
        return writer.commit(model="model.onnx", signature=Signature((x,), (x,)), lineage=[], evidence=Evidence())


@short
@given(st.data())
def test_manifest(artifact, data):
    file = artifact.path / "manifest.json"
    good = artifact.manifest.model_dump_json().encode()
    file.write_bytes(data.draw(mutated([good, json.dumps(json.loads(good)).encode()])))
    try:
        found = Artifact.open(artifact.path)
    except ArtifactError as exc:
        assert str(exc).isprintable()
    else:
        assert found.manifest.files == artifact.manifest.files
        assert found.model_path.parent == artifact.path


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@short
@given(st.dictionaries(st.sampled_from([*Manifest.model_fields, "x"]), anything))
def test_manifest_of_any_values(artifact, values):
    whole = {**artifact.manifest.model_dump(mode="json"), **values}
    (artifact.path / "manifest.json").write_text(json.dumps(whole))
    with contextlib.suppress(ArtifactError):
        Artifact.open(artifact.path)


TUNED = [
    json.dumps(RuntimeSettings("ort:cpu", 2, settings={"execution_mode": "parallel"}).as_dict()).encode(),
    json.dumps(RuntimeSettings("openvino:cpu", settings={"NUM_STREAMS": 2}, machine={"cpu": "x"}).as_dict()).encode(),
]


@short
@given(mutated(TUNED))
def test_settings(tmp_path, data):
    file = tmp_path / "s.json"
    file.write_bytes(data)
    with contextlib.suppress(DeploykitError):
        RuntimeSettings.load(file).check_contained("s.json")


RECIPES = [
    b'[export]\nsource = "model.py:make"\ndims = {n = 3}\n\n[int8]\nstep = "quantize-static"\ndata = "calib.npz"\n',
    b'[simplify]\nmodel = "a"\ntimeout_s = 1e3\n[benchmark]\nmodels = ["simplify"]\ndata = "eval.npz"\n',
]


@short
@given(mutated(RECIPES))
def test_recipe(tmp_path, data):
    file = tmp_path / "r.toml"
    file.write_bytes(data)
    try:
        Recipe.load(file)
    except RecipeError as exc:
        assert str(exc).isprintable()


# --- requests --------------------------------------------------------------------------------------------------------

HEAD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}]}
TEXTS = {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 11}}]}
BODIES = [
    b'{"id": "1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 1], "data": [[1], [2.5]]}]}',
    b'{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"]}], "parameters": {"timeout": 5}}',
    json.dumps(HEAD).encode() + bytes(8),
    json.dumps(TEXTS).encode() + b"\x01\0\0\0a\x02\0\0\0bc",
]  # fmt: skip


@short
@given(mutated(BODIES), st.sampled_from([None, len(json.dumps(HEAD)), len(json.dumps(TEXTS)), 0, 5]))
def test_request(data, length):
    with contextlib.suppress(RequestError):
        parse_request(memoryview(data), length, model="m", version=None, limits=Limits())
