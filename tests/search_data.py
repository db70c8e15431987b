"""The document of a search, to render: written by hand, as `deploykit optimize` writes it."""

from __future__ import annotations

import math
from typing import Any

ORT, OV = "ort:cpu", "openvino:cpu"
PARENT = 0.934


def make_quality(value: float | None, sqnr: float | None, *, met: bool = True) -> dict[str, Any]:
    """As a judge gives it; without labels where there is no value."""
    metric = None if value is None else "accuracy"
    agreement = None if sqnr is None else round(1 - 10 ** (-sqnr / 20), 4)
    told = "" if value is None else f"accuracy {value:.4f} (parent {PARENT:.4f}), "
    return {
        "summary": f"{told}SQNR {math.inf if sqnr is None else sqnr:.1f} dB",
        "sqnr_db": sqnr,
        "agreement": 1.0 if agreement is None else agreement,
        "metric": metric,
        "value": value,
        "parent": None if value is None else PARENT,
        "met": met,
    }


def make_seat(
    name: str, device: str, quality: dict[str, Any] | None, screened: float | None = None,
    decided: float | None = None, status: str = "dropped", dropped: tuple[str, str] | None = None,
    precision: str = "fp32", tuned: str | None = None, verdict: str = "faster",
) -> dict[str, Any]:  # fmt: skip
    """A variant on a device."""
    return {
        "label": f"{name} on {device}" + (" native" if precision == "native" else ""),
        "device": device,
        "precision": precision,
        "status": status,
        "dropped": None if dropped is None else dict(zip(("phase", "reason"), dropped, strict=True)),
        "quality": quality,
        "placement": {"device": device, "layers": {"Conv": {"int8": 8, "total": 9}}, "float": [],
                      "summary": "8 of 9 Conv int8"} if "static" in name else None,
        "screening": None
        if screened is None
        else {"ratio": screened, "low": screened * 0.95, "high": screened * 1.06, "turns": 6},
        "tuned": None if tuned is None else {"label": tuned, "ratio": 1.08, "settings": {"threads": 2}},
        "decision": None
        if decided is None
        else {
            "ratio": decided, "low": decided * 0.98, "high": decided * 1.021, "verdict": verdict,
            "median_ms": 4.0 / decided, "p90_ms": 4.3 / decided, "p99_ms": None, "throughput_per_s": 250 * decided,
            "peak_memory_bytes": 91_000_000,
        },
    }  # fmt: skip


def make_variant(
    name: str, about: str, parent: str | None, size: int | None, *seats: dict[str, Any],
    dropped: tuple[str, str] | None = None, seconds: float = 2.0, cached: bool = False, step: str = "quantize-static",
) -> dict[str, Any]:  # fmt: skip
    """A model that was made, or not."""
    return {
        "name": name,
        "about": about,
        "parent": parent,
        "steps": [{"step": step}],
        "status": "kept" if any(s["status"] != "dropped" for s in seats) else "dropped",
        "dropped": None if dropped is None else dict(zip(("phase", "reason"), dropped, strict=True)),
        "size_bytes": size,
        "nodes": None if size is None else 60,
        "seconds": seconds,
        "cached": cached,
        "seats": {s["device"] + (" native" if s["precision"] == "native" else ""): s for s in seats},
    }


