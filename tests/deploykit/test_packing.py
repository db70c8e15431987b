"""Packing: any source, whole or not at all; normalization beside the bytes; float16 with its error; what is shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import pack_data, show_data
from deploykit.data import Dataset
from deploykit.errors import DataError, OutputExistsError
from deploykit.optimizers import StaticConfig
from deploykit.optimizers.feeding import batches_of
from deploykit.packing import Normalization, write_samples
from deploykit.progress import Progress
from deploykit.specs import Signature, TensorSpec
from deploykit.zarr_writer import Layout

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
dice = np.random.default_rng(0)
IMAGES = dice.integers(0, 256, (50, 3, 6, 5), np.uint8)
LABELS = np.arange(50) % 3

MODULE = """
import numpy as np, os, signal

def good():
    for n in (3, 1, 4):
        yield {"x": np.full((n, 2), n, np.float32), "labels": np.arange(n)}

def one():
    return {"x": np.zeros((2, 2))}

def nothing():
    return iter(())

def shapes():
    yield {"x": np.zeros((2, 2))}
    yield {"x": np.zeros((2, 3))}

def types():
    yield {"x": np.zeros(2, np.float32)}
    yield {"x": np.zeros(2, np.float64)}

def names():
    yield {"x": np.zeros(2)}
    yield {"y": np.zeros(2)}

def longer():
    yield {"x": np.array(["a"])}
    yield {"x": np.array(["abc"])}

def raises():
    yield {"x": np.zeros((2, 2))}
    raise OSError("boom")

def objects():
    return {"x": np.array([{}, []], object)}

def dates():
    return {"x": np.zeros(2, "datetime64[s]")}

def slashes():
    return {"a/b": np.zeros(2)}

def refilled():
    rows = np.zeros((2, 3))
    for n in range(4):
        rows[:] = n
        yield {"x": rows}

