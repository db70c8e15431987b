"""Cross-layer equalization: give the channels between two convolutions sizes that quantize well.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019, arXiv:1906.04721): a
channel may be divided by any positive factor where it is made and multiplied where it is read, because Relu lets it
through. Theirs is `s = sqrt(r1 / r2)`, of the ranges of the channel's weights in the first and the second layer.

What pays depends on the scheme: with one scale a weight tensor, equal ranges of weights; with one a channel, a balance
of activations and weights (as in SmoothQuant). So several factors are tried for each pair, theirs among them, and the
one with the smallest error of the pair on real rows is taken, if it is better than none.

Relu6 does not let a factor through: a Clip from 0 to a bound is passed only by channels that stayed below the bound in
all calibration data, and never by a factor that would bring them near it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deploykit.optimizers.base import Opener
from deploykit.optimizers.editing import Editor
from deploykit.optimizers.folding import Place, apply_edits, find_convolution
from deploykit.optimizers.products import Product, find_products
from deploykit.optimizers.sampling import Feeder, Sample, sample_rows
from deploykit.optimizers.scheme import Scheme, error_power, rounded_activation
from deploykit.optimizers.smooth_quant import channel_factors
from deploykit.progress import Progress
from deploykit.specs import Array
from deploykit.weights import LightModel

_ROWS = 256
_SWEEPS = 4
_ALPHAS = (0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
# A smaller gain is within what a few hundred rows can tell, and did not add up over real models.
_BETTER = 0.8
# A channel that came this near to a bound may reach it in other data.
_HEADROOM = 1.25


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two products with one activation between them; ``first`` is None where it is not quantized."""

    first: Product | None
    second: Product
    place: Place


def equalize(
    light: LightModel,
    nodes: list[str],
    scheme: Scheme,
    feeder: Feeder,
    open_model: Opener,
    folder: Path,
    progress: Progress,
) -> list[str]:
    """Equalize chains of convolutions, in place; on data like those of calibration the model computes the same.

    Args:
        light: Its weights may be written.
        nodes: Names of the nodes that will be quantized.
        scheme: How weights will be rounded.
        feeder: Gives calibration batches.
        open_model: Opens a model file for inference.
        folder: For copies of the model.
        progress: Told how far it is.

    Returns:
        What was done, for the user.
    """
    editor = Editor(light)
    found, _ = find_products(editor, nodes)
    pairs = _pairs(editor, found)
    convolutions = sum(p.window is not None for p in found)
    if not pairs:
        return [f"equalization: nothing to do, no two of {convolutions} convolutions follow each other alone"]
    wanted = {p.name: p for pair in pairs for p in (pair.first, pair.second) if p is not None}
    samples: dict[str, Sample] = {}
    for part in sample_rows(light, list(wanted.values()), feeder, open_model, folder, limit=_ROWS):
        samples |= part
    changed: set[str] = set()
    for sweep in range(_SWEEPS):
        moved = False
        for number, pair in enumerate(pairs):
            if pair.second.name in samples:
                moved |= _balance(editor, pair, samples, scheme, changed)
            progress.advance(sweep * len(pairs) + number + 1, _SWEEPS * len(pairs), "pairs")
        if not moved:
            break
    held = sum(bool((_free(p, samples[p.second.name]) == 0).any()) for p in pairs if p.second.name in samples)
    notes = [
        f"equalization: {len(changed)} of {len(pairs)} pairs of convolutions changed, the error of any other is no "
        "fifth less for it"
    ]
    if held:
        notes.append(f"equalization: in {held} pairs channels that reach the bound of a Clip were left as they are")
    return notes


def _pairs(editor: Editor, products: list[Product]) -> list[_Pair]:
    by_name = {p.name: p for p in products}
    pairs = []
    for product in products:
        if product.window is None or editor.is_shared(product.data) or editor.is_shared(product.weight):
            continue
        place = find_convolution(editor, product.data, len(product.dims))
        if place is not None:
            pairs.append(_Pair(by_name.get(place.edits[0].node.name), product, place))
    return pairs


