"""The accuracy algorithms in their proven order, around the collection of ranges.

Before it: SmoothQuant, then cross-layer equalization, which change activations and with them their ranges. After it:
AdaRound, then bias correction, which need the ranges. All of them change floating-point weights only, so that whatever
inserts the Q/DQ pairs need not know of them. The order is NNCF's and AIMET's.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploykit.optimizers.adaround import adaround
from deploykit.optimizers.base import Opener
from deploykit.optimizers.bias_correction import correct_fast, correct_fully
from deploykit.optimizers.biases import Biases
from deploykit.optimizers.editing import Editor, own_copy
from deploykit.optimizers.equalize import equalize
from deploykit.optimizers.pairs import insert_pairs
from deploykit.optimizers.products import Product, find_products
from deploykit.optimizers.quantize_config import StaticConfig
from deploykit.optimizers.ranges import Ranges
from deploykit.optimizers.sampling import Feeder, real_positions, run_exposed
from deploykit.optimizers.scheme import Scheme, error_power
from deploykit.optimizers.smooth_quant import smooth
from deploykit.progress import Progress
from deploykit.specs import Array, Feeds
from deploykit.weights import LightModel

# Calibration samples that full bias correction runs on, and as many again that judge it.
_SAMPLES = 128
_FLOAT = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True, slots=True)
class Material:
    """Calibration data that can be run over again.

    Attributes:
        feeder: Gives the batches from their beginning.
        open_model: Opens a model file for inference.
        folder: Where temporary copies of the model may stand.
    """

    feeder: Feeder
    open_model: Opener
    folder: Path


def refines(config: StaticConfig) -> bool:
    """Whether any of the algorithms is asked for."""
    return config.smooth != "off" or config.equalize or config.bias_correction != "off" or config.rounding != "nearest"


def before_ranges(
    light: LightModel, nodes: list[str], config: StaticConfig, bits: int, data: Material, progress: Progress
) -> list[str]:
    """Apply what changes activations, in place.

    Args:
        light: Its weights may be written.
        nodes: Names of the nodes that will be quantized.
        config: Which algorithms.
        bits: Of weights.
        data: What to calibrate on.
        progress: Told how far it is.

    Returns:
        What was done, for the user.
    """
    scheme, notes = Scheme(bits, config.per_channel), []
    if config.smooth != "off":
        alpha = None if config.smooth == "auto" else float(config.smooth)
        with progress.step("SmoothQuant"):
            notes += smooth(light, nodes, scheme, alpha, data.feeder, data.open_model, data.folder, progress)
    if config.equalize:
        with progress.step("cross-layer equalization"):
            notes += equalize(light, nodes, scheme, data.feeder, data.open_model, data.folder, progress)
    return notes


def after_ranges(
    light: LightModel,
    nodes: list[str],
    ranges: Ranges,
    config: StaticConfig,
    bits: int,
    data: Material,
    progress: Progress,
) -> list[str]:
    """Apply what needs the ranges of activations, in place; see `before_ranges`."""
    if config.bias_correction == "off" and config.rounding == "nearest":
        return []
    with tempfile.TemporaryDirectory(prefix=".reference-", dir=data.folder) as place:
        return _after(light, _copy(light, Path(place)), nodes, ranges, config, bits, data, progress)


def _copy(light: LightModel, folder: Path) -> LightModel:
    """The model as it is now, whatever is written to it later."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(light.proto)
    return own_copy(LightModel(copy, light.folder), folder / "weights")


def _after(
    light: LightModel,
    reference: LightModel,
    nodes: list[str],
    ranges: Ranges,
    config: StaticConfig,
    bits: int,
    data: Material,
    progress: Progress,
) -> list[str]:
    products, left = find_products(Editor(light), nodes)
    notes = []
    if config.rounding == "adaround":
        with progress.step("AdaRound"):
            notes += adaround(
                light, products, ranges, Scheme(bits, config.per_channel), data.feeder, data.open_model, data.folder,
                progress,
            )  # fmt: skip
    if config.bias_correction != "off":
        with progress.step(f"{config.bias_correction} bias correction"):
            notes += _correct(light, reference, nodes, products, ranges, config, bits, data, progress)
    if left:
        notes.append(f"{len(left)} layers are treated by no accuracy algorithm: {', '.join(left[:3])}")
    return notes


