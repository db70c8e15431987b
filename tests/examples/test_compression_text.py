"""The text example of compression by training: its data, its networks and its commands.

The whole road (`compress.py --quick`) takes minutes of a CPU, so that its parts are looked at.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from deploykit.cli import cli

HERE = Path(__file__).resolve().parent.parent.parent / "examples" / "compression" / "text"


def load(name: str) -> ModuleType:
    """A module of the example, under a name of its own: three examples have a data.py."""
    spec = importlib.util.spec_from_file_location(f"_compression_text_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


data, model = load("data"), load("model")
MOVIES = "".join(
    f"{n}\t{rating}\t{text}\n"
    for n, (rating, text) in enumerate(
        [("2.5", "A ''very'' fine film &amp; more"), ("-1.2", "Dull."), ("0.5", "It is a film"), ("-0.7", "dull!")]
        + [(f"{(-1) ** i * 2.0}", f"film number {i} and its words") for i in range(200)]
    )
)
PRODUCTS = "".join(
    f"{review}_{line}\t{(-1) ** line * 1.5}\tproduct {review} line {line}\n"
    for review in range(40)
    for line in range(5)
)
PRODUCTS += "0_9\t-2.0\tfilm number 7 and its words.\n"


def archive(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = {"movieReviewSnippets": MOVIES, "amazonReviewSnippets": "\ufeff" + PRODUCTS}
    inner = archive({f"hutto_ICWSM_2014/{n}_GroundTruth.txt": text.encode() for n, text in texts.items()})
    path = tmp_path_factory.mktemp("sdist") / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(archive({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


def check_apart(parts: dict[str, Any]) -> None:
    """No review, and no line, stands in two parts; what is unlabelled belongs to the training."""
    seen: dict[str, str] = {}
    for name, lines in parts.items():
        side = "train" if name == "unlabelled" else name
        for line in lines:
            assert all(seen.setdefault(key, side) == side for key in (line.review, data._key(line))), line


# --- data ------------------------------------------------------------------------------------------------------------


def test_lines_are_read_with_their_review(sdist: Path) -> None:
    lines = data.read(sdist)
    assert (lines[0].text, lines[0].rating, lines[0].label) == ('A "very" fine film & more', 2.5, 1)
    assert [line.label for line in lines[1:4]] == [0, data.UNKNOWN, 0]
    products = [line for line in lines if line.source == "amazonReviewSnippets"]
    assert products[0].review == products[4].review != products[5].review
    assert len({line.review for line in lines if line.source == "movieReviewSnippets"}) == 204


def test_nothing_stands_on_both_sides(sdist: Path) -> None:
    parts = data.split(data.read(sdist))
    check_apart(parts)
    total = sum(len(parts[name]) for name in ("train", "validation", "test"))
    assert 0.15 < len(parts["test"]) / total < 0.3
    assert 0.04 < len(parts["validation"]) / total < 0.15
    for name in ("train", "validation", "test"):
        assert {line.label for line in parts[name]} == {0, 1}
    # "Dull." and "dull!", and the film's line that a review of a product has too, are one line each.
    texts = [data._key(line) for name in ("train", "validation", "test") for line in parts[name]]
    assert len(texts) == len(set(texts))
    assert {line.text for line in parts["unlabelled"]} <= {"It is a film"}
    assert data.split(data.read(sdist)) == parts


def test_an_equal_line_keeps_two_reviews_together() -> None:
    lines = [data.Line("amazonReviewSnippets", f"r{n % 2}", 2.0, text) for n, text in enumerate("abacd")]
    lines[3] = data.Line("amazonReviewSnippets", "r1", 2.0, "A!")
    (group,) = data._grouped(lines)
    assert [line.text for line in group] == ["a", "b", "d"]


def test_the_real_lines(tmp_path: Path) -> None:
    try:
        found = data.fetch(tmp_path)
    except SystemExit as exc:
        pytest.skip(f"{exc}: pip download --no-deps --no-binary :all: {data.PACKAGE}, and VADER_SDIST=FILE")
    parts = data.split(data.read(found))
    check_apart(parts)
    assert {name: len(lines) // 500 for name, lines in parts.items()} == {
        "test": 5, "validation": 2, "train": 18, "unlabelled": 1,
    }  # fmt: skip
    for name in ("train", "validation", "test"):
        assert 0.45 < np.mean([line.label for line in parts[name]]) < 0.6


def test_new_texts_are_stretches(sdist: Path) -> None:
    lengths = np.array([6, 9, 3])
    mask = (np.arange(12) < lengths[:, None]).astype(np.int64)
    ids = np.arange(100, 136).reshape(3, 12) * mask
    ids[:, 0], ids[np.arange(3), lengths - 1] = 1, 2
    made = data.stretched({"input_ids": ids, "attention_mask": mask, "labels": np.ones(3)}, 40)
    assert made["input_ids"].shape == (120, 12)
    assert (made["labels"] == data.UNKNOWN).all()
    words = [row[1:length] for row, length in zip(ids, lengths - 1, strict=True)]
    pairs = {(int(a), int(b)) for row in words for a, b in itertools.pairwise(row)}
    for row, real in zip(made["input_ids"], made["attention_mask"].astype(bool), strict=True):
        text = row[real]
        assert not row[~real].any()
        assert (text[0], text[-1]) == (1, 2)
        inner = text[1:-1]
        broken = [p for p in itertools.pairwise(inner) if (int(p[0]), int(p[1])) not in pairs]
        assert len(broken) <= 1  # where the second stretch begins
    assert len({row.tobytes() for row in made["input_ids"]}) > 30


@pytest.mark.parametrize("content", [b"no archive", archive({"a.txt": b"x"})], ids=["no archive", "another one"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(SystemExit, match="not the source distribution of vaderSentiment"):
        data.read(tmp_path / "x.tar.gz")


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VADER_SDIST", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(SystemExit, match="VADER_SDIST") as caught:
        data.fetch(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("VADER_SDIST", str(tmp_path / "nosuch.tar.gz"))
    with pytest.raises(SystemExit, match=r"nosuch\.tar\.gz, which is no file"):
        data.fetch(tmp_path)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=20, num_labels=2,
    )  # fmt: skip
    made = transformers.BertForSequenceClassification(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope="module")
def tokens() -> dict[str, torch.Tensor]:
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()
    return {
        "input_ids": torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(1)),
        "attention_mask": mask,
    }


def test_a_student_as_large_as_its_teacher_is_its_teacher(teacher: Any, tokens: Any) -> None:
    student = model.make_student(teacher, np.arange(60), layers=(0, 1, 2), heads=4, neurons=64, rank=32).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(**tokens)["logits"], teacher(**tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_narrow_table_keeps_the_words_that_occur(teacher: Any) -> None:
    counts = np.zeros(60, int)
    counts[:10] = 1000
    student = model.make_student(teacher, counts, layers=(0, 2), heads=3, neurons=16, rank=12)
    table = teacher.bert.embeddings.word_embeddings.weight
    lost = (student.words.widen(student.words.table.weight) - table).detach().norm(dim=1) / table.norm(dim=1)
    assert lost[:10].max() < 0.1 < lost[10:].min()
    assert len(student.layers) == 2
    assert student.layers[1].up.weight.shape == (16, 32)
    layer, own = teacher.bert.encoder.layer[2], student.layers[1]
    heads = layer.attention.self.query.weight.reshape(4, 8, 32)
    chosen = own.query.weight.reshape(3, 8, 32)
    found = [next(n for n, head in enumerate(heads) if torch.equal(head, one)) for one in chosen]
    assert found == sorted(set(found))
    columns = layer.attention.output.dense.weight.reshape(32, 4, 8)[:, found].flatten(1)
    torch.testing.assert_close(own.out.weight, columns)
    kept = [(layer.intermediate.dense.weight == row).all(1).nonzero().item() for row in own.up.weight]
    torch.testing.assert_close(own.down.weight, layer.output.dense.weight[:, kept])


def test_the_start_takes_the_two_inputs_alone(minilm_dir: Path, tmp_path: Path) -> None:
    import transformers

    model.write_start(tmp_path / "start", layers=1)
    tokenizer = model.load_tokenizer(tmp_path / "start")
    rows = data.encode(tokenizer, [data.Line("movies", "1", 2.0, "A fine film."), data.Line("movies", "2", 0.0, "So.")])
    assert rows["input_ids"].shape == rows["attention_mask"].shape == (2, data.POSITIONS)
    assert rows["labels"].tolist() == [1, data.UNKNOWN]
    assert set(tokenizer("A film.")) == {"input_ids", "attention_mask"}
    made = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    assert made.config.num_hidden_layers == 1
    assert made.config.id2label == {0: "negative", 1: "positive"}
    whole = transformers.AutoModel.from_pretrained(minilm_dir)
    torch.testing.assert_close(
        made.bert.encoder.layer[0].output.dense.weight, whole.encoder.layer[0].output.dense.weight
    )


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_every_stage_is_a_command(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE.parent))
    monkeypatch.setitem(sys.modules, "data", data)
    monkeypatch.setitem(sys.modules, "model", model)
    compress = load("compress")
    stages = compress.stages(quick)
    for stage in stages:
        shown = CliRunner().invoke(cli, [*stage.arguments, "-o", stage.output, "--dry-run"])
        assert shown.exit_code == 0, shown.output
        assert stage.resumes == (stage.arguments[0] in ("finetune", "prune", "distill"))
    assert [stage.output for stage in stages] == [*(folder for _, folder in compress.common.MODELS), compress.TYPICAL]


def test_typical_lines_have_no_padding() -> None:
    lengths = np.array([3, 5, 5, 9])
    mask = (np.arange(12) < lengths[:, None]).astype(np.int64)
    found = data.typical({"input_ids": np.arange(48).reshape(4, 12), "attention_mask": mask, "labels": np.ones(4)})
    assert set(found) == {"input_ids", "attention_mask"}
    np.testing.assert_array_equal(found["input_ids"], [np.arange(12, 17), np.arange(24, 29)])
    assert found["attention_mask"].all()
