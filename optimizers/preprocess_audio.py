"""Samples of sound become the (log-)mel spectrogram that a model takes, inside the graph.

The Fourier transforms are one convolution: its filters are windowed cosines and sines, its stride is the hop. ONNX's
own STFT is missing in many runtimes; a convolution is what all of them do best. Power is the sum of two squares, so
that the sum and the mel filters are one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deploykit.errors import OptimizationError
from deploykit.optimizers.mel import (
    fourier_filters,
    frames_of,
    log_factor,
    log_mel,
    mel_filters,
    padding,
    samples_of,
)
from deploykit.optimizers.preprocess_config import (
    FEATURE_LAYOUTS,
    AudioConfig,
    check_audio,
    check_lengths,
    choose_input,
    fresh_symbol,
)
from deploykit.optimizers.preprocess_graph import Builder
from deploykit.specs import Array, Dim, Signature, TensorSpec

_INT16 = 32768.0


@dataclass(frozen=True, slots=True)
class AudioPlan:
    """What goes before one input.

    Attributes:
        config: What was asked for.
        given: The input as it will be: [batch, samples].
        wanted: The input as it was, the number of frames known where it follows from the config.
        layout: Of the model's input, as in `AudioConfig`.
    """

    config: AudioConfig
    given: TensorSpec
    wanted: TensorSpec
    layout: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know."""
        empty = int((mel_filters(self.config).max(axis=1) == 0).sum())
        if not empty:
            return ()
        return (f"{empty} of {self.config.mels} mel filters lie between two bins of the transform and give nothing",)

    @property
    def low_high(self) -> tuple[float, float]:
        """Values that made-up inputs may take: a standard deviation about 0, or whole numbers."""
        return (-3000.0, 3000.0) if self.config.dtype == "int16" else (-0.1, 0.1)

    @property
    def step(self) -> str:
        """Name of the step in a lineage."""
        return "preprocess-audio"

    @property
    def params(self) -> dict[str, Any]:
        """For the lineage."""
        found = asdict(self.config) | {"input": self.given.name, "layout": self.layout}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}

    def free_sizes(self, case: int, inside: Sequence[int]) -> dict[str, int]:
        """Sizes of the free dimensions of made-up waveforms, their number left aside.

        Args:
            case: Each gives others.
            inside: A shape that the model takes.
        """
        assert self.given.shape is not None
        name = self.given.shape[1]
        if not isinstance(name, str):
            return {}
        if self.config.samples is not None:  # shorter ones and a longer one
            return {name: int(self.config.samples * (0.4, 1.2, 0.9)[case % 3])}
        samples = samples_of(self.config, inside[self.layout.index("t")])
        return {name: max(samples, self.config.n_fft)}

    def build(self, graph: Builder) -> str:
        """Add the nodes.

        Returns:
            The tensor that the model reads.
        """
        config, x = self.config, self.given.name
        if config.dtype == "int16":
            x = graph.add("Mul", [graph.cast(x, "float32", "float"), graph.number("level", 1 / _INT16)], "sound")
        if config.samples is not None:
            x = graph.add("Pad", [x, graph.integers("behind", 0, 0, 0, config.samples)], "longer")
            x = graph.cut(x, 1, 0, config.samples, "cut")
        x = graph.add("Unsqueeze", [x, graph.integers("channel_axis", 1)], "channel")
        if side := padding(config):
            ends = graph.integers("ends", 0, 0, side, 0, 0, side)
            x = graph.add("Pad", [x, ends], "padded", mode=config.pad_mode)
        x = self._mel(graph, x)
        if config.drop_last:
            x = graph.cut(x, 2, 0, -1, "frames")
        x = self._arranged(graph, self._scaled(graph, x))
        return graph.cast(x, self.wanted.dtype, "made") if self.wanted.dtype != "float32" else x

    def _mel(self, graph: Builder, x: str) -> str:
        """Mel spectrogram [batch, mels, frames] of [batch, 1, samples]."""
        config, filters = self.config, mel_filters(self.config)
        used = np.flatnonzero(filters.any(axis=0))
        if not used.size:
            raise OptimizationError(
                "every mel filter lies between two bins of the transform", hint="take fewer --mels or a larger --n-fft"
            )
        bins = slice(int(used[0]), int(used[-1]) + 1)
        filters, count = filters[:, bins], bins.stop - bins.start
        waves = fourier_filters(config, bins).astype(np.float32)[:, None, :]
        x = graph.add(
            "Conv", [x, graph.constant("waves", waves)], "transform", kernel_shape=[config.n_fft], strides=[config.hop]
        )
        x = graph.add("Mul", [x, x], "squares")
        if config.power == 2:
            both = np.concatenate([filters, filters], axis=1).astype(np.float32)
            return graph.add("MatMul", [graph.constant("mel_filters", both), x], "mel")
        cosines, sines = graph.cut(x, 1, 0, count, "cosines"), graph.cut(x, 1, count, 2 * count, "sines")
        x = graph.add("Sqrt", [graph.add("Add", [cosines, sines], "power")], "magnitude")
        return graph.add("MatMul", [graph.constant("mel_filters", filters.astype(np.float32)), x], "mel")

    def _scaled(self, graph: Builder, x: str) -> str:
        """Logarithm, dynamic range and normalization."""
        config, factor = self.config, 1.0
        if config.log != "none":
            if config.offset:
                x = graph.add("Add", [x, graph.number("offset", config.offset)], "above")
            if config.floor:
                x = graph.add("Max", [x, graph.number("floor", config.floor)], "raised")
            x, factor = graph.add("Log", [x], "logarithm"), log_factor(config)
        if config.top is not None:
            x, factor = graph.affine(x, np.array(factor), np.array(0.0), "unit"), 1.0
            loudest = graph.largest(x, (1, 2), "loudest")
            x = graph.add("Max", [x, graph.add("Sub", [loudest, graph.number("top", config.top)], "least")], "near")
        mean, std = np.array(config.mean or (0.0,)), np.array(config.std or (1.0,))
        scale, shift = np.broadcast_arrays(factor / std, -mean / std)
        return graph.affine(x, scale.reshape(-1, 1), shift.reshape(-1, 1), "normal")

    def _arranged(self, graph: Builder, x: str) -> str:
        """[batch, mels, frames] in the model's layout."""
        if self.layout.index("t") < self.layout.index("m"):
            x = graph.add("Transpose", [x], "turned", perm=[0, 2, 1])
        if "1" in self.layout:
            x = graph.add("Unsqueeze", [x, graph.integers("one_axis", self.layout.index("1"))], "arranged")
        return x

    def reference(self, waveforms: Array) -> Array:
        """What the model has to be given, in float64 and by numpy's Fourier transform, without the graph.

        Args:
            waveforms: [batch, samples] of the dtype given.

        Returns:
            Of the model's layout and dtype.
        """
        made = np.stack([log_mel(self.config, waveform) for waveform in waveforms])
        if self.layout.index("t") < self.layout.index("m"):
            made = made.transpose(0, 2, 1)
        if "1" in self.layout:
            made = np.expand_dims(made, self.layout.index("1"))
        return made.astype(self.wanted.dtype)


