"""Hugging Face model directories: config.json, safetensors, optional tokenizer.

Nothing is fetched, and no code out of the directory runs.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import ValueRange
from deploykit.errors import ExportError, SourceError, first_line
from deploykit.exporters.base import ExportOptions, Source
from deploykit.exporters.pytorch import Call, TorchSource
from deploykit.exporters.shapes import plan_inputs
from deploykit.extras import require
from deploykit.specs import Array, TensorSpec

_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_ASSETS = (
    "config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
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

# Makes text inputs of shape [batch, sequence].
_Draw = Callable[[int, int], dict[str, Array]]


def open_model_directory(path: Path, options: ExportOptions) -> Source:
    """Load a model directory.

    Raises:
        SourceError: Unreadable, without safetensors, with missing weights, or of a kind not supported yet.
    """
    transformers = require("transformers", extra="hf")
    config = _config(transformers, path)
    if options.inputs:
        raise ExportError("--input does not apply to a Hugging Face directory, whose config names the inputs")
    model = _load(transformers, config, path)
    parameters = inspect.signature(model.forward).parameters
    assets = tuple(p for name in _ASSETS if (p := path / name).is_file())
    if getattr(config, "is_encoder_decoder", False) or ("past_key_values" in parameters and _is_decoder(config)):
        raise ExportError(
            f"{type(model).__name__} generates text; models with a decoder are not supported yet",
            hint="export a module of your own: file.py:factory",
        )
    if "pixel_values" in parameters and "input_ids" not in parameters:
        return _image_source(model, config, path, options, assets)
    if "input_ids" in parameters and "pixel_values" not in parameters:
        return _text_source(transformers, model, config, path, options, assets)
    raise ExportError(
        f"{type(model).__name__} takes {', '.join(list(parameters)[:4])}",
        expected="a text encoder (input_ids) or an image model (pixel_values)",
        hint="export a module of your own: file.py:factory",
    )


def _is_decoder(config: Any) -> bool:
    names = " ".join(getattr(config, "architectures", None) or [])
    return bool(getattr(config, "is_decoder", False)) or "CausalLM" in names or "LMHead" in names


def _config(transformers: Any, path: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as exc:
        raise SourceError(
            f"cannot read {path / 'config.json'} ({first_line(exc)})",
            expected="the config of a known architecture",
        ) from exc


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that config.json names; the name comes from a stranger, so it has to be a model's."""
    name = next(iter(getattr(config, "architectures", None) or []), None)
    if name is None:
        return transformers.AutoModel
    try:
        found = getattr(transformers, str(name), None)
    except Exception as exc:  # transformers imports on access, and the import may fail in any way
        raise SourceError(f"transformers {transformers.__version__} cannot import {name} ({first_line(exc)})") from exc
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise SourceError(
            f"transformers {transformers.__version__} has no model {name}",
            expected="a known architecture in config.json",
        )
    return found


def _load(transformers: Any, config: Any, path: Path) -> Any:
    if not any(path.glob("*.safetensors")):
        raise SourceError(
            f"{path} has no *.safetensors",
            expected="weights as safetensors (pickled .bin files may run code)",
            hint="convert them: model.save_pretrained(DIR)",
        )
    auto = _model_class(transformers, config)
    try:
        model, info = auto.from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, output_loading_info=True, dtype="float32"
        )
    except Exception as exc:
        raise SourceError(
            f"cannot load {path} as {auto.__name__} ({first_line(exc)})", hint="fetch the directory again"
        ) from exc
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        # transformers fills these with random numbers; whatever is exported then is not the user's model.
        raise SourceError(
            f"{path} lacks {len(missing)} weights of {auto.__name__}, the first is {missing[0]}",
            expected="a checkpoint of this very class",
            hint='correct "architectures" in config.json, or fetch the directory again',
        )
    if info.get("mismatched_keys"):
        raise SourceError(
            f"{path}: weights of another shape than config.json says: {sorted(info['mismatched_keys'])[0]}"
        )
    model.config.return_dict = True
    return model


