"""TFLite files: the interpreter's numbers, or a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploykit import pipeline
from deploykit.errors import ParityError, SourceError


@pytest.mark.parametrize("size", [0, 3, 200])
def test_what_is_no_tflite_file(opened: Any, message: Any, build: Any, tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes((b"\x20\0\0\0TFL3" + bytes(192))[:size])
    message(SourceError, lambda: opened(path))


def test_quantized_files_are_held_to_the_same_numbers(build: Any, tmp_path: Path) -> None:
    saved = build.trained.saved_model(tmp_path / "saved")
    build.trained.tflite(tmp_path / "int8.tflite", saved, quantized=True)
    try:
        made = pipeline.export(tmp_path / "int8.tflite", tmp_path / "out", devices=["ort:cpu"])
    except ParityError as exc:  # whether integer sums round alike is the runtime's business; a wrong artifact is not
        assert "other numbers" in str(exc)
        assert not (tmp_path / "out").exists()
    else:
        assert made.manifest.evidence.parity[0]["verdict"] == "passed"
        assert any("quantized" in note for note in made.manifest.lineage[0].notes)
