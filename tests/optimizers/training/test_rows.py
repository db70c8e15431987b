"""Rows of a training: each once an epoch, in an order that the seed and the epoch decide."""

import numpy as np
import pytest
import torch

from deploykit.data import Dataset
from deploykit.errors import DataError
from deploykit.optimizers.training.rows import Batches, Rows, gather

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
