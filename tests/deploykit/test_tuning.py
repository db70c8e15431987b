"""Settings files beside a benchmark's candidates; the search itself is tested on a made-up arena."""

from __future__ import annotations

from pathlib import Path

import pytest

import deploykit
from deploykit.benchmarks import Candidate
from deploykit.errors import BenchmarkError
from deploykit.progress import Progress
from deploykit.runtimes.settings import RuntimeSettings
from deploykit.tuning import tuned_candidates


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
