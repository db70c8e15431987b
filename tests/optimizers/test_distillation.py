"""Distances between teacher and student, derived students, and what of two networks is compared."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.data import Dataset
from deploykit.errors import DataError, OptimizationError
from deploykit.optimizers.distillation import (
    Derivation,
    DistillConfig,
    check_distill_config,
    derive_student,
    losses,
    parse_derivation,
)
from deploykit.optimizers.distillation.cache import why_not_kept, with_answers
from deploykit.optimizers.distillation.derive import _shared, evenly, source_name
from deploykit.optimizers.distillation.distiller import ANSWERS, Distillation, make_distiller
from deploykit.optimizers.distillation.networks import Network
from deploykit.optimizers.distillation.plan import make_plan
from deploykit.optimizers.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

rng = np.random.default_rng(0)


def network(model: nn.Module, output: str = "logits", label: str = "net") -> Network:
    """A network of one input, `x`, and one output."""
    return Network(model.eval(), {"x": "x"}, lambda module, batch: {output: module(batch["x"])}, label)


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_divergence_is_hintons_formula(temperature: float) -> None:
    student, teacher = rng.normal(size=(2, 6, 5)) * 3
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    by_hand = temperature**2 * np.mean(np.sum(p * np.log(p / q), -1))
    found = losses.soft_divergence(torch.tensor(student), torch.tensor(teacher), temperature)
    assert float(found) == pytest.approx(by_hand, rel=1e-5)
    # Cross-entropy with the soft targets has the same gradient: T (q - p) / rows.
    scores = torch.tensor(student, requires_grad=True)
    losses.soft_divergence(scores, torch.tensor(teacher), temperature).backward()
    np.testing.assert_allclose(scores.grad, temperature * (q - p) / 6, atol=1e-6)


def test_masked_positions_do_not_count() -> None:
    student, teacher = torch.tensor(rng.normal(size=(2, 3, 4, 5)))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    real = losses.soft_divergence(student[mask.bool()], teacher[mask.bool()], 2.0)
    assert float(losses.soft_divergence(student, teacher, 2.0, mask)) == pytest.approx(float(real), rel=1e-6)


def test_a_single_score_is_two_classes() -> None:
    student, teacher = rng.normal(size=(2, 7))
    p, q = (1 / (1 + np.exp(-v)) for v in (teacher, student))
    by_hand = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    scores = [losses.class_scores(torch.tensor(v), probabilities=False) for v in (student, teacher)]
    assert float(losses.soft_divergence(*scores, 1.0)) == pytest.approx(by_hand, rel=1e-5)
    shown = [losses.class_scores(torch.tensor(v)[:, None], probabilities=True) for v in (q, p)]
    assert float(losses.soft_divergence(*shown, 1.0)) == pytest.approx(by_hand, rel=1e-4)


def test_embeddings() -> None:
    hidden, mask = torch.tensor(rng.normal(size=(2, 3, 4))), torch.tensor([[1, 1, 0], [1, 1, 1]])
    pooled = losses.pooled(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0, :2].mean(0).float())
    torch.testing.assert_close(losses.pooled(pooled), pooled)
    ours, theirs = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 3.0, 0.0], [3.0, 0.0, 0.0]])
    # The student's rows stand at right angles, the teacher's at 45 degrees.
    assert float(losses.embedding_distance(ours, theirs, "similarity")) == pytest.approx(0.5)
    assert float(losses.embedding_distance(ours, 2 * ours, "cosine")) == pytest.approx(0, abs=1e-6)
    assert float(losses.embedding_distance(ours, 2 * ours, "mse")) == pytest.approx((1 + 4) / 4)


def test_attention_divergence() -> None:
    ours, theirs = (torch.tensor(softmax(rng.normal(size=(2, h, 5, 5)))) for h in (4, 2))
    assert float(losses.attention_divergence(theirs, theirs)) == pytest.approx(0, abs=1e-6)
    means = [a.mean(1).numpy() for a in (ours, theirs)]
    by_hand = np.mean(np.sum(means[1] * np.log(means[1] / means[0]), -1))
    assert float(losses.attention_divergence(ours, theirs)) == pytest.approx(by_hand, rel=1e-4)


def test_features_are_compared_on_the_smaller_map() -> None:
    ours, theirs = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 8, 8)
    assert float(losses.feature_distance(ours, theirs)) == pytest.approx(1)
    assert float(losses.feature_distance(theirs, 3 * theirs)) == pytest.approx(4 / 9)


# --- derived students ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> Any:
    """Four layers, hidden 32 in four heads, 64 neurons."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=20, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def tokens() -> dict[str, Any]:
    ids = torch.tensor(rng.integers(1, 50, (4, 9)))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_layers_are_taken_evenly() -> None:
    assert evenly(12, 6) == (0, 2, 4, 7, 9, 11)  # DistilBERT's
    assert evenly(12, 12) == tuple(range(12))
    assert evenly(4, 1) == (0,)
    assert _shared([3, 4, 6, 3], 8) == [2, 2, 3, 1]
    assert all(sum(_shared([3, 4, 6, 3], n)) == n for n in range(4, 17))


