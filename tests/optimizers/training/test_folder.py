"""Files of a training: whole or as they were before, and without code in them."""

import pickle
import resource

import pytest
import torch

from deploykit.errors import OptimizationError, OutputExistsError, StorageError
from deploykit.optimizers.training import TrainConfig
from deploykit.optimizers.training.folder import TrainingFolder, load_tensors, save_tensors, settings_of


def plan(**settings):
    return {
        **settings_of(TrainConfig(**settings), {"source": "a.py:make"}),
        "data": {"rows": 3, "arrays": "labels, x", "sha256": "d"},
        "eval_data": {"rows": 5, "arrays": "labels, x", "sha256": "e"},
        "module": "m",
    }


PLAN = plan()


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


def test_a_full_disk_keeps_what_was_there(tmp_path):
    file = tmp_path / "last.ckpt"
    save_tensors({"a": torch.ones(3)}, file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*last\.ckpt"):
            save_tensors({"a": torch.ones(300_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(load_tensors(file)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        TrainingFolder(tmp_path / "file" / "t").begin()


def test_what_is_not_ours_is_left_alone(tmp_path):
    folder = TrainingFolder(tmp_path / "t")
    folder.check(PLAN, resume=False)
    assert not folder.path.exists()  # looking writes nothing
    folder.path.mkdir()
    folder.check(PLAN, resume=True)
    (folder.path / "mine").write_text("x")
    for resume in (False, True):
        with pytest.raises(OutputExistsError, match="left as it is"):
            folder.check(PLAN, resume=resume)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="left as it is"):
        TrainingFolder(tmp_path / "file").check(PLAN, resume=True)


def test_one_that_was_killed_while_it_read_its_data_gives_way(tmp_path):
    folder = TrainingFolder(tmp_path / "t")
    folder.begin()
    folder.rows.mkdir()
    (folder.rows / "0.rows").write_bytes(b"x")
    (folder.path / ".training.json.tmp-abc").write_bytes(b"{")
    folder.check(PLAN, resume=False)
    assert folder.open(PLAN) is False
    assert [p.name for p in folder.path.iterdir()] == ["training.json"]
    folder.forget()
    assert not folder.path.exists()


def test_weights_of_another_training_are_not_taken_for_its_own(tmp_path):
    """Somebody removed the checkpoint of a training that had ended: a new one must not hand out the old weights."""
    folder = TrainingFolder(tmp_path / "t")
    folder.begin()
    folder.open(PLAN)
    save_tensors({}, folder.path / "weights.pt")
    with pytest.raises(OutputExistsError, match="holds a training already"):
        folder.check(PLAN, resume=False)
    folder.forget()
    assert (folder.path / "weights.pt").exists()


def test_the_best_weights_are_those_that_the_checkpoint_names(tmp_path):
    folder = TrainingFolder(tmp_path)
    for epoch in (1, 2):
        save_tensors({"epoch": epoch}, folder.best(epoch))
    folder.keep_best(1)
    assert load_tensors(folder.best(1)) == {"epoch": 1}
    assert not folder.best(2).exists()
    folder.keep_best(None)
    assert not list(tmp_path.iterdir())


def test_it_knows_its_training_again(tmp_path):
    folder = TrainingFolder(tmp_path / "t")
    folder.begin()
    assert folder.open(plan(epochs=3)) is False
    (folder.path / "logs").mkdir()
    folder.check(PLAN, resume=False)
    assert folder.open(PLAN) is False  # the other ended before its first checkpoint
    assert not (folder.path / "logs").exists()
    assert folder.ours
    assert not folder.begun
    save_tensors({}, folder.last)
    with pytest.raises(OutputExistsError, match="--resume"):
        folder.check(PLAN, resume=False)
    assert folder.open(PLAN) is True
    assert folder.open(plan(checkpoint_minutes=1.0)) is True  # no number hangs on it
    (folder.path / "training.json").write_text("[")
    with pytest.raises(OptimizationError, match="no training to go on with"):
        folder.open(PLAN)


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("config", {"epochs": 11}, "begun with epochs 10, not 11"),
        ("about", {"source": "b.py:make"}, "begun with source 'a.py:make', not 'b.py:make'"),
        ("about", {"weight_bits": 8}, "begun with weight bits None, not 8"),
        ("data", {"rows": 4}, "begun with data rows 3, not 4"),
        ("data", {"sha256": "f"}, "begun with other values in the data"),
        ("eval_data", {"rows": 6}, "begun with eval data rows 5, not 6"),
        ("eval_data", {"sha256": "f"}, "begun with other values in the evaluation data"),
        ("module", "f", "begun with a module whose weights have other names or shapes"),
    ],
)
def test_another_training_is_refused(tmp_path, section, change, said):
    folder = TrainingFolder(tmp_path / "t")
    folder.begin()
    folder.open(PLAN)
    save_tensors({}, folder.last)
    other = {**PLAN, section: {**PLAN[section], **change} if isinstance(change, dict) else change}
    with pytest.raises(OptimizationError) as caught:
        folder.open(other)
    assert said in str(caught.value)
    if section in ("config", "about"):  # that much is known before anything is read
        with pytest.raises(OptimizationError, match="begun with"):
            folder.check({name: other[name] for name in ("config", "about")}, resume=True)
