"""Models that generate, as graphs: the key-value cache goes in and comes out as tensors.

A decoder takes the tokens that are new, a mask over past and new ones, and the keys and values of the past, whose
length may be 0: one graph serves the prompt and every step after it. An encoder-decoder becomes two graphs: the
encoder, which also computes the keys and values of the decoder's cross-attention once, and the decoder, which takes
them as inputs. Names are those of Optimum: `past_key_values.0.key`, `present.0.key`, `past_key_values.0.decoder.key`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.data import ValueRange
from deploykit.errors import ExportError, first_line
from deploykit.exporters.hf_inputs import Inputs, longest_text, rows_of, token_drawer
from deploykit.exporters.torch_onnx import from_numpy, to_numpy
from deploykit.extras import require
from deploykit.specs import Array, Dim, Feeds, TensorSpec

_FULL_PAST = "past_sequence + sequence"
# Of the numbers with a cache from those without one, relative to the spread of the outputs.
_CACHE_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a cache: [batch, heads, length, width].

    Attributes:
        layer: Number of the layer.
        kind: "key" or "value".
        side: "" for a decoder alone, "decoder" or "encoder" (cross-attention) beside an encoder.
        heads: Heads that have keys of their own.
        width: Size of one head.
    """

    layer: int
    kind: str
    side: str
    heads: int
    width: int

    @property
    def past(self) -> str:
        """Name as an input."""
        return f"past_key_values.{self._tail}"

    @property
    def present(self) -> str:
        """Name as an output."""
        return f"present.{self._tail}"

    @property
    def _tail(self) -> str:
        return ".".join(filter(None, (str(self.layer), self.side, self.kind)))

    def spec(self, length: Dim, batch: str = "batch") -> TensorSpec:
        """As an input whose past has ``length``."""
        return TensorSpec(self.past, "float32", (batch, self.heads, length, self.width))


def _slots(cache: Any, side: str, label: str) -> tuple[Slot, ...]:
    """The tensors that a cache is made of.

    Raises:
        ExportError: It holds something else than growing keys and values.
    """
    found = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or type(layer).__name__ != "DynamicLayer":
            raise ExportError(
                f"{label} keeps {type(layer).__name__} in layer {number}",
                expected="keys and values that grow with the text",
                hint="export a module of your own: file.py:factory",
            )
        for kind, tensor in (("key", keys), ("value", values)):
            found.append(Slot(number, kind, side, int(tensor.shape[1]), int(tensor.shape[3])))
    return tuple(found)