def test_fewer_layers_have_the_teachers_weights(bert: Any, tokens: Any) -> None:
    before = copy.deepcopy(bert.state_dict())
    derived = derive_student(bert, parse_derivation("derive:layers=2"))
    assert derived.module.config.num_hidden_layers == 2
    assert bert.config.num_hidden_layers == 4
    assert (derived.copied, derived.cut, derived.fresh) == (len(derived.module.state_dict()), 0, 0)
    for name, tensor in derived.module.state_dict().items():
        assert torch.equal(tensor, before[name.replace("layer.1.", "layer.3.")]), name
    assert source_name("bert.encoder.layer.1.output.dense.bias", bert, derived.module).count("layer.3.") == 1
    with torch.no_grad():
        for parameter in derived.module.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())
    assert derived.module(**tokens).logits.shape == (4, 3)


def test_neurons_without_weights_are_the_ones_that_go(bert: Any, tokens: Any) -> None:
    """Half of the neurons do nothing: without them the network gives the same."""
    lame = copy.deepcopy(bert)
    with torch.no_grad():
        for number, layer in enumerate(lame.bert.encoder.layer):
            idle = torch.randperm(64, generator=torch.Generator().manual_seed(number))[:32]
            layer.intermediate.dense.weight[idle] = 0
            layer.intermediate.dense.bias[idle] = 0
            layer.output.dense.weight[:, idle] = 0
        derived = derive_student(lame, Derivation(ffn=0.5))
        assert derived.module.config.intermediate_size == 32
        assert derived.cut == 4 * 3
        torch.testing.assert_close(derived.module(**tokens).logits, lame(**tokens).logits)


def test_narrower_layers_keep_whole_strong_heads(bert: Any, tokens: Any) -> None:
    teacher = copy.deepcopy(bert)
    attention = teacher.bert.encoder.layer[0].attention
    with torch.no_grad():
        for part in (attention.self.query, attention.self.key, attention.self.value):
            part.weight[8:16] *= 50  # head 1
            part.weight[24:32] *= 40  # head 3
        teacher.bert.embeddings.word_embeddings.weight[:, 16:] *= 500  # channels
    derived = derive_student(teacher, Derivation(width=0.5))
    config = derived.module.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (16, 2, 32)
    kept = derived.module.bert.encoder.layer[0].attention.self.query.weight
    heads = [*range(8, 16), *range(24, 32)]
    assert torch.equal(kept, attention.self.query.weight[heads][:, 16:])
    embeddings = derived.module.bert.embeddings.word_embeddings.weight
    assert torch.equal(embeddings, teacher.bert.embeddings.word_embeddings.weight[:, 16:])
    assert derived.module(**tokens).logits.isfinite().all()


def test_a_convolutional_network_loses_blocks_of_its_stages() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 3], layer_type="basic", num_labels=5
    )
    teacher = transformers.ResNetForImageClassification(config).eval()
    derived = derive_student(teacher, Derivation(layers=3))
    assert derived.module.config.depths == [1, 2]
    theirs, ours = teacher.state_dict(), derived.module.state_dict()
    last = "resnet.encoder.stages.1.layers.{}.layer.0.convolution.weight"
    assert torch.equal(ours[last.format(1)], theirs[last.format(2)])
    narrow = derive_student(teacher, Derivation(width=0.5))
    assert narrow.module.config.hidden_sizes == [8, 16]
    assert (narrow.copied, narrow.fresh) == (0, len(narrow.module.state_dict()))
    assert narrow.module(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 5)


def gpt2() -> Any:
    import transformers

    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2Model(config)


