"""Where a kernel stands under the roofs, and the roofs themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploykit.benchmarks import roofline
from deploykit.benchmarks.roofline import Peaks, measure_peaks, memory_bytes_per_s, position, raised
from deploykit.runtimes import open_session, parse_device
from deploykit.runtimes.requests import Bound

# 100 GFLOP/s, 400 Gop/s of int8, 10 GB/s
PEAKS = Peaks(100.0, 400.0, None, 10e9, 2, "made up")


def test_arithmetic_that_takes_longer_than_its_bytes_is_bound_by_compute() -> None:
    # 50e6 MACs are 1000 us at the peak, 1e6 bytes are 100 us
    found = position(50_000_000, 1_000_000, 2000.0, "float32", PEAKS)
    assert (found.bound, found.of_peak) == ("compute", pytest.approx(0.5))
    assert found.gflops == pytest.approx(50.0)
    assert found.gbytes_per_s == pytest.approx(0.5)


def test_bytes_that_take_longer_are_bound_by_memory() -> None:
    found = position(1_000_000, 10_000_000, 1250.0, "float32", PEAKS)
    assert (found.bound, found.of_peak) == ("memory", pytest.approx(0.8))


def test_the_peak_is_that_of_the_precision() -> None:
    assert position(50_000_000, 0, 1000.0, "float32", PEAKS).of_peak == pytest.approx(1.0)
    assert position(50_000_000, 0, 1000.0, "int8", PEAKS).of_peak == pytest.approx(0.25)
    native = Peaks(100.0, 400.0, 200.0, None, 2, "")
    assert position(50_000_000, 0, 1000.0, "bfloat16", native).of_peak == pytest.approx(0.5)


def test_caches_are_not_more_than_the_roof() -> None:
    assert position(0, 10_000_000, 100.0, "float32", PEAKS).of_peak == 1.0


def test_short_kernels_are_overhead_and_long_ones_with_little_to_do_are_not() -> None:
    assert position(0, 100, 8.0, "float32", PEAKS).bound == "overhead"
    slow = position(0, 100, 8000.0, "float32", PEAKS)
    assert slow.bound == "memory"
    assert slow.of_peak is not None
    assert slow.of_peak < 0.001


def test_what_is_not_known_is_not_guessed() -> None:
    assert position(0, 0, 10.0, "float32", PEAKS).bound is None
    assert position(100, 0, 10.0, "float32", Peaks(None, None, None, None, 1, "")).of_peak is None
    assert position(100, 100, 0.0, "float32", PEAKS).gflops is None


def test_a_kernel_that_is_faster_than_the_peak_raises_it() -> None:
    found = raised(PEAKS, [("float32", 120.0), ("int8", 300.0), ("bfloat16", 900.0)])
    assert (found.fp32_gflops, found.int8_gops, found.native_gflops) == (120.0, 400.0, None)
    assert raised(Peaks(100.0, None, 200.0, None, 2, ""), [("bfloat16", 900.0)]).native_gflops == 900.0


def test_a_product_is_timed_without_copies_of_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "product.onnx"
    roofline._write_float(path)
    seen: list[Any] = []
    monkeypatch.setattr(roofline, "_best", lambda run: (seen.append(run), run(), 1.0)[-1])
    assert roofline._gflops(path, parse_device("ort:cpu"), 1, "fp32") == pytest.approx(2 * 1024**3 / 1e9)
    assert isinstance(seen[0].__self__, Bound)


@pytest.mark.parametrize("device", ["ort:cpu", "openvino:cpu"])
def test_peaks_are_measured_in_each_runtime_and_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SECONDS", 0.02)
    monkeypatch.setattr(roofline, "_cache", {})
    found = measure_peaks(parse_device(device), 1)
    for value in (found.fp32_gflops, found.int8_gops, found.bytes_per_s):
        assert value is not None
        assert math.isfinite(value)
        assert value > 0
    assert found.native_gflops is None
    assert device in found.how
    assert measure_peaks(parse_device(device), 1) is found
    assert measure_peaks(parse_device(device), 2) is not found


def test_the_integer_product_really_is_one(tmp_path: Path) -> None:
    for device, pairs in (("ort:cpu", False), ("openvino:cpu", True)):
        path = tmp_path / f"{pairs}.onnx"
        roofline._write_int8(path, as_pairs=pairs)
        onnx.checker.check_model(str(path))
        with open_session(path, device, threads=1) as session:
            spec = session.signature.inputs[0]
            nodes = session.placement({spec.name: np.ones((1024, 1024), spec.dtype)}).nodes
        products = [n for n in nodes if "MatMul" in n.op or "FullyConnected" in n.op]
        assert [n.precision for n in products] == ["int8"]


def test_a_device_without_the_model_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_cache", {})
    found = measure_peaks(parse_device("ort:AzureExecutionProvider"), 1)
    assert (found.fp32_gflops, found.int8_gops, found.bytes_per_s) == (None, None, None)


def test_memory_adds_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "_best", lambda run: (run(), 0.001)[1])
    assert memory_bytes_per_s(3) == pytest.approx(3 * (1 << 20) / 0.001)
