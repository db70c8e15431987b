"""Inputs of Hugging Face models: names, dynamic axes and values for text, images and sound."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import ValueRange
from deploykit.errors import ExportError, SourceError, first_line
from deploykit.specs import Array, Dim, Feeds, TensorSpec, terms

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SAMPLE_RATE = 16000
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

Draw = Callable[[Mapping[str, int]], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What goes into one graph.

    Attributes:
        specs: Names, dtypes and shapes; symbols for all dimensions that can be dynamic.
        draw: Makes values for sizes of all the symbols; other values at every call.
        example: Sizes for the export itself; at least 2 each, for torch.export takes 0 and 1 as constants.
        check: Further sizes to compare at.
        ranges: Values that made-up inputs may take.
        limits: Smallest and largest size that the model allows, by symbol.
        data: Where the values come from: "text" or "generated".
        fixed: Symbols that are sizes of the example unless the user names their axes.
    """

    specs: tuple[TensorSpec, ...]
    draw: Draw
    example: dict[str, int]
    check: tuple[dict[str, int], ...] = ()
    ranges: dict[str, ValueRange] = field(default_factory=dict)
    limits: dict[str, tuple[int, int]] = field(default_factory=dict)
    data: str = "generated"
    fixed: frozenset[str] = frozenset()

    def by_default(self, example: Mapping[str, int]) -> tuple[TensorSpec, ...]:
        """Inputs with the dimensions that are dynamic where the user names none."""
        return tuple(
            TensorSpec(s.name, s.dtype, tuple(example[d] if d in self.fixed else d for d in s.shape or ()))  # type: ignore[index]
            for s in self.specs
        )

    def sized(self, dims: Mapping[str, int]) -> dict[str, int]:
        """Sizes for the export, with the user's in place.

        Raises:
            ExportError: A size that the model does not allow.
        """
        wanted = {k: v for k, v in dims.items() if k in self.example}
        for name, size in wanted.items():
            low, high = self.limits.get(name, (1, 1 << 30))
            if not low <= size <= high:
                raise ExportError(f"--dim {name}={size}", expected=f"{low} to {high} for this model")
        return self.example | wanted


@dataclass(frozen=True, slots=True)
class Choice:
    """The dynamic dimensions that the user wants, and how their sizes become those of `Inputs`.

    Attributes:
        specs: Inputs with the user's dimensions.
        draw: Makes values for the user's sizes.
        check: Sizes to compare at, in the user's symbols.
        limits: Sizes that the model allows, by the user's symbol.
    """

    specs: tuple[TensorSpec, ...]
    draw: Callable[[dict[str, int]], dict[str, Array]]
    check: tuple[dict[str, int], ...]
    limits: dict[str, tuple[int, int]]


def choose(inputs: Inputs, wanted: Sequence[TensorSpec], example: Mapping[str, int]) -> Choice:
    """Translate between the dimensions of a model and those that the user chose.

    Args:
        inputs: The model's.
        wanted: The same inputs with the user's dimensions.
        example: Sizes of the model's symbols in the example.

    Raises:
        ExportError: Axes that are one dimension of the model have different names or are fixed in part.
    """
    places: dict[str, Dim] = {}
    for own, asked in zip(inputs.specs, wanted, strict=True):
        for axis, (dim, user) in enumerate(zip(own.shape or (), asked.shape or (), strict=True)):
            if len(terms(dim)) > 1 or isinstance(dim, int):
                continue
            if places.setdefault(dim, user) != user:
                raise ExportError(
                    f"axis {axis} of {own.name!r} is {user!r}, where the same dimension of another input is "
                    f"{places[dim]!r}; the model's inputs share it ({', '.join(map(str, inputs.specs))})",
                    hint="name the same axes for every input",
                )

    def own_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
        there = {dim: sizes[user] for dim, user in places.items() if isinstance(user, str) and user in sizes}
        return {**example, **there}

    symbols = {dim: user for dim, user in places.items() if isinstance(user, str)}
    check: list[dict[str, int]] = []
    for sizes in inputs.check:
        mine = {user: sizes[dim] for dim, user in symbols.items()}
        if mine and mine not in check:
            check.append(mine)
    limits = {user: inputs.limits[dim] for dim, user in symbols.items() if dim in inputs.limits}
    return Choice(tuple(wanted), lambda sizes: inputs.draw(own_sizes(sizes)), tuple(check), limits)


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


def image_inputs(config: Any, path: Path) -> Inputs:
    """`pixel_values` [batch, channels, height, width]; only the batch is dynamic by default."""
    height, width = _image_size(config, path)
    channels = int(getattr(config, "num_channels", 3))
    plan = ((1, height, width), (3, 2 * height, width), (2, height, 2 * width), (5, height, width))
    return Inputs(
        (TensorSpec("pixel_values", "float32", ("batch", channels, "height", "width")),),
        _pictures(channels),
        {"batch": 2, "height": height, "width": width},
        tuple({"batch": b, "height": h, "width": w} for b, h, w in plan),
        fixed=frozenset({"height", "width"}),
    )


def _pictures(channels: int) -> Draw:
    """Pictures [batch, channels, height, width] of patches and noise, each of another brightness and contrast.

    Plain noise looks all the same to a network that averages over the picture.
    """
    calls = itertools.count()

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        height, width = sizes["height"], sizes["width"]
        rng = np.random.default_rng(next(calls))
        made = []
        for _ in range(sizes["batch"]):
            side = int(rng.integers(2, 6))
            patches = rng.standard_normal((channels, side, side))
            rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
            light, contrast = rng.standard_normal((channels, 1, 1)), rng.uniform(0.3, 1.5)
            noise = rng.standard_normal((channels, height, width)) * rng.uniform(0.1, 0.5)
            made.append(light + contrast * patches[:, rows][:, :, columns] + noise)
        return {"pixel_values": np.stack(made).astype(np.float32)}

    return draw


