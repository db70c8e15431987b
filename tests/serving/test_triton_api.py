"""What Triton's clients ask beyond the Open Inference Protocol: configurations and statistics."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from deploykit.serving.requests import InferRequest, InferResult, ModelInfo
from deploykit.serving.triton_api import Statistics, model_config
from deploykit.specs import TensorSpec


@pytest.fixture(scope="module")
def both(running, fake_engine):
    """Both protocols over one engine, counted together."""
    with running(fake_engine(), None, statistics=Statistics()) as served:
        with (
            http_client.InferenceServerClient(served.address) as http,
            grpc_client.InferenceServerClient(served.grpc_address) as grpc,
        ):
            yield http, grpc
        # Its greenlets do not like to be collected in another thread.
        del http
        gc.collect()


def test_config(both):
    http, grpc = both
    config = http.get_model_config("pair")
    assert config["max_batch_size"] == 8 and config["dynamic_batching"] == {}
    assert config["version_policy"] == {"latest": {"num_versions": 2}}
    assert config["input"] == [{"name": n, "data_type": "TYPE_INT32", "dims": [2]} for n in ("a", "b")]
    assert [o["name"] for o in config["output"]] == ["sum", "difference"]
    assert (config["platform"], config["backend"]) == ("onnxruntime_onnx", "onnxruntime")
    theirs = grpc.get_model_config("pair").config
    assert theirs.max_batch_size == 8 and theirs.HasField("dynamic_batching") and theirs.backend == "onnxruntime"
    assert [(i.name, i.data_type, list(i.dims)) for i in theirs.input] == [("a", 8, [2]), ("b", 8, [2])]
    assert (
        type(theirs.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[8].name == "TYPE_INT32"
    )
    # Where requests are not joined, all dimensions are the client's.
    config = http.get_model_config("mean", "1")
    assert config["max_batch_size"] == 0 and "dynamic_batching" not in config
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [1, 3, 224, 224]}]
    assert http.get_model_config("echo_BYTES")["input"][0]["data_type"] == "TYPE_STRING"
    assert not grpc.get_model_config("mean").config.HasField("dynamic_batching")


def test_every_type_has_its_number():
    from tritonclient.grpc import model_config_pb2

    from deploykit.serving.v2_types import DATATYPES

    for dtype, datatype in DATATYPES.items():
        spec = (TensorSpec("x", dtype, (1,)),)
        info = ModelInfo("m", ("1",), "onnxruntime_onnx", spec, spec, 0)
        name = model_config(info)["input"][0]["data_type"]
        assert name == f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}"
        assert model_config(info, enums=True)["input"][0]["data_type"] == model_config_pb2.DataType.Value(name)


def test_statistics_count_both_protocols_and_failures(both):
    http, grpc = both
    before = http.get_inference_statistics("nan")["model_stats"][0]["inference_stats"]
    for module, client in ((http_client, http), (grpc_client, grpc)):
        x = module.InferInput("x", [1], "FP32").set_data_from_numpy(np.zeros(1, np.float32))
        for _ in range(2):
            client.infer("nan", [x])
        for model in ("busy", "lost"):
            with pytest.raises(InferenceServerException):
                client.infer(model, [x])
    (stats,) = http.get_inference_statistics("nan", "2")["model_stats"]
    assert (stats["name"], stats["version"]) == ("nan", "2")
    assert stats["inference_count"] == stats["execution_count"] == 4 and stats["last_inference"] > 1.6e12
    assert stats["inference_stats"]["success"]["count"] == 4 and stats["inference_stats"]["success"]["ns"] > 0
    assert stats["inference_stats"]["queue"]["count"] == stats["inference_stats"]["compute_infer"]["count"] == 4
    assert [b["batch_size"] for b in stats["batch_stats"]] == [1]
    assert before["success"]["count"] == 0
    theirs = grpc.get_inference_statistics("nan", "2").model_stats[0]
    assert (theirs.inference_count, theirs.inference_stats.success.count) == (4, 4)
    assert theirs.inference_stats.success.ns == stats["inference_stats"]["success"]["ns"]
    everything = http.get_inference_statistics()["model_stats"]
    assert {(s["name"], s["version"]) for s in everything} >= {("nan", "1"), ("nan", "2"), ("pair", "2")}
    failed = {s["name"]: s["inference_stats"]["fail"]["count"] for s in everything if s["version"] == "2"}
    assert (failed["busy"], failed["lost"], failed["nan"]) == (2, 2, 0)
    assert len(grpc.get_inference_statistics().model_stats) == len(everything)


@pytest.mark.parametrize("ask", ["get_model_config", "get_inference_statistics"])
def test_models_that_there_are_not(both, ask):
    for client, code in zip(both, ("404", "StatusCode.NOT_FOUND"), strict=True):
        for name, version in (("nothing", ""), ("pair", "9")):
            with pytest.raises(InferenceServerException) as caught:
                getattr(client, ask)(name, version)
            assert caught.value.status() == code


def test_a_batch_is_counted_in_the_parts_of_its_requests():
    statistics = Statistics()

    def answer(rows, batch, compute_s):
        x = np.zeros((rows, 3), np.float32)
        result = InferResult("m", "1", {}, "", 0.25, compute_s, batch)
        statistics.answered(InferRequest("m", {"x": x}), result, 1.0)

    for rows in (1, 2, 3):  # one batch of six rows
        answer(rows, 6, 0.6)
    answer(2, 2, 0.5)
    answer(5, 0, 0.125)  # a model that joins nothing: its rows are nobody's business

    class Engine:
        def info(self, name, version=None):
            return ModelInfo(name, ("1",), "p", (), (), 6)

    (found,) = statistics.shown(Engine(), "m")
    assert (found["inference_count"], found["execution_count"]) == (9, 3)
    spent = found["inference_stats"]
    assert spent["success"] == {"count": 5, "ns": 5_000_000_000} and spent["queue"]["ns"] == 1_250_000_000
    assert spent["compute_infer"] == {"count": 5, "ns": round((3 * 0.6 + 0.5 + 0.125) * 1e9)}
    sizes = {b["batch_size"]: b["compute_infer"] for b in found["batch_stats"]}
    assert sizes == {
        1: {"count": 1, "ns": 125_000_000}, 2: {"count": 1, "ns": 500_000_000}, 6: {"count": 1, "ns": 600_000_000},
    }  # fmt: skip
