"""An encoder and a decoder with caches as two graphs; see `hf_generation` for the names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deploykit.data import ValueRange
from deploykit.errors import ExportError, first_line
from deploykit.exporters.hf_generation import (
    Graph,
    Slot,
    adapter,
    cache_of,
    presents,
    refuse_difference,
    run_adapter,
    slots_of,
    steps,
)
from deploykit.exporters.hf_inputs import Inputs, rows_of
from deploykit.exporters.hf_text import longest_text
from deploykit.exporters.torch_onnx import from_numpy, to_numpy
from deploykit.extras import require
from deploykit.specs import Array, Dim, Feeds, TensorSpec


def encoder_decoder_graphs(model: Any, source: Inputs, text: Inputs) -> tuple[Graph, Graph]:
    """The encoder with the cross-attention's keys and values, and the decoder with its cache.

    Args:
        model: Whose forward takes `decoder_input_ids` and `encoder_outputs`.
        source: Inputs of the encoder.
        text: Draws tokens for the decoder.

    Raises:
        ExportError: The cache is of a kind that tensors cannot stand for, or gives other numbers than a run without.
    """
    label = type(model).__name__
    sample = source.draw({**source.example, "batch": 2})
    own, cross = _probe_pair(model, sample, label)
    mask = "attention_mask" in sample and "input_ids" in sample
    encoder = adapter(model, _encoder_call(model, cross))
    length: Dim = "encoder_sequence"
    frames = run_adapter(encoder, sample)[cross[0].present].shape[2]
    if not any(s in source.example for s in ("sequence", "samples", "frames")):
        length = int(frames)
    decoder = adapter(model, _decoder_call(model, own, cross, mask=mask))
    specs = [TensorSpec("input_ids", "int64", ("batch", "sequence"))]
    if mask:
        specs.append(TensorSpec("encoder_attention_mask", "int64", ("batch", length)))
    specs += [s.spec("past_sequence") for s in own] + [s.spec(length) for s in cross]
    sizes = {"encoder_sequence": 10} if isinstance(length, str) else {}
    longest = longest_text(model.config.get_text_config(decoder=True))
    inputs = Inputs(
        tuple(specs),
        _pair_drawer(encoder, decoder, source, text, (own, cross), tuple(s.name for s in specs)),
        {"batch": 2, "sequence": 3, "past_sequence": 5, **sizes},
        steps({"batch": 1, **sizes}, {"batch": 3, **{k: v + 3 for k, v in sizes.items()}}),
        {"input_ids": text.ranges["input_ids"], "encoder_attention_mask": ValueRange(1, 1)},
        {"sequence": (1, longest), "past_sequence": (0, longest - 1)},
        source.data,
    )
    _check_pair(model, encoder, decoder, source, inputs, own)
    return Graph("encoder", encoder, source, {}), Graph("decoder", decoder, inputs, {})


def _probe_pair(model: Any, sample: Feeds, label: str) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    torch = require("torch", extra="torch")
    tensors = {n: from_numpy(a) for n, a in sample.items()}
    ids = torch.ones((rows_of(sample), 3), dtype=torch.long)
    try:
        with torch.no_grad():
            cache = model(**tensors, decoder_input_ids=ids, use_cache=True, return_dict=True).past_key_values
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
    except Exception as exc:
        raise ExportError(
            f"{label} does not run with a key-value cache ({first_line(exc)})",
            hint="export a module of your own: file.py:factory",
        ) from exc
    return slots_of(own, "decoder", label), slots_of(cross, "encoder", label)


def _encoder_call(model: Any, cross: Sequence[Slot]) -> Callable[..., Mapping[str, Any]]:
    torch = require("torch", extra="torch")

    def call(**tensors: Any) -> Mapping[str, Any]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        encoded = model.get_encoder()(**tensors, return_dict=True)
        hidden = encoded.last_hidden_state
        # One step of the decoder fills the cross-attention's cache; what else it computes is cut off by the exporter.
        mask = {"attention_mask": tensors["attention_mask"]} if "attention_mask" in tensors else {}
        out = model(
            encoder_outputs=encoded, use_cache=True, return_dict=True,
            decoder_input_ids=torch.zeros((hidden.shape[0], 1), dtype=torch.long),
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), **mask,
        )  # fmt: skip
        return {"last_hidden_state": hidden, **presents(out.past_key_values.cross_attention_cache, cross)}

    return call


def _decoder_call(model: Any, own: Sequence[Slot], cross: Sequence[Slot], *, mask: bool) -> Callable[..., Any]:
    width = _hidden_size(model)

    def call(**tensors: Any) -> Mapping[str, Any]:
        from transformers.cache_utils import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        keys = tensors[cross[0].past]
        # Of the encoder's output only the shape is read: its keys and values are in the cache.
        encoded = BaseModelOutput(last_hidden_state=keys.new_zeros((keys.shape[0], keys.shape[2], width)))
        encoded.attention_mask = None  # some speech encoders hand their mask on
        cache = EncoderDecoderCache(cache_of(tensors, own, grows=True), cache_of(tensors, cross, grows=False))
        cache.is_updated = dict.fromkeys(range(len(cross) // 2), True)
        extra = {"attention_mask": tensors["encoder_attention_mask"]} if mask else {}
        out = model(
            encoder_outputs=encoded, decoder_input_ids=tensors["input_ids"],
            past_key_values=cache, use_cache=True, return_dict=True, **extra,
        )  # fmt: skip
        return {"logits": out.logits, **presents(out.past_key_values.self_attention_cache, own)}

    return call


def _hidden_size(model: Any) -> int:
    config = getattr(model.config, "encoder", None) or model.config
    return int(getattr(config, "d_model", None) or config.hidden_size)


def _pair_drawer(
    encoder: Any,
    decoder: Any,
    source: Inputs,
    text: Inputs,
    slots: tuple[Sequence[Slot], Sequence[Slot]],
    names: Iterable[str],
) -> Callable[[Mapping[str, int]], dict[str, Array]]:
    """What the encoder makes of its inputs, and the past that the decoder makes of the first tokens."""
    own, cross = slots
    wanted = tuple(names)

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        batch, new, past = sizes["batch"], sizes["sequence"], sizes["past_sequence"]
        length = sizes.get("encoder_sequence")
        own_length = {"sequence": length} if length and "sequence" in source.example else {}
        given = source.draw({**source.example, **own_length, "batch": batch})
        encoded = run_adapter(encoder, given)
        # Frames of sound do not give every length: they are cut to the one that is asked for.
        made = {s.past: encoded[s.present][:, :, :length] for s in cross}
        if "encoder_attention_mask" in wanted:
            made["encoder_attention_mask"] = given["attention_mask"]
        ids = text.draw({"batch": batch, "sequence": past + new})["input_ids"]
        made |= {s.past: np.zeros((batch, s.heads, 0, s.width), np.float32) for s in own}
        if past:
            out = run_adapter(decoder, made | {"input_ids": ids[:, :past]})
            made |= {s.past: out[s.present] for s in own}
        made["input_ids"] = ids[:, past:]
        return {n: np.ascontiguousarray(made[n]) for n in wanted}

    return draw


def _check_pair(model: Any, encoder: Any, decoder: Any, source: Inputs, inputs: Inputs, own: Sequence[Slot]) -> None:
    """Refuse parts that give other numbers than the whole model."""
    torch = require("torch", extra="torch")
    given = source.draw({**source.example, "batch": 2})
    encoded = run_adapter(encoder, given)
    ids = inputs.draw({**inputs.example, "batch": 2, "sequence": 9, "past_sequence": 0})["input_ids"]
    fixed: dict[str, Array] = {n.replace("present.", "past_key_values."): a for n, a in encoded.items()}
    fixed.pop("last_hidden_state")
    if any(s.name == "encoder_attention_mask" for s in inputs.specs):
        fixed["encoder_attention_mask"] = given["attention_mask"]
    empty = {s.past: np.zeros((2, s.heads, 0, s.width), np.float32) for s in own}
    cut = 5
    start = run_adapter(decoder, {"input_ids": ids[:, :cut], **fixed, **empty})
    rest = run_adapter(decoder, {"input_ids": ids[:, cut:], **fixed, **{s.past: start[s.present] for s in own}})
    with torch.no_grad():
        tensors = {n: from_numpy(a) for n, a in given.items()}
        whole = model(**tensors, decoder_input_ids=from_numpy(ids), use_cache=False, return_dict=True).logits
    refuse_difference(np.concatenate([start["logits"], rest["logits"]], 1), to_numpy(whole), type(model).__name__)