def _cache_of(tensors: Mapping[str, Any], slots: Sequence[Slot], *, grows: bool) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    by_place = {(s.layer, s.kind): tensors[s.past] for s in slots}
    for number in range(len(slots) // 2):
        layer = DynamicLayer()
        keys, values = by_place[number, "key"], by_place[number, "value"]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    if not grows:
        cache.layer_class_to_replicate = None
    return cache


def _presents(cache: Any, slots: Sequence[Slot]) -> dict[str, Any]:
    return {s.present: getattr(cache.layers[s.layer], "keys" if s.kind == "key" else "values") for s in slots}


def _module(model: Any, call: Callable[..., Mapping[str, Any]]) -> Any:
    """A module whose forward is ``call``."""
    torch = require("torch", extra="torch")

    class Adapter(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **tensors: Any) -> Mapping[str, Any]:
            return call(**tensors)

    return Adapter().eval()


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph that a model becomes.

    Attributes:
        name: Of the part; empty where the model is one graph.
        module: Takes the inputs by keyword.
        inputs: What goes in.
        constants: Keyword arguments that are no tensors.
    """

    name: str
    module: Any
    inputs: Inputs
    constants: Mapping[str, Any]


def decoder_graph(model: Any, text: Inputs, parameters: Sequence[str]) -> Graph:
    """A decoder with its cache.

    Raises:
        ExportError: The cache is of a kind that tensors cannot stand for, or gives other numbers than a run without.
    """
    label = type(model).__name__
    positions = "position_ids" in parameters
    slots = _slots(_probe_cache(model, text, label), "", label)

    def call(**tensors: Any) -> Mapping[str, Any]:
        extra = {"position_ids": tensors["position_ids"]} if positions else {}
        out = model(
            input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], use_cache=True, return_dict=True,
            past_key_values=_cache_of(tensors, slots, grows=True), **extra,
        )  # fmt: skip
        return {"logits": out.logits, **_presents(out.past_key_values, slots)}

    module = _module(model, call)
    batch = [TensorSpec("input_ids", "int64", ("batch", "sequence"))]
    batch.append(TensorSpec("attention_mask", "int64", ("batch", _FULL_PAST)))
    if positions:
        batch.append(TensorSpec("position_ids", "int64", ("batch", "sequence")))
    specs = (*batch, *(s.spec("past_sequence") for s in slots))
    longest = longest_text(model.config.get_text_config(decoder=True))
    inputs = Inputs(
        specs,
        _decoder_drawer(module, specs, text, slots),
        {"batch": 2, "sequence": 3, "past_sequence": 6},
        _steps({"batch": 1}, {"batch": 3}),
        {"input_ids": text.ranges["input_ids"], "attention_mask": ValueRange(1, 1), "position_ids": ValueRange(0, 0)},
        {"sequence": (1, longest), "past_sequence": (0, longest - 1)},
        text.data,
    )
    _check_cache(model, module, inputs, slots, label)
    return Graph("", module, inputs, {})


def _steps(one: dict[str, int], more: dict[str, int]) -> tuple[dict[str, int], ...]:
    """A single step, a prompt without a past, several tokens at once, a prompt of several texts."""
    return (
        {**one, "sequence": 1, "past_sequence": 7},
        {**one, "sequence": 6, "past_sequence": 0},
        {**more, "sequence": 2, "past_sequence": 4},
        {**more, "sequence": 5, "past_sequence": 0},
    )


def _probe_cache(model: Any, text: Inputs, label: str) -> Any:
    torch = require("torch", extra="torch")
    from transformers.cache_utils import DynamicCache

    ids = from_numpy(text.draw({"batch": 1, "sequence": 4})["input_ids"])
    try:
        with torch.no_grad():
            cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True, return_dict=True)
            cache = cache.past_key_values
    except Exception as exc:
        raise ExportError(
            f"{label} does not run with a key-value cache ({first_line(exc)})",
            hint="export a module of your own: file.py:factory",
        ) from exc
    if cache is None or not getattr(cache, "layers", None):
        raise ExportError(f"{label} gives no key-value cache", hint="export a module of your own: file.py:factory")
    return cache


def _decoder_drawer(
    module: Any, specs: Sequence[TensorSpec], text: Inputs, slots: Sequence[Slot]
) -> Callable[[Mapping[str, int]], dict[str, Array]]:
    """Texts cut in two: the model itself makes the past of the first part, the second part is new.

    Every other row of a batch with a past begins with padding, as batches of prompts of unequal length do.
    """
    names = [s.name for s in specs]

    def draw(sizes: Mapping[str, int]) -> dict[str, Array]:
        batch, new, past = sizes["batch"], sizes["sequence"], sizes["past_sequence"]
        ids = text.draw({"batch": batch, "sequence": past + new})["input_ids"]
        mask = np.ones((batch, past + new), np.int64)
        if past > 2:
            mask[1::2, :2] = 0
        places = np.maximum(np.cumsum(mask, 1) - 1, 0)
        cached = {s.past: np.zeros((batch, s.heads, 0, s.width), np.float32) for s in slots}
        if past:
            # Token by token would be slower; the padded positions come first and are masked from then on.
            first = {"input_ids": ids[:, :past], "attention_mask": mask[:, :past], "position_ids": places[:, :past]}
            out = _run(module, {k: v for k, v in first.items() if k in names} | cached)
            real = mask[:, None, :past, None].astype(np.float32)  # what stands at padded positions means nothing
            cached = {s.past: np.nan_to_num(out[s.present]) * real for s in slots}
        made = {"input_ids": ids[:, past:], "attention_mask": mask, "position_ids": places[:, past:], **cached}
        return {n: np.ascontiguousarray(made[n]) for n in names}

    return draw


def _run(module: Any, feeds: Feeds) -> dict[str, Array]:
    torch = require("torch", extra="torch")
    with torch.no_grad():
        out = module(**{n: from_numpy(a) for n, a in feeds.items()})
    return {n: to_numpy(t) for n, t in out.items()}


def _check_cache(model: Any, module: Any, inputs: Inputs, slots: Sequence[Slot], label: str) -> None:
    """Refuse a cache that gives other numbers than the model gives for the whole text at once."""
    torch = require("torch", extra="torch")
    text = inputs.draw({"batch": 2, "sequence": 9, "past_sequence": 0})
    cut = 5
    first = {n: a[:, :cut] if n in ("input_ids", "attention_mask", "position_ids") else a for n, a in text.items()}
    start = _run(module, first)
    rest = {
        n: a[:, cut:] if n in ("input_ids", "position_ids") else a for n, a in text.items()
    } | {s.past: start[s.present] for s in slots}  # fmt: skip
    with torch.no_grad():
        whole = to_numpy(model(input_ids=from_numpy(text["input_ids"]), use_cache=False, return_dict=True).logits)
    got = np.concatenate([start["logits"], _run(module, rest)["logits"]], 1)
    _refuse_difference(got, whole, label)


def _refuse_difference(got: Array, whole: Array, label: str) -> None:
    error = float(np.abs(got - whole).max()) / (float(whole.std()) or 1.0)
    if not error <= _CACHE_TOLERANCE:
        raise ExportError(
            f"{label} gives other numbers with a key-value cache than without one (off by {error:.2g} of their spread)",
            expected="a model whose past is in its keys and values",
            hint="export a module of your own: file.py:factory",
        )


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
    encoder = _module(model, _encoder_call(model, cross))
    length: Dim = "encoder_sequence"
    frames = _run(encoder, sample)[cross[0].present].shape[2]
    if not any(s in source.example for s in ("sequence", "samples", "frames")):
        length = int(frames)
    decoder = _module(model, _decoder_call(model, own, cross, mask=mask))
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
        _steps({"batch": 1, **sizes}, {"batch": 3, **{k: v + 3 for k, v in sizes.items()}}),
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
    return _slots(own, "decoder", label), _slots(cross, "encoder", label)


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
        return {"last_hidden_state": hidden, **_presents(out.past_key_values.cross_attention_cache, cross)}

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
        cache = EncoderDecoderCache(_cache_of(tensors, own, grows=True), _cache_of(tensors, cross, grows=False))
        cache.is_updated = dict.fromkeys(range(len(cross) // 2), True)
        extra = {"attention_mask": tensors["encoder_attention_mask"]} if mask else {}
        out = model(
            encoder_outputs=encoded, decoder_input_ids=tensors["input_ids"],
            past_key_values=cache, use_cache=True, return_dict=True, **extra,
        )  # fmt: skip
        return {"logits": out.logits, **_presents(out.past_key_values.self_attention_cache, own)}

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
        encoded = _run(encoder, given)
        # Frames of sound do not give every length: they are cut to the one that is asked for.
        made = {s.past: encoded[s.present][:, :, :length] for s in cross}
        if "encoder_attention_mask" in wanted:
            made["encoder_attention_mask"] = given["attention_mask"]
        ids = text.draw({"batch": batch, "sequence": past + new})["input_ids"]
        made |= {s.past: np.zeros((batch, s.heads, 0, s.width), np.float32) for s in own}
        if past:
            out = _run(decoder, made | {"input_ids": ids[:, :past]})
            made |= {s.past: out[s.present] for s in own}
        made["input_ids"] = ids[:, past:]
        return {n: np.ascontiguousarray(made[n]) for n in wanted}

    return draw


def _check_pair(model: Any, encoder: Any, decoder: Any, source: Inputs, inputs: Inputs, own: Sequence[Slot]) -> None:
    """Refuse parts that give other numbers than the whole model."""
    torch = require("torch", extra="torch")
    given = source.draw({**source.example, "batch": 2})
    encoded = _run(encoder, given)
    ids = inputs.draw({**inputs.example, "batch": 2, "sequence": 9, "past_sequence": 0})["input_ids"]
    fixed: dict[str, Array] = {n.replace("present.", "past_key_values."): a for n, a in encoded.items()}
    fixed.pop("last_hidden_state")
    if any(s.name == "encoder_attention_mask" for s in inputs.specs):
        fixed["encoder_attention_mask"] = given["attention_mask"]
    empty = {s.past: np.zeros((2, s.heads, 0, s.width), np.float32) for s in own}
    cut = 5
    start = _run(decoder, {"input_ids": ids[:, :cut], **fixed, **empty})
    rest = _run(decoder, {"input_ids": ids[:, cut:], **fixed, **{s.past: start[s.present] for s in own}})
    with torch.no_grad():
        tensors = {n: from_numpy(a) for n, a in given.items()}
        whole = model(**tensors, decoder_input_ids=from_numpy(ids), use_cache=False, return_dict=True).logits
    _refuse_difference(np.concatenate([start["logits"], rest["logits"]], 1), to_numpy(whole), type(model).__name__)


def decoder_tokens(config: Any) -> Inputs:
    """Draws tokens for a decoder that has no tokenizer of its own."""
    text = config.get_text_config(decoder=True)
    draw = token_drawer(text, ("input_ids",))
    return Inputs(
        (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        lambda sizes: draw(sizes["batch"], sizes["sequence"]),
        {"batch": 2, "sequence": 8},
        ranges={"input_ids": ValueRange(0, int(text.vocab_size) - 1)},
    )
