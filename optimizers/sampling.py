"""Samples of what products are really given: a bounded number of rows, and the extremes of each channel over all data.

Rows are chosen by a deterministic reservoir: each gets a pseudo-random key in the order in which it comes, and the rows
with the smallest keys stay, so that neither the number of samples nor the batch size changes what is kept or how much
memory it takes. Positions that an attention mask calls padding are left out: nothing reads their results.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.errors import OptimizationError
from deploykit.optimizers.base import Opener
from deploykit.optimizers.products import Product
from deploykit.specs import Array, Feeds
from deploykit.weights import LightModel, write_light

if TYPE_CHECKING:
    import onnx

# A fresh pass over the calibration data.
Feeder = Callable[[], Iterator[Feeds]]

_MASK = "attention_mask"
# Beyond this a value is a mask constant (-3.4e38), and no error can be computed.
_MASK_MAGNITUDE = 1e30
# Rows of all products that are sampled in one pass; beyond it, there is another pass.
_BUDGET_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """What a product was given.

    Attributes:
        rows: Rows at random places, `[groups, n, inputs]`.
        low: Smallest value of each input channel, over everything; `[channels]`.
        high: Largest.
    """

    rows: Array
    low: Array
    high: Array


class _Reservoir:
    def __init__(self, product: Product, limit: int) -> None:
        self._product, self._limit = product, limit
        self._draw = np.random.default_rng(zlib.crc32(product.data.encode()))
        self._keys = np.empty(0)
        self._rows: Array | None = None
        self._low: Array | None = None
        self._high: Array | None = None

    def update(self, values: Array, real: Array | None) -> None:
        """Look at one batch; ``real`` says which of its leading positions count."""
        if values.size == 0:
            return
        values = np.asarray(values, np.float32)
        axis = self._product.channel_axis % values.ndim
        others = tuple(i for i in range(values.ndim) if i != axis)
        low, high = values.min(axis=others), values.max(axis=others)
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)
        source = self._product.rows(values)
        keys = self._draw.random(source.count)
        if real is not None and not self._product.window:
            inner = values.shape[real.ndim : -1]
            keys[~np.broadcast_to(real.reshape(*real.shape, *[1] * len(inner)), values.shape[:-1]).ravel()] = 2
        edge = min(1.0, self._keys.max()) if len(self._keys) >= self._limit else 1.0
        numbers = np.flatnonzero(keys < edge)
        numbers = numbers[np.argsort(keys[numbers], kind="stable")[: self._limit]]
        if not len(numbers):
            return
        fresh = source.take(numbers)
        self._rows = fresh if self._rows is None else np.concatenate([self._rows, fresh], axis=1)
        self._keys = np.concatenate([self._keys, keys[numbers]])
        if len(self._keys) > self._limit:
            kept = np.argsort(self._keys, kind="stable")[: self._limit]
            self._keys, self._rows = self._keys[kept], self._rows[:, kept]

    def result(self) -> Sample | None:
        """None where no row was seen, or not all values are finite and of a size that can be computed with."""
        if self._rows is None or self._low is None or self._high is None:
            return None
        # Extremes of NaN are NaN, so that these speak for the rows too.
        if not (np.abs(self._low) < _MASK_MAGNITUDE).all() or not (np.abs(self._high) < _MASK_MAGNITUDE).all():
            return None
        return Sample(self._rows, self._low, self._high)


def real_positions(feeds: Feeds, values: Array) -> Array | None:
    """Which positions are no padding, by the model's attention mask; None without one.

    Returns:
        ``[batch, length]`` for values of ``[batch, length, …]``, ``[batch * length]`` for flattened ones.
    """
    mask = feeds.get(_MASK)
    if mask is None or mask.ndim != 2:
        return None
    if values.ndim >= 3 and values.shape[:2] == mask.shape:
        return np.asarray(mask != 0)
    # Gemm takes positions of all samples in one axis.
    return np.asarray(mask != 0).reshape(-1) if values.ndim == 2 and len(values) == mask.size > len(mask) else None


def sample_rows(
    light: LightModel,
    products: Sequence[Product],
    feeder: Feeder,
    open_model: Opener,
    folder: Path,
    *,
    limit: int,
) -> Iterator[dict[str, Sample]]:
    """Run the model over the data, and keep rows of what the products are given.

    Args:
        light: Left as it is, until the next group is asked for.
        products: Whose inputs to watch.
        feeder: Gives the batches, once for each pass.
        open_model: Opens a model file for inference.
        folder: For copies of the model.
        limit: Rows kept of each product.

    Yields:
        Samples by the product's name, as many products at once as fit into bounded memory; a product that saw no row,
        or none that is finite, is missing.

    Raises:
        OptimizationError: There was no batch.
    """
    for part in _parts(products, limit):
        # Branches that read the same tensor in the same way share their rows.
        shared = {_key(p): _Reservoir(p, limit) for p in part}
        for feeds, outputs in run_exposed(light, [p.data for p in part], feeder(), open_model, folder):
            for (data, *_), reservoir in shared.items():
                values = outputs[str(data)]
                reservoir.update(values, real_positions(feeds, values))
        results = {key: reservoir.result() for key, reservoir in shared.items()}
        yield {p.name: found for p in part if (found := results[_key(p)]) is not None}


def run_exposed(
    light: LightModel, tensors: Iterable[str], batches: Iterable[Feeds], open_model: Opener, folder: Path
) -> Iterator[tuple[Feeds, dict[str, Array]]]:
    """Run a model with inner tensors among its outputs; each batch is forgotten once it was looked at.

    Yields:
        The feeds, and the tensors by name (inputs of the graph too).

    Raises:
        OptimizationError: There was no batch.
    """
    import onnx

    names = list(dict.fromkeys(tensors))
    proto = onnx.ModelProto()
    proto.CopyFrom(light.proto)
    _expose(proto, names)
    with tempfile.TemporaryDirectory(prefix=".exposed-", dir=folder) as place:
        file = Path(place) / "exposed.onnx"
        write_light(LightModel(proto, light.folder), file)
        del proto
        run = open_model(file)
        seen = False
        for feeds in batches:
            seen = True
            outputs = run(feeds)
            yield feeds, {n: np.asarray(outputs[n] if n in outputs else feeds[n]) for n in names}
    if not seen:
        raise OptimizationError("the calibration data hold no batch", expected="at least one sample")


def _expose(model: onnx.ModelProto, names: Iterable[str]) -> None:
    import onnx

    there = {v.name for v in (*model.graph.output, *model.graph.input)}
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    for name in names:
        if name not in there:
            # Without a shape: a wrong one would be an error, a missing one is not.
            kind = kinds.get(name, onnx.TensorProto.FLOAT)
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))


def _key(product: Product) -> tuple[object, ...]:
    return (product.data, product.window, product.groups)


def _parts(products: Sequence[Product], limit: int) -> Iterator[list[Product]]:
    """Cut a list so that the samples of each piece fit into the budget."""
    part: list[Product] = []
    seen: set[tuple[object, ...]] = set()
    used = 0
    for product in products:
        size = 0 if _key(product) in seen else 4 * limit * math.prod((product.groups, product.inputs))
        if part and used + size > _BUDGET_BYTES:
            yield part
            part, seen, used = [], set(), 0
            size = 4 * limit * math.prod((product.groups, product.inputs))
        part.append(product)
        seen.add(_key(product))
        used += size
    if part:
        yield part
