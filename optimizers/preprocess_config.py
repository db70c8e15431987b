"""What preprocessing to put before an input: images and sound."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from deploykit.errors import OptimizationError
from deploykit.specs import Signature, TensorSpec

LAYOUTS = ("nhwc", "nchw")
COLORS = ("rgb", "bgr")
RESAMPLES = ("bilinear", "bicubic")
MEL_SCALES = ("htk", "slaney")
MEL_NORMS = ("none", "slaney")
LOGS = ("none", "ln", "log10", "db")
PAD_MODES = ("reflect", "constant")
SOUND_DTYPES = ("float32", "int16")
FEATURE_LAYOUTS = ("bmt", "btm", "b1mt", "b1tm", "bmt1", "btm1")
# Larger ones would take gigabytes for matrices and filters.
_MAX_PIXELS, _MAX_N_FFT, _MAX_MELS, _MAX_SAMPLES = 1 << 14, 1 << 13, 1 << 10, 1 << 26
# Smaller ones are denormals in float32, which runtimes may take for 0.
_LEAST_FLOOR = 1.2e-38
# Preprocessing is computed in float32, whatever the model computes in.
_MODEL_DTYPES = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """Images as they are decoded, uint8, in place of prepared ones.

    In this order: resize, crop, rescale, subtract ``mean``, divide by ``std``.

    Attributes:
        input: The model's input; None where only one can be meant.
        resize: (height, width), or the length of the shorter edge, which keeps the shape of the picture; None for no
            resize.
        crop: (height, width) cut out of the middle; of an odd rest, the larger half lies below and to the right.
        resample: "bilinear" or "bicubic" (a = -0.5, as Pillow has it).
        antialias: Whether the filter grows where the picture shrinks, as in Pillow; without it only "bilinear".
        rescale: What a level of 0 to 255 is multiplied by.
        mean: Subtracted after that, for all channels or each of them, in the order of the model's channels.
        std: What is divided by, likewise.
        layout: Of the images given, "nhwc" or "nchw".
        color: Order of the channels given, "rgb" or "bgr".
        model_color: Order of the channels that the model takes.
        model_layout: Of the model's input; None to read it off its shape.
        size: (height, width) of all images given; None where each batch may have its own.
    """

    input: str | None = None
    resize: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    resample: str = "bilinear"
    antialias: bool = True
    rescale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: str = "nhwc"
    color: str = "rgb"
    model_color: str = "rgb"
    model_layout: str | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """Samples of sound in place of a (log-)mel spectrogram.

    In this order: pad or cut to ``samples``, Fourier transforms of windowed frames, ``power`` of their magnitudes, mel
    filters, ``offset`` and ``floor``, logarithm, ``top``, subtract ``mean``, divide by ``std``.

    Attributes:
        input: The model's input; None where only one can be meant.
        sample_rate: Samples a second.
        n_fft: Samples of a Fourier transform.
        win: Samples of the periodic Hann window in the middle of it; None for ``n_fft``.
        hop: Samples from one frame to the next.
        mels: Number of mel filters.
        fmin: Where the lowest of them begins, in Hz.
        fmax: Where the highest of them ends, in Hz; None for half the sample rate.
        mel_scale: "htk" or "slaney".
        mel_norm: "slaney" for filters of equal area, else "none".
        power: 2 for power, 1 for magnitude.
        center: Whether the signal is padded at both ends, so that frame t is centered at sample t * hop.
        pad_mode: How: "reflect" or "constant" (zeros).
        drop_last: Whether the last frame is left out, as Whisper does.
        log: "ln", "log10", "db" (10 log10 of a power, 20 log10 of a magnitude) or "none".
        offset: Added before the logarithm.
        floor: Smaller values are raised to it before the logarithm.
        top: Values further than this below the largest of a waveform are raised to that; None for no such limit.
        mean: Subtracted at the end, for all filters or each of them.
        std: What is divided by, likewise.
        samples: Shorter waveforms are padded with zeros to so many samples, longer ones are cut; None for neither.
        dtype: Of the samples: "float32" in -1 to 1, or "int16", which are divided by 32768.
        layout: Of the model's input, by batch, mel filters, time and axes of size 1: "bmt", "btm", "b1mt", "b1tm",
            "bmt1" or "btm1"; None to read it off its shape.
    """

    input: str | None = None
    sample_rate: int = 16000
    n_fft: int = 400
    win: int | None = None
    hop: int = 160
    mels: int = 80
    fmin: float = 0.0
    fmax: float | None = None
    mel_scale: str = "htk"
    mel_norm: str = "none"
    power: int = 2
    center: bool = True
    pad_mode: str = "reflect"
    drop_last: bool = False
    log: str = "ln"
    offset: float = 0.0
    floor: float = 1e-10
    top: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    samples: int | None = None
    dtype: str = "float32"
    layout: str | None = None


PreprocessConfig = ImageConfig | AudioConfig
# What a field may be, by its name for people; None where it may be left to be found out.
_IMAGE_CHOICES = {
    "layout": ("layout", LAYOUTS), "color": ("color", COLORS), "model color": ("model_color", COLORS),
    "resample": ("resample", RESAMPLES), "model layout": ("model_layout", (*LAYOUTS, None)),
}  # fmt: skip
_AUDIO_CHOICES = {
    "mel scale": ("mel_scale", MEL_SCALES), "mel norm": ("mel_norm", MEL_NORMS), "log": ("log", LOGS),
    "pad mode": ("pad_mode", PAD_MODES), "dtype": ("dtype", SOUND_DTYPES),
    "feature layout": ("layout", (*FEATURE_LAYOUTS, None)),
}  # fmt: skip


def _check_choices(config: PreprocessConfig, choices: Mapping[str, tuple[str, Sequence[str | None]]]) -> None:
    """Refuse what is not among the choices.

    Raises:
        OptimizationError: It is not.
    """
    for name, (field, known) in choices.items():
        value = getattr(config, field)
        if value not in known:
            raise OptimizationError(f"{name} {value!r}", expected=", ".join(filter(None, known)))


def check_image(config: ImageConfig) -> None:
    """Refuse what no image can be prepared with.

    Raises:
        OptimizationError: A value that is not offered, or that contradicts another.
    """
    _check_choices(config, _IMAGE_CHOICES)
    for name, size in (("resize", config.resize), ("crop", config.crop), ("size", config.size)):
        lengths = (size,) if isinstance(size, int) else size or ()
        if not all(1 <= length <= _MAX_PIXELS for length in lengths):
            raise OptimizationError(f"{name} {size}", expected=f"1 to {_MAX_PIXELS} pixels")
    if not config.antialias and config.resample != "bilinear":
        raise OptimizationError(
            f"{config.resample} without antialias is not offered", expected="bilinear", hint="leave --no-antialias out"
        )
    if not math.isfinite(config.rescale) or config.rescale == 0:
        raise OptimizationError(f"rescale {config.rescale}", expected="a number other than 0, like 0.00392156862745098")
    _check_numbers(config.mean, config.std)


def check_audio(config: AudioConfig) -> None:
    """Refuse what no spectrogram can be computed with.

    Raises:
        OptimizationError: A value that is not offered, or that contradicts another.
    """
    _check_choices(config, _AUDIO_CHOICES)
    if config.power not in (1, 2):
        raise OptimizationError(f"power {config.power}", expected="1 (magnitude) or 2 (power)")
    for name, number, least, most in (
        ("sample rate", config.sample_rate, 1, _MAX_SAMPLES),
        ("hop", config.hop, 1, _MAX_SAMPLES),
        ("mels", config.mels, 1, _MAX_MELS),
        ("n_fft", config.n_fft, 4, _MAX_N_FFT),
    ):
        if not least <= number <= most:
            raise OptimizationError(f"{name} {number}", expected=f"{least} to {most}")
    if config.win is not None and not 1 < config.win <= config.n_fft:
        raise OptimizationError(f"a window of {config.win} samples", expected=f"2 to {config.n_fft}, those of --n-fft")
    if config.samples is not None and not config.n_fft <= config.samples <= _MAX_SAMPLES:
        raise OptimizationError(
            f"{config.samples} samples", expected=f"{config.n_fft}, those of --n-fft, to {_MAX_SAMPLES}"
        )
    half, fmax = config.sample_rate / 2, config.fmax
    if not 0 <= config.fmin < (half if fmax is None else fmax) <= half:
        raise OptimizationError(
            f"mel filters from {config.fmin} to {half if fmax is None else fmax} Hz",
            expected=f"a range within 0 and {half:g} Hz, half the sample rate",
        )
    for name, value in (("offset", config.offset), ("floor", config.floor), ("top", config.top)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise OptimizationError(f"{name} {value}", expected="0 or more")
    if config.log != "none" and max(config.offset, config.floor) < _LEAST_FLOOR:
        raise OptimizationError(
            "the logarithm of silence", expected=f"a --floor or an --offset of at least {_LEAST_FLOOR}, for float32"
        )
    if config.top == 0:
        raise OptimizationError("top 0", expected="more than 0, like 8 for Whisper or 80 dB")
    _check_numbers(config.mean, config.std)


def _check_numbers(mean: Sequence[float], std: Sequence[float]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if not all(math.isfinite(v) for v in values) or (name == "std" and 0 in values):
            expected = "finite numbers" if name == "mean" else "finite numbers other than 0"
            raise OptimizationError(f"{name} {','.join(map(str, values))}", expected=expected)


def check_lengths(config: PreprocessConfig, count: int, what: str) -> None:
    """Refuse means and deviations that are neither one number nor one each.

    Raises:
        OptimizationError: They are not.
    """
    for name, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (0, 1, count):
            raise OptimizationError(f"{name} has {len(values)} numbers", expected=f"1, or {count}: one for each {what}")


def choose_input(signature: Signature, name: str | None, ranks: Collection[int], what: str) -> TensorSpec:
    """The input that preprocessing goes before.

    Args:
        signature: The model's.
        name: What was asked for; None where only one can be meant.
        ranks: Numbers of axes that the input may have.
        what: What it holds, for the message.

    Raises:
        OptimizationError: There is no such input, several may be meant, or it cannot hold that.
    """
    known, axes = ", ".join(str(spec) for spec in signature.inputs), " or ".join(map(str, sorted(ranks)))
    if name is not None:
        found = [spec for spec in signature.inputs if spec.name == name]
        if not found:
            raise OptimizationError(f"the model has no input {name!r}", expected=f"one of: {known}")
    else:
        found = [s for s in signature.inputs if s.dtype in _MODEL_DTYPES and len(s.shape or ()) in ranks]
        if not found:
            raise OptimizationError(
                f"none of the model's inputs can hold {what}: {known}", expected=f"float32 or float16 of {axes} axes"
            )
        if len(found) > 1:
            raise OptimizationError(
                f"{len(found)} of the model's inputs may hold {what}: {known}", hint="name it: --input NAME"
            )
    spec = found[0]
    if spec.dtype not in _MODEL_DTYPES or spec.shape is None or len(spec.shape) not in ranks:
        raise OptimizationError(
            f"{spec} cannot hold {what}", expected=f"float32 or float16 of {axes} axes; the model has: {known}"
        )
    return spec


def fresh_symbol(name: str, signature: Signature) -> str:
    """A name for a dynamic dimension that nothing in the model has, so that no two sizes become equal by name."""
    taken: set[str] = {d for spec in signature for d in spec.shape or () if isinstance(d, str)}
    taken |= {symbol for spec in signature for symbol in spec.symbols}
    return next(n for n in _numbered(name) if n not in taken)


def _numbered(name: str) -> Iterable[str]:
    yield name
    number = 1
    while True:
        number += 1
        yield f"{name}_{number}"
