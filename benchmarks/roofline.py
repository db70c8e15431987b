"""How near a kernel comes to what this machine can do.

The roofs are measured here, with the threads that the model runs with: a table would know nothing of a quota, a
neighbour or a thermal limit. A kernel's roof is the longer of two times: of its arithmetic at the peak of its
precision, and of its bytes at the peak of the memory (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DeploykitError
from deploykit.extras import require
from deploykit.runtimes import Device, open_session

_SIDE = 1024
_RUNS, _SECONDS = 30, 0.4
# Two of them are read and one is written; larger than the caches next to a core.
_MEMORY_BYTES = 32 << 20
# A kernel whose roof and whose time are this short is one whose start costs more than what it does.
_SHORT_ROOF_US, _SHORT_US = 5.0, 50.0
_FAR = 0.1
_HALF = ("bfloat16", "float16")
_cache: dict[tuple[str, int, str], Peaks] = {}


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most that was seen here.

    Attributes:
        fp32_gflops: 1e9 floating-point operations per second in single precision; None where it could not be measured.
        int8_gops: 1e9 operations per second of uint8 by int8.
        native_gflops: Of what the runtime takes for floats when it may choose; None where it may not.
        bytes_per_s: Memory traffic of an addition of two large arrays; None for devices that are not a CPU.
        threads: Used for it.
        how: How each was measured.
    """

    fp32_gflops: float | None
    int8_gops: float | None
    native_gflops: float | None
    bytes_per_s: float | None
    threads: int
    how: str

    def gops(self, precision: str) -> float | None:
        """The peak for a kernel of some precision."""
        if precision == "int8":
            return self.int8_gops
        if precision in _HALF and self.native_gflops:
            return self.native_gflops
        return self.fp32_gflops

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a kernel stands under the roofs.

    Attributes:
        gflops: 1e9 operations per second; None where it has no arithmetic that is counted.
        gbytes_per_s: 1e9 bytes per second; None where they are not known.
        bound: "compute" or "memory", by the longer roof; "overhead" where both are shorter than a call; None where
            nothing is known.
        of_peak: Time at the roof by time taken, at most 1: caches can be faster than memory.
    """

    gflops: float | None
    gbytes_per_s: float | None
    bound: str | None
    of_peak: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)


def position(macs: int, moved_bytes: int, time_us: float, precision: str, peaks: Peaks) -> Position:
    """Place a kernel.

    Args:
        macs: Multiply-accumulates; each is two operations.
        moved_bytes: Read and written.
        time_us: Microseconds that it took.
        precision: That it computed in.
        peaks: Of this machine.
    """
    if time_us <= 0:
        return Position(None, None, None, None)
    gflops = 2 * macs / time_us / 1e3 if macs else None
    gbytes = moved_bytes / time_us / 1e3 if moved_bytes else None
    gops = peaks.gops(precision)
    compute_us = 2 * macs / gops / 1e3 if macs and gops else 0.0
    memory_us = moved_bytes / peaks.bytes_per_s * 1e6 if moved_bytes and peaks.bytes_per_s else 0.0
    roof = max(compute_us, memory_us)
    if not roof:
        return Position(gflops, gbytes, None, None)
    of_peak = min(1.0, roof / time_us)
    bound = "compute" if compute_us >= memory_us else "memory"
    if roof < _SHORT_ROOF_US and time_us < _SHORT_US and of_peak < _FAR:
        bound = "overhead"
    return Position(gflops, gbytes, bound, of_peak)


def raised(peaks: Peaks, reached: Iterable[tuple[str, float]]) -> Peaks:
    """Peaks that hold for what was reached: a neighbour may have been busy while they were measured.

    Args:
        peaks: As measured.
        reached: Precision and 1e9 operations per second of kernels that are long enough to be believed.
    """
    for precision, gops in reached:
        if precision == "float32" and peaks.fp32_gflops and gops > peaks.fp32_gflops:
            peaks = replace(peaks, fp32_gflops=gops)
        if precision == "int8" and peaks.int8_gops and gops > peaks.int8_gops:
            peaks = replace(peaks, int8_gops=gops)
        if precision in _HALF and peaks.native_gflops and gops > peaks.native_gflops:
            peaks = replace(peaks, native_gflops=gops)
    return peaks


def measure_peaks(device: Device, threads: int, precision: str = "fp32") -> Peaks:
    """The best of several short runs, about a second in all; kept for this process.

    Args:
        device: Whose runtime multiplies.
        threads: As in `open_session`.
        precision: "native" measures what the runtime takes for floats as well.
    """
    key = (str(device), threads, precision)
    if key not in _cache:
        _cache[key] = _measure(device, threads, precision)
    return _cache[key]


def _measure(device: Device, threads: int, precision: str) -> Peaks:
    cpu = device.target.startswith("CPU")
    with tempfile.TemporaryDirectory(prefix="deploykit-peak-") as folder:
        floats, integers = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        _write_float(floats)
        _write_int8(integers, as_pairs=device.runtime != "ort")
        fp32 = _gflops(floats, device, threads, "fp32")
        int8 = _gflops(integers, device, threads, "fp32")
        native = _gflops(floats, device, threads, "native") if precision == "native" else None
    return Peaks(
        fp32, int8, native, memory_bytes_per_s(threads) if cpu else None, threads,
        f"best of short runs on {device} with {threads} threads: a product of {_SIDE} x {_SIDE} matrices in float32, "
        "in uint8 by int8"
        + (f", and the sum of two arrays of {_MEMORY_BYTES >> 20} MiB" if cpu else "; memory was not measured"),
    )  # fmt: skip


def _gflops(path: Path, device: Device, threads: int, precision: str) -> float | None:
    """Best of the runs; None where the device does not run such a model."""
    try:
        with open_session(path, device, threads=threads, precision=precision) as session:
            (spec,) = session.signature.inputs
            feeds = {spec.name: np.ones((_SIDE, _SIDE), spec.dtype)}
            # Copies to a device and back are no part of what it computes.
            seconds = _best(session.bind(feeds).run)
    except DeploykitError:
        return None
    return float(2 * _SIDE**3 / seconds / 1e9)


def _best(run: Any) -> float:
    clock, best, end = time.perf_counter, float("inf"), time.perf_counter() + _SECONDS
    for _ in range(_RUNS):
        began = clock()
        run()
        best = min(best, clock() - began)
        if clock() > end:
            break
    return best


def memory_bytes_per_s(threads: int) -> float:
    """Bytes a second of `c = a + b` on large arrays, cut into one part a thread; two reads and a write are counted."""
    count = _MEMORY_BYTES // 4
    a, b, c = (np.ones(count, np.float32) for _ in range(3))
    edges = np.linspace(0, count, threads + 1).astype(int)
    parts = [slice(low, high) for low, high in pairwise(edges)]
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter's lock while it adds
        seconds = _best(lambda: list(pool.map(lambda p: np.add(a[p], b[p], out=c[p]), parts)))
    return 3 * _MEMORY_BYTES / seconds


def _write_float(path: Path) -> None:
    onnx = require("onnx", extra="ort")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = np.random.default_rng(0).standard_normal((_SIDE, _SIDE)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "peak",
        [helper.make_tensor_value_info("x", kind, [_SIDE, _SIDE])],
        [helper.make_tensor_value_info("y", kind, [_SIDE, _SIDE])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    _save(onnx, graph, path)


def _write_int8(path: Path, *, as_pairs: bool) -> None:
    """An integer product; as Q/DQ pairs for a runtime that takes no operator on integers."""
    onnx = require("onnx", extra="ort")
    helper, kinds, array = onnx.helper, onnx.TensorProto, onnx.numpy_helper.from_array
    codes = np.random.default_rng(0).integers(-100, 100, (_SIDE, _SIDE)).astype(np.int8)
    stored = [array(codes, "w"), array(np.uint8(128), "xz"), array(np.int8(0), "wz")]
    if as_pairs:
        stored += [array(np.float32(0.02), "s")]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "xz"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "xz"], ["d"]),
            helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["dw"]),
            helper.make_node("MatMul", ["d", "dw"], ["y"], name="product"),
        ]
        ends = kinds.FLOAT, kinds.FLOAT
    else:
        nodes = [helper.make_node("MatMulInteger", ["x", "w", "xz", "wz"], ["y"], name="product")]
        ends = kinds.UINT8, kinds.INT32
    graph = helper.make_graph(
        nodes, "peak", [helper.make_tensor_value_info("x", ends[0], [_SIDE, _SIDE])],
        [helper.make_tensor_value_info("y", ends[1], [_SIDE, _SIDE])], stored,
    )  # fmt: skip
    _save(onnx, graph, path)


def _save(onnx: Any, graph: Any, path: Path) -> None:
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), str(path))
