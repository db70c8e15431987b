"""Datasets and inputs that are made up."""

from __future__ import annotations

import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.data import Dataset, ValueRange, batch_size_of, generate, load_object
from deploykit.errors import DataError, DeploykitError, SourceError
from deploykit.specs import Signature, TensorSpec

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "x": np.arange(7 * 3 * 2, dtype=np.float32).reshape(7, 3, 2),
    "columns": np.asfortranarray(np.arange(7 * 5).reshape(7, 5)),
    "labels": np.arange(7, dtype=np.int8),
    "text": np.array([f"né{i}" for i in range(7)]),
    "empty": np.zeros((7, 0), np.float16),
}


def whole(dataset: Dataset, size: int) -> dict[str, Any]:
    """All batches, put together; each is checked on the way."""
    parts = list(dataset.batches(size))
    for part in parts[:-1]:
        assert {len(a) for a in part.values()} == {size}
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def refused(call: Any) -> str:
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert text.isprintable()
    return text


def read_all(source: Path | str) -> None:
    for _ in Dataset.open(source).batches(2):
        pass


@pytest.fixture(params=["savez", "savez_compressed", "directory", "memory"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    if request.param == "memory":
        return Dataset.from_arrays(ARRAYS)
    if request.param == "directory":
        for name, array in ARRAYS.items():
            np.save(tmp_path / f"{name}.npy", array)
        (tmp_path / "notes.txt").write_text("not data")
        return Dataset.open(tmp_path)
    getattr(np, request.param)(tmp_path / "d.npz", **ARRAYS)
    return Dataset.open(tmp_path / "d.npz")


# --- arrays in files and in memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches(dataset: Dataset, size: int) -> None:
    for _ in range(2):  # a dataset can be read again
        found = whole(dataset, size)
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


def test_what_is_known_without_reading(dataset: Dataset) -> None:
    assert dataset.length == 7
    assert set(dataset.names or ()) == ARRAYS.keys()
    assert dataset.has_labels is True


@pytest.mark.parametrize(("count", "found"), [(1, 1), (5, 5), (7, 7), (50, 7)])
def test_head(dataset: Dataset, count: int, found: int) -> None:
    head = dataset.head(count)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(head[name], array[:found])


@pytest.mark.parametrize("size", [0, -1])
def test_impossible_batch_sizes(dataset: Dataset, size: int) -> None:
    assert "batch size" in refused(lambda: list(dataset.batches(size)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "d.npz", x=np.zeros((1000, 1000), np.float32))
    sizes: list[int] = []
    read = zipfile.ZipExtFile.read

    def counted(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        data = read(self, n)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    batches = Dataset.open(tmp_path / "d.npz").batches(10)
    assert next(batches)["x"].shape == (10, 1000)
    assert sum(sizes) < 100_000
    assert sum(1 for _ in batches) == 99
    assert max(sizes) == 10 * 1000 * 4


def test_npy_files_are_mapped(tmp_path: Path) -> None:
    """Not read: a file with a hole of 1 TB would not fit in memory."""
    np.save(tmp_path / "x.npy", np.zeros((1, 1024), np.uint8))
    header = (tmp_path / "x.npy").read_bytes()[:128].replace(b"(1, 1024)", b"(1073741824, 1024)")
    header = header[:127].rstrip()
    (tmp_path / "x.npy").write_bytes(header + b" " * (127 - len(header)) + b"\n")
    with (tmp_path / "x.npy").open("ab") as stream:
        stream.truncate(128 + 2**40)
    dataset = Dataset.open(tmp_path)
    assert dataset.length == 2**30
    assert next(dataset.batches(4))["x"].shape == (4, 1024)


# --- what cannot be read ---------------------------------------------------------------------------------------------


def test_lengths_differ(tmp_path: Path) -> None:
    arrays = {"a": np.zeros(3), "b": np.zeros(4)}
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    (tmp_path / "dir").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "dir" / f"{name}.npy", array)
    for call in (
        lambda: Dataset.open(tmp_path / "d.npz"),
        lambda: Dataset.open(tmp_path / "dir"),
        lambda: Dataset.from_arrays(arrays),
    ):
        assert "{'a': 3, 'b': 4}" in refused(call)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [({}, "no arrays"), ({"a": np.array(1)}, "scalar"), ({"a": np.zeros((0, 3))}, "no samples")],
    ids=["none", "scalar", "empty"],
)
def test_nothing_to_read(tmp_path: Path, arrays: dict[str, Any], word: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    assert word in refused(lambda: Dataset.open(tmp_path / "d.npz"))
    assert word in refused(lambda: Dataset.from_arrays(arrays))


@pytest.mark.parametrize("name", ["none.npz", "none", "none/", "C:none.npz"])
def test_missing(name: str) -> None:
    assert "does not exist" in refused(lambda: Dataset.open(name))


def test_not_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    assert ".npz" in refused(lambda: Dataset.open(tmp_path / "d.csv"))
    (tmp_path / "empty").mkdir()
    assert "no .npy files" in refused(lambda: Dataset.open(tmp_path / "empty"))


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def test_pickles_are_refused(tmp_path: Path) -> None:
    trap = np.array([Trap(), Trap()], object)
    np.savez(tmp_path / "d.npz", x=trap)
    refused(lambda: read_all(tmp_path / "d.npz"))
    (tmp_path / "dir").mkdir()
    np.save(tmp_path / "dir" / "x.npy", trap)
    refused(lambda: read_all(tmp_path / "dir"))
    trap.dump(tmp_path / "dir" / "x.npy")  # a bare pickle
    refused(lambda: read_all(tmp_path / "dir"))
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    (tmp_path / "other.npz").rename(tmp_path / "dir" / "x.npy")  # an archive under the wrong name
    refused(lambda: read_all(tmp_path / "dir"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path: Path, save: Any) -> None:
    """Bytes changed at random: the data, or a DataError; nothing else."""
    file = tmp_path / "d.npz"
    noise = np.random.default_rng(0).normal(size=(40, 7))
    save(file, x=noise, labels=np.arange(40))
    good = file.read_bytes()
    dice = random.Random(0)
    errors = 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(dice.choice([1, 1, 2, 8])):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        file.write_bytes(bad)
        try:
            read_all(file)
        except DataError:
            errors += 1
    assert errors > 100


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_npz(tmp_path: Path, save: Any) -> None:
    file = tmp_path / "d.npz"
    save(file, x=np.random.default_rng(0).normal(size=(40, 7)))
    good = file.read_bytes()
    for length in (0, 1, 40, 200, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        refused(lambda: read_all(file))


def test_npz_whose_array_is_cut_off(tmp_path: Path) -> None:
    """The archive is whole, the array in it is not."""
    np.save(tmp_path / "x.npy", np.zeros((10, 10)))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-8])
    batches = Dataset.open(tmp_path / "d.npz").batches(9)
    assert len(next(batches)["x"]) == 9
    assert "cut off" in refused(lambda: next(batches))


def test_truncated_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((10, 10)))
    good = (tmp_path / "x.npy").read_bytes()
    for length in (0, 5, 100, len(good) - 1):
        (tmp_path / "x.npy").write_bytes(good[:length])
        assert "x.npy" in refused(lambda: read_all(tmp_path))


# --- functions -------------------------------------------------------------------------------------------------------

_MODULE = """
import numpy as np

def arrays():
    return {"x": np.arange(5), "labels": [1, 2, 3, 4, 5]}

def batches():
    for n in (3, 1, 4):
        yield {"x": np.full((n, 2), n)}

def several():
    return [{"x": [1, 2]}, {"x": [3]}]

def lengths():
    yield {"x": np.zeros((1, 2))}
    yield {"x": np.zeros((1, 3))}

def names():
    yield {"x": np.zeros(1)}
    yield {"y": np.zeros(1)}

def nothing():
    return iter(())

def none():
    return None

def number():
    return 3

def strings():
    yield "x"

def ragged():
    return {"x": [[1], [1, 2]]}

def unequal():
    return {"x": [1], "y": [1, 2]}

def wants(argument):
    return {}

def late():
    yield {"x": [1]}
    raise RuntimeError("out\\nof tape")  # line 45

value = 3
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    (tmp_path / "calib_data.py").write_text(_MODULE)
    return str(tmp_path / "calib_data.py")


def test_function_that_returns(module: str) -> None:
    dataset = Dataset.open(f"{module}:arrays")
    assert [list(b["x"]) for b in dataset.batches(2)] == [[0, 1], [2, 3], [4]]
    assert list(dataset.head(9)["labels"]) == [1, 2, 3, 4, 5]
    assert dataset.length is None
    assert dataset.has_labels is None


def test_function_that_yields(module: str) -> None:
    dataset = Dataset.open(f"{module}:batches")
    assert [b["x"].shape for b in dataset.batches(3)] == [(3, 2), (1, 2), (3, 2), (1, 2)]
    assert list(dataset.head(5)["x"][:, 0]) == [3, 3, 3, 1, 4]
    assert [list(b["x"]) for b in Dataset.open(f"{module}:several").batches(8)] == [[1, 2], [3]]


def test_function_by_module_name(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert list(Dataset.open("calib_data:arrays").head(1)["x"]) == [0]
    finally:
        sys.modules.pop("calib_data", None)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("none", "NoneType"),
        ("number", "int"),
        ("strings", "yielded str"),
        ("ragged", "ValueError"),
        ("unequal", "different lengths"),
        ("wants", "TypeError"),
        ("value", "no function"),
        ("absent", "has no 'absent'"),
        ("late", "RuntimeError: out at calib_data.py:45"),
    ],
)
def test_functions_that_fail(module: str, name: str, word: str) -> None:
    assert word in refused(lambda: read_all(f"{module}:{name}"))


@pytest.mark.parametrize(
    ("name", "word"), [("lengths", "fit together"), ("names", "fit together"), ("nothing", "no samples")]
)
def test_head_of_what_does_not_fit_together(module: str, name: str, word: str) -> None:
    assert word in refused(lambda: Dataset.open(f"{module}:{name}").head(2))


def test_consumer_may_stop_early_and_its_errors_are_its_own(module: str) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in Dataset.open(f"{module}:batches").batches(1):
            _ = 1 / 0


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("nocolon", "names no function"),
        (":f", "names no function"),
        ("m:", "names no function"),
        ("m:not an identifier", "names no function"),
        ("no_such_module_x:f", "cannot be found"),
        ("no_such_module_x.sub:f", "cannot be found"),
        ("missing.py:f", "does not exist"),
        ("json:nothing", "has no 'nothing'"),
    ],
)
def test_objects_that_cannot_be_loaded(text: str, word: str) -> None:
    with pytest.raises(SourceError, match=word):
        load_object(text)


@pytest.mark.parametrize("text", ["raise ValueError('no')", "import no_such_module_y", "x ="])
def test_file_that_fails_on_import(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    for _ in range(2):  # not the second time either
        with pytest.raises(SourceError, match="failed on import"):
            load_object(f"{tmp_path}/bad.py:f")


def test_file_is_loaded_once(tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text("class Thing: pass")
    assert load_object(f"{tmp_path}/once.py:Thing") is load_object(f"{tmp_path}/once.py:Thing")


# --- inputs that are made up -----------------------------------------------------------------------------------------


def test_generate_every_dtype() -> None:
    dtypes = ["bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64", "bfloat16"]
    specs = [TensorSpec(d, d, ("n", 50)) for d in dtypes]
    made = generate(specs, {"n": 4}, seed=1)
    for dtype in dtypes:
        assert made[dtype].dtype.name == dtype
        assert made[dtype].shape == (4, 50)
        assert len(np.unique(made[dtype].astype(np.float64))) > 1
    again, other = generate(specs, {"n": 4}, seed=1), generate(specs, {"n": 4}, seed=2)
    for dtype in dtypes:
        np.testing.assert_array_equal(again[dtype], made[dtype])
        assert (other[dtype] != made[dtype]).any()


def test_generate_inside_ranges() -> None:
    specs = [TensorSpec("ids", "int64", (1000,)), TensorSpec("x", "float32", (1000,)), TensorSpec("k", "int64", ())]
    made = generate(specs, {}, ranges={"ids": ValueRange(5, 7), "x": ValueRange(100, 104), "k": ValueRange(2, 2)})
    assert set(made["ids"]) == {5, 6, 7}
    assert abs(made["x"].mean() - 102) < 0.5
    assert abs(made["x"].std() - 2) < 0.5
    assert made["k"].shape == ()
    assert made["k"] == 2


def test_what_cannot_be_made_up() -> None:
    for spec in (TensorSpec("s", "string", (1,)), TensorSpec("u", "float32", None), TensorSpec("x", "float32", ("n",))):
        with pytest.raises(DataError, match="--d"):
            generate([spec], {})


@pytest.mark.parametrize(
    ("shapes", "size"),
    [([("n", 3)], 4), ([(2, 3)], 2), ([(2, 3), ("n", 3)], 4), ([()], 1), ([None], 1), ([], 1)],
)
def test_batch_size_of(shapes: list[Any], size: int) -> None:
    specs = tuple(TensorSpec(f"x{i}", "float32", s) for i, s in enumerate(shapes))
    feeds = {s.name: np.zeros([4 if isinstance(d, str) else d for d in s.shape or ()], np.float32) for s in specs}
    assert batch_size_of(Signature(specs, ()), feeds) == size


def test_errors_are_ours() -> None:
    assert issubclass(DataError, DeploykitError)
