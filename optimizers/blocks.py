"""Round weights in blocks: a scale, and for 4 bits a zero point, for each few weights of an output channel.

The finer the scales, the fewer bits the values need: 4 bits with a scale every 32 weights lose about as much as 5 or 6
with one a channel. What a block's scale is, is searched: that which rounds with the least squared error is at times a
little smaller than what covers the extremes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deploykit.specs import Array

# Shares of the range that covers all values of a block, tried in turn.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Blocks:
    """A rounded matrix `[inputs, outputs]`; a value is `scale * (code - zero)`.

    Attributes:
        codes: uint8 `[inputs, outputs]`, 0 to 2^bits - 1.
        scales: float32 `[blocks, outputs]`.
        zeros: uint8 `[blocks, outputs]`; the middle of the codes throughout where `symmetric`.
        bits: Of a code.
        size: Inputs in a block; the last one may have fewer.
        symmetric: Whether all zero points are 2^(bits-1).
    """

    codes: Array
    scales: Array
    zeros: Array
    bits: int
    size: int
    symmetric: bool

    def values(self) -> Array:
        """The rounded matrix in float32."""
        rows = np.arange(len(self.codes)) // self.size
        return (self.codes.astype(np.float32) - self.zeros.astype(np.float32)[rows]) * self.scales[rows]


def round_blocks(weight: Array, bits: int, size: int, *, symmetric: bool) -> Blocks:
    """Round a matrix to the nearest of what its blocks can hold.

    Args:
        weight: float32 `[inputs, outputs]`; finite.
        bits: 2 to 8.
        size: Inputs that share a scale.
        symmetric: Whether 0 is in the middle of the codes, instead of where the block's values need it.
    """
    inputs, outputs = weight.shape
    count = -(-inputs // size)
    codes = np.empty((inputs, outputs), np.uint8)
    scales = np.empty((count, outputs), np.float32)
    zeros = np.empty((count, outputs), np.uint8)
    for columns in _pieces(inputs, outputs):
        part = np.asarray(weight[:, columns], np.float32)
        filled = np.zeros((count * size, part.shape[1]), np.float32)
        filled[:inputs] = part
        found = _best(filled.reshape(count, size, -1), bits, symmetric)
        codes[:, columns] = found[0].reshape(count * size, -1)[:inputs]
        scales[:, columns], zeros[:, columns] = found[1], found[2]
    return Blocks(codes, scales, zeros, bits, size, symmetric)


def _pieces(inputs: int, outputs: int) -> Iterator[slice]:
    """Columns, so many at once that the search works in bounded memory."""
    width = max(1, _PIECE_ELEMENTS // max(1, inputs))
    for start in range(0, outputs, width):
        yield slice(start, start + width)


def _best(blocks: Array, bits: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes `[blocks, size, outputs]`, scales and zero points `[blocks, outputs]` with the least squared error."""
    top = (1 << bits) - 1
    low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
    kept: tuple[Array, Array, Array] | None = None
    least = np.empty(0)
    for share in _SHARES if bits < 8 else _SHARES[:1]:
        if symmetric:
            # The side with one code more takes the larger extreme: 4 bits hold -8 to 7.
            scale = np.maximum(high / (top // 2), -low / (top // 2 + 1)) * share
            zero = np.full_like(scale, top // 2 + 1)
        else:
            scale = (high - low) * share / top
            zero = np.clip(np.rint(-low * share / np.where(scale > 0, scale, 1)), 0, top)
        scale = np.where(scale > np.finfo(np.float32).tiny, scale, 1).astype(np.float32)
        code = np.clip(np.rint(blocks / scale[:, None]) + zero[:, None], 0, top)
        error = np.square((code - zero[:, None]) * scale[:, None] - blocks).sum(axis=1)
        if kept is None:
            kept, least = (code.astype(np.uint8), scale, zero.astype(np.uint8)), error
            continue
        better = error < least
        least = np.where(better, error, least)
        kept = (
            np.where(better[:, None], code, kept[0]).astype(np.uint8),
            np.where(better, scale, kept[1]),
            np.where(better, zero, kept[2]).astype(np.uint8),
        )
    assert kept is not None
    return kept


def pack_nbits(blocks: Blocks) -> tuple[Array, Array, Array | None]:
    """What ONNX Runtime's MatMulNBits reads: weights, scales, and zero points where there are several.

    Source: onnxruntime `docs/ContribOperators.md`, com.microsoft.MatMulNBits: B `[N, blocks, size * bits / 8]`, scales
    `[N, blocks]`, zero points `[N, ceil(blocks * bits / 8)]`; of two 4-bit values in a byte the first is the lower
    half.
    """
    inputs, outputs = blocks.codes.shape
    count = len(blocks.scales)
    filled = np.repeat(blocks.zeros, blocks.size, axis=0)  # a block that is not full ends in zeros
    filled[:inputs] = blocks.codes
    turned = np.ascontiguousarray(filled.T).reshape(outputs, count, blocks.size)
    zeros = np.ascontiguousarray(blocks.zeros.T)
    return (
        pack_codes(turned, blocks.bits),
        np.ascontiguousarray(blocks.scales.T),
        None if blocks.symmetric else pack_codes(zeros, blocks.bits),
    )


def pack_codes(codes: Array, bits: int) -> Array:
    """Codes of 8 bits as they are, of 4 bits two in a byte along the last axis, which is filled up with zeros."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(codes[..., 0::2] | codes[..., 1::2] << 4, np.uint8)
