"""Images as they are decoded become what a model takes, inside the graph.

A resize is two products with matrices (`resampling`): constants where all images have one size, else made by the graph
out of the size that it is given. ONNX's own Resize is not used: OpenVINO (2026.4) reads it and ignores its `antialias`.
Values between two levels stay between them, where Pillow rounds after each of its two passes to whole levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deploykit.errors import OptimizationError
from deploykit.optimizers.preprocess_config import (
    ImageConfig,
    check_image,
    check_lengths,
    choose_input,
    fresh_symbol,
)
from deploykit.optimizers.preprocess_graph import Builder
from deploykit.optimizers.resampling import CUBIC_A, crop_start, resize_matrix, resized
from deploykit.specs import Array, Dim, Signature, TensorSpec

_CHANNELS = (1, 3, 4)
_COLORS = 3
_BLACK, _WHITE = 0.0, 255.0
# Of height and width of made-up images to what the model takes.
_FACTORS = ((1.4, 1.9), (0.75, 0.9), (2.3, 1.1), (1.0, 1.0))
_Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What goes before one input.

    Attributes:
        config: What was asked for.
        given: The input as it will be: uint8.
        wanted: The input as it was, its height and width known where they follow from the config.
        layout: Of the model's input.
        channels: Of both.
    """

    config: ImageConfig
    given: TensorSpec
    wanted: TensorSpec
    layout: str
    channels: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know."""
        return ()

    @property
    def low_high(self) -> tuple[float, float]:
        """Values that made-up inputs may take."""
        return _BLACK, _WHITE

    @property
    def step(self) -> str:
        """Name of the step in a lineage."""
        return "preprocess-image"

    @property
    def params(self) -> dict[str, Any]:
        """For the lineage."""
        found = asdict(self.config) | {"input": self.given.name, "model_layout": self.layout}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}

    @property
    def _resizes(self) -> bool:
        size, resize = self.config.size, self.config.resize
        return resize is not None and (size is None or resized(*size, resize) != size)

    def free_sizes(self, case: int, inside: Sequence[int]) -> dict[str, int]:
        """Sizes of the free dimensions of made-up images, their number left aside.

        Args:
            case: Each gives others, larger and smaller than what the model takes.
            inside: A shape that the model takes.
        """
        assert self.given.shape is not None
        dims = self.given.shape[1:3] if self.config.layout == "nhwc" else self.given.shape[2:]
        lengths = inside[2:] if self.layout == "nchw" else inside[1:3]
        factors = _FACTORS[case % len(_FACTORS)] if self.config.resize is not None else (1.0, 1.0)
        return {d: int(n * f) or 1 for d, n, f in zip(dims, lengths, factors, strict=True) if isinstance(d, str)}

    def build(self, graph: Builder) -> str:
        """Add the nodes.

        Returns:
            The tensor that the model reads.
        """
        config, x, layout, is_float = self.config, self.given.name, self.config.layout, False
        if self._resizes:
            x, layout, is_float = self._resample(graph), "nchw", True
        elif config.crop is not None:
            x = self._crop(graph, x)
        if layout != self.layout:  # before the cast: a byte is cheaper to move
            order = [0, 3, 1, 2] if layout == "nhwc" else [0, 2, 3, 1]
            x = graph.add("Transpose", [x], "turned", perm=order)
        if not is_float:
            x = graph.cast(x, "float32", "float")
        if config.color != config.model_color:
            axis = 1 if self.layout == "nchw" else 3
            x = graph.add("Gather", [x, graph.integers("reversed", 2, 1, 0)], "colors", axis=axis)
        scale, shift = self._affine()
        x = graph.affine(x, scale, shift, "normal")
        return graph.cast(x, self.wanted.dtype, "made") if self.wanted.dtype != "float32" else x

    def _affine(self) -> tuple[Array, Array]:
        """Rescaling and normalization in one: what is multiplied and what is added, of the shape that broadcasts."""
        mean, std = np.array(self.config.mean or (0.0,)), np.array(self.config.std or (1.0,))
        scale, shift = np.broadcast_arrays(self.config.rescale / std, -mean / std)
        shape = (1, -1, 1, 1) if self.layout == "nchw" else (1, 1, 1, -1)
        return scale.reshape(shape), shift.reshape(shape)

    def _crop(self, graph: Builder, name: str) -> str:
        assert self.config.size is not None and self.config.crop is not None  # `plan_image` sees to it
        first = 1 if self.config.layout == "nhwc" else 2
        for axis, size, crop in zip((first, first + 1), self.config.size, self.config.crop, strict=True):
            start = crop_start(size, crop)
            name = graph.cut(name, axis, start, start + crop, f"cropped_{axis}")
        return name

    def _resample(self, graph: Builder) -> str:
        """Resize and crop: float32 [batch, channels, height, width]."""
        made = self._constant_matrices(graph) if self.config.size is not None else self._computed_matrices(graph)
        rows, columns = made
        x = graph.cast(self.given.name, "float32", "float")
        if self.config.layout == "nchw":
            x = graph.add("MatMul", [rows, x], "rows")
        else:
            # Rows first, of all columns and channels at once: only the smaller picture is turned.
            flat = graph.add("Reshape", [x, graph.integers("flat_shape", 0, 0, -1)], "flat")
            low = graph.add("MatMul", [rows, flat], "rows")
            low = graph.add("Reshape", [low, graph.integers("low_shape", 0, 0, -1, self.channels)], "low")
            x = graph.add("Transpose", [low], "low_turned", perm=[0, 3, 1, 2])
        x = graph.add("MatMul", [x, columns], "resized")
        if self.config.resample == "bilinear":
            return x
        # What a cubic kernel throws beyond black and white beside an edge, no decoded picture has.
        return graph.add("Clip", [x, graph.number("black", _BLACK), graph.number("white", _WHITE)], "levels")

    def _constant_matrices(self, graph: Builder) -> tuple[str, str]:
        size, resize = self.config.size, self.config.resize
        assert size is not None and resize is not None
        lengths = zip(size, resized(*size, resize), self.config.crop or (0, 0), strict=True)
        rows, columns = (self._matrix(*found).astype(np.float32) for found in lengths)
        return graph.constant("row_weights", rows), graph.constant("column_weights", columns.T)

    def _matrix(self, size: int, target: int, crop: int) -> Array:
        start, count = (crop_start(target, crop), crop) if crop else (0, target)
        config = self.config
        return resize_matrix(size, target, config.resample, antialias=config.antialias, start=start, rows=count)

    def _computed_matrices(self, graph: Builder) -> tuple[str, str]:
        """The matrices for the size of the images given, made by the graph."""
        config = self.config
        first = 1 if config.layout == "nhwc" else 2
        shape = graph.add("Shape", [self.given.name], "shape")
        sizes = [
            graph.add("Gather", [shape, graph.integer(f"axis_{axis}", axis)], what, axis=0)
            for axis, what in ((first, "height"), (first + 1, "width"))
        ]
        assert config.resize is not None
        if isinstance(config.resize, tuple):
            targets = [graph.integer(f"target_{length}", length) for length in config.resize]
        else:
            shorter, wanted = graph.add("Min", sizes, "shorter"), graph.integer("shorter_target", config.resize)
            targets = [
                graph.add("Div", [graph.add("Mul", [size, wanted], "longer"), shorter], "target") for size in sizes
            ]
        counts = config.crop or config.resize
        assert isinstance(counts, tuple)  # `plan_image` refuses a shorter edge without crop
        rows, columns = (
            self._computed_matrix(graph, *found, crop=config.crop is not None)
            for found in zip(sizes, targets, counts, strict=True)
        )
        return rows, graph.add("Transpose", [columns], "columns_turned", perm=[1, 0])

    def _computed_matrix(self, graph: Builder, size: str, target: str, count: int, *, crop: bool) -> str:
        """`resize_matrix` as nodes: float32 [count, size].

        With sizes n and m, pixel i is ((2i + 1) m - (2r + 1) n) / 2m pixels off the center of row r. The numerator is
        computed in whole numbers: at thousands of pixels, float32 would lose the digits that weights follow from.
        """
        two, one = graph.integer("two", 2), graph.integer("one", 1)
        number = graph.number
        odd = graph.constant("odd_rows", 2 * np.arange(count, dtype=np.int64)[:, None] + 1)
        if crop:
            rest = graph.add("Sub", [target, graph.integer(f"count_{count}", count)], "rest")
            start = graph.add("Div", [rest, two], "start")
            odd = graph.add("Add", [odd, graph.add("Mul", [start, two], "twice_start")], "odd_rows_cropped")
        places = graph.add("Range", [graph.integer("zero", 0), size, one], "places")
        places = graph.add("Add", [graph.add("Mul", [places, two], "twice_places"), one], "odd_places")
        terms = graph.add("Mul", [places, target], "term_places"), graph.add("Mul", [odd, size], "term_rows")
        offset = graph.cast(graph.add("Sub", terms, "offset"), "float32", "offset_float")
        unit = graph.add("Max", [size, target], "larger") if self.config.antialias else target
        unit = graph.cast(graph.add("Mul", [unit, two], "unit"), "float32", "unit_float")
        distance = graph.add("Abs", [graph.add("Div", [offset, unit], "signed")], "distance")
        if self.config.resample == "bilinear":
            weights = graph.add("Relu", [graph.add("Sub", [number("one_float", 1), distance], "below")], "weights")
        else:
            weights = self._cubic(graph, distance)
        total = graph.add("ReduceSum", [weights, graph.integers("last", 1)], "total", keepdims=1)
        return graph.add("Div", [weights, total], "matrix")

    def _cubic(self, graph: Builder, distance: str) -> str:
        """`resampling.kernel` as nodes, by Horner's scheme; beyond 2 the outer piece is 0 as it is at 2."""
        a = CUBIC_A

        def polynomial(x: str, factors: tuple[float, ...], hint: str) -> str:
            made = graph.number(f"{hint}_first", factors[0])
            for place, factor in enumerate(factors[1:], start=1):
                made = graph.add("Mul", [made, x], f"{hint}_times_{place}")
                if factor:
                    made = graph.add("Add", [made, graph.number(f"{hint}_{place}", factor)], f"{hint}_plus_{place}")
            return made

        near = polynomial(distance, (a + 2, -(a + 3), 0.0, 1.0), "near")
        capped = graph.add("Min", [distance, graph.number("two_float", 2)], "capped")
        far = polynomial(capped, (a, -5 * a, 8 * a, -4 * a), "far")
        inner = graph.add("Less", [distance, graph.number("one_float", 1)], "inner")
        return graph.add("Where", [inner, near, far], "weights")

    def reference(self, images: Array) -> Array:
        """What the model has to be given, step by step in float64, without the graph.

        Args:
            images: uint8 of the layout given.

        Returns:
            Of the model's layout and dtype.
        """
        return np.stack([self._prepared(image) for image in images]).astype(self.wanted.dtype)

    def _prepared(self, image: Array) -> Array:
        config = self.config
        x: Array = image.astype(np.float64)
        if config.layout == "nhwc":
            x = x.transpose(2, 0, 1)
        if config.resize is not None:
            height, width = x.shape[1:]
            targets = resized(height, width, config.resize)
            rows, columns = (
                resize_matrix(size, target, config.resample, antialias=config.antialias)
                for size, target in zip((height, width), targets, strict=True)
            )
            x = np.clip(rows @ x @ columns.T, _BLACK, _WHITE)
        if config.crop is not None:
            top, left = (crop_start(size, crop) for size, crop in zip(x.shape[1:], config.crop, strict=True))
            x = x[:, top : top + config.crop[0], left : left + config.crop[1]]
        if config.color != config.model_color:
            x = x[::-1]
        x = x * config.rescale - np.reshape(config.mean or (0.0,), (-1, 1, 1))
        x = x / np.reshape(config.std or (1.0,), (-1, 1, 1))
        return x if self.layout == "nchw" else x.transpose(1, 2, 0)


