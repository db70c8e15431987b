"""Real trainings of a small net on scikit-learn's digits, interrupted in every way."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from deploykit.data import Dataset
from deploykit.errors import DataError, OptimizationError, OutputExistsError
from deploykit.optimizers.training import Score, TrainConfig, evaluate, train
from deploykit.optimizers.training.course import Course
from deploykit.optimizers.training.probing import set_dropout
from deploykit.progress import Progress

ROWS, LABELS = load_digits(return_X_y=True)
ROWS = (ROWS / 16).astype(np.float32)
ORDER = np.random.default_rng(0).permutation(len(ROWS))
DATA = Dataset.from_arrays({"x": ROWS[ORDER[:640]], "labels": LABELS[ORDER[:640]]})
EVAL = Dataset.from_arrays({"x": ROWS[ORDER[640:]], "labels": LABELS[ORDER[640:]]})
SMALL = Dataset.from_arrays({"x": ROWS[:160], "labels": LABELS[:160]})
# 5 steps an epoch, and everything in it that has a state or is random.
CONFIG = TrainConfig(
    epochs=3, batch_size=32, learning_rate=5e-3, schedule="one-cycle", mixup=0.2, ema=0.9, label_smoothing=0.1,
    checkpoint_minutes=1e-9, metric="loss", seed=3,
)  # fmt: skip


def share_of_hits(pairs: Any) -> float:
    hits = [output.argmax(1) == labels for output, labels in pairs]
    return float(np.concatenate(hits).mean())


# Two runs compute in the same order, and a forked child has no threads to wait for.
pytestmark = pytest.mark.usefixtures("one_thread")
ACCURACY = Score("accuracy", True, share_of_hits)


def make_net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 10))


def weights(module: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def close(a: Any, b: Any) -> bool:
    """Equal but for what another alignment of memory may change."""
    return all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


def points(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of TensorBoard's event files, by tag and step, read by their framing and their messages."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for file in folder.glob("events.out.tfevents.*"):
        raw = file.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            event = Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned") / "training"
    net = make_net()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    config = TrainConfig(epochs=6, learning_rate=1e-2)
    result = train(net, DATA, config, folder, eval_data=EVAL, score=ACCURACY)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    return result, folder


def test_digits_are_learned(learned):
    result, folder = learned
    assert result.metric > 0.9
    assert result.metric == max(entry["accuracy"] for entry in result.history)
    assert result.before == evaluate(make_net(), EVAL, score=ACCURACY).metric < 0.3
    assert not list(folder.glob("best-*"))
    assert evaluate(result.module, EVAL, score=ACCURACY).metric == pytest.approx(result.metric, abs=1e-3)
    assert not result.module.training
    assert (result.epochs, result.stopped, len(result.history)) == (6, "epochs", 6)
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < losses[0] / 2
    assert json.loads((folder / "history.json").read_text()) == list(result.history)
    kept = torch.load(result.weights, weights_only=True)
    assert same(kept, weights(result.module))


def test_the_logs_can_be_read(learned):
    result, folder = learned
    found = points(folder / "logs")
    assert found["epoch/accuracy"] == pytest.approx({int(e["step"]): e["accuracy"] for e in result.history})
    assert set(found["train/loss"]) == set(range(10, 61, 10))
    assert max(found["learning_rate"].values()) == pytest.approx(1e-2, rel=0.1)


def test_a_training_is_not_overwritten(learned):
    _, folder = learned
    with pytest.raises(OutputExistsError, match="resume"):
        train(make_net(), DATA, TrainConfig(), folder)


def never(module: Any, step: int) -> None:
    raise AssertionError(step)


def test_a_finished_training_is_taken_as_it_is(learned):
    result, folder = learned
    config = TrainConfig(epochs=6, learning_rate=1e-2)
    again = train(
        make_net(), DATA, config, folder, eval_data=EVAL, score=ACCURACY, resume=True, after_step=never
    )  # fmt: skip
    assert again.history == result.history
    assert again.metric == result.metric
    assert same(weights(again.module), weights(result.module))
    with pytest.raises(OptimizationError, match=r"begun with learning rate 0\.01, not 0\.02"):
        train(
            make_net(), DATA, replace(config, learning_rate=0.02), folder, eval_data=EVAL, score=ACCURACY, resume=True
        )
    with pytest.raises(OptimizationError, match="data rows 640, not 160"):
        train(make_net(), SMALL, config, folder, eval_data=EVAL, score=ACCURACY, resume=True)
    # A kill between the last checkpoint and the history loses none of it.
    (folder / "history.json").unlink()
    train(make_net(), DATA, config, folder, eval_data=EVAL, score=ACCURACY, resume=True)
    assert json.loads((folder / "history.json").read_text()) == list(result.history)


def never_read(size: int) -> Any:
    raise AssertionError("read")


def test_another_training_is_refused(learned):
    """Everything that makes it another one; its settings before the data are read."""
    _, folder = learned
    config = TrainConfig(epochs=6, learning_rate=1e-2)
    unread = Dataset("unread", never_read)
    with pytest.raises(OptimizationError, match="begun with seed 0, not 1"):
        train(make_net(), unread, replace(config, seed=1), folder, eval_data=unread, score=ACCURACY, resume=True)
    about = {"source": "other.py:make"}
    with pytest.raises(OptimizationError, match=r"source None, not .other\.py:make"):
        train(make_net(), unread, config, folder, eval_data=unread, score=ACCURACY, resume=True, about=about)
    with pytest.raises(OutputExistsError, match="--resume"):
        train(make_net(), unread, config, folder)
    turned = Dataset.from_arrays({"x": ROWS[ORDER[:640]], "labels": 9 - LABELS[ORDER[:640]]})
    for data, judged, net, said in (
        (turned, EVAL, make_net(), "other values in the data"),
        (DATA, SMALL, make_net(), "eval data rows 1157, not 160"),
        (DATA, None, make_net(), "eval data"),
        (DATA, EVAL, nn.Linear(64, 10), "a module whose weights have other names or shapes"),
    ):
        with pytest.raises(OptimizationError) as caught:
            train(net, data, config, folder, eval_data=judged, score=ACCURACY if judged else None, resume=True)
        assert said in str(caught.value)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(make_net(), SMALL, CONFIG, folder / "training", eval_data=EVAL)


def without_times(history: Any) -> list[dict[str, float]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]


def assert_same_history(a: Any, b: Any) -> None:
    assert len(a.history) == len(b.history)
    for have, want in zip(without_times(a.history), without_times(b.history), strict=True):
        assert have == pytest.approx(want, rel=1e-4)


def check_resumed(folder: Path, uninterrupted: Any, step: int) -> None:
    """Go on in this process, and end where the uninterrupted training ended."""
    seen: list[int] = []
    told = Progress()
    result = train(
        make_net(), SMALL, CONFIG, folder, eval_data=EVAL, resume=True, progress=told,
        after_step=lambda module, number: seen.append(number),
    )  # fmt: skip
    assert seen == list(range(step, 16))
    assert any(f"goes on after step {step - 1} of 15" in note for note in told.notes)
    assert_same_history(result, uninterrupted)
    assert close(weights(result.module), weights(uninterrupted.module))
    assert result.metric == pytest.approx(uninterrupted.metric, rel=1e-4)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_kill_9_loses_nothing(tmp_path, uninterrupted, step):
    """In the middle of the first epoch, in the first step of the second (behind its end), and in its middle."""
    folder = tmp_path / "training"

    def die(module: Any, number: int) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            train(make_net(), SMALL, CONFIG, folder, eval_data=EVAL, after_step=die)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    check_resumed(folder, uninterrupted, step)


def test_a_kill_between_the_best_weights_and_the_checkpoint(tmp_path, uninterrupted):
    """The checkpoint of the epoch before goes with its own best weights, not with those of the epoch that is lost."""
    folder = tmp_path / "training"
    child = os.fork()
    if child == 0:
        try:
            check = Course.check_weights

            def die(course: Course) -> None:
                if course.epoch == 2 and not course.batch:
                    os.kill(os.getpid(), signal.SIGKILL)
                check(course)

            Course.check_weights = die
            train(make_net(), SMALL, CONFIG, folder, eval_data=EVAL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    state = torch.load(folder / "last.ckpt", weights_only=True)["deploykit"]
    assert (state["step"], state["best_epoch"]) == (9, 1)
    assert {file.name for file in folder.glob("best-*")} == {"best-1.pt", "best-2.pt"}
    check_resumed(folder, uninterrupted, 10)


def test_an_interrupt_in_the_last_step_is_heard(tmp_path, uninterrupted):
    """All is trained, and what the verb would do next waits for --resume."""

    def interrupt(module: Any, done: int) -> None:
        if done == 15:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_net(), SMALL, CONFIG, tmp_path / "t", eval_data=EVAL, after_step=interrupt)
    result = train(make_net(), SMALL, CONFIG, tmp_path / "t", eval_data=EVAL, resume=True, after_step=never)
    assert_same_history(result, uninterrupted)
    assert close(weights(result.module), weights(uninterrupted.module))


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 8), (signal.SIGTERM, 5)])
def test_an_interrupt_keeps_the_checkpoint(tmp_path, uninterrupted, number, step):
    folder = tmp_path / "training"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    told = Progress()

    def interrupt(module: Any, done: int) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    config = replace(CONFIG, checkpoint_minutes=60.0)  # the interrupt writes it
    with pytest.raises(KeyboardInterrupt):
        train(make_net(), SMALL, config, folder, eval_data=EVAL, after_step=interrupt, progress=told)
    assert any("interrupted after step" in note and "--resume" in note for note in told.notes)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    check_resumed(folder, uninterrupted, step + 1)


def test_the_seed_decides(tmp_path, uninterrupted):
    other = train(make_net(), SMALL, replace(CONFIG, seed=4), tmp_path / "other", eval_data=EVAL)
    assert not close(weights(other.module), weights(uninterrupted.module))
    again = train(make_net(), SMALL, CONFIG, tmp_path / "again", eval_data=EVAL)
    assert close(weights(again.module), weights(uninterrupted.module))


def test_plateau_goes_on_as_well(tmp_path):
    config = TrainConfig(
        epochs=5, batch_size=80, schedule="plateau", learning_rate=0.1, optimizer="sgd", metric="fixed"
    )
    fixed = Score("fixed", True, lambda pairs: float(len(list(pairs)) * 0 + 1))
    whole = train(make_net(), SMALL, config, tmp_path / "whole", eval_data=EVAL, score=fixed)

    def interrupt(module: Any, done: int) -> None:
        if done == 8:  # the end of the epoch after which the rate is halved
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_net(), SMALL, config, tmp_path / "cut", eval_data=EVAL, score=fixed, after_step=interrupt)
    rest = train(make_net(), SMALL, config, tmp_path / "cut", eval_data=EVAL, score=fixed, resume=True)
    assert [entry["learning_rate"] for entry in whole.history] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.05])
    assert_same_history(rest, whole)


def test_patience_keeps_the_best_weights(tmp_path):
    values = iter([0.8, 0.5, 0.7, 0.6, 0.65, 0.1, 0.9])  # the first is that before the training
    score = Score("listed", True, lambda pairs: next(values) if list(pairs) else 0.0)
    best: dict[str, Any] = {}

    def remember(module: Any, step: int) -> None:
        if step == 4:
            best.update(weights(module))

    config = TrainConfig(epochs=20, batch_size=80, patience=2, metric="listed")
    result = train(
        make_net(), SMALL, config, tmp_path / "t", eval_data=EVAL, score=score, after_step=remember
    )  # fmt: skip
    assert (result.epochs, result.stopped, result.before, result.metric) == (4, "patience", 0.8, 0.7)
    assert same(weights(result.module), best)


def test_the_average_is_what_is_kept(tmp_path):
    followed: dict[str, Any] = {}

    def follow(module: Any, step: int) -> None:
        count = step - 1
        for name, tensor in module.state_dict().items():
            if count == 0 or not tensor.is_floating_point():
                followed[name] = tensor.clone()
            else:
                decay = min(0.8, (1 + count) / (10 + count))
                followed[name] = decay * followed[name] + (1 - decay) * tensor

    config = TrainConfig(epochs=2, batch_size=40, ema=0.8)
    result = train(make_net(), SMALL, config, tmp_path / "t", after_step=follow)
    assert result.metric is None
    for name, tensor in result.module.state_dict().items():
        torch.testing.assert_close(tensor, followed[name])


class Pull(nn.Module):
    """A loss of one's own, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, module: Any, batch: Any) -> dict[str, Any]:
        task = nn.functional.mse_loss(self.scale * module(batch["x"]), batch["x"][:, :10])
        small = module[0].weight.square().mean()
        return {"loss": task + small, "task": task, "small": small}