def _constants(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _text_source(
    transformers: Any, model: Any, config: Any, path: Path, options: ExportOptions, assets: tuple[Path, ...]
) -> Source:
    parameters = inspect.signature(model.forward).parameters
    tokenizer = _tokenizer(transformers, path)
    wanted = set(tokenizer.model_input_names) if tokenizer else {"input_ids", "attention_mask"}
    if not tokenizer and getattr(config, "type_vocab_size", 0) > 1:
        wanted.add("token_type_ids")
    names = tuple(n for n in _TEXT_INPUTS if n in parameters and n in wanted | {"input_ids", "attention_mask"})
    longest = _longest(config)
    draw = _sentence_drawer(tokenizer, names) if tokenizer else _token_drawer(config, names)
    examples = draw(4, min(24, longest))
    specs = _text_specs(names, examples, options)
    shape = specs[0].shape or ()
    return TorchSource(
        model,
        examples,
        Call(names, 0, _constants(model)),
        options,
        str(path),
        specs=specs,
        draw=lambda sizes: draw(*specs[0].concrete(sizes)),
        ranges=_text_ranges(config, names),
        limits={str(shape[1]): (1, longest)},
        data="text" if tokenizer else "generated",
        kind="huggingface",
        assets=assets,
    )


def _text_specs(names: tuple[str, ...], examples: dict[str, Array], options: ExportOptions) -> tuple[TensorSpec, ...]:
    """`[batch, sequence]` unless the user says otherwise, and the same for every input."""
    if not options.dynamic:
        return tuple(TensorSpec(n, "int64", ("batch", "sequence")) for n in names)
    specs = plan_inputs(examples, options)
    if len({s.shape for s in specs}) > 1:
        raise ExportError(
            f"the inputs of a text model share their shape, and --dynamic makes it {', '.join(map(str, specs))}",
            hint="name the same axes for every input",
        )
    return specs


def _longest(config: Any) -> int:
    """Longest sequence that the position table allows; RoBERTa-like tables start after the padding index."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    offset = (getattr(config, "pad_token_id", None) or 0) + 1 if "roberta" in config.model_type else 0
    return int(positions) - offset


def _text_ranges(config: Any, names: tuple[str, ...]) -> dict[str, ValueRange]:
    ranges = {"input_ids": ValueRange(0, int(config.vocab_size) - 1), "attention_mask": ValueRange(1, 1)}
    ranges["token_type_ids"] = ValueRange(0, 0)
    return {n: r for n, r in ranges.items() if n in names}


def _tokenizer(transformers: Any, path: Path) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as exc:
        raise SourceError(
            f"cannot load the tokenizer of {path} ({first_line(exc)})", hint="fetch the directory again"
        ) from exc


def _sentence_drawer(tokenizer: Any, names: tuple[str, ...]) -> _Draw:
    """Inputs of any size out of real sentences: as many as the batch, cut and padded to the sequence length."""
    calls = itertools.count()

    def draw(batch: int, sequence: int) -> dict[str, Array]:
        # Other sentences at every call. A batch of one takes a long one; else mostly padding would be compared.
        turn = next(calls)
        order = _LONG if batch == 1 else range(len(_SENTENCES))
        chosen = [_SENTENCES[order[(turn + i) % len(order)]] for i in range(batch)]
        encoded = tokenizer(chosen, padding="max_length", truncation=True, max_length=sequence, return_tensors="np")
        made = {n: np.asarray(encoded[n], np.int64) for n in names if n in encoded}
        return {n: made.get(n, np.zeros_like(made["input_ids"])) for n in names}

    return draw


def _token_drawer(config: Any, names: tuple[str, ...]) -> _Draw:
    """Token ids below the vocabulary size; masks with padding at the end of every other row."""
    calls = itertools.count()

    def draw(batch: int, sequence: int) -> dict[str, Array]:
        shape = batch, sequence
        rng = np.random.default_rng(next(calls))
        mask = np.ones(shape, np.int64)
        mask[1::2, (sequence + 1) // 2 :] = 0
        made: dict[str, Array] = {
            "input_ids": rng.integers(0, int(config.vocab_size), shape),
            "attention_mask": mask,
            "token_type_ids": np.zeros(shape, np.int64),
        }
        return {n: made[n] for n in names}

    return draw


def _image_source(model: Any, config: Any, path: Path, options: ExportOptions, assets: tuple[Path, ...]) -> Source:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (
        2,
        int(getattr(config, "num_channels", 3)),
        int(options.dims.get("height", height)),
        int(options.dims.get("width", width)),
    )
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return TorchSource(
        model,
        {"pixel_values": pixels},
        Call(("pixel_values",), 0, _constants(model)),
        options,
        str(path),
        data="generated",
        kind="huggingface",
        assets=assets,
    )