def seq2seq() -> Any:
    import transformers

    return transformers.T5Model(
        transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


@pytest.mark.parametrize(
    ("make", "asked", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), Derivation(layers=1), "--student file.py:factory"),
        (seq2seq, Derivation(layers=1), "an encoder and a decoder"),
        (gpt2, Derivation(width=0.5), "feed-forward size"),
        (gpt2, Derivation(layers=3), "3 layers of a teacher with 2"),
        (gpt2, Derivation(layers=2), "as large as the teacher"),
    ],
)
def test_what_cannot_be_derived(make: Any, asked: Derivation, said: str) -> None:
    with pytest.raises(OptimizationError) as caught:
        derive_student(make(), asked)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text", ["derive:", "derive:layers", "derive:layers=0", "derive:layers=1.5", "derive:width=2", "derive:width=nan",
             "derive:heads=2", "derive:layers=inf", "derive:layers=1,layers=2"],
)  # fmt: skip
def test_derivations_that_cannot_be_read(text: str) -> None:
    with pytest.raises(OptimizationError, match="derive:layers=N"):
        parse_derivation(text)


# --- what is compared ------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """A classifier of pictures, with batch normalization, whose maps may have another size and number of channels."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def pictures() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"x": torch.randn(8, 1, 6, 6), "labels": torch.arange(8) % 4}


def parts_of(teacher: Network, student: Network, batch: Any, config: DistillConfig) -> tuple[Any, dict[str, Any]]:
    """The distiller in training mode, and the parts of its loss."""
    plan = make_plan(teacher, student, batch, config)
    distiller = make_distiller(student, plan, seed=0).train()
    objective = Distillation(teacher, student, plan, config, TrainConfig())
    with objective.looking():
        parts = objective(distiller, batch)
    parts["loss"].backward()
    return distiller, parts


def test_features_of_other_widths_and_sizes(pictures: Any) -> None:
    torch.manual_seed(1)
    teacher, student = network(Conv(8), label="teacher"), network(Conv(3, stride=2), label="student")
    before = copy.deepcopy(teacher.module.state_dict())
    config = DistillConfig(features=2.0, pairs=(("body", "body"),))
    distiller, parts = parts_of(teacher, student, pictures, config)
    assert distiller.features[0].weight.shape == (8, 3)
    assert distiller.features[0].weight.grad.abs().sum() > 0
    wanted = 0.9 * parts["logits"] + 2 * parts["features"] + 0.1 * parts["task"]
    torch.testing.assert_close(parts["loss"], wanted)
    # The teacher has neither gradients nor new statistics; the student's batch normalization is in training mode.
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.module.state_dict().items())
    assert all(p.grad is None for p in teacher.module.parameters())
    assert student.module.body[1].num_batches_tracked == 1


def test_task_loss_is_the_trainings_own(pictures: Any) -> None:
    torch.manual_seed(1)
    teacher, student = network(Conv(8)), network(Conv(3))
    plan = make_plan(teacher, student, pictures, DistillConfig())
    distiller = make_distiller(student, plan, seed=0).eval()
    smooth = Distillation(teacher, student, plan, DistillConfig(), TrainConfig(label_smoothing=0.2))
    found = smooth(distiller, pictures)
    output = student.run(pictures)["logits"]
    wanted = nn.functional.cross_entropy(output, pictures["labels"], label_smoothing=0.2)
    torch.testing.assert_close(found["task"], wanted)
    assert dict(plan.weights) == {"logits": 0.9, "task": 0.1}


def test_frames_with_labels_of_frames_and_of_symbols() -> None:
    nets = [network(output_of((8, 6, 5)), label=label) for label in ("teacher", "student")]
    symbols = {"x": torch.ones(8, 2), "labels": torch.ones((8, 2), dtype=torch.int64)}
    frames = {"x": torch.ones(8, 2), "labels": torch.ones((8, 6), dtype=torch.int64)}
    plan = make_plan(*nets, frames, DistillConfig())
    distiller = make_distiller(nets[1], plan, seed=0)
    output = nets[1].run(frames)["logits"]
    objective = Distillation(*nets, plan, DistillConfig(), TrainConfig())
    wanted = nn.functional.cross_entropy(output.flatten(0, 1), frames["labels"].flatten())
    torch.testing.assert_close(objective(distiller, frames)["task"], wanted)
    objective.check(distiller, frames)
    with pytest.raises(DataError):
        objective.check(distiller, symbols)
    ctc = Distillation(*nets, plan, DistillConfig(), TrainConfig(loss="ctc"))
    ctc.check(distiller, symbols)
    with torch.no_grad():
        nets[0].module.value.fill_(math.nan)
    with pytest.raises(OptimizationError, match="the part logits of the loss is nan"):
        ctc.check(distiller, symbols)