def make_search(report_data: Any, *, labelled: bool = True) -> dict[str, Any]:
    """A search with everything in it: a winner with a tie, a front of three, and every reason to be dropped.

    Args:
        report_data: The module that makes reports.
        labelled: Whether a metric was asked for; else agreement with the parent.
    """

    def quality(value: float, sqnr: float | None, *, met: bool = True) -> dict[str, Any]:
        return make_quality(value if labelled else None, sqnr, met=met)

    exact = quality(PARENT, None)
    low = "accuracy 0.9060 (parent 0.9340), goal: accuracy down by at most 0.01"
    variants = [
        make_variant(
            "fp32", "export by torch.export", None, 4_000_000,
            make_seat("fp32", ORT, exact, 1.0, status="dropped",
                      dropped=("decide", "slower than static on openvino:cpu: 0.41x [0.40, 0.42]"), decided=1.0,
                      verdict="tie"),
            make_seat("fp32", OV, exact, 1.31, dropped=("screen", "0.52x [0.49, 0.55] of the leader")),
            seconds=6.1, step="export",
        ),
        make_variant("fp32-ts", "export by TorchScript", None, 4_100_000, seconds=4.4, step="export",
                     dropped=("judge", "the same graph as fp32 after simplification")),
        make_variant(
            "simple", "onnxsim", "fp32", 3_900_000,
            make_seat("simple", ORT, exact, 1.02, decided=1.03, status="front", verdict="tie"),
            make_seat("simple", OV, exact, 1.33, dropped=("screen", "0.53x [0.50, 0.56] of the leader")),
            make_seat("simple", OV, quality(0.933, 48.2), 1.71, decided=1.74, precision="native", status="front"),
            seconds=1.4, cached=True, step="simplify",
        ),
        make_variant("fused", "transformer fusions", "simple", None, step="fuse", seconds=0.4,
                     dropped=("make", "no pattern of a transformer in 60 nodes")),
        make_variant(
            "fp16", "weights in float16", "simple", 2_000_000,
            make_seat("fp16", ORT, quality(0.934, 61.0), 0.97, dropped=("screen", "0.39x [0.37, 0.41] of the leader")),
            make_seat("fp16", OV, None, dropped=("judge", "did not load: f16 is not supported on this device")),
            step="quantize-half",
        ),
        make_variant(
            "dynamic", "int8, ranges at run time", "simple", 1_100_000,
            make_seat("dynamic", ORT, quality(0.931, 33.0), 1.42, 1.45,
                      dropped=("decide", "slower than static on openvino:cpu: 0.60x [0.59, 0.61]")),
            make_seat("dynamic", OV, quality(0.931, 33.0), 1.1,
                      dropped=("limits", "41.2 ms at the median, at most 40 ms were asked for")),
            step="quantize-dynamic",
        ),
        make_variant(
            "static", "int8, ranges from data", "simple", 1_150_000,
            make_seat("static", ORT, quality(0.929, 31.4), 1.95, 1.98, tuned="2 threads",
                      dropped=("tune", "0.81x [0.80, 0.82] of the leader with its best settings")),
            make_seat("static", OV, quality(0.929, 31.9), 2.36, 2.43, "winner", tuned="2 threads, hint LATENCY"),
        ),
        make_variant(
            "static-auto", "the same, ranges clipped where that is better", "simple", 1_150_000,
            make_seat("static-auto", ORT, quality(0.906, 24.0, met=False), dropped=("judge", f"too inaccurate: {low}")),
            make_seat("static-auto", OV, quality(0.930, 30.8), 2.35, 2.41, "tie", tuned="2 threads, hint LATENCY"),
        ),
        make_variant("static-nncf", "static, by NNCF and repaired", "simple", None, seconds=0.1,
                     dropped=("make", "nncf is not installed; pip install 'deploykit-ml[nncf]'")),
        make_variant(
            "static-equalize", "static, with equalized convolutions", "static", 1_160_000,
            make_seat("static-equalize", ORT, quality(0.41, 4.1, met=False),
                      dropped=("judge", "wrong: accuracy 0.4100 (parent 0.9340)")),
            make_seat("static-equalize", OV, quality(0.929, 31.0), 2.2,
                      dropped=("screen", "0.90x [0.86, 0.94] of the leader")),
        ),
        make_variant(
            "weights4", "weights in blocks of 4 bits", "simple", 620_000,
            make_seat("weights4", ORT, quality(0.925, 22.0), 0.92, 0.91, status="front", verdict="slower"),
            step="quantize-weights",
        ),
    ]  # fmt: skip
    report = report_data.add_optional(report_data.make_report())

    def result(name: str, device: str, why: str, *, native: bool = False) -> dict[str, Any]:
        variant = next(v for v in variants if v["name"] == name)
        seat = variant["seats"][device + (" native" if native else "")]
        return {
            "name": name, "path": f"front/{name}" + ("-native" if native else ""), "seat": seat["label"],
            "device": device,
            "settings": {"device": device, "threads": 2, "sessions": 1, "precision": seat["precision"],
                         "settings": {"PERFORMANCE_HINT": "LATENCY"} if device == OV else {},
                         "machine": {"cpu": "Imagined CPU 1"}},
            "size_bytes": variant["size_bytes"], "quality": seat["quality"], "why": why, "decided": True,
            **{k: seat["decision"][k] for k in ("ratio", "low", "high")},
        }  # fmt: skip

    phases = [
        ("export", 10.5, 2, 0), ("graphs", 4.9, 3, 1), ("make", 31.0, 7, 0), ("judge", 18.4, 15, 0),
        ("screen", 27.3, 14, 0), ("tune", 33.0, 3, 0), ("decide", 46.0, 1, 0),
    ]  # fmt: skip
    began, timed = 0.0, []
    for name, seconds, jobs, cached in phases:
        timed.append({"name": name, "seconds": seconds, "began_s": began, "jobs": jobs, "cached": cached})
        began += seconds * (0.7 if name == "graphs" else 1.0)  # the next begins while it still runs
    return {
        "schema_version": 1,
        "deploykit": "0.1.0",
        "created": "2026-11-27T12:00:00+00:00",
        "state": "done",
        "wish": {
            "source": "model.py:make", "model": None, "data": "calib.npz", "eval_data": "eval.npz",
            "goal": {"metric": "accuracy" if labelled else None, "drop": 0.01, "relative": False, "min_sqnr_db": None,
                     "min_agreement": None if labelled else 0.97},
            "objective": "latency",
            "limits": {"max_latency_ms": 40.0, "max_memory_mb": None, "max_size_mb": None},
            "devices": [ORT, OV], "batch": 1, "dims": {}, "contract": [], "budget_s": 180.0, "executor": "local",
        },
        "spent_s": 171.2,
        "environment": report["environment"],
        "headline": "static on openvino:cpu, 2.43x [2.38, 2.48] as fast as fp32 on ort:cpu, accuracy 0.9290 (-0.0050); "
        "a tie with static-auto on openvino:cpu",
        "winner": "front/static",
        "winner_seat": "static on openvino:cpu",
        "tied": ["static on openvino:cpu", "static-auto on openvino:cpu"],
        "reference": "fp32 on ort:cpu",
        "front": [
            result("static", OV, "fastest"), result("simple", OV, "between", native=True),
            result("simple", ORT, "most accurate"), result("weights4", ORT, "smallest"),
        ],
        "tried": variants,
        "phases": timed,
        "trials": report["tuning"]["trials"],
        "failures": [{"label": "judge fp16 on openvino:cpu", "error": "f16 is not supported on this device"}],
        "notes": ["calibrated on 256 samples"],
        "machines": [
            {"label": "Imagined CPU 1, 4 cores", "winner": "static on openvino:cpu", "headline": "2.43x [2.38, 2.48]"},
            {"label": "Imagined CPU 2, 8 cores", "winner": "simple on openvino:cpu", "headline": "1.90x [1.85, 1.95]"},
        ],
    }  # fmt: skip
