"""Lines of reviews with the mean of twenty people's ratings, as tokens: positive or negative.

The text is that of C. J. Hutto and E. Gilbert, "VADER" (ICWSM 2014), as the source distribution of vaderSentiment on
PyPI carries it: 10,605 lines on films (rotten.tomatoes.com) and 3,708 lines of 300 reviews of products (amazon.com),
each rated from -4 to 4.

A line is positive or negative where the mean is further from 0 than `NEUTRAL`; the others are left out, because the
people themselves do not agree about them: those of the training part serve as text without labels. The lines of one
review, and equal lines, stand on one side of the split only; every line on a film is a review of its own there.
"""

from __future__ import annotations

import html
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "vaderSentiment==3.3.2"
NEUTRAL = 0.5
POSITIONS = 48
TEST, VALIDATION = 0.2, 0.1
SEED = 0
FILES = ("movieReviewSnippets", "amazonReviewSnippets")
UNKNOWN = -100
CLASSES = ("negative", "positive")


@dataclass(frozen=True, slots=True)
class Line:
    """One line.

    Attributes:
        source: Its file.
        review: What it belongs to; equal for lines of one review.
        rating: The mean, -4 to 4.
        text: As it was written.
    """

    source: str
    review: str
    rating: float
    text: str

    @property
    def label(self) -> int:
        """0 for negative, 1 for positive, `UNKNOWN` near 0."""
        return UNKNOWN if abs(self.rating) <= NEUTRAL else int(self.rating > 0)


def fetch(folder: Path) -> Path:
    """The source distribution: what `VADER_SDIST` names, or what pip downloads into a folder.

    Raises:
        SystemExit: It is not there and cannot be fetched.
    """
    given = os.environ.get("VADER_SDIST")
    if given:
        if not Path(given).is_file():
            raise SystemExit(f"VADER_SDIST names {given}, which is no file")
        return Path(given)
    found = sorted(folder.glob("vader*.tar.gz"))
    if not found:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            "-d",
            str(folder),
        ]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
        found = sorted(folder.glob("vader*.tar.gz"))
        if done.returncode or not found:
            raise SystemExit(
                f"cannot fetch {PACKAGE} from the package index (no network?): fetch its source distribution elsewhere "
                "with `pip download --no-deps --no-binary :all:`, and name the file in VADER_SDIST"
            )
    return found[0]


def read(sdist: Path) -> list[Line]:
    """All lines of a source distribution.

    Raises:
        SystemExit: It is none of vaderSentiment's.
    """
    lines = []
    try:
        with tarfile.open(sdist) as outer:
            name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(name).read())) as inner:
                for source in FILES:
                    member = next(n for n in inner.getnames() if n.endswith(f"{source}_GroundTruth.txt"))
                    lines += _lines(source, inner.extractfile(member).read().decode("utf-8-sig", "replace"))
    except (tarfile.TarError, OSError, StopIteration, ValueError) as exc:
        raise SystemExit(f"{sdist} is not the source distribution of {PACKAGE} ({type(exc).__name__})") from exc
    return lines


def _lines(source: str, text: str) -> list[Line]:
    found = []
    for row in text.splitlines():
        number, rating, words = row.split("\t", 2)
        # The lines of one review of a product are numbered 12_1, 12_2, ...; lines on films have a number each.
        found.append(Line(source, f"{source}-{number.split('_')[0]}", float(rating), _clean(words)))
    return found


def _clean(text: str) -> str:
    return " ".join(html.unescape(text).replace("''", '"').split())


def split(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The parts "train", "validation", "test" and "unlabelled", which are the lines near 0 of the training part.

    Whole reviews go to one side, together with all that share an equal line with them.
    """
    groups = _grouped(lines)
    order = np.random.default_rng(SEED).permutation(len(groups))
    total = sum(len(group) for group in groups)
    parts: dict[str, list[Line]] = {"test": [], "validation": [], "train": []}
    limits = {"test": TEST * total, "validation": VALIDATION * (1 - TEST) * total, "train": float("inf")}
    names, taken = list(limits), 0
    for place in order:
        if taken >= limits[names[0]]:
            names, taken = names[1:], 0
        taken += len(groups[place])
        parts[names[0]] += groups[place]
    unlabelled = [line for line in parts["train"] if line.label == UNKNOWN]
    told = {name: [line for line in found if line.label != UNKNOWN] for name, found in parts.items()}
    return {**told, "unlabelled": unlabelled}


def _key(line: Line) -> str:
    return "".join(c for c in line.text.lower() if c.isalnum())


def _grouped(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines that have to stay together: those of one review, and equal ones; of equal ones the first is kept."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for line in lines:
        parent[root(line.review)] = root(_key(line) or line.review)
    groups: dict[str, dict[str, Line]] = {}
    for line in lines:
        groups.setdefault(root(line.review), {}).setdefault(_key(line), line)
    return [list(group.values()) for group in groups.values()]


def encode(tokenizer: Any, lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """Tokens, their mask and the labels, [lines, `POSITIONS`] int64, int64 and [lines] int64."""
    made = tokenizer(
        [line.text for line in lines], padding="max_length", truncation=True, max_length=POSITIONS, return_tensors="np"
    )  # fmt: skip
    return {
        "input_ids": np.asarray(made["input_ids"], np.int64),
        "attention_mask": np.asarray(made["attention_mask"], np.int64),
        "labels": np.array([line.label for line in lines], np.int64),
    }


def stretched(rows: Mapping[str, np.ndarray], times: int = 1, seed: int = SEED) -> dict[str, np.ndarray]:
    """New texts without labels out of encoded ones: a stretch of one, or a stretch each of two.

    What a teacher says of them tells a student more about the teacher than the lines alone do (Tang et al.: Distilling
    task-specific knowledge from BERT into simple neural networks, 2019).

    Args:
        rows: What `encode` gave.
        times: How many for each.
        seed: Of what is chosen.
    """
    rng = np.random.default_rng(seed)
    ids, lengths = rows["input_ids"], rows["attention_mask"].sum(1)
    count = times * len(ids)
    made, mask = np.zeros((count, ids.shape[1]), np.int64), np.zeros((count, ids.shape[1]), np.int64)
    begin, end = ids[0, 0], ids[0, lengths[0] - 1]

    def stretch(row: int) -> np.ndarray:
        words = ids[row, 1 : lengths[row] - 1]
        size = rng.integers(max(1, len(words) // 3), len(words) + 1) if len(words) else 0
        start = rng.integers(0, len(words) - size + 1)
        return words[start : start + size]

    for place in range(count):
        words = stretch(place % len(ids))
        if rng.random() < 0.5:
            words = np.concatenate([words, stretch(int(rng.integers(len(ids))))])
        text = np.concatenate([[begin], words[: ids.shape[1] - 2], [end]])
        made[place, : len(text)], mask[place, : len(text)] = text, 1
    return {"input_ids": made, "attention_mask": mask, "labels": np.full(count, UNKNOWN)}


def typical(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those texts that are as long as the median one, without padding and labels."""
    lengths = rows["attention_mask"].sum(1)
    usual = int(np.median(lengths))
    return {name: rows[name][lengths == usual, :usual] for name in ("input_ids", "attention_mask")}


def joined(*parts: Mapping[str, np.ndarray], seed: int = SEED) -> dict[str, np.ndarray]:
    """All rows, mixed."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.random.default_rng(seed).permutation(len(whole["labels"]))
    return {name: array[order] for name, array in whole.items()}
