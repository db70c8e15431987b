"""Reports to render and to compare: written by hand, with samples drawn from a fixed seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

MACHINE = {
    "cpu": "Imagined CPU 1",
    "architecture": "x86_64",
    "flags": {"avx2": True, "vnni": True, "amx_int8": False},
    "cores_machine": 4,
    "cores_affinity": 4,
    "cores_quota": None,
    "cores_allowed": 4,
    "threads_per_core": 2,
    "numa_nodes": 1,
    "governor": None,
    "hypervisor": None,
    "memory_bytes": 16 * 2**30,
    "kernel": "6.1",
}


def make_rounds(
    rng: np.random.Generator, median_ms: float, rounds: int, samples: int, *, noise: float = 0.02, place: int = 0
) -> list[dict[str, Any]]:
    """Log-normal latencies whose level moves a little from round to round."""
    made = []
    for number in range(rounds):
        level = median_ms * 1e6 * math.exp(rng.normal(0, noise))
        drawn = (level * np.exp(np.abs(rng.normal(0, 0.08, samples)) + rng.normal(0, 0.02, samples))).astype(int)
        made.append(
            {
                "samples_ns": drawn.tolist(),
                "wall_ns": int(drawn.sum()),
                "started_s": number * 9.0 + place * 1.1,
                "position": place,
                "round": number,
                "load_ms": 40 + rng.uniform(0, 4),
                "first_ms": 1.5,
                "peak_memory_bytes": int(90e6 + rng.uniform(0, 1e6)),
                "settings": {"intra_op_num_threads": "4"},
            }
        )
    return made


def make_candidate(
    rng: np.random.Generator, name: str, device: str, median_ms: float, place: int, *, size: int = 4_000_000,
    accuracy: float | None = 0.93, verdict: tuple[str, float, float, float] | None = None, status: str = "ok",
    rounds: int = 5, samples: int = 800, cosine: float = 0.9999,
) -> dict[str, Any]:  # fmt: skip
    """One entry of a report; without rounds where the status says that it was not timed."""
    int8 = "int8" in name
    entry: dict[str, Any] = {
        "name": name,
        "device": device,
        "model": f"{name}/model.onnx",
        "sha256": "0" * 64,
        "size_bytes": size,
        "precision": "fp32",
        "status": status,
        "settings": {"intra_op_num_threads": "4"},
        "tuned": None,
        "outputs": None
        if verdict is None and place == 0
        else {"kind": "equal" if cosine > 0.99999 else "near", "cosine": cosine},
        "accuracy": None
        if accuracy is None
        else {"samples": 600, "accuracy": accuracy, "precision": accuracy, "recall": accuracy, "f1": accuracy - 0.004},
        "placement": {
            "asked": "CPUExecutionProvider",
            "nodes": 9,
            "share_of_nodes": 1.0,
            "share_of_time": 1.0,
            "compute_precisions": {"int8": 3, "float32": 1} if int8 else {"float32": 4},
            "ops": {"Conv": 4, "Relu": 5},
        },
    }
    if not rounds:
        return entry
    measured = make_rounds(rng, median_ms, rounds, samples, place=place)
    pool = np.sort(np.concatenate([r["samples_ns"] for r in measured]))
    ms = {q: float(pool[max(0, math.ceil(q / 100 * pool.size) - 1)]) / 1e6 for q in (50, 90, 95, 99)}
    return entry | {
        "samples": int(pool.size),
        "median_ms": float(np.median([np.median(r["samples_ns"]) for r in measured])) / 1e6,
        "p50_ms": ms[50],
        "p90_ms": ms[90],
        "p95_ms": ms[95],
        "p99_ms": ms[99],
        "p999_ms": None,
        "throughput_per_s": pool.size / (sum(r["wall_ns"] for r in measured) / 1e9),
        "load_ms": float(np.median([r["load_ms"] for r in measured])),
        "first_ms": 1.5,
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in measured),
        "drift": {"ratio": 1.01, "flagged": False},
        "confirmed": None,
        "against_reference": None
        if verdict is None
        else dict(zip(("verdict", "ratio", "low", "high"), verdict, strict=True)),
        "rounds": measured,
    }


def make_report(
    seed: int = 0, *, scale: float = 1.0, labelled: bool = True, rounds: int = 5, samples: int = 800
) -> dict[str, Any]:
    """Five candidates: the reference, a tie, a faster one, one that dropped accuracy, and one that was not timed.

    Args:
        seed: Of the samples.
        scale: Of all latencies.
        labelled: Whether accuracy was measured.
        rounds: Of every candidate that was timed.
        samples: Of every round.
    """
    rng = np.random.default_rng(seed)
    scores = dict.fromkeys(("fp32", "simple", "int8", "int8-pc", "bad")) | (
        {"fp32": 0.932, "simple": 0.932, "int8": 0.928, "int8-pc": 0.88, "bad": 0.1} if labelled else {}
    )
    cpu = "ort:cpu"
    candidates = [
        make_candidate(rng, "fp32", cpu, 4.0 * scale, 0, accuracy=scores["fp32"], rounds=rounds, samples=samples),
        make_candidate(rng, "simple", cpu, 3.97 * scale, 1, accuracy=scores["simple"], rounds=rounds, samples=samples,
                       verdict=("tie", 1.008, 0.985, 1.03), cosine=1.0, size=3_900_000),
        make_candidate(rng, "int8", cpu, 2.1 * scale, 2, accuracy=scores["int8"], rounds=rounds, samples=samples,
                       verdict=("faster", 1.905, 1.86, 1.95), cosine=0.9991, size=1_100_000),
        make_candidate(rng, "int8-pc", "openvino:cpu", 1.7 * scale, 3, accuracy=scores["int8-pc"], rounds=rounds,
                       samples=samples,
                       verdict=("faster", 2.35, 2.28, 2.42), status="accuracy dropped by more than 0.01",
                       cosine=0.97, size=1_050_000),
        make_candidate(rng, "bad", "openvino:cpu", 1.0, 4, accuracy=scores["bad"], rounds=0, cosine=0.31,
                       status="wrong outputs: cosine 0.3100 is below 0.95", size=1_000_000),
    ]  # fmt: skip
    return {
        "schema_version": 2,
        "deploykit": "0.1.0",
        "created": "2026-11-26T12:00:00+00:00",
        "scenario": "latency",
        "settings": {
            "rounds": rounds,
            "seconds": 2.0,
            "warmup_s": 1.0,
            "threads": None,
            "batch": 1,
            "precision": "fp32",
            "max_drop": 0.01,
            "min_cosine": 0.95,
            "seed": 0,
            "inputs": "eval.npz",
            "scenario": "latency",
            "concurrency": None,
            "slo_p99_ms": None,
            "labelled_data": "eval.npz" if labelled else None,
        },
        "environment": {
            "machine": MACHINE | {"flags": dict(MACHINE["flags"])},
            "load_average": [0.1, 0.2, 0.3],
            "python": "3.11.7",
            "platform": "Linux",
            "packages": {"onnxruntime": "1.24.0", "numpy": "2.0.0"},
            "variables": {},
        },
        "notes": ["one note of the measurement"],
        "interrupted": False,
        "interval": "95 %",
        "noise_floor": 0.012,
        "winner": {
            "verdict": "winner",
            "candidates": ["int8 on ort:cpu"],
            "models": ["int8/model.onnx"],
            "reference": "fp32 on ort:cpu",
            "against_reference": {"verdict": "faster", "ratio": 1.905, "low": 1.86, "high": 1.95},
        },
        "candidates": candidates,
        "reference_again": make_rounds(rng, 4.0 * scale, rounds, samples, place=5),
    }


def add_optional(data: dict[str, Any]) -> dict[str, Any]:
    """With everything that only some reports hold: tuner trials, a load sweep, rates, and an explanation."""
    trials = []
    for stage, settings in (("threads", {}), ("scheduling", {"session.intra_op.allow_spinning": "0"}),
                            ("graph", {"optimize": "extended"})):  # fmt: skip
        for threads in (1, 2, 4):
            ms = 6.0 / threads**0.6 * (1.1 if settings else 1.0)
            trials.append(
                {
                    "label": f"{threads} threads",
                    "model": "fp32",
                    "device": "ort:cpu",
                    "settings": settings,
                    "threads": threads,
                    "stage": stage,
                    "median_ms": ms,
                    "throughput_per_s": 1000 / ms,
                    "kept": threads == 4,
                }
            )
    lost = {"label": "4 threads, x", "model": "fp32", "device": "ort:cpu", "settings": {"x": "1"}, "threads": 4,
            "stage": "graph", "kept": False}  # fmt: skip
    trials.append(lost | {"status": "not tried: the budget is too small", "median_ms": None, "throughput_per_s": None})
    # Quick until it died.
    trials.append(lost | {"status": "failed: signal 9", "median_ms": 0.1, "throughput_per_s": 1e4})
    data["tuning"] = {
        "objective": "latency",
        "trials": trials,
        "chosen": {"threads": 4},
        "budget_s": 60.0,
        "spent_s": 42.0,
    }
    for c in data["candidates"][:3]:
        base = 1000 / c["median_ms"]
        sweep = [
            {"concurrency": n, "throughput_per_s": base * min(n, 4) ** 0.8 * (1.0 if n < 8 else 0.97),
             "p50_ms": c["median_ms"] * n**0.5, "p99_ms": c["median_ms"] * n}
            for n in (1, 2, 4, 8)
        ]  # fmt: skip
        c["sweep"], c["knee"] = sweep, sweep[2]
        c["rates"] = [
            {"rate_per_s": base * share, "achieved_per_s": base * share, "queries": 700, "p50_ms": c["median_ms"],
             "p99_ms": c["median_ms"] / (1.02 - share), "met": c["median_ms"] / (1.02 - share) <= 20}
            for share in (0.3, 0.5, 0.7, 0.85, 0.95)
        ]  # fmt: skip
        c["highest_rate_per_s"] = base * 0.7
    data["settings"]["slo_p99_ms"] = 20.0
    data["explain"] = {"int8 on ort:cpu": _explanation()}
    return data


def _explanation() -> dict[str, Any]:
    precisions = ("int8", "int8", "float32")
    layers = [
        {
            "name": f"/backbone/stage{n // 6}/block{n % 6}/Conv_quant", "op": "QLinearConv" if n % 3 else "Reorder",
            "kernel": "jit_avx512_core_amx", "on": "CPUExecutionProvider", "precision": precisions[n % 3],
            "time_us": 400.0 / (n + 1), "share": 0.25 / (n + 1), "macs": 1_000_000 * (n + 1), "bytes": 40_000,
            "gflops": 120.0, "gbytes_per_s": 9.0, "bound": "compute", "of_peak": 0.4,
            "kernels": [{"name": "k", "op": "Conv", "time_us": 400.0 / (n + 1)}],
        }
        for n in range(18)
    ]  # fmt: skip
    finding = {
        "kind": "unfused",
        "severity": "high",
        "what": "a QuantizeLinear stands alone before the pooling",
        "cure": "deploykit quantize repair",
        "nodes": ["/pool/QuantizeLinear"],
        "cost_us": 35.0,
    }
    peak = {
        "fp32_gflops": 300.0, "int8_gops": 1100.0, "native_gflops": None, "bytes_per_s": 2e10, "threads": 4,
        "how": "measured", "other_cores": 0.1, "loaded": False,
    }  # fmt: skip
    roofline = {
        "gflops": 110.0, "gbytes_per_s": 7.5, "of_compute_peak": 0.31, "of_memory_peak": 0.37, "bound": "compute",
    }  # fmt: skip
    return {
        "label": "int8 on ort:cpu", "device": "ort:cpu", "total_us": 2100.0, "profiled_us": 2050.0, "layers": layers,
        "unattributed_us": 30.0, "peak": peak, "roofline": roofline, "placement": {}, "findings": [finding],
        "notes": ["a note of the profiler"],
    }  # fmt: skip