def test_an_objective_of_ones_own(tmp_path):
    pull = Pull()
    data = Dataset.from_arrays({"x": ROWS[:160]})
    result = train(
        make_net(), data, TrainConfig(epochs=4, metric="loss", learning_rate=1e-2), tmp_path / "t", objective=pull,
        eval_data=data,
    )  # fmt: skip
    assert float(pull.scale.detach()) != 1.0
    assert (pull.fixed == 1).all()
    for entry in result.history:
        assert entry["loss"] == pytest.approx(entry["task"] + entry["small"], rel=1e-5)
    assert result.metric == min(entry["eval_loss"] for entry in result.history)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    told = Progress()
    config = TrainConfig(optimizer="sgd", learning_rate=1e18, clip_norm=None, warmup=0.0, epochs=3)
    with pytest.raises(OptimizationError, match=r"not finite|became (nan|inf)") as caught:
        train(make_net(), SMALL, config, tmp_path / "t", progress=told)
    assert "lower the learning rate" in str(caught.value)
    assert not (tmp_path / "t" / "weights.pt").exists()


def test_nothing_is_printed(tmp_path, capfd):
    train(make_net(), SMALL, TrainConfig(epochs=1), tmp_path / "t")
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_epochs_are_told(tmp_path):
    class Told(Progress):
        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []
            self.steps: list[tuple[int, int | None]] = []

        def say(self, text: str) -> None:
            self.said.append(text)

        def advance(self, done: int, total: int | None, unit: str) -> None:
            self.steps.append((done, total))

    told = Told()
    train(make_net(), SMALL, TrainConfig(epochs=2, batch_size=80), tmp_path / "t", progress=told)
    assert [text.split(":")[0] for text in told.said] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert "loss" in told.said[0]
    assert told.steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("data", "settings", "options", "kind", "word"),
    [
        ({"x": ROWS[:9]}, {}, {}, DataError, "has no 'labels'"),
        ({"x": ROWS[:9], "labels": LABELS[:9] + 5}, {}, {}, DataError, "classes from 0 to 9"),
        ({"x": ROWS[:9], "labels": LABELS[:9] / 2}, {}, {}, DataError, "integer classes"),
        ({"x": ROWS[:9, :50], "labels": LABELS[:9]}, {}, {}, DataError, "does not take rows"),
        ({"x": ROWS[:9], "labels": np.zeros((9, 3), np.float32)}, {"loss": "mse"}, {}, DataError, "labels of shape"),
        ({"x": ROWS[:9].astype(str), "labels": LABELS[:9]}, {}, {}, DataError, "numbers"),
        ({"x": ROWS[:1], "labels": LABELS[:1]}, {}, {}, OptimizationError, "step 1 failed"),
        (None, {"metric": "f1"}, {"eval_data": EVAL, "score": ACCURACY}, OptimizationError, "the metric is f1"),
        (None, {"patience": 2}, {}, OptimizationError, "patience needs data"),
        (None, {"mixup": 0.1}, {"objective": Pull()}, OptimizationError, "mixup"),
        (None, {"epochs": 0}, {}, OptimizationError, "epochs"),
        (None, {}, {"feed": lambda module, batch: {"none": None}}, DataError, "returned"),
    ],
)
def test_what_does_not_fit_is_said_before(tmp_path, data, settings, options, kind, word):
    with pytest.raises(kind) as caught:
        train(
            make_net(), SMALL if data is None else Dataset.from_arrays(data), TrainConfig(**settings), tmp_path / "t",
            **options,
        )  # fmt: skip
    assert word in str(caught.value)
    assert "step 1" in word or not (tmp_path / "t").exists()