def _correct(
    light: LightModel,
    reference: LightModel,
    nodes: list[str],
    products: list[Product],
    ranges: Ranges,
    config: StaticConfig,
    bits: int,
    data: Material,
    progress: Progress,
) -> list[str]:
    """Correct biases; undone where the quantized model is no better for it on other data."""
    biases = Biases(Editor(light), products)

    def quantize(model: LightModel) -> LightModel:
        import onnx

        copy = onnx.ModelProto()
        copy.CopyFrom(model.proto)
        return LightModel(insert_pairs(LightModel(copy, model.folder), nodes, ranges, config, bits), model.folder)

    before, noise = biases.snapshot(), _noise(reference, quantize(light), data)
    notes = []
    # Where the full correction does not hold on other data, the fast one may.
    for kind in ("full", "fast") if config.bias_correction == "full" else ("fast",):
        if kind == "fast":
            done = correct_fast(
                light, reference, products, biases, ranges, Scheme(bits, config.per_channel), data.feeder,
                data.open_model, data.folder, progress,
            )  # fmt: skip
        else:
            done = correct_fully(
                light, reference, products, biases, quantize, lambda: _samples(data.feeder(), 0, _SAMPLES),
                data.open_model, data.folder, progress,
            )  # fmt: skip
        after = _noise(reference, quantize(light), data)
        if after < noise:
            notes.append(
                f"{kind} bias correction of {done} layers: the outputs' error went from {_db(noise)} to {_db(after)}"
            )
            break
        biases.restore(before)
        notes.append(f"{kind} bias correction left out: the outputs' error would go from {_db(noise)} to {_db(after)}")
    if biases.missing:
        notes.append(f"bias correction: {len(biases.missing)} layers have no bias: {', '.join(biases.missing[:3])}")
    return notes


def _noise(light: LightModel, quantized: LightModel, data: Material) -> float:
    """Energy of the outputs' errors as a share of the outputs', where nothing was corrected on."""
    names = [v.name for v in light.proto.graph.output if v.type.tensor_type.elem_type == _FLOAT]
    errors, powers = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)

    def outputs(model: LightModel) -> Iterator[tuple[Feeds, dict[str, Array]]]:
        batches = _samples(data.feeder(), _SAMPLES, 2 * _SAMPLES)
        return run_exposed(model, names, batches, data.open_model, data.folder)

    for (feeds, want), (_, have) in zip(outputs(light), outputs(quantized), strict=True):
        for name in names:
            real = real_positions(feeds, want[name])
            wanted, found = (v[name] if real is None else v[name][real] for v in (want, have))
            errors[name] += error_power(found, wanted)
            powers[name] += error_power(wanted, np.zeros_like(wanted))
    return sum(errors[n] / max(powers[n], 1e-30) for n in names)


def _samples(batches: Iterator[Feeds], start: int, end: int) -> Iterator[Feeds]:
    """Whole batches from the sample ``start`` to ``end``; the first ones where the data do not reach so far."""
    first: list[Feeds] = []
    count, given = 0, False
    for batch in batches:
        size = max((len(a) for a in batch.values() if a.ndim), default=1)
        if count < start and count + size <= end - start:
            first.append(batch)
        elif start <= count < end:
            given = True
            yield batch
        elif count >= end:
            return
        count += size
    if not given:
        yield from first


def _db(noise: float) -> str:
    return f"{10 * math.log10(max(noise, 1e-30)):.2f} dB" if math.isfinite(noise) else "infinity"