def _image_size(config: Any, path: Path) -> tuple[int, int]:
    """Height and width: what the preprocessor makes, else the config's, else 224 x 224."""
    found = _preprocessor(path)
    for name in ("crop_size", "size"):
        size = found.get(name)
        if isinstance(size, int):
            return size, size
        if isinstance(size, dict) and isinstance(size.get("height"), int) and isinstance(size.get("width"), int):
            return size["height"], size["width"]
        if isinstance(size, dict) and isinstance(size.get("shortest_edge"), int):
            return size["shortest_edge"], size["shortest_edge"]
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _preprocessor(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "preprocessor_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def audio_inputs(config: Any, path: Path, main: str, parameters: Sequence[str]) -> Inputs:
    """Waveforms [batch, samples], or spectrograms of the shape that the model's front end makes."""
    mels = next((int(m) for n in ("num_mel_bins", "input_feat_per_channel") if (m := getattr(config, n, None))), None)
    if main == "input_features" and hasattr(config, "max_source_positions") and "whisper" in config.model_type:
        fixed = (mels or 80, 2 * int(config.max_source_positions))
        return _spectrograms(main, lambda batch: (batch, *fixed), ("batch", *fixed))
    if main == "input_values" and mels and hasattr(config, "max_length"):  # audio spectrogram transformers
        fixed = (int(config.max_length), mels)
        return _spectrograms(main, lambda batch: (batch, *fixed), ("batch", *fixed))
    if main == "input_values":
        return _waveforms(config, path, parameters)
    width = mels or int(getattr(config, "feature_projection_input_dim", 0) or 0)
    if not width:
        raise ExportError(
            f"the shape of {main!r} does not follow from a config of type {config.model_type}",
            hint="export a module of your own: file.py:factory",
        )
    spec = TensorSpec(main, "float32", ("batch", "frames", width))
    draw = _noise(main, lambda sizes: (sizes["batch"], sizes["frames"], width))
    check = tuple({"batch": b, "frames": f} for b, f in ((1, 64), (3, 128), (2, 50)))
    return Inputs((spec,), draw, {"batch": 2, "frames": 64}, check)


def _spectrograms(name: str, shape: Callable[[int], tuple[int, ...]], dims: tuple[Dim, ...]) -> Inputs:
    return Inputs(
        (TensorSpec(name, "float32", dims),),
        _noise(name, lambda sizes: shape(sizes["batch"])),
        {"batch": 2},
        ({"batch": 1}, {"batch": 3}),
    )


def _waveforms(config: Any, path: Path, parameters: Sequence[str]) -> Inputs:
    """Half a second and more at 16 kHz; a mask where the model was trained with one."""
    found = _preprocessor(path).get("return_attention_mask")
    masked = "attention_mask" in parameters and bool(
        found if found is not None else getattr(config, "feat_extract_norm", "layer") == "layer"
    )
    names = ("input_values", "attention_mask") if masked else ("input_values",)
    length = SAMPLE_RATE // 2
    noise = _noise("input_values", lambda sizes: (sizes["batch"], sizes["samples"]))

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        made = noise(sizes)
        mask = np.ones(made["input_values"].shape, np.int64)
        mask[1::2, -sizes["samples"] // 4 :] = 0
        if masked:
            made = {"input_values": made["input_values"] * mask.astype(np.float32), "attention_mask": mask}
        return made

    specs = [TensorSpec("input_values", "float32", ("batch", "samples"))]
    specs += [TensorSpec(n, "int64", ("batch", "samples")) for n in names[1:]]
    plan = ((1, length), (3, length * 2), (2, length - length // 3), (4, length + 1))
    return Inputs(
        tuple(specs),
        draw,
        {"batch": 2, "samples": length},
        tuple({"batch": b, "samples": n} for b, n in plan),
        {n: ValueRange(1, 1) for n in names[1:]},
    )


def _noise(name: str, shape: Callable[[Mapping[str, int]], tuple[int, ...]]) -> Draw:
    """Normally distributed values; other ones at every call."""
    calls = itertools.count()

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        rng = np.random.default_rng(next(calls))
        return {name: rng.standard_normal(shape(sizes)).astype(np.float32)}

    return draw


def joined(first: Inputs, second: Inputs) -> Inputs:
    """The inputs of two towers of one graph; their batches are dimensions of their own."""

    def renamed(spec: TensorSpec, role: str) -> TensorSpec:
        dims = tuple(f"{role}_batch" if d == "batch" else d for d in spec.shape or ())
        return TensorSpec(spec.name, spec.dtype, dims)

    def own(sizes: Mapping[str, int], role: str) -> dict[str, int]:
        return {k.removeprefix(f"{role}_"): v for k, v in sizes.items()}

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        return {**first.draw(own(sizes, "text")), **second.draw(own(sizes, "image"))}

    rest = {k: v for k, v in (first.example | second.example).items() if k != "batch"}
    example = {"text_batch": 3, "image_batch": 2} | rest
    check = tuple(
        example | {"text_batch": t, "image_batch": i} | {k: v for k, v in one.items() if k != "batch"}
        for t, i, one in zip((1, 2, 4), (1, 3, 2), itertools.cycle(first.check), strict=False)
    )
    specs = tuple(renamed(s, "text") for s in first.specs) + tuple(renamed(s, "image") for s in second.specs)
    return Inputs(
        specs, draw, example, check, first.ranges | second.ranges, first.limits | second.limits, first.data,
        first.fixed | second.fixed,
    )  # fmt: skip


def rows_of(feeds: Feeds) -> int:
    """Batch size of a set of inputs."""
    return len(next(iter(feeds.values())))
