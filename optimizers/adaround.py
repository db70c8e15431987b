"""AdaRound: learn for each weight whether it is rounded up or down.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (ICML 2020, arXiv:2004.10568): the nearest
integer is not the best one for the layer's result. Each weight gets a variable `V` whose rectified sigmoid
`h = clip(1.2 sigmoid(V) - 0.1, 0, 1)` is the share of rounding up; the squared error of the layer's result, plus a term
`1 - |2h - 1|^b` that drives `h` to 0 or 1 as `b` falls from 20 to 2, is minimized with Adam (Kingma and Ba 2015).

Here the error is that of rounded inputs times rounded weights against the floating-point product, so that the rounding
of inputs is compensated too. It is a quadratic form of the weights' errors, so its gradient comes from one matrix of
second moments of the inputs: a step costs the same for few and many rows.

The rounded weights are written as floating-point numbers on the grid of the 8-bit scheme. The largest of each scale is
left as it was: whoever quantizes them later finds the same grid and the same integers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploykit.optimizers.base import Opener
from deploykit.optimizers.editing import Editor
from deploykit.optimizers.products import Product
from deploykit.optimizers.ranges import Ranges
from deploykit.optimizers.sampling import Feeder, sample_rows
from deploykit.optimizers.scheme import Scheme, error_power, rounded_activation
from deploykit.progress import Progress
from deploykit.specs import Array
from deploykit.weights import LightModel

TIME_LIMIT_S = 600.0
_ROWS = 2048
_STEPS = 500
_RATE = 0.05
# Share of the steps in which only the error counts.
_WARM = 0.2
_STRENGTH = 0.5
_SHARPNESS = (20.0, 2.0)
# Of the mean second moment: keeps weights that no row decides at their nearest integer.
_DAMPING = 0.01
_LOW, _SPAN = -0.1, 1.2
# Second moments of one layer: beyond it, memory and time would not be bounded.
_LARGEST_INPUTS = 8192


def adaround(
    light: LightModel,
    products: Sequence[Product],
    ranges: Ranges,
    scheme: Scheme,
    feeder: Feeder,
    open_model: Opener,
    folder: Path,
    progress: Progress,
    *,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[str]:
    """Round the weights of products, in place, where that is better than the nearest integers on rows kept apart.

    Args:
        light: Its weights may be written.
        products: The layers.
        ranges: Of activations.
        scheme: How weights are rounded.
        feeder: Gives calibration batches.
        open_model: Opens a model file for inference.
        folder: For copies of the model.
        progress: Told how far it is.
        time_limit_s: Layers that are not begun by then keep their nearest integers.

    Returns:
        What was done, for the user.
    """
    editor, started = Editor(light), time.monotonic()
    fitting = [
        p for p in products if p.inputs <= _LARGEST_INPUTS and p.data in ranges.low and not editor.is_shared(p.weight)
    ]
    by_name = {p.name: p for p in fitting}
    better: list[float] = []
    late = seen = 0
    for samples in sample_rows(light, fitting, feeder, open_model, folder, limit=_ROWS):
        for name, sample in samples.items():
            seen += 1
            progress.advance(seen, len(fitting), "layers")
            if time.monotonic() - started > time_limit_s:
                late += 1
                continue
            product = by_name[name]
            weight = product.matrix(editor.read(product.weight))
            noisy = rounded_activation(sample.rows, ranges.low[product.data], ranges.high[product.data])
            made, gain = round_matrix(weight, sample.rows, noisy, scheme)
            if gain < 1:
                editor.write(product.weight, product.weight_from(made))
                better.append(gain)
        if late:
            break
    late += len(fitting) - seen if late else 0
    left = len(products) - len(fitting)
    notes = [f"AdaRound: {len(better)} of {len(products)} layers rounded, any other is not better for it"]
    if better:
        notes[0] += f"; the error of those is {np.median(better):.2f} times that of the nearest integers (median)"
    if late:
        notes.append(f"AdaRound: {late} layers keep their nearest integers, {time_limit_s:g} s were over")
    if left:
        why = "too large, without a range, or their weights are read elsewhere too"
        notes.append(f"AdaRound: {left} layers left: {why}")
    return notes


def round_matrix(weight: Array, rows: Array, noisy: Array, scheme: Scheme) -> tuple[Array, float]:
    """Round one weight.

    Args:
        weight: `[groups, inputs, outputs]`.
        rows: Inputs in floating point, `[groups, n, inputs]`.
        noisy: The same as the quantized model sees them.
        scheme: The grid.

    Returns:
        The weight on the grid, and its error as a share of that of the nearest integers, on the last quarter of the
        rows, which nothing was fitted to.
    """
    cut = max(1, rows.shape[1] * 3 // 4)
    steps = scheme.steps(weight)
    scaled = weight / steps
    # These decide the scale: another value would move the whole grid.
    largest = np.abs(scaled) >= scheme.limit - 0.5
    floor = np.clip(np.floor(scaled), -scheme.limit, scheme.limit - 1)
    up = _learn(scaled, floor, rows[:, :cut], noisy[:, :cut])
    made = np.where(largest, weight, (floor + up) * steps).astype(np.float32)
    if rows.shape[1] == cut:
        return made, 1.0
    want = rows[:, cut:] @ weight
    error = error_power(noisy[:, cut:] @ made, want)
    nearest = error_power(noisy[:, cut:] @ scheme.rounded(weight), want)
    return made, error / max(nearest, 1e-30)


def _learn(scaled: Array, floor: Array, rows: Array, noisy: Array) -> Array:
    """1 where a weight is rounded up, 0 where down."""
    count = rows.shape[1]
    moments = np.matmul(noisy.transpose(0, 2, 1), noisy) / count
    drift = np.matmul(noisy.transpose(0, 2, 1), noisy - rows) / count @ scaled
    scale = np.maximum(np.trace(moments, axis1=1, axis2=2)[:, None, None] / moments.shape[1], 1e-30)
    moments = (moments / scale + _DAMPING * np.eye(moments.shape[1], dtype=np.float32)).astype(np.float32)
    drift = (drift / scale).astype(np.float32)
    share = np.clip(scaled - floor, 0.001, 0.999)
    variable = -np.log(_SPAN / (share - _LOW) - 1)
    first, second = np.zeros_like(variable), np.zeros_like(variable)
    for step in range(_STEPS):
        sigmoid = 1 / (1 + np.exp(-variable))
        raw = _SPAN * sigmoid + _LOW
        h = np.clip(raw, 0, 1)
        slope = 2 * (moments @ (floor + h - scaled) + drift)
        progress = (step / _STEPS - _WARM) / (1 - _WARM)
        if progress > 0:
            # From `begin` to `end` along half a cosine, as in AIMET's and the authors' implementations.
            begin, end = _SHARPNESS
            beta = end + 0.5 * (begin - end) * (1 + math.cos(math.pi * progress))
            side = 2 * h - 1
            slope -= _STRENGTH * 2 * beta * np.sign(side) * np.abs(side) ** (beta - 1)
        slope *= _SPAN * sigmoid * (1 - sigmoid) * ((raw > 0) & (raw < 1))
        first += 0.1 * (slope - first)
        second += 0.001 * (slope * slope - second)
        rate = _RATE * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        variable -= rate * first / (np.sqrt(second) + 1e-8)
    return np.asarray(variable >= 0, np.float32)