def plan_audio(signature: Signature, config: AudioConfig) -> AudioPlan:
    """Find out what has to go before which input.

    Raises:
        OptimizationError: No input can take it, or the config contradicts the model or itself.
    """
    check_audio(config)
    check_lengths(config, config.mels, "mel filter")
    spec = choose_input(signature, config.input, (3, 4), "a spectrogram")
    assert spec.shape is not None  # choose_input looks at it
    layout = config.layout or _layout_of(spec, config.mels)
    if len(layout) != len(spec.shape) or any(d != w for d, w in _fixed(layout, spec, config.mels)):
        raise OptimizationError(
            f"a feature layout of {layout} with {config.mels} mel filters", expected=f"what fits {spec}"
        )
    frames = spec.shape[layout.index("t")]
    samples, made = _lengths(config, frames, spec, signature)
    shape: list[Dim] = list(spec.shape)
    shape[layout.index("t")], shape[layout.index("m")] = made, config.mels
    given = TensorSpec(spec.name, config.dtype, (spec.shape[0], samples))
    return AudioPlan(config, given, TensorSpec(spec.name, spec.dtype, tuple(shape)), layout)


def _fixed(layout: str, spec: TensorSpec, mels: int) -> list[tuple[int, int]]:
    """Sizes of the axes of mel filters and of size 1: what the model has, where it is fixed, and what comes."""
    sizes = {"m": mels, "1": 1}
    pairs = zip(layout, spec.shape or (), strict=False)
    return [(dim, sizes[axis]) for axis, dim in pairs if axis in sizes and isinstance(dim, int)]


def _layout_of(spec: TensorSpec, mels: int) -> str:
    shape = spec.shape or ()
    fits = [
        layout
        for layout in FEATURE_LAYOUTS
        if len(layout) == len(shape)
        and shape[layout.index("m")] == mels
        and ("1" not in layout or shape[layout.index("1")] == 1)
    ]
    if len(fits) != 1:
        found = f"may be {' or '.join(fits)}" if fits else f"has no axis of {mels} mel filters"
        raise OptimizationError(f"{spec} {found}", hint="say which axis is what: --feature-layout; or see --mels")
    return fits[0]


def _lengths(config: AudioConfig, frames: Dim, spec: TensorSpec, signature: Signature) -> tuple[Dim, Dim]:
    """Samples of the input as it will be, and frames of what the model gets.

    Raises:
        OptimizationError: They are not those that the model takes.
    """
    if config.samples is not None:
        made = frames_of(config, config.samples)
        if isinstance(frames, int) and made != frames:
            raise OptimizationError(
                f"{config.samples} samples make {made} frames", expected=f"{spec}",
                hint=f"take --samples {samples_of(config, frames)}, or see --hop, --n-fft, --no-center, --drop-last",
            )  # fmt: skip
        return fresh_symbol("samples", signature), made
    if isinstance(frames, str):
        return fresh_symbol("samples", signature), frames
    samples = samples_of(config, frames)
    if samples < config.n_fft:
        raise OptimizationError(
            f"{frames} frames come from {samples} samples, fewer than a transform of {config.n_fft}",
            hint="take a smaller --n-fft, or a larger --hop",
        )
    return samples, frames
