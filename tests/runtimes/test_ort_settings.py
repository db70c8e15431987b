"""What is set on ONNX Runtime: by name, by provider, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from deploykit.errors import DeviceError
from deploykit.runtimes import open_session, parse_device
from deploykit.runtimes.base import SessionOptions
from deploykit.runtimes.ort_settings import OrtPlan, plan


def planned(device: str, threads: int = 3, precision: str = "fp32", optimize: Any = True, **extra: Any) -> OrtPlan:
    return plan(ort, parse_device(device), SessionOptions(threads, optimize, precision, extra))


def options_of(session: Any) -> Any:
    return session._session.get_session_options()


def test_named_settings_reach_the_session(net: Path) -> None:
    settings = {
        "intra_op_num_threads": 2, "inter_op_num_threads": 2, "execution_mode": "parallel",
        "graph_optimization_level": "basic", "session.intra_op.allow_spinning": False, "session.dynamic_block_base": 4,
    }  # fmt: skip
    with open_session(net, threads=1, settings=settings) as session:
        found = options_of(session)
        assert (found.intra_op_num_threads, found.inter_op_num_threads) == (2, 2)
        assert found.execution_mode == ort.ExecutionMode.ORT_PARALLEL
        assert found.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # ONNX Runtime would take "False" for something that is not "0".
        assert found.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert found.get_session_config_entry("session.dynamic_block_base") == "4"
        assert session.settings["execution_mode"] == "parallel"
        assert session.settings["session.intra_op.allow_spinning"] == "0"
        image = np.ones((1, 3, 8, 8), np.float32)
        basic = [n.op for n in session.placement({"image": image}).nodes]
    with open_session(net, threads=1) as session:
        assert [n.op for n in session.placement({"image": image}).nodes] != basic


@pytest.mark.parametrize("level", ["basic", "extended", "layout", "all", True, False])
def test_levels(net: Path, level: Any) -> None:
    with open_session(net, optimize=level) as session:
        name = {True: "all", False: "disabled"}.get(level, level)
        assert session.settings["graph_optimization_level"] == name


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"inter_op_num_threads": 2}, "parallel"),
        ({"inter_op_num_threads": True}, "whole number"),
        ({"execution_mode": "Parallel"}, "sequential or parallel"),
        ({"device_buffers": 1}, "true or false"),
        ({"use_arena": 1}, "has no option 'use_arena'"),
        ({"intra_op_num_thread": 1}, "did you mean 'intra_op_num_threads'"),
        ({"session.set_denormals_as_zero": "1"}, "did you mean 'session.set_denormal_as_zero'"),
        ({"session.set_denormal": "1"}, "has no setting 'session.set_denormal'"),
        ({"session.intra_op": "1"}, "would ignore it"),
    ],
)
def test_wrong_settings_say_what_is_right(net: Path, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(DeviceError) as caught:
        open_session(net, settings=settings)
    assert word in str(caught.value)


def test_a_configuration_that_only_the_library_knows(net: Path) -> None:
    with open_session(net, settings={"session.debug_layout_transformation": "0"}) as session:
        assert session.settings["session.debug_layout_transformation"] == "0"


def test_unknown_level(net: Path) -> None:
    with pytest.raises(DeviceError, match="basic"):
        open_session(net, optimize="most")


# --- providers, as far as that goes without their hardware -----------------------------------------------------------


def test_cuda_keeps_single_precision() -> None:
    assert planned("ort:cuda").provider == {"use_tf32": "0"}
    assert planned("ort:cuda", precision="native").provider == {}
    assert planned("ort:cuda", use_tf32=True).provider == {"use_tf32": "1"}
    assert planned("ort:cuda").config["session.disable_cpu_ep_fallback"] == "1"
    assert planned("ort:cuda", **{"session.disable_cpu_ep_fallback": 0}).config == {
        "session.disable_cpu_ep_fallback": "0"
    }


def test_tensorrt_caches_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "unset")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    native = planned("ort:tensorrt", precision="native", trt_fp16_enable=True)
    assert native.provider == {"trt_fp16_enable": "1"}
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    cached = planned("ort:tensorrt", trt_engine_cache_path="/c", trt_timing_cache_path="/t", trt_int8_enable=True)
    assert cached.provider["trt_engine_cache_enable"] == cached.provider["trt_timing_cache_enable"] == "1"
    assert cached.provider["trt_int8_enable"] == "1"
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == cached.as_dict()["NVIDIA_TF32_OVERRIDE"] == "0"
    for flag in ("trt_fp16_enable", "trt_bf16_enable"):
        with pytest.raises(DeviceError, match="precision native"):
            planned("ort:tensorrt", **{flag: "True"})
    assert planned("ort:tensorrt", trt_fp16_enable=False).provider["trt_fp16_enable"] == "0"


def test_openvino_provider_gets_threads_and_precision(tmp_path: Path) -> None:
    made = planned("ort:openvino")
    assert (made.intra, made.level, made.provider["device_type"]) == (1, "disabled", "CPU")
    cpu = {"INFERENCE_NUM_THREADS": "3", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "f32"}
    assert json.loads(made.provider["load_config"]) == {"CPU": cpu}
    (tmp_path / "c.json").write_text('{"CPU": {"NUM_STREAMS": "2"}}')
    for given in ({"CPU": {"NUM_STREAMS": "2"}}, '{"CPU": {"NUM_STREAMS": "2"}}', str(tmp_path / "c.json")):
        assert json.loads(planned("ort:openvino", load_config=given).provider["load_config"]) == {
            "CPU": cpu | {"NUM_STREAMS": "2"}
        }
    native = planned("ort:openvino", precision="native", num_streams=2, optimize="all")
    assert native.level == "all"
    assert native.provider["num_streams"] == "2"
    assert json.loads(native.provider["load_config"]) == {"CPU": {"INFERENCE_NUM_THREADS": "3"}}
    assert planned("ort:openvino", device_type="GPU").provider == {"device_type": "GPU", "precision": "FP32"}
    for wrong in ("{", "[]", str(tmp_path / "none.json")):
        with pytest.raises(DeviceError, match="load_config"):
            planned("ort:openvino", load_config=wrong)


def test_directml_runs_nodes_one_after_another() -> None:
    assert planned("ort:directml").memory_pattern is False
    assert planned("ort:directml").apply(ort).enable_mem_pattern is False
    with pytest.raises(DeviceError, match="DirectML"):
        planned("ort:directml", execution_mode="parallel")


def test_xnnpack_has_a_thread_pool_of_its_own() -> None:
    made = planned("ort:xnnpack")
    assert (made.intra, made.provider) == (1, {"intra_op_num_threads": "3"})
    assert made.config["session.intra_op.allow_spinning"] == "0"
    assert planned("ort:xnnpack", intra_op_num_threads=2).provider == {"intra_op_num_threads": "2"}
    with pytest.raises(DeviceError, match="no option"):
        planned("ort:xnnpack", threads_per_core=2)


def test_coreml_options_go_through() -> None:
    assert planned("ort:coreml", ModelFormat="MLProgram").provider == {"ModelFormat": "MLProgram"}
