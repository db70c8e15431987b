"""`select_data`: a part of real data by a real net's features, with its labels and its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import pack_data, quantize_static, select_data, show_data
from deploykit.data import Dataset
from deploykit.errors import DataError, ModelError, OptimizationError, OutputExistsError
from deploykit.progress import Progress


@pytest.fixture(scope="module")
def folder(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net trained on digits, and 597 labelled ones that it has not seen."""
    folder = tmp_path_factory.mktemp("digits")
    digits.write(folder)
    pack_data(folder / "eval.npz", folder / "eval.zarr")
    return folder


@pytest.mark.parametrize("method", ["k-center", "herding", "random"])
def test_a_part_of_a_dataset(folder: Path, tmp_path: Path, method: str) -> None:
    source = dict(np.load(folder / "eval.npz"))
    made = select_data(folder / "eval.npz", tmp_path / "part.npz", model=folder / "net.onnx", count=60, method=method)
    assert (len(made.indices), made.samples, made.classes) == (60, 597, 10)
    assert list(made.indices) == sorted(set(made.order))
    part = dict(np.load(tmp_path / "part.npz"))
    for name in ("x", "labels"):
        np.testing.assert_array_equal(part[name], source[name][list(made.indices)])
    shares = np.bincount(part["labels"]) - 60 * np.bincount(source["labels"]) / 597
    assert np.abs(shares).max() < 1
    noted = show_data(tmp_path / "part.npz").selection
    assert noted is not None
    assert (noted["indices"], noted["method"], noted["samples"]) == (list(made.indices), method, 597)
    assert len(noted["sha256"]) == 64
    assert made.features.startswith("r3 of")  # what goes into the last layer
    if method == "k-center":
        assert made.spread.radius < made.random.radius
    if method == "herding":
        assert made.spread.mean_error < made.random.mean_error


def test_the_same_choice_from_every_form(folder: Path, tmp_path: Path) -> None:
    options = {"model": folder / "net.onnx", "fraction": 0.05, "seed": 4}
    first = select_data(folder / "eval.npz", tmp_path / "a.zarr", **options)
    second = select_data(folder / "eval.zarr", tmp_path / "b.zarr", batch_size=7, **options)
    assert first.indices == second.indices
    assert len(first.indices) == 30
    for name, array in Dataset.open(tmp_path / "a.zarr").head(99).items():
        np.testing.assert_array_equal(array, Dataset.open(tmp_path / "b.zarr").head(99)[name])
    by_inputs = select_data(folder / "eval.zarr", tmp_path / "c.npz", fraction=0.05)
    assert by_inputs.features == "inputs"
    assert by_inputs.indices != first.indices
    by_tensor = select_data(folder / "eval.zarr", tmp_path / "d.npz", model=folder / "net.onnx", tensor="r0", count=9)
    assert by_tensor.features.startswith("r0 of")


def test_a_part_calibrates(folder: Path, tmp_path: Path) -> None:
    select_data(folder / "eval.zarr", tmp_path / "part.zarr", model=folder / "net.onnx", count=32)
    artifact = quantize_static(
        folder / "net.onnx", tmp_path / "int8", data=tmp_path / "part.zarr", eval_data=folder / "eval.zarr",
        max_drop=0.02, devices=["ort:cpu"], gate_seconds=0,
    )  # fmt: skip
    assert artifact.manifest.evidence.accuracy[0]["certified"]


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    for labels in (np.linspace(0, 1, 20), np.arange(20), np.zeros((20, 2), int)):
        told = Progress()
        np.savez(tmp_path / "d.npz", x=x, labels=labels)
        made = select_data(tmp_path / "d.npz", tmp_path / "part.npz", count=5, progress=told)
        assert made.classes is None
        assert any("no classes" in note for note in told.notes)
        assert len(np.load(tmp_path / "part.npz")["labels"]) == 5
        (tmp_path / "part.npz").unlink()
    np.savez(tmp_path / "d.npz", x=x, labels=np.arange(20) % 2)
    assert select_data(tmp_path / "d.npz", tmp_path / "part.npz", count=5, stratify=False).classes is None


def test_what_cannot_be_selected(folder: Path, tmp_path: Path) -> None:
    data, out = folder / "eval.npz", tmp_path / "part.npz"
    for options, word in (
        ({}, "how many"), ({"count": 5, "fraction": 0.5}, "how many"), ({"count": 598}, "597 samples"),
        ({"count": 0}, "1 or more"), ({"fraction": 1.5}, "to 1"), ({"count": 5, "tensor": "r3"}, "-m MODEL"),
        ({"count": 5, "method": "best"}, "herding"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=word):
            select_data(data, out, **options)
    with pytest.raises(DataError, match=r"\.npz"):
        select_data(data, tmp_path / "part.csv", count=5)
    with pytest.raises(OptimizationError, match="nosuch"):
        select_data(data, out, count=5, model=folder / "net.onnx", tensor="nosuch")
    with pytest.raises(ModelError):
        select_data(data, out, count=5, model=folder / "none.onnx")
    np.savez(tmp_path / "other.npz", x=np.zeros((9, 3), np.float32))
    with pytest.raises(DataError):
        select_data(tmp_path / "other.npz", out, count=5, model=folder / "net.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"other.npz"}
    out.write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        select_data(data, out, count=5)
    assert out.read_bytes() == b"mine"
