"""Mel filter banks, windowed Fourier transforms as filters, and the log-mel spectrogram in float64: the reference.

Scales: "htk" is m = 2595 log10(1 + f / 700) (The HTK Book, 5.4); "slaney" is linear below 1 kHz and logarithmic above
(M. Slaney, Auditory Toolbox, Interval Research report 1998-010), as librosa and Whisper have it.
"""

from __future__ import annotations

import numpy as np

from deploykit.optimizers.preprocess_config import AudioConfig
from deploykit.specs import Array

# Slaney's scale: 15 mels up to 1 kHz, then 27 to every factor of 6.4.
_BREAK_HZ, _BREAK_MEL, _STEP = 1000.0, 15.0, 27.0 / np.log(6.4)
_LOGARITHMS = {"ln": 1.0, "log10": 1 / np.log(10), "db": 10 / np.log(10)}


def to_mel(hertz: Array, scale: str) -> Array:
    """Frequencies on a mel scale."""
    if scale == "htk":
        return np.asarray(2595.0 * np.log10(1.0 + hertz / 700.0))
    above = _BREAK_MEL + np.log(np.maximum(hertz, _BREAK_HZ) / _BREAK_HZ) * _STEP
    return np.where(hertz < _BREAK_HZ, hertz * (_BREAK_MEL / _BREAK_HZ), above)


def to_hertz(mel: Array, scale: str) -> Array:
    """The inverse of `to_mel`."""
    if scale == "htk":
        return np.asarray(700.0 * (10.0 ** (mel / 2595.0) - 1.0))
    above = _BREAK_HZ * np.exp((np.maximum(mel, _BREAK_MEL) - _BREAK_MEL) / _STEP)
    return np.where(mel < _BREAK_MEL, mel * (_BREAK_HZ / _BREAK_MEL), above)


def mel_filters(config: AudioConfig) -> Array:
    """Triangles over the bins of a Fourier transform, equally wide on the mel scale.

    Returns:
        float64 [mels, n_fft // 2 + 1].
    """
    fmax = config.sample_rate / 2 if config.fmax is None else config.fmax
    ends = to_mel(np.array([config.fmin, fmax]), config.mel_scale)
    edges = to_hertz(np.linspace(ends[0], ends[1], config.mels + 2), config.mel_scale)
    bins = np.arange(config.n_fft // 2 + 1) * (config.sample_rate / config.n_fft)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    filters = np.maximum(np.minimum(rising, falling), 0.0)
    if config.mel_norm == "slaney":
        filters = filters * (2.0 / (high - low))
    return np.asarray(filters)


def window(config: AudioConfig) -> Array:
    """The periodic Hann window, with zeros on both sides where it is shorter than the transform; float64 [n_fft]."""
    length = config.n_fft if config.win is None else config.win
    made = np.zeros(config.n_fft)
    start = (config.n_fft - length) // 2
    made[start : start + length] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    return made


def fourier_filters(config: AudioConfig, bins: slice) -> Array:
    """Windowed cosines, then windowed sines: the filters whose answers are a frame's transform.

    Args:
        config: Length and window.
        bins: Which of the n_fft // 2 + 1 bins.

    Returns:
        float64 [2 * bins, n_fft].
    """
    frequencies = np.arange(config.n_fft // 2 + 1)[bins, None]
    # The product is taken modulo the length first: an angle of thousands of turns would cost digits.
    angles = 2 * np.pi * ((frequencies * np.arange(config.n_fft)) % config.n_fft) / config.n_fft
    return np.concatenate([np.cos(angles), -np.sin(angles)]) * window(config)


def padding(config: AudioConfig) -> int:
    """Samples added at each end."""
    return config.n_fft // 2 if config.center else 0


def frames_of(config: AudioConfig, samples: int) -> int:
    """How many frames a waveform has; less than 1 where it is too short."""
    return 1 + (samples + 2 * padding(config) - config.n_fft) // config.hop - int(config.drop_last)


def samples_of(config: AudioConfig, frames: int) -> int:
    """The shortest waveform that has so many frames."""
    return (frames - 1 + int(config.drop_last)) * config.hop + config.n_fft - 2 * padding(config)


def log_factor(config: AudioConfig) -> float:
    """What the natural logarithm is multiplied by; 20 log10 of a magnitude is 10 log10 of the power."""
    return float(_LOGARITHMS[config.log]) * (2 if config.log == "db" and config.power == 1 else 1)


def log_mel(config: AudioConfig, waveform: Array) -> Array:
    """The spectrogram of one waveform, by numpy's Fourier transform, in float64.

    Args:
        config: How.
        waveform: [samples], of the config's dtype.

    Returns:
        [mels, frames].
    """
    x = waveform.astype(np.float64) / (32768.0 if config.dtype == "int16" else 1.0)
    if config.samples is not None:
        x = np.pad(x[: config.samples], (0, max(0, config.samples - len(x))))
    x = np.pad(x, padding(config), mode="reflect" if config.pad_mode == "reflect" else "constant")
    frames = np.lib.stride_tricks.sliding_window_view(x, config.n_fft)[:: config.hop]
    if config.drop_last:
        frames = frames[:-1]
    spectrum = np.abs(np.fft.rfft(frames * window(config), axis=1)) ** config.power
    made = mel_filters(config) @ spectrum.T
    if config.log != "none":
        made = np.log(np.maximum(made + config.offset, config.floor)) * log_factor(config)
    if config.top is not None:
        made = np.maximum(made, made.max() - config.top)
    if config.mean:
        made = made - np.reshape(config.mean, (-1, 1))
    if config.std:
        made = made / np.reshape(config.std, (-1, 1))
    return np.asarray(made)
