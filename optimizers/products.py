"""Convolutions and matrix products in one form: rows of inputs times a matrix of weights, group by group.

A MatMul or Gemm has one group; a Conv has its own groups, and its rows are the windows that it looks at (im2col). So an
algorithm that is written for `rows [groups, n, inputs] @ weight [groups, inputs, outputs]` treats all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deploykit.optimizers.editing import Editor, attributes, standard
from deploykit.specs import Array

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Window:
    """What a convolution looks at; one entry a spatial axis, pads have two.

    Attributes:
        kernel: Sizes.
        strides: Steps between windows.
        dilations: Steps between the values of one window.
        pads: Zeros before each axis, then behind each; () where `auto_pad` decides.
        auto_pad: "NOTSET", "VALID", "SAME_UPPER" or "SAME_LOWER".
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str


@dataclass(frozen=True, slots=True)
class Product:
    """A node with constant weights.

    Attributes:
        name: Of the node.
        op: Its operator type.
        data: The tensor that is multiplied.
        output: Its result.
        weight: The weights' name.
        dims: The weights' shape.
        groups: Independent parts of the input channels.
        transposed: Whether a Gemm's weights are `[outputs, inputs]`.
        window: Of a convolution.
    """

    name: str
    op: str
    data: str
    output: str
    weight: str
    dims: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    window: Window | None = None

    @property
    def channel_axis(self) -> int:
        """The axis of the result that output channels lie on."""
        return 1 if self.window else -1

    @property
    def inputs(self) -> int:
        """Length of one row: what one output of one group is made of."""
        return math.prod(self.dims[1:]) if self.window or self.transposed else self.dims[0]

    @property
    def input_channels(self) -> int:
        """Channels of the data."""
        return self.dims[1] * self.groups if self.window else self.inputs

    @property
    def output_channels(self) -> int:
        """Channels of the result."""
        return self.dims[0] if self.window or self.transposed else self.dims[1]

    def matrix(self, weight: Array) -> Array:
        """Weights as `[groups, inputs, outputs]`."""
        if self.window:
            return np.asarray(weight).reshape(self.groups, -1, self.inputs).transpose(0, 2, 1)
        return np.asarray(weight.T if self.transposed else weight)[None]

    def weight_from(self, matrix: Array) -> Array:
        """Undo `matrix`."""
        if self.window:
            return np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(self.dims)
        return np.ascontiguousarray(matrix[0].T if self.transposed else matrix[0])

    def per_input(self, factors: Array) -> Array:
        """One value an input channel as `[groups, inputs, 1]`, to multiply a matrix with."""
        taps = math.prod(self.window.kernel) if self.window else 1
        return np.repeat(factors.reshape(self.groups, -1), taps, axis=1)[:, :, None]

    def per_output(self, factors: Array) -> Array:
        """One value an output channel as `[groups, 1, outputs]`, to multiply a matrix with."""
        return factors.reshape(self.groups, 1, -1)

    def rows(self, values: Array) -> RowSource:
        """The rows of one batch of data; none is made before it is asked for."""
        return _WindowRows(self, self.window, values) if self.window else _FlatRows(values)


class RowSource(Protocol):
    """Rows of a batch, by number.

    Attributes:
        count: How many there are.
    """

    count: int

    def take(self, numbers: Array) -> Array:
        """The rows of these numbers, `[groups, n, inputs]`."""


class _FlatRows:
    def __init__(self, values: Array) -> None:
        self._values = values.reshape(-1, values.shape[-1])
        self.count = len(self._values)

    def take(self, numbers: Array) -> Array:
        return self._values[numbers][None]


class _WindowRows:
    def __init__(self, product: Product, window: Window, values: Array) -> None:
        self._groups, self._window = product.groups, window
        sizes = values.shape[2:]
        reach = [d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
        pads = _pads(window, sizes, reach)
        half = len(sizes)
        self._padded = np.pad(values, [(0, 0), (0, 0), *zip(pads[:half], pads[half:], strict=True)])
        padded = self._padded.shape[2:]
        self._out = [(s - r) // step + 1 for s, r, step in zip(padded, reach, window.strides, strict=True)]
        self.count = len(values) * max(0, math.prod(self._out))

    def take(self, numbers: Array) -> Array:
        sample, *place = np.unravel_index(numbers, [len(self._padded), *self._out])
        n, half = len(numbers), len(place)
        index: list[Any] = [sample.reshape(-1, *[1] * half), slice(None)]
        for axis, (at, kernel) in enumerate(zip(place, self._window.kernel, strict=True)):
            shape = [1] * half
            shape[axis] = kernel
            taps = np.arange(kernel).reshape(shape) * self._window.dilations[axis]
            index.append(at.reshape(-1, *[1] * half) * self._window.strides[axis] + taps)
        # A slice between index arrays: the arrays' axes come first, [n, *kernel, channels].
        found = np.moveaxis(self._padded[tuple(index)], -1, 1)
        return np.ascontiguousarray(found.reshape(n, self._groups, -1).transpose(1, 0, 2))


def _pads(window: Window, sizes: tuple[int, ...], reach: list[int]) -> list[int]:
    if window.auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        return list(window.pads) or [0] * 2 * len(sizes)
    # ONNX, Conv: as many windows as ceil(size / stride), the odd zero behind (UPPER) or before (LOWER).
    before, behind = [], []
    for size, step, span in zip(sizes, window.strides, reach, strict=True):
        total = max(0, (-(-size // step) - 1) * step + span - size)
        small, large = total // 2, total - total // 2
        before.append(small if window.auto_pad == "SAME_UPPER" else large)
        behind.append(large if window.auto_pad == "SAME_UPPER" else small)
    return before + behind


def find_products(editor: Editor, names: Iterable[str]) -> tuple[list[Product], list[str]]:
    """The products among the named nodes.

    Returns:
        The products in the graph's order, and for each product that cannot be treated, its name and why.
    """
    wanted, found, left = frozenset(names), [], []
    for node in editor.light.proto.graph.node:
        if node.name not in wanted or not standard(node, "Conv", "ConvTranspose", "MatMul", "Gemm"):
            continue
        made = _product(editor, node)
        if isinstance(made, Product):
            found.append(made)
        else:
            left.append(f"{node.name} ({made})")
    return found, left


def _product(editor: Editor, node: onnx.NodeProto) -> Product | str:
    given = attributes(node)
    if node.op_type == "ConvTranspose":
        return "a transposed convolution"
    if not editor.is_weight(node.input[1]):
        return "no constant float32 weights"
    dims = editor.dims(node.input[1])
    base = (node.name, node.op_type, node.input[0], node.output[0], node.input[1], dims)
    if node.op_type == "Conv":
        return Product(*base, groups=_number(given.get("group", 1)), window=_window(given, dims))
    if given.get("transA"):
        return "its data are transposed"
    if given.get("alpha", 1.0) != 1.0 or (len(node.input) > 2 and node.input[2] and given.get("beta", 1.0) != 1.0):
        return "alpha or beta is not 1"
    return Product(*base, transposed=bool(given.get("transB", 0)))


def _window(given: dict[str, object], dims: tuple[int, ...]) -> Window:
    ones = (1,) * (len(dims) - 2)
    auto = given.get("auto_pad", b"NOTSET")
    return Window(
        kernel=dims[2:],
        strides=_numbers(given.get("strides")) or ones,
        dilations=_numbers(given.get("dilations")) or ones,
        pads=_numbers(given.get("pads")),
        auto_pad=auto.decode() if isinstance(auto, bytes) else str(auto),
    )


def _number(value: Any) -> int:
    return int(value)


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in value or ())
