"""Every loss against its formula, written out in numpy."""

import itertools

import numpy as np
import pytest
import torch

from deploykit.errors import DataError
from deploykit.optimizers.training import Supervised, TrainConfig
from deploykit.optimizers.training.losses import are_probabilities, cosine_distance, ctc, focal, mix, squared_error

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((6, 4)) * 2
CLASSES = np.array([0, 3, 1, -1, 2, 3])  # one is padding
REAL = CLASSES >= 0


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def likely():
    return log_softmax(LOGITS)[REAL, CLASSES[REAL]]


def loss_of(output, labels, **settings):
    found = Supervised(TrainConfig(**settings)).loss(torch.tensor(output), torch.tensor(labels))
    return float(found)


def test_cross_entropy_with_smoothing_and_padding():
    assert loss_of(LOGITS, CLASSES) == pytest.approx(-likely().mean(), rel=1e-5)
    target = np.full((6, 4), 0.2 / 4)
    target[np.arange(6), CLASSES] += 0.8
    smooth = -(target * log_softmax(LOGITS)).sum(1)[REAL].mean()
    assert loss_of(LOGITS, CLASSES, label_smoothing=0.2) == pytest.approx(smooth, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"loss": "focal"}])
def test_a_batch_of_padding_alone_teaches_nothing(settings):
    """A mean over nothing would be NaN, and end the training."""
    output = torch.tensor(LOGITS, requires_grad=True)
    loss = Supervised(TrainConfig(**settings)).loss(output, torch.full((6,), -1))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (output.grad == 0).all()


def test_positions_are_rows():
    whole = loss_of(LOGITS.reshape(2, 3, 4), CLASSES.reshape(2, 3))
    assert whole == pytest.approx(loss_of(LOGITS, CLASSES), rel=1e-6)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_single_score_is_the_logit_of_class_1(shape):
    scores, labels = LOGITS[:, 0], np.array([0, 1, 1, 0, 1, 0])
    sigmoid = 1 / (1 + np.exp(-scores))
    binary = -np.mean(labels * np.log(sigmoid) + (1 - labels) * np.log(1 - sigmoid))
    assert loss_of(scores.reshape(shape), labels) == pytest.approx(binary, rel=1e-5)


def test_focal_counts_the_sure_ones_less():
    p = np.exp(likely())
    for gamma in (0.0, 0.5, 2.0):
        want = np.mean((1 - p) ** gamma * -np.log(p))
        assert float(focal(torch.tensor(LOGITS), torch.tensor(CLASSES), gamma)) == pytest.approx(want, rel=1e-5)
    assert loss_of(LOGITS, CLASSES, loss="focal", focal_gamma=0.5) < loss_of(LOGITS, CLASSES)


def test_focal_has_a_gradient_where_all_is_right():
    sure = torch.tensor([[60.0, -60.0]], requires_grad=True)
    focal(sure, torch.tensor([0]), 0.5).backward()
    assert sure.grad.isfinite().all()


def test_probabilities_are_taken_by_their_logarithm():
    probabilities = np.exp(log_softmax(LOGITS)).astype(np.float32)
    assert are_probabilities(torch.tensor(probabilities))
    assert not are_probabilities(torch.tensor(LOGITS))
    supervised = Supervised(TrainConfig())
    supervised.probabilities = True
    found = float(supervised.loss(torch.tensor(probabilities), torch.tensor(CLASSES)))
    assert found == pytest.approx(-likely().mean(), rel=1e-4)


def test_regression_and_directions():
    want = RNG.standard_normal((6, 4))
    assert loss_of(LOGITS, want, loss="mse") == pytest.approx(np.square(LOGITS - want).mean(), rel=1e-5)
    assert float(squared_error(torch.tensor(LOGITS[:, :1]), torch.tensor(want[:, 0]))) == pytest.approx(
        np.square(LOGITS[:, 0] - want[:, 0]).mean()
    )
    cosines = (LOGITS * want).sum(1) / np.linalg.norm(LOGITS, axis=1) / np.linalg.norm(want, axis=1)
    assert float(cosine_distance(torch.tensor(LOGITS), torch.tensor(want))) == pytest.approx(
        1 - cosines.mean(), rel=1e-6
    )


def test_ctc_sums_over_all_alignments():
    frames = RNG.standard_normal((2, 4, 3))
    labels = [[1, 2], [2]]
    p = np.exp(log_softmax(frames))
    nats = []
    for row, label in zip(p, labels, strict=True):
        total = 0.0
        for path in itertools.product(range(3), repeat=4):
            collapsed = [symbol for symbol, _ in itertools.groupby(path) if symbol]
            if collapsed == label:
                total += np.prod([row[t, symbol] for t, symbol in enumerate(path)])
        nats.append(-np.log(total) / len(label))  # torch's mean is over symbols first
    found = ctc(torch.tensor(frames, dtype=torch.float32), torch.tensor([[1, 2], [2, -1]]))
    assert float(found) == pytest.approx(np.mean(nats), rel=1e-5)


def test_mixup_is_cross_entropy_with_mixed_targets():
    net = torch.nn.Linear(5, 4).train()
    batch = {"x": torch.randn(8, 5), "labels": torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])}
    torch.manual_seed(7)
    found = float(Supervised(TrainConfig(mixup=0.4))(net, batch)["loss"].detach())
    torch.manual_seed(7)
    mixed, order, share = mix(batch, 0.4)
    assert 0 < share < 1
    torch.testing.assert_close(mixed["x"], share * batch["x"] + (1 - share) * batch["x"][order])
    one_hot = torch.eye(4)[batch["labels"]]
    target = share * one_hot + (1 - share) * one_hot[order]
    want = -(target * net(mixed["x"]).log_softmax(-1)).sum(1).mean()
    assert found == pytest.approx(float(want.detach()), rel=1e-5)
    plain = Supervised(TrainConfig(mixup=0.4))(net.eval(), batch)["loss"]
    assert float(plain.detach()) == pytest.approx(
        float(torch.nn.functional.cross_entropy(net(batch["x"]), batch["labels"]).detach())
    )


@pytest.mark.parametrize(
    ("output", "labels", "settings", "word"),
    [
        (LOGITS, CLASSES[:5], {}, "labels of shape [6]"),
        (LOGITS, CLASSES.astype(float), {}, "integer classes"),
        (LOGITS, CLASSES.reshape(2, 3), {"loss": "focal"}, "labels of shape"),
        (LOGITS, np.zeros((6, 3)), {"loss": "mse"}, "for an output"),
        (LOGITS, CLASSES, {"loss": "ctc"}, "[n, frames, classes]"),
    ],
)
def test_labels_that_do_not_fit(output, labels, settings, word):
    with pytest.raises(DataError) as caught:
        loss_of(output, labels, **settings)
    assert word in str(caught.value)
