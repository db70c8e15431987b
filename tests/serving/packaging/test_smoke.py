"""The smoke test: golden requests in process and over HTTP, and everything that a server may answer instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

import deploykit
from deploykit.errors import ArtifactError, PackageError
from deploykit.runtimes import open_session
from deploykit.serving.bundles import Bundle, bundle_schema
from deploykit.serving.smoke_http import pack, unpack
from deploykit.serving.v2_types import DATATYPES

HEADER = "inference-header-content-length"
NUMPY = {"FP32": np.float32, "INT64": np.int64}


def v2(bundle: Bundle, *, binary: bool = True, shift: float = 0.0) -> Any:
    """What a server of the Open Inference Protocol answers: decoded by hand and by tritonclient, computed here."""
    columns = bundle.manifest.columns

    def read(entry: dict[str, Any], data: bytes) -> Any:
        if "data" in entry:
            kind = object if entry["datatype"] == "BYTES" else NUMPY[entry["datatype"]]
            array = np.array(entry["data"], dtype=kind)
        elif entry["datatype"] == "BYTES":
            array = np.array([w.decode() for w in deserialize_bytes_tensor(data)], dtype=object)
        else:
            array = np.frombuffer(data, NUMPY[entry["datatype"]])
        array = array.reshape(entry["shape"])
        return array[:, 0] if entry["name"] in columns else array

    def answer(path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        assert path == f"/v2/models/{bundle.manifest.name}/infer"
        size = int(headers.get(HEADER, len(body)))
        asked, at, feeds = json.loads(body[:size]), size, {}
        for entry in asked["inputs"]:
            length = entry.get("parameters", {}).get("binary_data_size", 0)
            feeds[entry["name"]] = read(entry, body[at : at + length])
            at += length
        assert at == len(body)
        with open_session(bundle.model_path, "ort:cpu") as session:
            outputs = session.run(feeds)
        entries, blobs = [], []
        for spec in bundle.signature.outputs:
            array = outputs[spec.name]
            if spec.dtype == "float32":
                array = array + np.float32(shift)
            array = array[:, None] if spec.name in columns else array
            kind = {"float32": "FP32", "int64": "INT64", "string": "BYTES"}[spec.dtype]
            made: dict[str, Any] = {"name": spec.name, "datatype": kind, "shape": list(array.shape)}
            if binary:
                blobs.append(serialize_byte_tensor(array).item() if kind == "BYTES" else array.tobytes())
                made["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                made["data"] = array.reshape(-1).tolist()
            entries.append(made)
        head = json.dumps({"model_name": bundle.manifest.name, "outputs": entries}).encode()
        more = {"Inference-Header-Content-Length": str(len(head))} if binary else {}
        return 200, more, b"".join([head, *blobs])

    return answer


@pytest.fixture
def bundle(artifact: Any, tmp_path: Path) -> Bundle:
    return deploykit.package(artifact().path, tmp_path / "out", target="triton")


@pytest.mark.parametrize("wire", ["binary", "json"])
@pytest.mark.parametrize("kind", ["rows", "text", "steps", "fixed"])
def test_a_server_that_is_right(artifact: Any, serve: Any, tmp_path: Path, kind: str, wire: str) -> None:
    made = deploykit.package(artifact(kind).path, tmp_path / "out", target="triton", device="ort:cpu")
    server = serve(v2(made, binary=wire == "binary"))
    record = deploykit.smoke(made.path, server.url, wire=wire)
    assert record["passed"], record
    assert record["against"] == server.url
    assert record["max_abs"] is not None and record["max_abs"] < 1e-5
    assert len(server.asked) == len(made.golden()) == record["cases"]
    assert (HEADER in server.asked[0][1]) == (wire == "binary")


def test_a_server_that_is_wrong(bundle: Bundle, serve: Any) -> None:
    record = deploykit.smoke(bundle.path, serve(v2(bundle, shift=0.25)).url)
    assert not record["passed"]
    assert record["max_abs"] == pytest.approx(0.25, rel=1e-3)


def test_a_prefix_and_a_token_are_sent(bundle: Bundle, serve: Any) -> None:
    inner = v2(bundle)
    server = serve(lambda path, headers, body: inner(path.removeprefix("/prefix"), headers, body))
    assert deploykit.smoke(bundle.path, server.url + "/prefix/", headers={"Authorization": "Bearer s"})["passed"]
    assert {headers["authorization"] for _, headers, _ in server.asked} == {"Bearer s"}


OUTPUT = {"name": "y", "datatype": "FP32", "shape": [1, 300]}


def one_output(**changed: Any) -> bytes:
    return json.dumps({"outputs": [OUTPUT | changed]}).encode()


@pytest.mark.parametrize(
    ("status", "headers", "body", "words"),
    [
        (500, {}, b'{"error": "out of memory"}', "answers 500: out of memory"),
        (404, {}, b"<html>", "answers 404 with"),
        (200, {}, b"", "answers 200 with"),
        (200, {}, b"[" * 100_000, "answers 200 with"),
        (200, {}, b"[]", "otherwise than the Open Inference Protocol"),
        (200, {}, b'{"outputs": [{"name": "y"}]}', "otherwise than the Open Inference Protocol"),
        (200, {}, one_output(data=[1.0]), "otherwise than"),
        (200, {}, one_output(data=["a"] * 300), "no array of float32"),
        (200, {"Inference-Header-Content-Length": "9999"}, b"{}", "'9999' for 2 bytes"),
        (200, {"Inference-Header-Content-Length": "-1"}, b"{}", "'-1' for 2 bytes"),
        (200, {}, one_output(parameters={"binary_data_size": 4}), "0 bytes"),
        (200, {}, one_output(datatype="X", parameters={"binary_data_size": 0}), "no type of the protocol"),
    ],
)  # fmt: skip
def test_answers_that_are_none(
    bundle: Bundle, serve: Any, status: int, headers: dict[str, str], body: bytes, words: str
) -> None:
    with pytest.raises(PackageError, match=words):
        deploykit.smoke(bundle.path, serve(lambda *_: (status, headers, body)).url)


def test_an_output_that_is_missing_fails(bundle: Bundle, serve: Any) -> None:
    record = deploykit.smoke(bundle.path, serve(lambda *_: (200, {}, b'{"outputs": []}')).url)
    assert not record["passed"]
    assert "is missing" in record["reason"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port"])
def test_urls_that_are_none(bundle: Bundle, url: str) -> None:
    with pytest.raises(PackageError):
        deploykit.smoke(bundle.path, url)


def test_nobody_answers(bundle: Bundle, serve: Any) -> None:
    server = serve(v2(bundle))
    server.close()
    with pytest.raises(PackageError, match="does not answer"):
        deploykit.smoke(bundle.path, server.url)
    with pytest.raises(PackageError, match="is not ready after"):
        deploykit.smoke(bundle.path, server.url, wait_s=0.3)


def test_it_waits_until_the_model_is_ready(bundle: Bundle, serve: Any) -> None:
    inner, seen = v2(bundle), []

    def answer(path: str, headers: Mapping[str, str], body: bytes) -> Any:
        if path.endswith("/ready"):
            seen.append(path)
            return (200 if len(seen) > 2 else 503), {}, b"{}"
        assert len(seen) > 2, "asked before it was ready"
        return inner(path, headers, body)

    assert deploykit.smoke(bundle.path, serve(answer).url, wait_s=30)["passed"]
    assert seen == ["/v2/models/net/ready"] * 3


def test_in_process_and_as_an_artifact(bundle: Bundle, tmp_path: Path) -> None:
    for path, target in ((bundle.path, "triton"), (tmp_path / "net", "artifact")):
        record = deploykit.smoke(path)
        assert (record["passed"], record["target"], record["against"]) == (True, target, "ort:cpu")


def test_a_model_that_does_not_give_its_golden_outputs_is_not_packaged(artifact: Any, tmp_path: Path) -> None:
    made = artifact(change=lambda outputs: {n: a + np.float32(0.5) for n, a in outputs.items()})
    with pytest.raises(PackageError, match="does not answer its golden requests on ort:cpu"):
        deploykit.package(made.path, tmp_path / "out", target="triton")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net"]
    assert not deploykit.smoke(made.path)["passed"]


def noisy(outputs: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {n: (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in outputs.items()}


def test_a_quantized_model_is_judged_by_its_cosine(artifact: Any, tmp_path: Path) -> None:
    made = artifact(change=noisy, step="quantize-static")
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton")
    assert bundle.manifest.contract.min_cosine == 0.95
    assert deploykit.smoke(bundle.path)["passed"]
    with pytest.raises(PackageError, match="golden requests"):
        deploykit.package(made.path, tmp_path / "strict", target="triton", min_cosine=0.999999)


@pytest.mark.parametrize("name", ["golden.npz", "models/net/1/model.onnx"])
def test_changed_data_are_refused_and_changed_configuration_is_said(bundle: Bundle, name: str) -> None:
    (bundle.path / "models/net/config.pbtxt").write_text("max_batch_size: 1", encoding="ascii")
    record = deploykit.smoke(bundle.path)
    assert record["passed"]
    assert record["edited"] == ["models/net/config.pbtxt"]
    path = bundle.path / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(PackageError, match="sha256"):
        deploykit.smoke(bundle.path)
    path.unlink()
    with pytest.raises(PackageError, match="missing"):
        deploykit.smoke(bundle.path)


def test_a_model_behind_a_link_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    version = bundle.path / "models" / "net" / "1"
    version.rename(tmp_path / "elsewhere")
    version.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="a link"):
        deploykit.smoke(bundle.path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m | {"schema_version": 9}, "schema 9"),
        (lambda m: m | {"model": "../net/model.onnx"}, "files below the bundle"),
        (lambda m: m | {"model": "/etc/passwd"}, "files below the bundle"),
        (lambda m: m | {"model": "models/other.onnx"}, "does not list its model"),
        (lambda m: m | {"protocol": "smoke signals"}, "protocol"),
        (lambda m: m | {"surprise": 1}, "surprise"),
        (lambda m: {k: v for k, v in m.items() if k != "contract"}, "contract"),
    ],
)
def test_manifests_that_are_none(bundle: Bundle, change: Any, words: str) -> None:
    file = bundle.path / "deploykit.json"
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(PackageError, match=words):
        deploykit.smoke(bundle.path)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no bundle and no artifact"):
        deploykit.smoke(tmp_path)
    (tmp_path / "deploykit.json").write_text("{", encoding="utf-8")
    with pytest.raises(PackageError, match="not JSON"):
        deploykit.smoke(tmp_path)


def test_a_changed_artifact(artifact: Any) -> None:
    made = artifact()
    (made.path / "more").write_text("x", encoding="utf-8")
    with pytest.raises(ArtifactError):
        deploykit.smoke(made.path)


def test_the_manifest_has_a_schema(bundle: Bundle) -> None:
    import jsonschema

    manifest = json.loads((bundle.path / "deploykit.json").read_text(encoding="utf-8"))
    jsonschema.validate(manifest, bundle_schema())


@pytest.mark.parametrize("dtype", sorted(set(DATATYPES) - {"string", "bfloat16"}))
def test_every_type_survives_the_wire(dtype: str) -> None:
    rng = np.random.default_rng(0)
    array = (rng.standard_normal((3, 0 if dtype == "uint64" else 5)) * 100).astype(dtype)
    for made in (array, array[::-1], np.asfortranarray(array), array.astype(array.dtype.newbyteorder(">"))):
        found = unpack(pack(made), DATATYPES[dtype], list(made.shape), "x")
        assert found.dtype == np.dtype(dtype)
        assert np.array_equal(found, made)


@settings(deadline=None)
@given(st.lists(st.text(max_size=5), max_size=6))
def test_strings_survive_the_wire_and_are_tritons(texts: list[str]) -> None:
    texts = [t.encode("utf-8", "ignore").decode() for t in texts]
    array = np.array(texts, dtype=object)
    packed = pack(array)
    assert unpack(packed, "BYTES", [len(texts)], "x").tolist() == texts
    if texts:
        assert packed == serialize_byte_tensor(array).item()


@settings(deadline=None)
@given(st.binary(max_size=40), st.lists(st.integers(0, 3), max_size=3))
def test_bytes_that_are_no_strings_are_refused_or_read_whole(data: bytes, shape: list[int]) -> None:
    try:
        found = unpack(data, "BYTES", shape, "x")
    except PackageError:
        return
    assert list(found.shape) == shape
