"""Rows of a training: each once an epoch, in an order that the seed and the epoch decide."""

import resource

import numpy as np
import pytest
import torch

from deploykit.data import Dataset
from deploykit.errors import DataError, StorageError
from deploykit.optimizers.training.outputs import tensors_of
from deploykit.optimizers.training.rows import Batches, Rows, gather, survey

X = np.arange(23 * 3, dtype=np.float32).reshape(23, 3)
LABELS = np.arange(23, dtype=np.int32)


def drawn(epoch=0, begun=0, seed=0, size=5):
    rows = Rows({"x": X, "labels": LABELS}, "memory")
    return list(Batches(rows, size, seed, lambda: (epoch, begun)))


def order(batches):
    return torch.cat([batch["labels"] for batch in batches]).tolist()


def test_every_row_once_and_no_tiny_rest():
    found = drawn(size=11)
    assert sorted(order(found)) == list(range(23))
    assert [len(batch["labels"]) for batch in found] == [8, 8, 7]
    assert found[0]["labels"].dtype == torch.int64
    for batch in found:
        np.testing.assert_array_equal(batch["x"].numpy(), X[batch["labels"].numpy()])


def test_the_order_hangs_on_seed_and_epoch():
    assert order(drawn(epoch=3)) == order(drawn(epoch=3))
    assert len({tuple(order(drawn(epoch=e, seed=s))) for e in range(3) for s in range(3)}) == 9


def test_an_epoch_goes_on_where_it_was():
    assert order(drawn(epoch=2, begun=3)) == order(drawn(epoch=2)[3:])


def test_where_is_asked_with_the_first_batch():
    place = [0, 0]
    batches = Batches(Rows({"labels": LABELS}, "memory"), 5, 0, lambda: tuple(place))
    assert len(batches) == 5
    iterator = iter(batches)
    place[:] = [4, 2]
    assert order(list(iterator)) == order(drawn(epoch=4, begun=2))


def test_large_data_are_kept_on_the_disk(tmp_path):
    many = {"x": np.random.default_rng(0).standard_normal((900, 4)), "labels": np.arange(900)}
    rows = gather(Dataset.from_arrays(many), tmp_path / "rows", limit_bytes=1000)
    assert all(isinstance(array, np.memmap) for array in rows.arrays.values())
    index = np.array([5, 899, 0, 300])
    for name, array in rows.take(index).items():
        np.testing.assert_array_equal(array, many[name][index])
    assert not (tmp_path / "other").exists()
    small = gather(Dataset.from_arrays(many), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    np.testing.assert_array_equal(small.arrays["x"], many["x"])


@pytest.mark.parametrize(
    ("second", "word"),
    [
        ({"x": np.zeros((2, 4), np.float32)}, "float32 [3] in one batch and float32 [4]"),
        ({"x": np.zeros((2, 3))}, "float64 [3]"),
        ({"y": np.zeros((2, 3), np.float32)}, "another y"),
    ],
)
def test_batches_that_do_not_fit_together(tmp_path, second, word):
    data = Dataset("made", lambda size: iter([{"x": np.zeros((2, 3), np.float32)}, second]))
    with pytest.raises(DataError) as caught:
        gather(data, tmp_path / "rows")
    assert word in str(caught.value)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="no samples"):
        gather(Dataset("empty", lambda size: iter(())), tmp_path / "rows")


def test_however_it_is_cut_it_is_the_same_dataset():
    many = {"x": np.random.default_rng(0).standard_normal((600, 4)), "labels": np.arange(600)}
    whole = survey(Dataset.from_arrays(many))
    assert (whole.rows, whole.arrays) == (600, ("labels", "x"))

    def cut(arrays, size):
        parts = [{n: a[i : i + size] for n, a in arrays.items()} for i in range(0, 600, size)]
        return survey(Dataset("cut", lambda _: iter(parts)))

    assert cut(many, 7) == whole
    assert Rows(many, "memory").seen == whole
    assert cut({**many, "deploykit.teacher": many["x"]}, 7) == whole  # what a verb adds is not the user's
    other = many["x"].copy()
    other[599, 3] += 1
    for changed in ({"x": other}, {"x": many["x"].astype(np.float32)}, {"x": many["x"].reshape(600, 2, 2)}):
        assert cut({**many, **changed}, 7).sha256 != whole.sha256
    swapped = {"x": many["x"][::-1], "labels": many["labels"]}
    assert cut(swapped, 7).sha256 != whole.sha256


@pytest.mark.parametrize("dtype", ["<i8", ">i8", ">i4", "u1", "u2", "u8", "i1", "?"])
def test_integer_labels_of_any_type_are_int64(dtype):
    labels = np.array([1, 0, 1]).astype(dtype)
    batch = tensors_of({"x": np.arange(3).astype(">f4"), "labels": labels}, "cpu")
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["x"].tolist() == [0, 1, 2]
    seen = survey(Dataset.from_arrays({"labels": labels})).labels
    assert (seen.dtype, seen.top) == (str(labels.dtype), 1)


def test_numbers_that_torch_lacks_are_named():
    with pytest.raises(DataError, match="'x' is"):
        tensors_of({"x": np.zeros(2, np.longdouble)}, "cpu")


def test_a_disk_that_is_full_is_said(tmp_path):
    many = {"x": np.zeros((900, 40)), "labels": np.arange(900)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            gather(Dataset.from_arrays(many), tmp_path / "rows", limit_bytes=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
