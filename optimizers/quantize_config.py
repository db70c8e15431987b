"""What 8-bit quantization is told, and what both kinds of it share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from deploykit.errors import OptimizationError
from deploykit.extras import version_of
from deploykit.machine import inspect_machine

DYNAMIC_OPS = ("MatMul", "Gemm", "Attention", "LSTM", "Gather")
WEIGHT_BITS = ("auto", "8", "7")
BIAS_CORRECTIONS = ("off", "fast", "full")  # in the order of what they cost; or "auto"
ROUNDINGS = ("nearest", "adaround")
SMOOTH = ("auto", "off")  # or, in static quantization, an alpha
ENGINES = ("deploykit", "nncf", "both")
# What only our own engine knows, by field: the option.
_OWN = {
    "calibration": "--calibration", "percentile": "--percentile", "save_calibration": "--save-calibration",
    "merge": "--merge", "smooth": "--smooth", "equalize": "--equalize", "bias_correction": "--bias-correction",
    "rounding": "--rounding",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DynamicConfig:
    """Dynamic quantization: int8 weights, activations quantized while the model runs.

    Attributes:
        ops: Operator types to quantize. Convolutions are left out: ConvInteger is many times slower than float.
        per_channel: One scale an output channel.
        exclude: Node names and operator types that stay in floating point.
        weight_bits: "8", "7", or "auto": 7 where the CPU lacks VNNI, because there the sum of two 8-bit products
            saturates at 16 bits.
        smooth: SmoothQuant of what layer normalizations give to products, without data: "auto" or "off".
    """

    ops: tuple[str, ...] = DYNAMIC_OPS
    per_channel: bool = True
    exclude: tuple[str, ...] = ()
    weight_bits: str = "auto"
    smooth: str = "auto"


@dataclass(frozen=True, slots=True)
class StaticConfig:
    """Static quantization with ranges from calibration data.

    Attributes:
        calibration: How ranges come from what was seen: "minmax", "percentile", "entropy", "mse" or "auto".
        percentile: For "percentile": the share of values inside the range, in percent.
        save_calibration: A file to keep what was seen in; see `Calibration`.
        merge: Such files of the same model, whose data count too.
        merge_only: Whether they hold all that counts, so that data are for the accuracy algorithms only.
        per_channel: One scale an output channel of a weight.
        exclude: Node names and operator types that stay in floating point.
        batch_size: Samples in one calibration run.
        max_samples: Calibration samples used at most; None for all.
        weight_bits: As in `DynamicConfig`.
        smooth: SmoothQuant of matrix products: "off", "auto" (alpha searched for each activation, off where that is
            better), or an alpha from 0 to 1. What it changes hangs on the data: "auto" is off beside `merge` and
            `save_calibration`.
        equalize: Cross-layer equalization of convolutions.
        bias_correction: "off", "fast" (from each layer's own rounding errors), "full" (from the quantized model's), or
            "auto": fast for transformers, off for other models and, as `smooth`, beside `merge` and `save_calibration`.
        rounding: Of weights: "nearest" or "adaround".
        engine: Who quantizes: "deploykit", "nncf", or "both", of which the pipeline keeps the better model. NNCF has no
            use for calibration, percentile, save_calibration, merge, smooth, equalize, bias_correction and rounding;
            depthwise convolutions have one scale a channel and 8 bits with it, whatever is asked.
    """

    calibration: str = "minmax"
    percentile: float = 99.99
    save_calibration: str | None = None
    merge: tuple[str, ...] = ()
    merge_only: bool = False
    per_channel: bool = True
    exclude: tuple[str, ...] = ()
    batch_size: int = 8
    max_samples: int | None = None
    weight_bits: str = "auto"
    smooth: str | float = "auto"
    equalize: bool = False
    bias_correction: str = "auto"
    rounding: str = "nearest"
    engine: str = "deploykit"


def check_engine(config: StaticConfig) -> None:
    """Refuse an unknown engine, and options that the engine does not know.

    Raises:
        OptimizationError: Such an option is set.
    """
    if config.engine not in ENGINES:
        raise OptimizationError(f"engine {config.engine!r}", expected=" or ".join(ENGINES))
    changed = own_options(config) if config.engine == "nncf" else []
    if changed:
        raise OptimizationError(
            f"the engine nncf knows no {' and no '.join(changed)}",
            expected="what NNCF decides by itself: ranges, SmoothQuant and its own bias correction",
            hint=f"leave {'it' if len(changed) == 1 else 'them'} out, or take --engine deploykit or both",
        )


def own_options(config: StaticConfig) -> list[str]:
    """The options with other values than their defaults that hold for our own engine only."""
    return [option for name, option in _OWN.items() if getattr(config, name) != getattr(StaticConfig(), name)]


def for_engine(config: StaticConfig, engine: str) -> StaticConfig:
    """The same settings for one engine, without those that it does not know."""
    plain = {name: getattr(StaticConfig(), name) for name in _OWN} if engine == "nncf" else {}
    return replace(config, engine=engine, **plain)


@dataclass(frozen=True, slots=True)
class WeightsConfig:
    """Weight-only quantization: weights in blocks, activations in floating point.

    Attributes:
        bits: 8 or 4.
        block: Inputs of a product that share a scale: 16, 32, 64, 128 or 256; None for 128 with 8 bits and 32 with 4.
        form: "qdq", ONNX's own operators, or "nbits", ONNX Runtime's MatMulNBits.
        exclude: Node names and operator types that stay in floating point.
        embeddings: Whether tables read by Gather become int8 with a scale a row.
    """

    bits: int = 8
    block: int | None = None
    form: str = "qdq"
    exclude: tuple[str, ...] = ()
    embeddings: bool = True


@dataclass(frozen=True, slots=True)
class HalfConfig:
    """Weights in 16-bit floating point.

    Attributes:
        precision: "fp16" or "bf16".
        compute: "storage": weights are stored in 16 bits, and runtimes compute with them in what they like; "native":
            activations are in 16 bits, too; "auto": native where the model is for a device that computes in it.
        exclude: Node names and operator types that stay in float32.
    """

    precision: str = "fp16"
    compute: str = "auto"
    exclude: tuple[str, ...] = ()


def weight_bits(asked: str) -> tuple[int, list[str]]:
    """Bits of a weight, and the reason where it was our choice."""
    if asked not in WEIGHT_BITS:
        raise OptimizationError(f"weight bits {asked!r}", expected=" or ".join(WEIGHT_BITS))
    if asked != "auto":
        return int(asked), []
    if inspect_machine().int8_dot:
        return 8, []
    return 7, [
        "weights have 7 bits: this CPU has no VNNI, and 8-bit products would saturate; "
        "for a target with VNNI use --weight-bits 8"
    ]


def check_accuracy_options(config: StaticConfig) -> None:
    """Refuse values that no accuracy algorithm knows.

    Raises:
        OptimizationError: One is unknown.
    """
    smooth = config.smooth
    number = isinstance(smooth, int | float) and not isinstance(smooth, bool)
    if not (0 <= smooth <= 1 if isinstance(smooth, int | float) and number else smooth in SMOOTH):
        raise OptimizationError(f"smooth {smooth!r}", expected="off, auto, or an alpha from 0 to 1")
    if config.bias_correction not in ("auto", *BIAS_CORRECTIONS):
        known = " or ".join(("auto", *BIAS_CORRECTIONS))
        raise OptimizationError(f"bias correction {config.bias_correction!r}", expected=known)
    if config.rounding not in ROUNDINGS:
        raise OptimizationError(f"rounding {config.rounding!r}", expected=" or ".join(ROUNDINGS))


def tools() -> dict[str, str]:
    """Versions of the packages that quantize."""
    return {name: version_of(name) or "unknown" for name in ("onnxruntime", "onnx")}


@contextlib.contextmanager
def no_advice() -> Iterator[None]:
    """Keep onnxruntime's advice to pre-process, which `prepare` has done, off the root logger.

    Without a handler there, `logging.warning` would install one for the whole process.
    """
    root = logging.getLogger()
    handler = logging.NullHandler()

    def wanted(record: logging.LogRecord) -> bool:
        return "run pre-processing before quantization" not in record.getMessage()

    root.addFilter(wanted)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(wanted)
