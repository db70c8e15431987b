"""NVIDIA's clients, HTTP and gRPC, against both protocols."""

from __future__ import annotations

import threading
import time

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from deploykit.serving.v2_types import DATATYPES

RNG = np.random.default_rng(7)
VALUES = {
    "bool": np.array([[True, False, True]]),
    "string": np.array([["a", "", "süß \U0001f370"]], object),
    "float16": np.array([[0.5, -65504, 6e-8]], np.float16),
    "bfloat16": np.array([[0.5, -3e38, 1e-40]], np.float32).astype(ml_dtypes.bfloat16),
    "float32": np.array([[0.1, -3.4e38, 1e-45]], np.float32),
    "float64": np.array([[0.1, -1.7e308, 5e-324]]),
    **{
        dtype: np.array([[np.iinfo(dtype).min, np.iinfo(dtype).max, 7]], dtype)
        for dtype in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
    },
}


@pytest.fixture(scope="module")
def http(served):
    with http_client.InferenceServerClient(served.address) as client:
        yield client


@pytest.fixture(scope="module")
def grpc(served):
    with grpc_client.InferenceServerClient(served.grpc_address) as client:
        yield client


def tensor(module, name, array, **options):
    datatype = "BYTES" if array.dtype == object else DATATYPES[array.dtype.name]
    found = module.InferInput(name, list(array.shape), datatype)
    # The client takes BF16 as the float32 that it cuts.
    found.set_data_from_numpy(array.astype(np.float32) if datatype == "BF16" else array, **options)
    return found


def check(got, array):
    assert list(got.shape) == list(array.shape)
    if array.dtype == object:
        assert [item.decode() if isinstance(item, bytes) else item for item in got.reshape(-1)] == list(
            array.reshape(-1)
        )
    elif array.dtype.name == "bfloat16":
        np.testing.assert_array_equal(got, array.astype(np.float32))
    else:
        # The client makes float64 of nothing.
        assert got.dtype == array.dtype or not array.size
        np.testing.assert_array_equal(got, array)


def test_every_datatype_is_tried():
    assert set(VALUES) == set(DATATYPES)


@pytest.mark.parametrize("dtype", sorted(VALUES))
@pytest.mark.parametrize("shape", [(1, 3), (3,), (3, 1, 1), (0, 3)], ids=str)
def test_http_binary(http, dtype, shape):
    array = VALUES[dtype].reshape(shape) if 0 not in shape else VALUES[dtype][:0]
    inputs = [tensor(http_client, "x", array, binary_data=True)]
    check(http.infer(f"echo_{DATATYPES[dtype]}", inputs).as_numpy("y"), array)


@pytest.mark.parametrize("dtype", sorted(set(VALUES) - {"bfloat16"}))
def test_http_json(served, http, dtype):
    array = VALUES[dtype]
    inputs = [tensor(http_client, "x", array, binary_data=False)]
    outputs = [http_client.InferRequestedOutput("y", binary_data=False)]
    result = http.infer(f"echo_{DATATYPES[dtype]}", inputs, outputs=outputs)
    check(result.as_numpy("y"), array)
    assert "data" in result.get_output("y")


