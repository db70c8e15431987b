"""Texts of different lengths: what is cut is padding alone, and a training without it is the same training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.data import Dataset
from deploykit.errors import DataError
from deploykit.optimizers.training import Score, TrainConfig, train
from deploykit.optimizers.training.padding import cut, trimmed
from deploykit.optimizers.training.rows import Batches, Rows
from deploykit.progress import Progress

POSITIONS, WORDS = 40, 50


def texts(count: int = 300, seed: int = 0) -> dict[str, Any]:
    """Rows whose label says whether a word stands in them; most are short."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(1 + rng.geometric(0.15, count), POSITIONS - 2)
    mask = (np.arange(POSITIONS) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(2, WORDS, (count, POSITIONS)) * mask
    labels = rng.integers(0, 2, count)
    ids[:, 0] = labels  # the first word tells
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Bag(nn.Module):
    """The mean of the words that are real, and how wide the batches were."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, 8)
        self.out = nn.Linear(8, 2)
        self.widths: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        self.widths.append(input_ids.shape[1])
        real = attention_mask[..., None].float()
        return self.out((self.words(input_ids) * real).sum(1) / real.sum(1))


def batches(epoch: int = 0, begun: int = 0, count: int = 300) -> list[dict[str, Any]]:
    rows = texts(count) | {"number": np.arange(count)}
    return list(Batches(Rows(rows, "texts", trim=True), 8, 0, lambda: (epoch, begun)))


def test_batches_hold_texts_of_like_length_and_end_with_the_longest():
    found, whole = batches(), texts()
    assert sorted(torch.cat([b["number"] for b in found]).tolist()) == list(range(300))
    assert {len(b["number"]) for b in found} <= {7, 8}
    for batch in found:
        index = batch["number"].numpy()
        longest = whole["attention_mask"][index].sum(1).max()
        assert batch["input_ids"].shape[1] == batch["attention_mask"].shape[1] == longest
        np.testing.assert_array_equal(batch["input_ids"].numpy(), whole["input_ids"][index][:, :longest])
        np.testing.assert_array_equal(batch["labels"].numpy(), whole["labels"][index])
    real = sum(int(b["attention_mask"].sum()) for b in found)
    assert real / sum(b["attention_mask"].numel() for b in found) > 0.85
    assert real / (300 * POSITIONS) < 0.25


def test_the_order_is_another_in_every_epoch_and_goes_on_where_it_was():
    orders = [[b["number"].tolist() for b in batches(epoch)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert [b["number"].tolist() for b in batches(1, 5)] == orders[1][5:]
    widths = [b["input_ids"].shape[1] for b in batches()]
    assert widths != sorted(widths)


def test_what_has_the_positions_of_the_mask_is_cut():
    arrays = {
        "attention_mask": np.ones((3, 6), np.int64), "labels": np.zeros((3, 6), np.int64),
        "frames": np.zeros((3, 6, 6), np.float32), "scores": np.zeros((3, 6), np.float32),
        "other": np.zeros((3, 5), np.int64), "number": np.arange(3),
    }  # fmt: skip
    shapes = {name: array.shape for name, array in cut(arrays, 2).items()}
    assert shapes == {
        "attention_mask": (3, 2), "labels": (3, 2), "frames": (3, 2, 6), "scores": (3, 6), "other": (3, 5),
        "number": (3,),
    }  # fmt: skip


def test_a_dataset_keeps_its_rows_and_their_order():
    whole, place = texts(), 0
    for batch in trimmed(Dataset.from_arrays(whole)).batches(32):
        count, width = batch["input_ids"].shape
        np.testing.assert_array_equal(batch["input_ids"], whole["input_ids"][place : place + count, :width])
        assert not whole["attention_mask"][place : place + count, width:].any()
        place += count
    assert place == 300


def test_a_row_without_a_word_has_one_position():
    rows = Rows({"attention_mask": np.zeros((2, 4), np.int64)}, "texts", trim=True)
    assert rows.take(np.arange(2))["attention_mask"].shape == (2, 1)


def test_a_training_without_padding_is_the_same_training(tmp_path):
    data, eval_data = (Dataset.from_arrays(texts(64, seed)) for seed in (1, 2))
    score = Score("accuracy", True, lambda pairs: float(np.concatenate([o.argmax(1) == y for o, y in pairs]).mean()))
    kept, notes = {}, {}
    for trim in (False, True):
        # One batch an epoch: both see the same rows in every step.
        config = TrainConfig(epochs=30, batch_size=64, learning_rate=0.1, trim_padding=trim)
        net, told = Bag(), Progress()
        trained = train(net, data, config, tmp_path / str(trim), eval_data=eval_data, score=score, progress=told)
        kept[trim], notes[trim] = (net, trained), " ".join(told.notes)
    assert kept[True][1].metric == kept[False][1].metric > 0.8
    for one, other in zip(*(kept[trim][0].parameters() for trim in (False, True)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert set(kept[False][0].widths) == {POSITIONS}
    assert max(kept[True][0].widths) < POSITIONS
    assert "--trim-padding" in notes[False]
    assert "--trim-padding" not in notes[True]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"attention_mask": None}, "not none"),
        ({"attention_mask": np.ones(300, np.int64)}, "of shape [300]"),
        ({"attention_mask": texts()["attention_mask"][:, ::-1]}, "before or between"),
    ],
)
def test_padding_that_cannot_be_told_is_refused(tmp_path, change, word):
    rows = {name: array for name, array in (texts() | change).items() if array is not None}
    with pytest.raises(DataError) as caught:
        train(Bag(), Dataset.from_arrays(rows), TrainConfig(trim_padding=True), tmp_path / "training")
    assert word in str(caught.value)
    assert not (tmp_path / "training").exists()
