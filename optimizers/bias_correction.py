"""Bias correction: take out of each layer's result what rounding shifts its mean by.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019, arXiv:1906.04721),
section 4.2: rounding errors do not average out over an output channel, and the shift that they leave can be taken off
its bias.

- Fast: the shift that a layer makes itself, `E[Q(x) Q(W) - x W]` over sampled rows of its inputs in floating point: the
  mean of the input times the error of the weights, and the rounding of the input. Layer by layer, none waits for
  another.
- Full: the quantized model runs, and its channels' means are compared with those of the model in floating point, so
  that what earlier layers shifted is seen too. Layers are corrected in the order of their depth, a bounded number of
  depths at once; where a pass corrects several depths, it is done twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.optimizers.base import Opener
from deploykit.optimizers.biases import Biases
from deploykit.optimizers.editing import Editor
from deploykit.optimizers.products import Product
from deploykit.optimizers.ranges import Ranges
from deploykit.optimizers.sampling import Feeder, real_positions, run_exposed, sample_rows
from deploykit.optimizers.scheme import Scheme, rounded_activation
from deploykit.progress import Progress
from deploykit.specs import Array, Feeds
from deploykit.weights import LightModel

if TYPE_CHECKING:
    import onnx

# Makes the quantized copy of a model, which is left as it is.
Quantizer = Callable[[LightModel], LightModel]

_ROWS = 1024
_PASSES = 12


def correct_fast(
    light: LightModel,
    reference: LightModel,
    products: Sequence[Product],
    biases: Biases,
    ranges: Ranges,
    scheme: Scheme,
    feeder: Feeder,
    open_model: Opener,
    folder: Path,
    progress: Progress,
) -> int:
    """Correct each layer for the shift that it makes itself.

    Args:
        light: The model.
        reference: What it was before any weight was rounded or any bias shifted.
        products: The layers.
        biases: Theirs, which are shifted.
        ranges: Of activations.
        scheme: How weights are rounded.
        feeder: Gives calibration batches.
        open_model: Opens a model file for inference.
        folder: For copies of the model.
        progress: Told how far it is.

    Returns:
        The number of layers that were corrected.
    """
    editor, before, done = Editor(light), Editor(reference), 0
    known = [p for p in products if p.name in biases and p.data in ranges.low]
    by_name = {p.name: p for p in known}
    for samples in sample_rows(reference, known, feeder, open_model, folder, limit=_ROWS):
        for name, sample in samples.items():
            product = by_name[name]
            weight = product.matrix(editor.read(product.weight))
            rows = rounded_activation(sample.rows, ranges.low[product.data], ranges.high[product.data])
            errors = rows @ scheme.rounded(weight)
            errors -= sample.rows @ product.matrix(before.read(product.weight))
            shift, noise = errors.mean(axis=1), errors.var(axis=1) / errors.shape[1]
            # A mean that is no larger than its own uncertainty is taken for what it is worth.
            trusted = shift**2 / np.maximum(shift**2 + noise, 1e-30)
            biases.shift(name, -(shift * trusted))
            done += 1
            progress.advance(done, len(known), "layers")
    return done


def correct_fully(
    light: LightModel,
    reference: LightModel,
    products: Sequence[Product],
    biases: Biases,
    quantize: Quantizer,
    feeder: Feeder,
    open_model: Opener,
    folder: Path,
    progress: Progress,
) -> int:
    """Correct each layer for the shift that the quantized model has there; see `correct_fast`.

    Args:
        light: The model.
        reference: What it was before any weight was rounded or any bias shifted.
        products: The layers.
        biases: Theirs, which are shifted.
        quantize: Makes the quantized copy of the model as it is.
        feeder: Gives calibration batches.
        open_model: Opens a model file for inference.
        folder: For copies of the model.
        progress: Told how far it is.

    Returns:
        The number of layers that were corrected.
    """
    depths = product_depths(light.proto, products)
    pending = [p for p in products if p.name in biases]
    levels = [[p for p in pending if depths[p.name] == d] for d in sorted({depths[p.name] for p in pending})]
    corrected: set[str] = set()
    buckets = list(_buckets(levels, _PASSES))
    for number, bucket in enumerate(buckets):
        layers = [p for level in bucket for p in level]
        want = channel_means(reference, layers, feeder(), open_model, folder)
        for _ in range(1 if len(bucket) == 1 else 2):
            have = channel_means(quantize(light), layers, feeder(), open_model, folder)
            for product in layers:
                if product.name in want and product.name in have:
                    biases.shift(product.name, want[product.name] - have[product.name])
                    corrected.add(product.name)
        progress.advance(number + 1, len(buckets), "passes")
    return len(corrected)


def channel_means(
    light: LightModel, products: Iterable[Product], batches: Iterator[Feeds], open_model: Opener, folder: Path
) -> dict[str, Array]:
    """The mean of each output channel, by the product's name; padding does not count.

    Products whose node is not in the model any more, or whose means are not finite, are missing.
    """
    outputs = {n.name: n.output[0] for n in light.proto.graph.node}
    there = [p for p in products if p.name in outputs]
    sums: dict[str, Array] = {}
    counts: dict[str, int] = {}
    for feeds, found in run_exposed(light, [outputs[p.name] for p in there], batches, open_model, folder):
        for product in there:
            values = found[outputs[product.name]]
            real = None if product.window else real_positions(feeds, values)
            flat = values[real] if real is not None else np.moveaxis(values, product.channel_axis, -1)
            flat = flat.reshape(-1, product.output_channels)
            sums[product.name] = sums.get(product.name, 0) + flat.sum(axis=0, dtype=np.float64)
            counts[product.name] = counts.get(product.name, 0) + len(flat)
    return {n: s / max(counts[n], 1) for n, s in sums.items() if np.isfinite(s).all()}


def product_depths(model: onnx.ModelProto, products: Iterable[Product]) -> dict[str, int]:
    """How many products lie on the longest way from the inputs to each product, itself included."""
    names = {p.name for p in products}
    depth: dict[str, int] = {}
    found = {}
    for node in model.graph.node:  # sorted, as ONNX wants it
        here = max((depth.get(i, 0) for i in node.input), default=0) + (node.name in names)
        if node.name in names:
            found[node.name] = here
        depth.update(dict.fromkeys(node.output, here))
    return found


def _buckets(levels: list[list[Product]], limit: int) -> Iterator[list[list[Product]]]:
    """Cut levels into at most ``limit`` pieces of neighbours, as equal as can be."""
    if levels:
        edges = np.linspace(0, len(levels), min(limit, len(levels)) + 1).round().astype(int)
        for start, end in itertools.pairwise(edges):
            yield levels[start:end]
