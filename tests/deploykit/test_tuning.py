"""Settings files beside a benchmark's candidates; the search itself is tested on a made-up arena."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import deploykit
from deploykit.benchmarks import Candidate, Settings
from deploykit.benchmarks.tuner import Score, Tuning
from deploykit.benchmarks.tuner_space import Config
from deploykit.errors import BenchmarkError
from deploykit.progress import Progress
from deploykit.runtimes.settings import RuntimeSettings
from deploykit.tuning import Tuner, save_winner, tuned_candidates


@pytest.mark.parametrize("device", ["openvino:cpu", "ov:CPU"])
def test_a_settings_file_is_for_a_device_by_whatever_name(tmp_path: Path, device: str) -> None:
    RuntimeSettings(device, threads=1, optimize=True).save(tmp_path / "tuned.json")
    plain = [Candidate("m", "m.onnx", place, "", 0) for place in ("ort:cpu", "openvino:cpu")]
    (found,) = tuned_candidates(plain, [tmp_path / "tuned.json"], 1, Progress())
    assert (found.device, found.name, found.threads, found.tuned) == ("openvino:cpu", "m tuned", 1, True)


def test_a_settings_file_for_a_device_that_is_not_measured(tmp_path: Path) -> None:
    RuntimeSettings("openvino:cpu").save(tmp_path / "tuned.json")
    with pytest.raises(BenchmarkError, match="add --device openvino:cpu"):
        tuned_candidates([Candidate("m", "m.onnx", "ort:cpu", "", 0)], [tmp_path / "tuned.json"], 1, Progress())


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(BenchmarkError, match="nothing to measure"):
        deploykit.benchmark([])


PLAIN = Candidate("m", "m.onnx", "ort:cpu", "", 0, threads=2)


def cut(budget_s: float, load_s: float, request_s: float, **given: Any) -> Settings:
    """What a budget leaves for the measurement of one model whose tuning changed nothing."""
    told = Settings(**{"rounds": 10, "seconds": 2.0, "warmup_s": 1.0, **given})
    tuner = Tuner([PLAIN], told, lambda size: [{}] * 32, Progress())
    base = Config(2)
    tuning = Tuning(base, [Score(base, "threads", [request_s * 1e9], [0.0])], 1.0, load_s=load_s)
    return tuner._cut({PLAIN: tuning}, budget_s, None)


@pytest.mark.parametrize(("load_s", "request_s"), [(1.3, 0.0), (9.0, 0.001), (6.0, 0.2)])
@pytest.mark.parametrize("budget_s", [90.0, 150.0, 400.0])
def test_the_measurement_fits_into_what_tuning_leaves(load_s: float, request_s: float, budget_s: float) -> None:
    made = cut(budget_s, load_s, request_s)
    warm = max(made.warmup_s, min(10 * request_s, 1.5))
    load = load_s - 1.0 - max(0.1, min(10 * request_s, 1.5))
    once = 1.0 + 2 * load + 36 * request_s  # its outputs; for the profile it is loaded again
    run = 1.0 + load + warm + made.seconds + request_s
    assert once + made.rounds * 2 * run <= budget_s
    assert made.rounds == 10 or once + 10 * 2 * run > 0.8 * budget_s
    if load_s < 2:
        assert made.rounds == 10


def test_of_throughput_the_sweep_counts_too() -> None:
    """Every number of requests in flight that is tried before the rounds takes its time."""
    latency, offline = cut(60.0, 1.3, 0.0), cut(60.0, 1.3, 0.0, scenario="offline")
    assert latency.rounds == offline.rounds == 10
    assert 20 * (latency.seconds + latency.warmup_s) > 20 * (offline.seconds + offline.warmup_s) + 2


@pytest.mark.parametrize("tuned", [True, False])
def test_settings_that_were_there_before_are_not_called_found(tmp_path: Path, tuned: bool) -> None:
    best = Candidate("m", "m.onnx", "ort:cpu", "", 0, threads=2, tuned=tuned)
    told = Progress()
    report: Any = SimpleNamespace(
        winner={"candidates": [best.label]}, data={"settings": {"threads": None, "precision": "fp32", "batch": 1}},
        candidates=[{"name": "m", "device": "ort:cpu"}],
    )  # fmt: skip
    save_winner(report, [best], tmp_path / "tuned.json", told)
    (note,) = told.notes
    assert ("nothing that was found is better" in note) != tuned