def plan_image(signature: Signature, config: ImageConfig) -> ImagePlan:
    """Find out what has to go before which input.

    Raises:
        OptimizationError: No input can take it, or the config contradicts the model or itself.
    """
    check_image(config)
    spec = choose_input(signature, config.input, (4,), "images")
    assert spec.shape is not None  # choose_input looks at it
    layout = config.model_layout or _layout_of(spec)
    batch, *rest = spec.shape
    channels, own = (rest[0], rest[1:]) if layout == "nchw" else (rest[2], rest[:2])
    if not isinstance(channels, int):
        raise OptimizationError(
            f"{spec}: its channels are not a number", hint="fix them when it is exported, or see --model-layout"
        )
    check_lengths(config, channels, "channel")
    if config.color != config.model_color and channels != _COLORS:
        raise OptimizationError(
            f"{config.color} for a model of {channels} channels", expected="3", hint="leave --color out"
        )
    given, final = _sizes(config, (own[0], own[1]), spec, signature)

    def arranged(order: str, size: tuple[Dim, Dim]) -> tuple[Dim, ...]:
        return (batch, channels, *size) if order == "nchw" else (batch, *size, channels)

    return ImagePlan(
        config,
        TensorSpec(spec.name, "uint8", arranged(config.layout, given)),
        TensorSpec(spec.name, spec.dtype, arranged(layout, final)),
        layout,
        channels,
    )