@pytest.mark.parametrize("dtype", sorted(VALUES))
@pytest.mark.parametrize("shape", [(1, 3), (3,), (0, 3)], ids=str)
def test_grpc_raw(grpc, dtype, shape):
    array = VALUES[dtype].reshape(shape) if 0 not in shape else VALUES[dtype][:0]
    check(grpc.infer(f"echo_{DATATYPES[dtype]}", [tensor(grpc_client, "x", array)]).as_numpy("y"), array)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_http_compressed(served, http, algorithm):
    array = RNG.random((2, 3, 224, 224), np.float32)
    result = http.infer(
        "identity",
        [tensor(http_client, "x", array)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    check(result.as_numpy("y"), array)


def test_grpc_compressed(grpc):
    array = RNG.random((2, 3, 224, 224), np.float32)
    check(grpc.infer("identity", [tensor(grpc_client, "x", array)], compression_algorithm="gzip").as_numpy("y"), array)


@pytest.mark.parametrize("module", [http_client, grpc_client], ids=["http", "grpc"])
def test_two_inputs_two_outputs_a_choice_a_version_and_an_id(served, http, grpc, module):
    client = http if module is http_client else grpc
    a, b = RNG.integers(-9, 9, (2, 3, 2), np.int32)
    inputs = [tensor(module, "a", a), tensor(module, "b", b)]
    result = client.infer("pair", inputs, request_id="seven")
    check(result.as_numpy("sum"), a + b)
    check(result.as_numpy("difference"), a - b)
    response = result.get_response()
    told = response if isinstance(response, dict) else {"id": response.id, "model_version": response.model_version}
    assert told["id"] == "seven" and told["model_version"] == "2"

    result = client.infer("pair", inputs, "1", outputs=[module.InferRequestedOutput("difference")])
    check(result.as_numpy("difference"), a - b)
    assert result.as_numpy("sum") is None
    request = served.engine.asked[-1]
    assert request.version == "1" and request.outputs == ("difference",)


@pytest.mark.parametrize("module", [http_client, grpc_client], ids=["http", "grpc"])
def test_an_array_that_is_not_contiguous_and_a_scalar(http, grpc, module):
    client = http if module is http_client else grpc
    array = RNG.random((2, 5), np.float32)
    result = client.infer("strided", [tensor(module, "x", array)])
    check(result.as_numpy("y"), array.T)
    check(result.as_numpy("z"), np.array(7))


def test_json_and_binary_in_one_request(http):
    a, b = RNG.integers(-9, 9, (2, 3, 2), np.int32)
    inputs = [tensor(http_client, "a", a, binary_data=False), tensor(http_client, "b", b, binary_data=True)]
    outputs = [
        http_client.InferRequestedOutput("sum", binary_data=True),
        http_client.InferRequestedOutput("difference", binary_data=False),
    ]
    result = http.infer("pair", inputs, outputs=outputs)
    check(result.as_numpy("sum"), a + b)
    check(result.as_numpy("difference"), a - b)


def test_outputs_without_a_number_are_read_back(http):
    x = [tensor(http_client, "x", np.zeros(1, np.float32))]
    for binary in (True, False):
        outputs = [http_client.InferRequestedOutput(name, binary_data=binary) for name in ("y", "z")]
        result = http.infer("nan", x, outputs=outputs)
        np.testing.assert_array_equal(result.as_numpy("y"), np.array([1.5, np.nan], np.float32))
        np.testing.assert_array_equal(result.as_numpy("z"), [1.5, np.nan])
        result = http.infer("infinite", x, outputs=outputs)
        np.testing.assert_array_equal(result.as_numpy("y"), np.array([np.nan, np.inf, -np.inf, 0.1], np.float32))
        np.testing.assert_array_equal(result.as_numpy("z"), np.array([np.inf, 2], np.float16))


@pytest.mark.parametrize("module", [http_client, grpc_client], ids=["http", "grpc"])
def test_health_and_metadata(http, grpc, served, module):
    client = http if module is http_client else grpc
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("mean")
    assert client.is_model_ready("mean", "1") and not client.is_model_ready("loading")
    options = {} if module is http_client else {"as_json": True}
    server = client.get_server_metadata(**options)
    assert server["name"] == "deploykit" and "binary_tensor_data" in server["extensions"]
    meta = client.get_model_metadata("pair", **options)
    assert meta["platform"] == "onnxruntime_onnx" and list(meta["versions"]) == ["1", "2"]
    assert [(i["name"], i["datatype"], [int(d) for d in i["shape"]]) for i in meta["inputs"]] == [
        ("a", "INT32", [-1, 2]),
        ("b", "INT32", [-1, 2]),
    ]
    assert [o["name"] for o in meta["outputs"]] == ["sum", "difference"]


@pytest.mark.parametrize("module", [http_client, grpc_client], ids=["http", "grpc"])
def test_repository(http, grpc, served, module):
    client = http if module is http_client else grpc
    options = {} if module is http_client else {"as_json": True}
    index = client.get_model_repository_index(**options)
    names = {entry["name"] for entry in (index if module is http_client else index["models"])}
    assert names == set(served.engine.models)
    served.engine.loaded.clear()
    served.engine.unloaded.clear()
    client.load_model("pair")
    client.unload_model("mean")
    assert served.engine.loaded == ["pair"] and served.engine.unloaded == ["mean"]
    with pytest.raises(InferenceServerException, match="not offered"):
        client.load_model("pair", config="{}")
    with pytest.raises(InferenceServerException, match="no model"):
        client.load_model("nothing")
    assert served.engine.loaded == ["pair"]


@pytest.mark.parametrize("module", [http_client, grpc_client], ids=["http", "grpc"])
@pytest.mark.parametrize(
    ("model", "array", "status", "message"),
    [
        ("nothing", np.zeros(1, np.float32), ("404", "StatusCode.NOT_FOUND"), "no model 'nothing'"),
        ("mean", np.zeros((1, 3, 224, 223), np.float32), ("400", "StatusCode.INVALID_ARGUMENT"), "shape of x"),
        ("nan", np.zeros(1), ("400", "StatusCode.INVALID_ARGUMENT"), "x is float64; expected float32"),
        ("busy", np.zeros(1, np.float32), ("429", "StatusCode.RESOURCE_EXHAUSTED"), "queue is full"),
        ("loading", np.zeros(1, np.float32), ("503", "StatusCode.UNAVAILABLE"), "still loading"),
        ("lost", np.zeros(1, np.float32), ("503", "StatusCode.UNAVAILABLE"), "worker died"),
        ("bug", np.zeros(1, np.float32), ("500", "StatusCode.INTERNAL"), "internal error"),
    ],
)
def test_refusals(http, grpc, module, model, array, status, message):
    client = http if module is http_client else grpc
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.infer(model, [tensor(module, "x", array)])
    assert caught.value.status() == status[module is grpc_client]
    assert "secret" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("module", [http_client, grpc_client], ids=["http", "grpc"])
def test_timeout_in_microseconds(served, http, grpc, module):
    client = http if module is http_client else grpc
    expected = "504" if module is http_client else "StatusCode.DEADLINE_EXCEEDED"
    with pytest.raises(InferenceServerException) as caught:
        client.infer(
            "slow", [tensor(module, "x", np.zeros(1, np.float32))], request_id=f"late {expected}", timeout=50_000
        )
    assert caught.value.status() == expected
    assert f"late {expected}" in served.engine.cancelled
    assert client.infer("nan", [tensor(module, "x", np.zeros(1, np.float32))], timeout=50_000_000)
    left = served.engine.asked[-1].deadline - time.monotonic()
    assert 0 < left < 50


def test_grpc_deadline_and_cancel(served, grpc):
    x = [tensor(grpc_client, "x", np.zeros(1, np.float32))]
    with pytest.raises(InferenceServerException) as caught:
        grpc.infer("slow", x, request_id="deadline", client_timeout=0.2)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert served.engine.asked[-1].deadline is not None

    served.engine.waiting.clear()
    done = threading.Event()
    call = grpc.async_infer("slow", x, callback=lambda result, error: done.set(), request_id="cancel")
    assert served.engine.waiting.wait(10)
    call.cancel()
    assert done.wait(10)
    until(lambda: {"deadline", "cancel"} <= set(served.engine.cancelled))


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not come to that in 10 s")


@pytest.mark.parametrize("module", [http_client, grpc_client], ids=["http", "grpc"])
def test_sequences_and_shared_memory_are_refused(http, grpc, module):
    client = http if module is http_client else grpc
    x = tensor(module, "x", np.zeros(1, np.float32))
    with pytest.raises(InferenceServerException, match="sequence"):
        client.infer("nan", [x], sequence_id=3, sequence_start=True)
    with pytest.raises(InferenceServerException, match="classification"):
        client.infer("nan", [x], outputs=[module.InferRequestedOutput("y", class_count=2)])
    x.set_shared_memory("region", 4)
    with pytest.raises(InferenceServerException, match="shared_memory_region"):
        client.infer("nan", [x])
