"""`select_data`: a part of real data by a real net's features, with its labels and its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import pack_data, quantize_static, select_data, selecting, show_data
from deploykit.artifact import sha256_of
from deploykit.data import Dataset
from deploykit.errors import DataError, MissingDependencyError, ModelError, OptimizationError, OutputExistsError
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
    assert noted["seed"] == 0
    assert noted["sha256"] == made.sha256 == sha256_of(folder / "eval.npz")
    assert noted["model_sha256"] == sha256_of(folder / "net.onnx")
    assert noted["model"] == str(folder / "net.onnx")
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
    assert by_inputs.model is None and by_inputs.model_sha256 is None
    assert second.sha256 == by_inputs.sha256 == show_data(folder / "eval.zarr", verify=False).digest
    by_tensor = select_data(folder / "eval.zarr", tmp_path / "d.npz", model=folder / "net.onnx", tensor="r0", count=19)
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


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No features are made, of a model or of inputs: what is refused has to be before."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("the heavy work began")

    monkeypatch.setattr(selecting, "model_features", refuse)
    monkeypatch.setattr(selecting, "raw_features", refuse)


@pytest.mark.usefixtures("idle")
def test_what_is_refused_before_a_model_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out, net = folder / "eval.npz", tmp_path / "part.npz", folder / "net.onnx"
    with pytest.raises(DataError, match="597 samples"):
        select_data(data, out, model=net, count=598)
    with pytest.raises(DataError, match=r"9 samples of 10 classes.*--no-stratify"):
        select_data(data, out, model=net, count=9)
    with pytest.raises(DataError, match="6 samples of 10 classes"):
        select_data(folder / "eval.zarr", out, fraction=0.01)
    with pytest.raises(OptimizationError, match=r"no tensor 'r33'.*like r3"):
        select_data(data, out, count=20, model=net, tensor="r33")
    np.savez(tmp_path / "narrow.npz", x=np.zeros((30, 3), np.float32))
    np.savez(tmp_path / "names.npz", a=np.zeros((30, 64), np.float32), b=np.zeros((30, 64), np.float32))
    for name in ("narrow", "names"):
        with pytest.raises(DataError):
            select_data(tmp_path / f"{name}.npz", out, count=5, model=net, device="ort:cpu", tensor="r3")
    (tmp_path / "odd.py").write_text(
        "import numpy as np\n\ndef make():\n    return {'x': np.zeros((9, 64)), 'note': np.array([None] * 9)}\n"
    )
    with pytest.raises(DataError, match="Python objects"):
        select_data(f"{tmp_path / 'odd.py'}:make", out, count=5)
    with pytest.raises(DataError, match="fixed length"):
        select_data(f"{tmp_path / 'odd.py'}:make", tmp_path / "part.zarr", count=5)

    def missing(name: str, **options: Any) -> Any:
        raise MissingDependencyError(name)

    monkeypatch.setattr("deploykit.packing.require", missing)
    with pytest.raises(MissingDependencyError):
        select_data(data, tmp_path / "part.zarr", count=20)
    assert not out.exists()


@pytest.mark.parametrize(("row", "value"), [(3, np.nan), (41, np.inf), (41, 1e300)])
def test_features_that_are_not_finite_name_the_sample(tmp_path: Path, row: int, value: float) -> None:
    x = np.random.default_rng(0).normal(size=(100, 300))
    x[row, 7] = value
    np.savez(tmp_path / "d.npz", x=x)
    with pytest.raises(OptimizationError, match=f"sample {row} are not finite"):
        select_data(tmp_path / "d.npz", tmp_path / "part.npz", count=5)
    assert not (tmp_path / "part.npz").exists()


def test_every_source_has_a_digest(tmp_path: Path) -> None:
    """Of a directory, and of the values that a function gives, in whatever batches."""
    x = np.random.default_rng(0).normal(size=(20, 3))
    (tmp_path / "rows").mkdir()
    np.save(tmp_path / "rows" / "x.npy", x)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "give.py").write_text(
        "import pathlib\nimport numpy as np\n\nrows = np.load(pathlib.Path(__file__).with_name('x.npy'))\n\n"
        "def whole():\n    return {'x': rows}\n\n"
        "def pieces():\n    for start in range(0, 20, 7):\n        yield {'x': rows[start : start + 7]}\n\n"
        "def other():\n    return {'x': rows[::-1]}\n"
    )
    made = {
        name: select_data(tmp_path / "rows" if name == "rows" else f"{tmp_path / 'give.py'}:{name}",
                          tmp_path / f"{name}.npz", count=5)
        for name in ("rows", "whole", "pieces", "other")
    }  # fmt: skip
    assert all(len(found.sha256) == 64 for found in made.values())
    assert made["whole"].sha256 == made["pieces"].sha256 != made["other"].sha256
    assert made["whole"].indices == made["pieces"].indices == made["rows"].indices
    before = made["rows"].sha256
    np.save(tmp_path / "rows" / "x.npy", x + 1)
    assert select_data(tmp_path / "rows", tmp_path / "again.npz", count=5).sha256 != before


def test_a_function_that_gives_other_samples_each_time(tmp_path: Path) -> None:
    (tmp_path / "give.py").write_text(
        "import numpy as np\n\ndice = np.random.default_rng(0)\n\n"
        "def shuffled():\n    return {'x': dice.permutation(30).astype(np.float32)[:, None]}\n\n"
        "def types():\n    yield {'x': np.zeros((9, 2), np.int64)}\n    yield {'x': np.full((9, 2), 0.5)}\n"
    )
    with pytest.raises(DataError, match="other samples each time"):
        select_data(f"{tmp_path / 'give.py'}:shuffled", tmp_path / "part.npz", count=5)
    with pytest.raises(DataError, match=r"'x' is float64\[2\] in one, int64\[2\] before"):
        select_data(f"{tmp_path / 'give.py'}:types", tmp_path / "part.npz", count=5)
    assert {p.name for p in tmp_path.iterdir()} == {"give.py"} | {p.name for p in tmp_path.glob("__pycache__")}


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
        select_data(data, out, count=20, model=folder / "net.onnx", tensor="nosuch")
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