def _layout_of(spec: TensorSpec) -> str:
    assert spec.shape is not None
    first, last = spec.shape[1] in _CHANNELS, spec.shape[3] in _CHANNELS
    if first == last:
        raise OptimizationError(
            f"{spec}: where its channels are cannot be told", hint="say it: --model-layout nchw, or nhwc"
        )
    return "nchw" if first else "nhwc"


def _sizes(
    config: ImageConfig, own: tuple[Dim, Dim], spec: TensorSpec, signature: Signature
) -> tuple[tuple[Dim, Dim], tuple[Dim, Dim]]:
    """Height and width of the images given, and of those that the model gets.

    Raises:
        OptimizationError: They are not those that the model takes, or cannot be known.
    """
    size, resize, crop = config.size, config.resize, config.crop
    if resize is None and crop is None:
        if size is not None:
            _check_size(size, own, spec, "--size gives")
        made = size or own
        return made, made
    if resize is None and size is None:
        raise OptimizationError(
            "a crop of images of any size may find them too small", hint="add --resize, or --size HEIGHTxWIDTH"
        )
    reached = size if resize is None else resized(*size, resize) if size else resize
    if crop is None and isinstance(reached, int):
        raise OptimizationError(
            f"a shorter edge of {reached} leaves the longer one open, and the images of a batch have one size",
            hint=f"add --crop {reached}, or --size HEIGHTxWIDTH for images of one size",
        )
    assert reached is not None
    least: _Size = (reached, reached) if isinstance(reached, int) else reached
    if crop is not None and (crop[0] > least[0] or crop[1] > least[1]):
        raise OptimizationError(
            f"a crop of {_text(crop)} from images that may be {_text(least)}", expected="a crop that is no larger"
        )
    final = crop or least
    _check_size(final, own, spec, "the images come out as")
    given = size or (fresh_symbol("height", signature), fresh_symbol("width", signature))
    return given, final


def _check_size(size: _Size, own: tuple[Dim, Dim], spec: TensorSpec, what: str) -> None:
    if any(isinstance(dim, int) and dim != length for dim, length in zip(own, size, strict=True)):
        raise OptimizationError(
            f"{what} {_text(size)}", expected=f"{spec}", hint=f"add --resize {_text(own)}, or a --crop of that size"
        )


def _text(size: tuple[Dim, Dim]) -> str:
    return f"{size[0]}x{size[1]}"