def failing(pairs: Any) -> float:
    raise ValueError("only one class")


@pytest.mark.parametrize(
    ("judged", "settings", "score", "kind", "word"),
    [
        ({"x": ROWS[:9]}, {}, ACCURACY, DataError, "has no 'labels'"),
        ({"x": ROWS[:9], "labels": LABELS[:9] + 5}, {}, ACCURACY, DataError, "has label 13"),
        ({"x": ROWS[:9], "labels": LABELS[:9] / 2}, {}, ACCURACY, DataError, "integer classes"),
        ({"x": ROWS[:9], "labels": np.full(9, -1)}, {}, ACCURACY, DataError, "no label of 0 or above"),
        ({"x": ROWS[:9], "labels": LABELS[:9, None]}, {}, ACCURACY, DataError, "labels of shape"),
        ({"x": ROWS[:9, :50], "labels": LABELS[:9]}, {}, ACCURACY, DataError, "accuracy cannot be measured"),
        ({"x": ROWS[:9], "labels": LABELS[:9]}, {}, Score("accuracy", True, failing), DataError, "only one class"),
        (
            {"x": ROWS[:9], "labels": LABELS[:9]}, {},
            Score("accuracy", True, lambda pairs: math.nan * len(list(pairs))), OptimizationError,
            "nan on memory before the training",
        ),
        ({"x": ROWS[:0], "labels": LABELS[:0]}, {}, ACCURACY, DataError, "no samples"),
        (
            {"x": ROWS[:9], "labels": np.zeros((9, 3), np.float32)}, {"loss": "mse", "metric": "loss"}, None, DataError,
            "labels of shape",
        ),
    ],
)  # fmt: skip
def test_evaluation_data_are_tried_before_the_training(tmp_path, judged, settings, score, kind, word):
    data = SMALL
    if settings.get("loss") == "mse":
        data = Dataset.from_arrays({"x": ROWS[:20], "labels": ROWS[:20, :10]})
    length = len(judged["x"])
    held_out = Dataset("memory", lambda size: iter([judged] if length else []), length=length)
    with pytest.raises(kind) as caught:
        train(
            make_net(), data, TrainConfig(**settings), tmp_path / "t", eval_data=held_out, score=score,
            after_step=never,
        )  # fmt: skip
    assert word in str(caught.value)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        ([[1, 2, -1], [0, 1, -1]], "the blank of ctc"),
        ([[1, -1, 2], [1, 2, -1]], "padding before its end"),
        ([[1, 1, 1], [1, 2, -1]], "needs 5 frames, and the output has 4"),
    ],
)
def test_symbols_that_ctc_cannot_align(tmp_path, labels, word):
    right = {"x": np.zeros((2, 4, 3), np.float32), "labels": np.array([[1, 2, -1], [2, -1, -1]])}
    wrong = Dataset.from_arrays({**right, "labels": np.array(labels)})
    good = Dataset.from_arrays(right)
    config = TrainConfig(loss="ctc", metric="loss")
    for data, judged in ((wrong, None), (good, wrong)):
        with pytest.raises(DataError) as caught:
            train(nn.Linear(3, 5), data, config, tmp_path / "t", eval_data=judged, after_step=never)
        assert word in str(caught.value)


