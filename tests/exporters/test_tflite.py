"""TFLite files: the interpreter's numbers, or a reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploykit import pipeline
from deploykit.errors import ParityError, SourceError
from deploykit.exporters.tflite_sparse import densify, write_dense


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


@pytest.fixture(scope="module")
def sparse(build: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float weights, of which five in six are zero and not stored."""
    import keras
    import tensorflow as tf

    rng = np.random.default_rng(0)
    net = keras.models.clone_model(build.trained.network())
    net.set_weights(
        [w * (rng.random(w.shape) > 0.85) if w.ndim > 1 else w for w in build.trained.network().get_weights()]
    )
    converter = tf.lite.TFLiteConverter.from_keras_model(net)
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    path = tmp_path_factory.mktemp("sparse") / "m.tflite"
    path.write_bytes(converter.convert())
    return path


def test_sparse_weights(sparse: Path, tmp_path: Path) -> None:
    made = pipeline.export(sparse, tmp_path / "out", devices=["ort:cpu"])
    assert made.manifest.evidence.parity[0]["verdict"] == "passed"
    assert not write_dense(sparse, tmp_path / "dense.tflite").samefile(sparse)
    again = tmp_path / "dense.tflite"
    assert write_dense(again, tmp_path / "other.tflite") == again


def test_blocks_of_sparse_weights() -> None:
    """A 4x6 matrix in blocks of 2x3, of which only some are stored: rows of blocks, then blocks, then their places."""

    def level(size: int, segments: list[int] | None = None, indices: list[int] | None = None) -> Any:
        wrap = [None if v is None else SimpleNamespace(values=v) for v in (segments, indices)]
        return SimpleNamespace(
            format=int(segments is not None), denseSize=size, arraySegments=wrap[0], arrayIndices=wrap[1]
        )

    tree = SimpleNamespace(
        traversalOrder=[0, 1, 2, 3],
        blockMap=[0, 1],
        dimMetadata=[level(2), level(0, [0, 1, 2], [1, 0]), level(2), level(3)],
    )
    made = densify(np.arange(1, 13), [4, 6], tree)
    assert made.tolist() == [[0, 0, 0, 1, 2, 3], [0, 0, 0, 4, 5, 6], [7, 8, 9, 0, 0, 0], [10, 11, 12, 0, 0, 0]]
    columns = SimpleNamespace(
        traversalOrder=[1, 0], blockMap=None, dimMetadata=[level(3), level(0, [0, 2, 2, 3], [0, 3, 1])]
    )
    assert densify(np.array([5, 6, 7]), [4, 3], columns).tolist() == [[5, 0, 0], [0, 0, 7], [0, 0, 0], [6, 0, 0]]