def killed():
    yield {"x": np.zeros((60, 100), np.int64)}
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "source.py").write_text(MODULE)
    np.savez(tmp_path / "images.npz", image=IMAGES, labels=LABELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def signature(dtype: str, name: str = "image") -> Signature:
    return Signature((TensorSpec(name, dtype, ("n", 3, 6, 5)),), ())


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_source(folder: Path) -> None:
    (folder / "dir").mkdir()
    np.save(folder / "dir" / "x.npy", np.asfortranarray(np.arange(12.0).reshape(4, 3)))
    pack_data("dir", "dir.zarr")
    pack_data("dir.zarr", "again.zarr")
    for name in ("dir.zarr", "again.zarr"):
        np.testing.assert_array_equal(Dataset.open(name).head(9)["x"], np.arange(12.0).reshape(4, 3))
    made = pack_data("source.py:good", "function.zarr", layout=Layout(chunk_bytes=16, file_bytes=32))
    assert made.length == 8
    expected = [3, 3, 3, 1, 4, 4, 4, 4]
    assert Dataset.open("function.zarr").head(9)["x"][:, 0].tolist() == expected
    pack_data("source.py:one", "one.zarr")


def test_a_function_may_fill_the_same_array_again(folder: Path) -> None:
    pack_data("source.py:refilled", "d.zarr")
    expected = [0, 0, 1, 1, 2, 2, 3, 3]
    assert Dataset.open("d.zarr").head(9)["x"][:, 0].tolist() == expected
    assert Dataset.open("source.py:refilled").head(9)["x"][:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("function", "word"),
    [
        ("nothing", "no samples"), ("shapes", "do not fit"), ("types", "do not fit"), ("names", "do not fit"),
        ("longer", "do not fit"), ("raises", "boom"), ("objects", "astype"), ("dates", "astype"),
        ("slashes", "slashes"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_leaves_nothing(folder: Path, function: str, word: str) -> None:
    before = set(folder.iterdir())
    with pytest.raises(DataError, match=word):
        pack_data(f"source.py:{function}", "out/d.zarr")
    assert set(folder.iterdir()) - before <= {folder / "__pycache__"}


def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "d.zarr").mkdir()
    with pytest.raises(OutputExistsError):
        pack_data("images.npz", "d.zarr")
    with pytest.raises(DataError, match=r"\.zarr"):
        pack_data("images.npz", "d")
    assert not list((folder / "d.zarr").iterdir())


def test_a_kill_leaves_nothing(folder: Path) -> None:
    layout = "Layout(chunk_bytes=2**10, file_bytes=2**12)"
    code = f"from deploykit.packing import *; pack_data('source.py:killed', 'd.zarr', layout={layout})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "d.zarr").exists()
    left = list(folder.glob(".d.zarr.tmp-*"))
    assert len(left) == 1
    assert list(left[0].rglob("c/*"))  # it was writing
    os.utime(left[0], (0, 0))
    pack_data("source.py:good", "d.zarr")
    assert not list(folder.glob(".d.zarr.tmp-*"))


# --- normalization ---------------------------------------------------------------------------------------------------


def test_bytes_and_normalized_reals_of_one_store(folder: Path) -> None:
    made = pack_data("images.npz", "d.zarr", normalization=Normalization(MEAN, STD))
    dataset = Dataset.open("d.zarr")
    expected = (IMAGES / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    found = dataset.head(50)
    assert found["image"].dtype == np.float32
    np.testing.assert_allclose(found["image"], expected, atol=1e-6)
    np.testing.assert_array_equal(found["labels"], LABELS)
    np.testing.assert_array_equal(dataset.stored().head(50)["image"], IMAGES)
    # A model says by the type of its input which of them it takes; of one input, whatever it is called.
    for name in ("image", "x"):
        assert dataset.fitted(signature("uint8", name).inputs).head(1)["image"].dtype == np.uint8
        assert dataset.fitted(signature("float32", name).inputs).head(1)["image"].dtype == np.float32
    for dtype in ("uint8", "float32"):
        batch = next(batches_of(signature(dtype), dataset, StaticConfig(batch_size=4)))
        assert batch["image"].dtype == dtype
    (image,) = (a for a in made.arrays if a.name == "image")
    assert (image.stored, image.dtype, image.nbytes) == ("uint8", "float32", 4 * IMAGES.size)
    assert image.disk_bytes is not None and image.disk_bytes < 2 * IMAGES.size
    # Packed again it is the same store.
    assert pack_data("d.zarr", "again.zarr").digest == made.digest


def test_models_with_and_without_the_normalization(folder: Path) -> None:
    """Compared on the same store, through the reading that all verbs share."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from deploykit.models import benchmark_feeds, load_model, probe_feeds

    pack_data("images.npz", "d.zarr", normalization=Normalization(MEAN, STD))
    scale = 1 / 255 / np.array(STD, np.float32)[None, :, None, None]
    offset = (-np.array(MEAN) / np.array(STD)).astype(np.float32)[None, :, None, None]
    for kind, nodes in {
        TensorProto.FLOAT: [helper.make_node("GlobalAveragePool", ["x"], ["y"])],
        TensorProto.UINT8: [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["f", "s"], ["m"]),
            helper.make_node("Add", ["m", "o"], ["a"]), helper.make_node("GlobalAveragePool", ["a"], ["y"]),
        ],
    }.items():  # fmt: skip
        weights = [numpy_helper.from_array(scale.astype(np.float32), "s"), numpy_helper.from_array(offset, "o")]
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", kind, ["n", 3, 6, 5])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 1, 1])], weights if len(nodes) > 1 else [],
        )  # fmt: skip
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), f"{kind}.onnx")
    from deploykit.runtimes import open_session

    outputs = []
    for kind in (TensorProto.FLOAT, TensorProto.UINT8):
        model = load_model(f"{kind}.onnx")
        feeds, _ = probe_feeds(model, Dataset.open("d.zarr"), {})
        assert benchmark_feeds(model, Dataset.open("d.zarr"), 2, {})[0][0]["x"].dtype == feeds[0]["x"].dtype
        with open_session(model.path, "ort:cpu") as session:
            outputs.append(session.run(feeds[2])["y"])
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)


def test_channels_last_and_one_channel(folder: Path) -> None:
    np.savez("last.npz", a=IMAGES.transpose(0, 2, 3, 1), b=IMAGES[:, :1])
    pack_data("last.npz", "d.zarr", normalization=Normalization(MEAN, STD, axis=-1, names=("a",)))
    found = Dataset.open("d.zarr").head(50)
    assert found["b"].dtype == np.uint8
    np.testing.assert_allclose(found["a"], (IMAGES.transpose(0, 2, 3, 1) / 255 - MEAN) / STD, atol=1e-6)
    pack_data("last.npz", "one.zarr", normalization=Normalization((0.5,), (0.25,), names=("b",)))
    np.testing.assert_allclose(Dataset.open("one.zarr").head(50)["b"], (IMAGES[:, :1] / 255 - 0.5) / 0.25, atol=1e-6)
    pack_data("last.npz", "scaled.zarr", normalization=Normalization(rescale=0.5))
    np.testing.assert_array_equal(Dataset.open("scaled.zarr").head(50)["b"], IMAGES[:, :1] * np.float32(0.5))


@pytest.mark.parametrize(
    ("normalization", "word"),
    [
        (Normalization((0.5, 0.5), (1.0, 1.0)), "channel-axis"),
        (Normalization((0.5,) * 3, (1.0,) * 2), "one a channel"),
        (Normalization((0.5,), (0.0,)), "above 0"),
        (Normalization((float("nan"),)), "above 0"),
        (Normalization(rescale=0.0), "above 0"),
        (Normalization((0.5,), names=("nosuch",)), "nosuch"),
        (Normalization((0.5,), names=("labels",)), "labels"),
    ],
)
def test_normalization_that_does_not_fit(folder: Path, normalization: Normalization, word: str) -> None:
    with pytest.raises(DataError, match=word):
        pack_data("images.npz", "d.zarr", normalization=normalization)
    np.savez("reals.npz", x=np.zeros((2, 3)))
    with pytest.raises(DataError):
        pack_data("reals.npz", "d.zarr", normalization=normalization)
    assert not (folder / "d.zarr").exists()


# --- float16 ---------------------------------------------------------------------------------------------------------


def test_float16_says_its_error(folder: Path) -> None:
    values = dice.normal(size=(40, 7)).astype(np.float32)
    values[0, 0] = np.inf
    values[1, 1] = np.nan
    np.savez("d.npz", x=values, labels=np.linspace(0, 1, 40))
    told = Progress()
    made = pack_data("d.npz", "d.zarr", float16=True, progress=told)
    found = Dataset.open("d.zarr").head(40)
    assert found["x"].dtype == np.float32
    np.testing.assert_array_equal(found["x"], values.astype(np.float16).astype(np.float32))
    assert found["labels"].dtype == np.float64  # as they are
    np.testing.assert_array_equal(found["labels"], np.linspace(0, 1, 40))
    (x,) = (a for a in made.arrays if a.name == "x")
    real = np.isfinite(values)
    off = np.abs(values[real].astype(np.float16).astype(np.float64) - values[real])
    assert x.error is not None
    assert x.error["max_abs"] == off.max()
    assert x.error["relative_rms"] == pytest.approx(np.sqrt((off**2).sum() / (values[real].astype(float) ** 2).sum()))
    assert any("float16" in note and "off by" in note for note in told.notes)


def test_float16_that_would_not_hold_it(folder: Path) -> None:
    np.savez("d.npz", x=np.array([1.0, 7e4]))
    with pytest.raises(DataError, match="70000"):
        pack_data("d.npz", "d.zarr", float16=True)
    with pytest.raises(DataError, match="leave --float16 out"):
        pack_data("images.npz", "d.zarr", float16=True)
    assert not (folder / "d.zarr").exists()


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_show_other_sources(folder: Path) -> None:
    found = show_data("images.npz")
    assert (found.form, found.length, found.verified) == ("npz", 50, "CRC-32 of every member")
    assert {a.name: (a.shape, a.dtype) for a in found.arrays} == {
        "image": ((50, 3, 6, 5), "uint8"), "labels": ((50,), "int64"),
    }  # fmt: skip
    assert found.nbytes == IMAGES.nbytes + LABELS.nbytes
    assert show_data("source.py:good").length == 8
    unread = show_data("source.py:good", verify=False)
    assert (unread.length, unread.nbytes, unread.arrays[0].shape) == (None, None, (-1, 2))
    data = bytearray((folder / "images.npz").read_bytes())
    data[1000] ^= 1
    (folder / "images.npz").write_bytes(data)
    with pytest.raises(DataError, match="CRC"):
        show_data("images.npz")


def test_samples_as_npz_and_as_zarr(folder: Path) -> None:
    """A store keeps the bytes, an archive has what is given; both keep the record, and neither changes with the day."""
    pack_data("images.npz", "d.zarr", normalization=Normalization(MEAN, STD))
    dataset, record = Dataset.open("d.zarr"), {"indices": [1, 7, 49]}
    notes = {n: {"scaling": s.as_dict()} for n, s in dataset.scalings.items()}
    for name in ("a.npz", "b.npz", "c.zarr"):
        write_samples(dataset, [1, 7, 49], name, record, notes)
        found = Dataset.open(name)
        assert show_data(name).selection == record
        np.testing.assert_array_equal(found.head(9)["image"], dataset.head(50)["image"][[1, 7, 49]])
        np.testing.assert_array_equal(found.head(9)["labels"], LABELS[[1, 7, 49]])
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()
    assert np.load("a.npz")["image"].dtype == np.float32
    assert Dataset.open("c.zarr").stored().head(1)["image"].dtype == np.uint8
    with pytest.raises(OutputExistsError):
        write_samples(dataset, [1], "a.npz", record, notes)
    with pytest.raises(DataError, match="holds 50 samples"):
        write_samples(Dataset.open("images.npz"), [50], "e.npz", record, {})
    assert not list(folder.glob(".*"))
    json.dumps(show_data("c.zarr").as_dict())


@pytest.mark.parametrize("function", ["types", "longer", "shapes", "names"])
def test_samples_that_would_be_rounded_or_cut_off_are_refused(folder: Path, function: str) -> None:
    dataset = Dataset.open(f"source.py:{function}")
    last = 1 if function == "longer" else 3
    for name in ("a.npz", "a.zarr"):
        with pytest.raises(DataError, match="do not fit together"):
            write_samples(dataset, [0, last], name, {}, {})
        assert not Path(name).exists()


def test_a_column_is_read_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "dir").mkdir()
    np.save(folder / "dir" / "image.npy", IMAGES)
    np.save(folder / "dir" / "labels.npy", LABELS)
    pack_data("images.npz", "d.zarr")
    for source in ("images.npz", "d.zarr", "dir"):
        assert np.concatenate(list(Dataset.open(source).column("labels", 7))).tolist() == LABELS.tolist()
    (chunk,) = (folder / "d.zarr" / "image" / "c").rglob("0/0/0/0")
    chunk.write_bytes(b"")
    assert next(Dataset.open("d.zarr").column("labels", 50)).tolist() == LABELS.tolist()


def test_take_reads_any_source(folder: Path) -> None:
    expected: dict[str, Any] = {"image": IMAGES[[0, 13, 49]], "labels": LABELS[[0, 13, 49]]}
    for dataset in (Dataset.open("images.npz"), Dataset.from_arrays({"image": IMAGES, "labels": LABELS})):
        parts = list(dataset.take([0, 13, 49], 2))
        for name, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)