def test_the_rate_of_dropout_is_that_of_the_training_alone(tmp_path):
    net = make_net()
    seen: set[float] = set()
    net[3].register_forward_hook(lambda part, given, output: seen.add(part.p))
    train(net, SMALL, TrainConfig(epochs=1, dropout=0.7), tmp_path / "t")
    assert seen == {0.7}
    assert net[3].p == 0.2


def test_whole_numbers_cannot_be_mixed(tmp_path):
    data = Dataset.from_arrays({"ids": np.zeros((4, 3), np.int64), "labels": np.zeros(4, np.int64)})
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(OptimizationError, match="mixup cannot mix 'ids'"):
        train(net, data, TrainConfig(mixup=0.2), tmp_path / "t")


def test_dropout_is_set_wherever_it_stands():
    net = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.MultiheadAttention(4, 2, dropout=0.5), nn.LSTM(4, 4, 2))
    assert set_dropout(net, 0.1) == 4
    assert [net[0].p, net[1].p, net[2].dropout, net[3].dropout] == [0.1] * 4
    with pytest.raises(OptimizationError, match="no dropout"):
        set_dropout(nn.Linear(2, 2), 0.1)


def test_evaluate_leaves_the_modes_alone():
    net = make_net().train()
    net[1].eval()
    found = evaluate(net, EVAL, score=ACCURACY, loss=nn.functional.cross_entropy, batch_size=100)
    assert [part.training for part in net] == [True, False, True, True, True]
    assert found.samples == len(LABELS) - 640
    net.eval()
    rows = torch.tensor(ROWS[ORDER[640:]])
    with torch.no_grad():
        want = nn.functional.cross_entropy(net(rows), torch.tensor(LABELS[ORDER[640:]]))
    assert found.loss == pytest.approx(float(want), rel=1e-5)


def test_mixed_precision_computes_in_16_bits_and_keeps_32(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    net = make_net()
    seen: dict[bool, Any] = {}
    net[0].register_forward_hook(lambda part, given, output: seen.update({part.training: output.dtype}))
    result = train(
        net, SMALL, TrainConfig(epochs=2, precision="bf16", metric="loss"), tmp_path / "t", eval_data=EVAL
    )  # fmt: skip
    assert seen == {True: torch.bfloat16, False: torch.float32}
    assert {tensor.dtype for tensor in result.module.parameters()} == {torch.float32}
    assert result.history[1]["loss"] < result.history[0]["loss"]
    with pytest.raises(OptimizationError, match="fp16 is trained on GPUs"):
        train(make_net(), SMALL, TrainConfig(precision="fp16"), tmp_path / "u")
