"""Models that generate, as graphs: the key-value cache goes in and comes out as tensors.

A decoder takes the tokens that are new, a mask over past and new ones, and the keys and values of the past, whose
length may be 0: one graph serves the prompt and every step after it. An encoder-decoder becomes two graphs: the
encoder, which also computes the keys and values of the decoder's cross-attention once, and the decoder, which takes
them as inputs. Names are those of Optimum: `past_key_values.0.key`, `present.0.key`, `past_key_values.0.decoder.key`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.data import ValueRange
from deploykit.errors import ExportError, first_line
from deploykit.exporters.hf_inputs import Inputs
from deploykit.exporters.hf_text import longest_text, token_drawer
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


def slots_of(cache: Any, side: str, label: str) -> tuple[Slot, ...]:
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


def cache_of(tensors: Mapping[str, Any], slots: Sequence[Slot], *, grows: bool) -> Any:
    """The cache that the tensors of a past stand for.

    Args:
        tensors: By the slots' names as inputs.
        slots: What the cache is made of.
        grows: False for the cross-attention, which reads and never adds.
    """
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


def presents(cache: Any, slots: Sequence[Slot]) -> dict[str, Any]:
    """The tensors of a cache, by the slots' names as outputs."""
    return {s.present: getattr(cache.layers[s.layer], "keys" if s.kind == "key" else "values") for s in slots}


def adapter(model: Any, call: Callable[..., Mapping[str, Any]]) -> Any:
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
    slots = slots_of(_probe_cache(model, text, label), "", label)

    def call(**tensors: Any) -> Mapping[str, Any]:
        extra = {"position_ids": tensors["position_ids"]} if positions else {}
        out = model(
            input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], use_cache=True, return_dict=True,
            past_key_values=cache_of(tensors, slots, grows=True), **extra,
        )  # fmt: skip
        return {"logits": out.logits, **presents(out.past_key_values, slots)}

    module = adapter(model, call)
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
        steps({"batch": 1}, {"batch": 3}),
        {"input_ids": text.ranges["input_ids"], "attention_mask": ValueRange(1, 1), "position_ids": ValueRange(0, 0)},
        {"sequence": (1, longest), "past_sequence": (0, longest - 1)},
        text.data,
    )
    _check_cache(model, module, inputs, slots, label)
    return Graph("", module, inputs, {})


def steps(one: dict[str, int], more: dict[str, int]) -> tuple[dict[str, int], ...]:
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
            out = run_adapter(module, {k: v for k, v in first.items() if k in names} | cached)
            real = mask[:, None, :past, None].astype(np.float32)  # what stands at padded positions means nothing
            cached = {s.past: np.nan_to_num(out[s.present]) * real for s in slots}
        made = {"input_ids": ids[:, past:], "attention_mask": mask, "position_ids": places[:, past:], **cached}
        return {n: np.ascontiguousarray(made[n]) for n in names}

    return draw


def run_adapter(module: Any, feeds: Feeds) -> dict[str, Array]:
    """Run a module that takes its inputs by keyword and returns a dictionary."""
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
    start = run_adapter(module, first)
    rest = {
        n: a[:, cut:] if n in ("input_ids", "position_ids") else a for n, a in text.items()
    } | {s.past: start[s.present] for s in slots}  # fmt: skip
    with torch.no_grad():
        whole = to_numpy(model(input_ids=from_numpy(text["input_ids"]), use_cache=False, return_dict=True).logits)
    got = np.concatenate([start["logits"], run_adapter(module, rest)["logits"]], 1)
    refuse_difference(got, whole, label)


def refuse_difference(got: Array, whole: Array, label: str) -> None:
    """Compare logits of a run in steps with those of one run over everything.

    Raises:
        ExportError: They differ.
    """
    error = float(np.abs(got - whole).max()) / (float(whole.std()) or 1.0)
    if not error <= _CACHE_TOLERANCE:
        raise ExportError(
            f"{label} gives other numbers with a key-value cache than without one (off by {error:.2g} of their spread)",
            expected="a model whose past is in its keys and values",
            hint="export a module of your own: file.py:factory",
        )


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
