"""What is set on OpenVINO: streams and threads, virtual devices, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from deploykit.errors import DeviceError
from deploykit.machine import allowed_cores
from deploykit.runtimes import open_session, parse_device
from deploykit.runtimes.base import SessionOptions
from deploykit.runtimes.ov_settings import configure

IMAGE = {"image": np.ones((2, 3, 8, 8), np.float32)}


class Hardware:
    """A core as far as `configure` asks, with devices that this machine may lack."""

    def __init__(self, **capabilities: list[str]) -> None:
        self.capabilities = capabilities
        self.available_devices = list(capabilities)
        self.core = ov.Core()

    def get_property(self, device: str, name: str) -> Any:
        if name == "OPTIMIZATION_CAPABILITIES" and device in self.capabilities:
            return self.capabilities[device]
        if name == "SUPPORTED_PROPERTIES" and device in ("GPU", "NPU"):
            return {"INFERENCE_PRECISION_HINT": "RW", "PERFORMANCE_HINT": "RW", "FULL_DEVICE_NAME": "RO"}
        return self.core.get_property(device, name)


def made(core: Any, device: str, threads: int = 1, precision: str = "fp32", **extra: Any) -> dict[str, Any]:
    return configure(core, parse_device(device), SessionOptions(threads, True, precision, extra))


def test_streams_come_by_one_setting(net: Path) -> None:
    with open_session(net, "openvino:cpu", threads=1, settings={"NUM_STREAMS": 2}) as session:
        assert "PERFORMANCE_HINT" not in session.settings
        assert session.settings["INFERENCE_NUM_THREADS"] == min(2, allowed_cores())
        assert int(session._compiled.get_property("NUM_STREAMS")) == min(2, allowed_cores())  # type: ignore[attr-defined]
    with open_session(net, "openvino:cpu", settings={"PERFORMANCE_HINT": "THROUGHPUT"}) as session:
        assert "NUM_STREAMS" not in session.settings
        assert session.run(IMAGE)["feat"].shape == (2, 8)
    core = ov.Core()
    assert made(core, "openvino:cpu", threads=3)["INFERENCE_NUM_THREADS"] == 3
    assert made(core, "openvino:cpu", threads=3)["NUM_STREAMS"] == 1
    assert made(core, "openvino:cpu", NUM_STREAMS="AUTO")["INFERENCE_NUM_THREADS"] == allowed_cores()
    with pytest.raises(DeviceError, match="one of the two"):
        made(core, "openvino:cpu", NUM_STREAMS=2, PERFORMANCE_HINT="THROUGHPUT")


@pytest.mark.parametrize("device", ["openvino:cpu", "openvino:auto", "openvino:hetero:cpu"])
def test_properties_that_do_not_exist(net: Path, device: str) -> None:
    with pytest.raises(DeviceError, match="did you mean 'ENABLE_CPU_PINNING'"):
        open_session(net, device, settings={"ENABLE_CPU_PINING": True})
    with pytest.raises(DeviceError, match="can be read, not set"):
        open_session(net, device, settings={"FULL_DEVICE_NAME": "x"})


@pytest.mark.parametrize("device", ["openvino:auto", "openvino:auto:cpu", "openvino:multi:cpu", "openvino:hetero:cpu"])
def test_virtual_devices_hand_settings_on(net: Path, device: str) -> None:
    with open_session(net, device, threads=1, settings={"ENABLE_CPU_PINNING": False}) as session:
        found = session._compiled.get_property("DEVICE_PROPERTIES")["CPU"]  # type: ignore[attr-defined]
        assert found["INFERENCE_NUM_THREADS"] == 1
        assert found["ENABLE_CPU_PINNING"] is False
        assert "float32" in str(found["INFERENCE_PRECISION_HINT"])
        placement = session.placement(IMAGE)
        assert placement.nodes
        assert {node.on for node in placement.nodes} == {"CPU"}
        assert placement.share_of_nodes == 1.0
        assert placement.precisions() == {"float32": 1}
    with open_session(net, "openvino:cpu", threads=1) as session:
        expected = session.run(IMAGE)["feat"]
    with open_session(net, device) as session:
        np.testing.assert_allclose(session.run(IMAGE)["feat"], expected, rtol=1e-5)


def test_auto_does_not_fall_back() -> None:
    core: Any = Hardware(CPU=["FP32", "INT8"], GPU=["FP32", "FP16", "INT8"])
    found = made(core, "openvino:auto", threads=2)
    assert found["ENABLE_STARTUP_FALLBACK"] is found["ENABLE_RUNTIME_FALLBACK"] is False
    assert found["DEVICE_PROPERTIES"]["CPU"]["INFERENCE_NUM_THREADS"] == 2
    assert found["DEVICE_PROPERTIES"]["GPU"] == {"INFERENCE_PRECISION_HINT": "f32"}
    only = made(core, "openvino:auto:gpu", DEVICE_PROPERTIES={"GPU": {"PERFORMANCE_HINT": "THROUGHPUT"}})
    assert only["DEVICE_PROPERTIES"] == {"GPU": {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "THROUGHPUT"}}


def test_a_device_that_auto_shall_leave_out_gets_no_settings() -> None:
    core: Any = Hardware(CPU=["FP32", "INT8"], GPU=["FP32", "FP16", "INT8"])
    found = made(core, "openvino:auto:-gpu", threads=2)
    assert found["DEVICE_PROPERTIES"].keys() == {"CPU"}
    assert found["DEVICE_PROPERTIES"]["CPU"]["INFERENCE_NUM_THREADS"] == 2


def test_the_first_device_of_a_kind_goes_by_two_names(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbered:
        def __init__(self, compiled: Any) -> None:
            self._compiled = compiled

        def get_property(self, name: str) -> Any:
            return ["CPU.0"] if name == "EXECUTION_DEVICES" else self._compiled.get_property(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._compiled, name)

    with open_session(net, "openvino:cpu", threads=1) as session:
        real = session._compile  # type: ignore[attr-defined]
        monkeypatch.setattr(session, "_compile", lambda core, config: Numbered(real(core, config)))
        placement = session.placement(IMAGE)
    assert placement.asked == "CPU.0"
    assert placement.share_of_nodes == 1.0


def test_single_precision_where_there_is_none() -> None:
    core: Any = Hardware(CPU=["FP32"], NPU=["FP16", "INT8"])
    with pytest.raises(DeviceError, match="native"):
        made(core, "openvino:npu")
    assert made(core, "openvino:npu", precision="native") == {"PERFORMANCE_HINT": "LATENCY"}