def test_attention_of_transformers(bert: Any, tokens: Any) -> None:
    teacher_model, student_model = copy.deepcopy(bert), derive_student(bert, Derivation(layers=2, width=0.5)).module
    keys = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    nets = [
        Network(model, keys, lambda module, batch: module(**batch), label)
        for model, label in ((teacher_model, "teacher"), (student_model, "student"))
    ]
    own = student_model.config._attn_implementation
    config = DistillConfig(attention=1.0, features=1.0, attention_layers="all")
    distiller, parts = parts_of(*nets, tokens, config)
    assert distiller.features[0].weight.shape == (32, 16)
    assert float(parts["attention"].detach()) > 0
    assert student_model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    assert not student_model.bert.encoder.layer[1].attention.self.dropout.training
    assert student_model.bert.encoder.layer[1].output.dropout.training
    assert student_model.config._attn_implementation == own != "eager"


def output_of(shape: tuple[int, ...], scale: float = 1.0) -> nn.Module:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(scale * torch.randn(shape))

        def forward(self, x: Any) -> Any:
            return self.value + 0 * x.sum()

    return Fixed()


@pytest.mark.parametrize(
    ("name", "shape", "labels", "kind"),
    [
        ("logits", (8, 5), None, "classification"),
        ("logits", (8, 6, 5), None, "frames"),
        ("output", (8, 5), "classes", "classification"),
        ("output", (8, 1), "classes", "classification"),
        ("output", (8, 6, 5), "positions", "frames"),
        ("last_hidden_state", (8, 6, 5), None, "embedding"),
        ("sentence_embedding", (8, 5), "classes", "embedding"),
    ],
)
def test_the_kind_follows_from_outputs_and_labels(name: str, shape: Any, labels: Any, kind: str) -> None:
    batch = {"x": torch.ones(8, 2)}
    if labels is not None:
        batch["labels"] = torch.zeros((8,) if labels == "classes" else (8, 6), dtype=torch.int64)
    nets = [network(output_of(shape), output=name) for _ in range(2)]
    assert make_plan(*nets, batch, DistillConfig()).kind == kind


def test_embeddings_of_other_widths() -> None:
    nets = [network(output_of(shape), "sentence_embedding") for shape in ((8, 6), (8, 4))]
    batch = {"x": torch.ones(8, 2)}
    plan = make_plan(*nets, batch, DistillConfig())
    assert plan.embedding_loss == "similarity"
    assert not plan.projects
    distiller, parts = parts_of(*nets, batch, DistillConfig(embedding_loss="cosine"))
    assert distiller.embedding.weight.shape == (6, 4)
    torch.testing.assert_close(parts["loss"], parts["embedding"])


@pytest.mark.parametrize(
    ("teacher", "student", "config", "said"),
    [
        ((8, 5), (8, 4), {}, "4 classes, the teacher 5"),
        ((8, 6, 5), (8, 3, 5), {"kind": "frames"}, "3 x 5 positions and classes, the teacher 6 x 5"),
        ((8, 5), (8, 5), {"kind": "frames"}, "no output of teacher is of the kind frames"),
        ((8, 5), (8, 5), {"output": "nosuch"}, None),
        ((8, 5), (8, 5), {"embedding": 1.0}, "weight embedding"),
        ((8, 5), (8, 5), {"task": 1.0}, "the data have none"),
        ((8, 5), (8, 5), {"logits": 0.0}, "nothing of the teacher has a weight"),
        ((8, 5), (8, 5), {"features": 1.0}, "--features TEACHER=STUDENT"),
        ((8, 5), (8, 5), {"features": 1.0, "pairs": (("", "a"),)}, "has no module ''"),
        ((8, 5), (8, 5), {"attention": 1.0}, "no module of teacher returns its attention"),
        ((8, 5), (8, 5), {"kind": "embedding", "task": 1.0}, "a loss on labels for embeddings"),
        ((8, 5), (8, 5), {"embedding_loss": "mse"}, "an embedding loss"),
    ],
)
def test_what_does_not_fit_together(teacher: Any, student: Any, config: Any, said: str | None) -> None:
    nets = network(output_of(teacher), label="teacher"), network(output_of(student), label="student")
    if said is None:  # one output needs no name
        assert make_plan(*nets, {"x": torch.ones(8, 2)}, DistillConfig(**config)).student_output == "logits"
        return
    with pytest.raises(OptimizationError) as caught:
        make_plan(*nets, {"x": torch.ones(8, 2)}, DistillConfig(**config))
    assert said in str(caught.value)