def _balance(editor: Editor, pair: _Pair, samples: dict[str, Sample], scheme: Scheme, changed: set[str]) -> bool:
    """Try factors for one pair and take the best; whether one was taken."""
    second, sample = pair.second, samples[pair.second.name]
    weight = second.matrix(editor.read(second.weight))
    cost = _Cost(editor, pair, samples, scheme, weight)
    ones = np.ones(second.input_channels, np.float32)
    free = _free(pair, sample)
    least = np.minimum(1.0, _HEADROOM * np.maximum(sample.high, 0) / pair.place.bound)
    plain = best = cost.of(ones)
    kept = ones
    for factors in _filled(_candidates(cost, sample), sample, free, pair.place.bound):
        bounded = np.where(free > 0, np.maximum(factors, least), 1).astype(np.float32)
        made = cost.of(bounded)
        if made < best:
            best, kept = made, bounded
    if best > _BETTER * plain or not apply_edits(editor, pair.place.edits, 1 / kept):
        return False
    editor.write(second.weight, second.weight_from(weight * second.per_input(kept)))
    divisors = second.per_input(kept)[:, :, 0][:, None, :]
    samples[second.name] = replace(sample, rows=sample.rows / divisors, low=sample.low / kept, high=sample.high / kept)
    changed.add(second.name)
    return True


def _free(pair: _Pair, sample: Sample) -> Array:
    """1 for channels that a factor may change, 0 for those that reach the bound of a Clip; `[channels]`."""
    return (sample.high < 0.999 * pair.place.bound).astype(np.float32)


def _filled(candidates: list[Array], sample: Sample, free: Array, bound: float) -> Iterator[Array]:
    """Each candidate as it is, and where a bound holds channels fast, also so that the others fill the same range."""
    for factors in candidates:
        yield factors
        if np.isfinite(bound) and (free > 0).any():
            highest = float((sample.high / factors)[free > 0].max())
            if highest > 0:
                yield factors * np.float32(highest * _HEADROOM / bound)


class _Cost:
    """The noise of a pair's result, as a share of its energy, for given factors."""

    def __init__(self, editor: Editor, pair: _Pair, samples: dict[str, Sample], scheme: Scheme, weight: Array) -> None:
        self._pair, self._scheme, self._sample, self.weight = pair, scheme, samples[pair.second.name], weight
        self._want = self._sample.rows @ weight
        self._power = max(error_power(self._want, np.zeros_like(self._want)), 1e-30) / self._sample.rows.shape[1]
        first = pair.first
        self.first: Array | None = None
        # With one scale an output channel, a factor of that channel does not change how the first layer is rounded.
        if first is not None and first.name in samples:
            self.first = first.matrix(editor.read(first.weight))
            self._rows = samples[first.name].rows
        taps = weight.shape[1] * weight.shape[0] // pair.second.input_channels
        squares = np.square(weight).sum(axis=2).reshape(-1, taps).sum(axis=1)
        self._weights = squares  # how much one unit of noise in a channel adds to the second layer's result

    def of(self, factors: Array) -> float:
        second = self._pair.second
        divisors = second.per_input(factors)
        low, high = float((self._sample.low / factors).min()), float((self._sample.high / factors).max())
        rows = rounded_activation(self._sample.rows / divisors[:, :, 0][:, None, :], low, high)
        made = rows @ self._scheme.rounded(self.weight * divisors)
        noise = error_power(made, self._want) / rows.shape[1]
        if self.first is not None and not self._scheme.per_channel:
            noise += self._first_noise(factors)
        return float(noise / self._power)

    def _first_noise(self, factors: Array) -> float:
        first = self._pair.first
        assert first is not None and self.first is not None
        scales = first.per_output(factors)
        errors = self._rows @ (self._scheme.rounded(self.first / scales) * scales - self.first)
        means = np.square(errors).mean(axis=1).reshape(-1)
        return float((means * self._weights).sum())


def _candidates(cost: _Cost, sample: Sample) -> list[Array]:
    """The paper's factors, and balances of activations with weights."""
    taps = cost.weight.shape[0] * cost.weight.shape[1] // len(sample.high)
    heights = np.abs(cost.weight).max(axis=2).reshape(-1, taps).max(axis=1)
    sizes = np.maximum(np.abs(sample.low), np.abs(sample.high))
    found = [channel_factors(sizes, heights, alpha) for alpha in _ALPHAS]
    if cost.first is not None:
        ranges = np.abs(cost.first).max(axis=1).reshape(-1)
        found.append(channel_factors(ranges, heights, 0.5))
    return found
