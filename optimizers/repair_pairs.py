"""QuantizeLinear and DequantizeLinear as values: scale, zero point, axis, and who reads what between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.optimizers.editor import GraphEditor, attribute, is_op
from deploykit.optimizers.lazy_weights import read_weight
from deploykit.weights import is_external

if TYPE_CHECKING:
    import onnx

    from deploykit.specs import Array

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# onnx.TensorProto.DataType
FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6
# Operators that hand 8-bit values on without looking at them; Concat reads all its inputs, the others their first.
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Split", "Concat", "Identity",
         "MaxPool", "Expand")  # fmt: skip
_ONE_INPUT_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "MaxPool")
_AFTER_SCALE = 2


@dataclass(frozen=True, slots=True, eq=False)
class Params:
    """How numbers and codes belong together: number = (code - zero) * scale.

    Attributes:
        scale: Floating point; one element, or one a channel.
        zero: Of the codes' type, as many as there are scales.
        axis: The channels' axis; means nothing for one scale.
    """

    scale: Array
    zero: Array
    axis: int

    @property
    def per_tensor(self) -> bool:
        """Whether one scale is for all."""
        return self.scale.size == 1

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        info = np.iinfo(self.zero.dtype)
        return int(info.min), int(info.max)

    def lowest(self) -> Array:
        """Smallest number that a code stands for, a channel."""
        return np.asarray((self.limits[0] - self.zero.astype(np.float64)) * self.scale)

    def highest(self) -> Array:
        """Largest number that a code stands for, a channel."""
        return np.asarray((self.limits[1] - self.zero.astype(np.float64)) * self.scale)

    def same(self, other: Params) -> bool:
        """Whether both give the same codes."""
        return (
            self.zero.dtype == other.zero.dtype
            and np.array_equal(self.scale.reshape(-1), other.scale.reshape(-1))
            and np.array_equal(self.zero.reshape(-1), other.zero.reshape(-1))
            and (self.per_tensor or self.axis == other.axis)
        )

    def shifted(self) -> Params:
        """The same numbers in codes of the other sign: int8 as uint8 with a zero point 128 higher, and back."""
        if self.zero.dtype == np.int8:
            return replace(self, zero=(self.zero.astype(np.int16) + 128).astype(np.uint8))
        return replace(self, zero=(self.zero.astype(np.int16) - 128).astype(np.int8))


class PairEditor(GraphEditor):
    """A graph whose Q/DQ nodes are read and changed by their parameters.

    Args:
        model: Changed in place.
        folder: Of its external weights.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        super().__init__(model)
        self.folder = folder
        self._stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def stored(self, name: str) -> bool:
        """Whether a tensor is a constant, in memory or on disk."""
        return name in self._weights

    def values(self, name: str) -> Array | None:
        """A constant's value, from disk where it lies there."""
        weight = self._weights.get(name)
        if weight is None:
            return None
        return read_weight(weight, self.folder) if is_external(weight) else self.constant(name)

    def code_type(self, node: onnx.NodeProto) -> int:
        """Element type of the codes that a Q node makes or a DQ node reads; 0 where it is unknown."""
        if len(node.input) > _AFTER_SCALE and node.input[2]:
            return self.elem_type(node.input[2])
        if node.op_type == QUANTIZE:
            return int(attribute(node, "output_dtype", 0)) or UINT8
        source = self.maker(node.input[0])
        if source is not None and is_op(source, QUANTIZE):
            return self.code_type(source)
        return self.elem_type(node.input[0])

    def params(self, node: onnx.NodeProto | None) -> Params | None:
        """Parameters of a Q or DQ node; None where they are no constants, go by blocks, or are no integers.

        Without a zero point it is 0; without one to tell the type, QuantizeLinear makes uint8 (ONNX).
        """
        from onnx import helper

        if node is None or not is_op(node, QUANTIZE, DEQUANTIZE) or attribute(node, "block_size", 0):
            return None
        scale, kind = self.constant(node.input[1]), self.code_type(node)
        if scale is None or not kind:
            return None
        zero = None
        if len(node.input) > _AFTER_SCALE and node.input[2]:
            zero = self.constant(node.input[2])
            if zero is None:
                return None
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
        if dtype.kind not in "iu":
            return None
        zero = np.zeros(scale.shape, dtype) if zero is None else zero
        axis, rank = int(attribute(node, "axis", 1)), self.rank(node.input[0]) or self.rank(node.output[0])
        if axis < 0:
            if rank is None and scale.size > 1:
                return None
            axis += rank or 0
        return Params(scale, zero, axis)

    def set_params(self, node: onnx.NodeProto, params: Params) -> None:
        """Let a Q or DQ node use these parameters; equal ones share a constant."""
        import onnx

        for index, (hint, value) in enumerate((("scale", params.scale), ("zero_point", params.zero)), start=1):
            while len(node.input) <= index:
                node.input.append("")
            self.set_input(node, index, self.store(f"{node.output[0]}_{hint}", value))
        for name in ("output_dtype", "axis"):
            for found in [a for a in node.attribute if a.name == name]:
                node.attribute.remove(found)
        if not params.per_tensor:
            node.attribute.append(onnx.helper.make_attribute("axis", params.axis))
        if node.op_type == QUANTIZE:
            self.retype(node.output[0], onnx.helper.np_dtype_to_tensor_dtype(params.zero.dtype))

    def store(self, hint: str, value: Array) -> str:
        """A constant with this value, one for all that ask for the same."""
        key = (str(value.dtype), value.shape, np.ascontiguousarray(value).tobytes())
        if key not in self._stored:
            self._stored[key] = self.add_constant(hint, value)
        return self._stored[key]

    def retype(self, name: str, elem_type: int) -> None:
        """Note another element type for a tensor."""
        if name in self._shapes:
            self._shapes[name].elem_type = elem_type

    def dequantized(self, name: str) -> tuple[onnx.NodeProto, Params] | None:
        """The DQ node behind a tensor, and its parameters."""
        node = self.maker(name, DEQUANTIZE)
        found = self.params(node)
        return (node, found) if node is not None and found is not None else None

    def pair(self, name: str) -> tuple[onnx.NodeProto, onnx.NodeProto, Params] | None:
        """The Q and the DQ node behind an activation, where both agree."""
        found = self.dequantized(name)
        source = self.maker(found[0].input[0], QUANTIZE) if found else None
        made = self.params(source)
        if found is None or source is None or made is None or not made.same(found[1]):
            return None
        return source, found[0], found[1]

    def pair_before(self, name: str) -> tuple[onnx.NodeProto, onnx.NodeProto, Params] | None:
        """As `pair`, also over what only moves values; one scale, since channels may have moved."""
        maker = self.maker(name)
        while maker is not None and is_op(maker, *_ONE_INPUT_MOVES):
            name = maker.input[0]
            maker = self.maker(name)
        found = self.pair(name)
        return found if found is not None and found[2].per_tensor else None

    def weight(self, name: str) -> tuple[onnx.NodeProto, Params] | None:
        """The DQ node behind a weight that is stored as codes, and its parameters."""
        found = self.dequantized(name)
        return found if found is not None and found[0].input[0] in self._weights else None

    def add_pair(self, name: str, params: Params) -> str:
        """Quantize a tensor and back.

        Returns:
            What to read instead of it.
        """
        scale, zero = self.store(f"{name}_scale", params.scale), self.store(f"{name}_zero_point", params.zero)
        codes = self.add(QUANTIZE, [name, scale, zero], f"{name}_quantized")
        return self.add(DEQUANTIZE, [codes, scale, zero], f"{name}_dequantized", like=name)