def test_an_output_without_a_telling_name_asks_for_the_kind() -> None:
    nets = network(output_of((8, 5)), "output"), network(output_of((8, 5)), "output")
    with pytest.raises(OptimizationError, match="--kind classification"):
        make_plan(*nets, {"x": torch.ones(8, 2)}, DistillConfig())


@pytest.mark.parametrize(
    "config",
    [{"kind": "regression"}, {"temperature": 0.0}, {"temperature": math.inf}, {"task": -1.0}, {"cache": "maybe"},
     {"features": math.nan}, {"pairs": (("a", "b"),)}],
)  # fmt: skip
def test_configs_that_are_refused(config: Any) -> None:
    with pytest.raises(OptimizationError):
        check_distill_config(DistillConfig(**config))


# --- answers that are kept -------------------------------------------------------------------------------------------


def test_kept_answers_are_the_teachers(pictures: Any) -> None:
    teacher, student = network(Conv(8)), network(Conv(3))
    arrays = {name: tensor.numpy() for name, tensor in pictures.items()}
    plan = make_plan(teacher, student, pictures, DistillConfig())
    seen: list[int] = []
    data = with_answers(Dataset.from_arrays(arrays), teacher, plan, 3, seen.append)
    assert data.names == ("x", "labels", ANSWERS)
    found = np.concatenate([batch[ANSWERS] for batch in data.batches(5)])
    assert seen == [5, 8]
    np.testing.assert_allclose(found, teacher.run(pictures)["logits"], atol=1e-5)

    # The objective takes them, and does not ask the teacher again.
    another = network(output_of((8, 4), 100), label="another")
    objective = Distillation(another, student, plan, DistillConfig(), TrainConfig())
    distiller = make_distiller(student, plan, seed=0).eval()
    batch = {name: torch.from_numpy(array.copy()) for name, array in data.head(8).items()}
    own = Distillation(teacher, student, plan, DistillConfig(), TrainConfig())(distiller, pictures)
    torch.testing.assert_close(objective(distiller, batch)["logits"], own["logits"])


def test_texts_are_asked_without_their_padding(bert: Any) -> None:
    widths: list[int] = []
    lengths = np.array([4, 9, 2, 9, 1, 3, 5])
    mask = (np.arange(12) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(1, 40, mask.shape)

    def feed(module: Any, batch: Any) -> Any:
        widths.append(batch["input_ids"].shape[1])
        return {"logits": module(**batch).logits}

    keys = {"input_ids": "input_ids", "attention_mask": "teacher.attention_mask"}
    teacher = Network(bert, keys, feed, "bert")
    rows = {"input_ids": ids, "teacher.attention_mask": mask, "labels": np.arange(7)}
    plan: Any = SimpleNamespace(teacher_output="logits", answer=(3,))
    found = {
        trim: next(iter(with_answers(Dataset.from_arrays(rows), teacher, plan, 3, trim=trim).batches(7)))
        for trim in (True, False)
    }
    assert widths == [3, 9, 9, 12, 12, 12]
    np.testing.assert_allclose(found[True][ANSWERS], found[False][ANSWERS], atol=1e-5)
    assert found[True]["input_ids"].shape == ids.shape
    # Where each position has an answer, all of them are asked.
    plan.answer = (12, 3)
    list(with_answers(Dataset.from_arrays(rows), teacher, plan, 7, trim=True).batches(7))
    assert widths[-1] == 12


def test_when_answers_are_kept() -> None:
    rows = Dataset.from_arrays({"x": np.zeros((4, 2))})
    outside: Any = SimpleNamespace(looks_inside=False, answer=(10,))
    large: Any = SimpleNamespace(looks_inside=False, answer=(1 << 14, 1 << 14))
    inside: Any = SimpleNamespace(looks_inside=True, answer=(10,))
    assert why_not_kept(rows, outside, "auto") is None
    assert why_not_kept(rows, outside, "off")
    assert "GiB" in str(why_not_kept(rows, large, "auto"))
    assert why_not_kept(rows, large, "on") is None
    assert "inside" in str(why_not_kept(rows, inside, "auto"))
    with pytest.raises(OptimizationError, match="inside"):
        why_not_kept(rows, inside, "on")
