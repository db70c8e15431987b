"""Text for Hugging Face models: token ids, masks, segments and places on a page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import ValueRange
from deploykit.errors import SourceError, first_line
from deploykit.exporters.hf_inputs import Inputs
from deploykit.specs import Array, TensorSpec

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_PAGE = 1000
# Sentences of different lengths, so that the parity check sees real tokens and real padding.
_SENTENCES = (
    "Yes.",
    "The parcel arrived two days late, but nothing was broken.",
    "Could you tell me how to reset the password of an account that I can no longer reach by e-mail?",
    "Rain is expected in the north tomorrow.",
    "Quarterly revenue rose by 4.2 % to $31.7 million, while costs fell; the board raised its forecast.",
    "A short walk along the river, past the old mill and the wooden bridge, leads to a meadow where, in early "
    "summer, hundreds of orchids bloom between the tall grass and visitors come from far away to see them.",
    "I would not buy it again!",
    "Le train part à huit heures.",
)
_LONG = (5, 4, 2)


def text_inputs(transformers: Any, config: Any, path: Path, parameters: Sequence[str]) -> Inputs:
    """Token ids, mask and segments, [batch, sequence]; real sentences where there is a tokenizer."""
    tokenizer = load_tokenizer(transformers, path)
    wanted = set(tokenizer.model_input_names) if tokenizer else {"input_ids", "attention_mask"}
    if not tokenizer and getattr(config, "type_vocab_size", 0) > 1:
        wanted.add("token_type_ids")
    wanted |= {"input_ids", "attention_mask"}
    names = tuple(n for n in TEXT_INPUTS if n in parameters and n in wanted)
    longest = longest_text(config)
    draw = _sentence_drawer(tokenizer, names) if tokenizer else token_drawer(config, names)
    sequence = min(24, longest)
    ranges = {
        "input_ids": ValueRange(0, int(config.vocab_size) - 1),
        "attention_mask": ValueRange(1, 1),
        "token_type_ids": ValueRange(0, 0),
    }
    plan = ((1, sequence), (3, 2 * sequence), (2, sequence // 2 + 1), (5, sequence + 3))
    specs = [TensorSpec(n, "int64", ("batch", "sequence")) for n in names]
    if "bbox" in parameters:  # models of documents: where on the page a token stands
        specs.append(TensorSpec("bbox", "int64", ("batch", "sequence", 4)))
        ranges["bbox"] = ValueRange(0, _PAGE)
        names, draw = (*names, "bbox"), _with_boxes(draw)
    return Inputs(
        tuple(specs),
        lambda sizes: draw(sizes["batch"], sizes["sequence"]),
        {"batch": 4, "sequence": sequence},
        tuple({"batch": b, "sequence": min(s, longest)} for b, s in plan),
        {n: r for n, r in ranges.items() if n in names},
        {"sequence": (1, longest)},
        "text" if tokenizer else "generated",
    )


def _with_boxes(draw: Callable[[int, int], dict[str, Array]]) -> Callable[[int, int], dict[str, Array]]:
    """Boxes [batch, sequence, 4] of left, top, right, bottom in thousandths of the page."""
    calls = itertools.count()

    def drawn(batch: int, sequence: int) -> dict[str, Array]:
        rng = np.random.default_rng(next(calls))
        corners = np.sort(rng.integers(0, _PAGE + 1, (batch, sequence, 2, 2)), axis=2)
        return {**draw(batch, sequence), "bbox": corners.reshape(batch, sequence, 4)}

    return drawn


def longest_text(config: Any) -> int:
    """Longest sequence that the position table allows; RoBERTa-like tables start after the padding index."""
    for name in ("max_position_embeddings", "n_positions", "max_target_positions", "max_decoder_position_embeddings"):
        positions = getattr(config, name, None)
        if isinstance(positions, int) and positions > 0:
            break
    else:
        positions = 512
    offset = (getattr(config, "pad_token_id", None) or 0) + 1 if "roberta" in config.model_type else 0
    return int(positions) - offset


def load_tokenizer(transformers: Any, path: Path) -> Any:
    """The directory's tokenizer, or None.

    Raises:
        SourceError: It is there and cannot be loaded.
    """
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as exc:
        raise SourceError(
            f"cannot load the tokenizer of {path} ({first_line(exc)})", hint="fetch the directory again"
        ) from exc


def _sentence_drawer(tokenizer: Any, names: tuple[str, ...]) -> Callable[[int, int], dict[str, Array]]:
    """Inputs of any size out of real sentences: as many as the batch, cut and padded to the sequence length."""
    calls = itertools.count()
    if tokenizer.pad_token is None:  # models that generate often have none; what stands there is masked anyway
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def draw(batch: int, sequence: int) -> dict[str, Array]:
        # Other sentences at every call. A batch of one takes a long one; else mostly padding would be compared.
        turn = next(calls)
        order = _LONG if batch == 1 else range(len(_SENTENCES))
        chosen = [_SENTENCES[order[(turn + i) % len(order)]] for i in range(batch)]
        encoded = tokenizer(
            chosen, padding="max_length", truncation=True, max_length=sequence, return_tensors="np",
            padding_side="right",
        )  # fmt: skip
        made = {n: np.asarray(encoded[n], np.int64) for n in names if n in encoded}
        return {n: made.get(n, np.zeros_like(made["input_ids"])) for n in names}

    return draw


def token_drawer(config: Any, names: tuple[str, ...]) -> Callable[[int, int], dict[str, Array]]:
    """Token ids below the vocabulary size; masks with padding at the end of every other row.

    The end-of-text token is the last of every row and nowhere else: text towers pool there.
    """
    calls = itertools.count()
    end = getattr(config, "eos_token_id", None)
    special = {t for t in (end, getattr(config, "pad_token_id", None)) if isinstance(t, int)}
    legal = np.array([t for t in range(int(config.vocab_size)) if t not in special])

    def draw(batch: int, sequence: int) -> dict[str, Array]:
        shape = batch, sequence
        rng = np.random.default_rng(next(calls))
        mask = np.ones(shape, np.int64)
        mask[1::2, (sequence + 1) // 2 :] = 0
        ids = rng.choice(legal, shape)
        if isinstance(end, int) and end < int(config.vocab_size):
            ids[np.arange(batch), mask.sum(1) - 1] = end
        made: dict[str, Array] = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": mask,
            "token_type_ids": np.zeros(shape, np.int64),
        }
        return {n: made[n] for n in names}

    return draw
