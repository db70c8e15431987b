"""Files of a training: whole or as they were before, and without code in them."""

import pickle

import pytest
import torch

from deploykit.errors import OptimizationError, OutputExistsError, StorageError
from deploykit.optimizers.training import TrainConfig
from deploykit.optimizers.training.folder import TrainingFolder, load_tensors, save_tensors

DATA = {"rows": 3, "arrays": "labels, x"}


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_a_file_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Bomb()}, tmp_path / "last.ckpt")
    (tmp_path / "plain").write_bytes(pickle.dumps(Bomb()))
    for name in ("last.ckpt", "plain"):
        with pytest.raises(OptimizationError, match="cannot read"):
            load_tensors(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_failed_write_keeps_what_was_there(tmp_path):
    file = tmp_path / "last.ckpt"
    save_tensors({"a": torch.ones(3)}, file)
    with pytest.raises(Exception, match="pickle"):
        save_tensors({"a": lambda: None}, file)
    assert torch.equal(load_tensors(file)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        TrainingFolder(tmp_path / "file" / "t").check(resume=False)


def test_it_knows_its_training_again(tmp_path):
    folder = TrainingFolder(tmp_path / "t")
    folder.check(resume=False)
    folder.abandon()
    assert not folder.path.exists()
    folder.check(resume=True)
    assert folder.open(TrainConfig(epochs=3), DATA) is False
    (folder.path / "logs").mkdir()
    folder.check(resume=False)
    assert folder.open(TrainConfig(), DATA) is False  # the other ended before its first checkpoint
    assert not (folder.path / "logs").exists()
    assert folder.ours
    assert not folder.begun
    save_tensors({}, folder.last)
    with pytest.raises(OutputExistsError):
        folder.check(resume=False)
    assert folder.open(TrainConfig(), DATA) is True
    with pytest.raises(OptimizationError, match="begun with epochs 10, not 11"):
        folder.open(TrainConfig(epochs=11), DATA)
    with pytest.raises(OptimizationError, match="data rows 3, not 4"):
        folder.open(TrainConfig(), {**DATA, "rows": 4})
    (folder.path / "training.json").write_text("[")
    with pytest.raises(OptimizationError, match="no training to go on with"):
        folder.open(TrainConfig(), DATA)
