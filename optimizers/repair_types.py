"""Bit-exact repairs: the same numbers in the types, and at the places, where runtimes have integer kernels for them.

Each function changes a graph in place and returns how often it applied. After any of them the model gives the same
bits when nothing is fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.optimizers.editor import attribute, is_op
from deploykit.optimizers.repair_pairs import (
    DEQUANTIZE,
    FLOAT,
    INT8,
    INT32,
    MOVES,
    QUANTIZE,
    UINT8,
    PairEditor,
    Params,
)

if TYPE_CHECKING:
    import onnx

    from deploykit.specs import Array

_CONTRIB = "com.microsoft"
_MIDDLE = 128


def to_standard_domain(graph: PairEditor) -> int:
    """8-bit Q/DQ of com.microsoft become those of the standard, which every runtime fuses."""
    count = 0
    for node in graph.nodes:
        if node.domain != _CONTRIB or node.op_type not in (QUANTIZE, DEQUANTIZE):
            continue
        typed = len(node.input) > 2 and node.input[2]  # without it, the contrib operators have defaults of their own
        if (
            typed
            and graph.elem_type(node.input[2]) in (UINT8, INT8, INT32)
            and graph.elem_type(node.input[1]) in (0, FLOAT)
        ):
            node.domain = ""
            count += 1
    return count


def quantize_weights(graph: PairEditor) -> int:
    """Weights kept in float with a QuantizeLinear behind them become what that makes of them."""
    count = 0
    for node in graph.nodes:
        if not is_op(node, QUANTIZE) or graph.kept(node.output[0]):
            continue
        params, weight = graph.params(node), graph.values(node.input[0])
        if params is None or weight is None or weight.dtype != np.float32 or params.scale.dtype != np.float32:
            continue
        if params.zero.dtype not in (np.int8, np.uint8):
            continue
        name = graph.add_constant(f"{node.input[0]}_quantized", quantized(weight, params))
        for reader in graph.readers(node.output[0]):
            # Without a zero point the type was that of the codes, which stays.
            graph.set_input(reader, list(reader.input).index(node.output[0]), name)
        count += 1
    return count


def quantized(values: Array, params: Params) -> Array:
    """Codes of numbers: rounded to nearest, ties to even, then saturated (ONNX, QuantizeLinear)."""
    scale, zero = spread(params.scale, params.axis, values.ndim), spread(params.zero, params.axis, values.ndim)
    low, high = params.limits
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = np.rint(values / scale) + zero.astype(np.float32)
    return np.asarray(np.clip(codes, low, high), params.zero.dtype)


def spread(values: Array, axis: int, rank: int) -> Array:
    """One value a channel, shaped so that it spreads over a tensor of ``rank`` axes."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def turn_weights(graph: PairEditor) -> int:
    """A Transpose between a weight's DequantizeLinear and its reader moves into the stored codes."""
    count = 0
    for node in graph.nodes:
        if not is_op(node, "Transpose") or graph.kept(node.output[0]):
            continue
        found = graph.weight(node.input[0])
        codes = graph.values(found[0].input[0]) if found else None
        if found is None or codes is None:
            continue
        order = [int(i) for i in attribute(node, "perm") or range(codes.ndim - 1, -1, -1)]
        params = found[1]
        if not params.per_tensor:
            params = Params(params.scale, params.zero, order.index(params.axis))
        stored = graph.add_constant(f"{found[0].input[0]}_turned", codes.transpose(order))
        if graph.replace(node.output[0], dequantize_constant(graph, stored, params)):
            count += 1
    return count


def dequantize_constant(graph: PairEditor, codes: str, params: Params) -> str:
    """Dequantize stored codes.

    Returns:
        The name of the result.
    """
    inputs = [codes, graph.store(f"{codes}_scale", params.scale), graph.store(f"{codes}_zero_point", params.zero)]
    extra: dict[str, Any] = {} if params.per_tensor else {"axis": params.axis}
    return graph.add(DEQUANTIZE, inputs, f"{codes}_dequantized", **extra)


def weights_to_int8(graph: PairEditor) -> int:
    """uint8 weights become int8: OpenVINO's convolutions stay in float with the former."""
    count = 0
    for node in graph.nodes:
        found = graph.weight(node.output[0]) if is_op(node, DEQUANTIZE) else None
        if found is None or found[1].zero.dtype != np.uint8 or not _is_weight(graph, node.output[0]):
            continue
        codes = graph.values(node.input[0])
        if codes is None or np.any(found[1].zero != _MIDDLE):
            continue
        moved = (codes.astype(np.int16) - _MIDDLE).astype(np.int8)
        graph.set_input(node, 0, graph.store(f"{node.input[0]}_int8", moved))
        graph.set_params(node, found[1].shifted())
        count += 1
    return count


def lopsided_weights(graph: PairEditor) -> int:
    """How many uint8 weights are left, because their zero point is not the middle."""
    found = [graph.weight(n.output[0]) for n in graph.nodes if is_op(n, DEQUANTIZE)]
    return sum(f is not None and f[1].zero.dtype == np.uint8 and _is_weight(graph, f[0].output[0]) for f in found)


def _is_weight(graph: PairEditor, name: str) -> bool:
    return any(
        is_op(r, "Conv", "ConvTranspose", "MatMul", "Gemm") and list(r.input).index(name) == 1
        for r in graph.readers(name)
    )


def activations_to_uint8(graph: PairEditor) -> int:
    """int8 activations become uint8 with a zero point 128 higher.

    ONNX Runtime's x86 kernels take uint8 activations and int8 weights; its own conversion gives up on branches.
    """
    count = 0
    done: set[str] = set()
    for node in graph.nodes:
        if is_op(node, QUANTIZE) and node.output[0] not in done:
            found = family(graph, node)
            done |= {n.output[0] for n in found}
            if not found or not _turns(graph, found):
                continue
            # All before any: a DQ node may have its type from the Q node.
            shifted = [(m, p.shifted()) for m in found if (p := graph.params(m)) is not None]
            for member, params in shifted:
                graph.set_params(member, params)
            for member in found:
                if member.op_type != DEQUANTIZE:
                    for name in member.output:
                        graph.retype(name, UINT8)
                count += member.op_type == QUANTIZE
    return count


def _turns(graph: PairEditor, family: list[onnx.NodeProto]) -> bool:
    for node in family:
        if is_op(node, QUANTIZE, DEQUANTIZE):
            params = graph.params(node)
            if params is None or params.zero.dtype != np.int8:
                return False
    return True


def family(graph: PairEditor, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """All nodes that share the codes that a Q node makes: other Q, DQ, and what moves codes between them.

    Empty where somebody else looks at the codes.
    """
    found, waiting = {node.output[0]: node}, [node]
    while waiting:
        member = waiting.pop()
        around: list[onnx.NodeProto] = []
        if member.op_type != DEQUANTIZE:
            for name in member.output:
                if graph.kept(name):
                    return []
                around += graph.readers(name)
        if member.op_type != QUANTIZE:
            for name in _codes(member):
                maker = graph.maker(name)
                if maker is None:
                    return []
                around.append(maker)
        for other in around:
            if not is_op(other, QUANTIZE, DEQUANTIZE, *MOVES):
                return []
            if other.output[0] not in found:
                found[other.output[0]] = other
                waiting.append(other)
    return list(found.values())


def _codes(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input if node.op_type == "Concat" else node.input[:1]


def to_scalars(graph: PairEditor) -> int:
    """Scales of one element in a list become scalars, which ONNX Runtime wants around sums."""
    count = 0
    for node in graph.nodes:
        params = graph.params(node) if is_op(node, QUANTIZE, DEQUANTIZE) else None
        if params is None or not params.per_tensor or not (params.scale.ndim or params.zero.ndim):
            continue
        graph.set_params(node, Params(params.scale.reshape(()), params.zero.reshape(()), 0))
        count += is_op(node, QUANTIZE)
    return count


def share_quantizers(graph: PairEditor) -> int:
    """Several Q nodes with the same parameters on one tensor become one: a product is fused with a single one."""
    count = 0
    for name in dict.fromkeys(n.input[0] for n in graph.nodes if is_op(n, QUANTIZE)):
        kept: list[tuple[onnx.NodeProto, Params]] = []
        for node in graph.readers(name):
            params = graph.params(node) if is_op(node, QUANTIZE) else None
            if params is None:
                continue
            twin = next((n for n, p in kept if p.same(params)), None)
            if twin is None:
                kept.append((node, params))
            elif graph.replace(node.output[0], twin.output[0]):
                count += 1
    return count


def drop_implied_clips(graph: PairEditor) -> int:
    """Take Relu and Clip away where the quantizer behind them saturates at their bounds anyway.

    A runtime fuses a convolution with the quantizer that reads it, not across an operator.
    """
    count = 0
    for node in graph.nodes:
        bounds = clip_bounds(graph, node)
        reader = graph.reader(node.output[0], QUANTIZE) if bounds else None
        params = graph.params(reader)
        # ONNX Runtime would fuse a convolution with a quantizer of several scales, and fail when it runs.
        if bounds is None or reader is None or params is None or not params.per_tensor:
            continue
        if saturates(params, *bounds) and graph.replace(node.output[0], node.input[0]):
            count += 1
    return count


def clip_bounds(graph: PairEditor, node: onnx.NodeProto) -> tuple[float, float] | None:
    """Bounds of a Relu or Clip; None for other nodes, and for bounds that are no constants."""
    if is_op(node, "Relu"):
        return 0.0, np.inf
    if not is_op(node, "Clip"):
        return None
    found = [-np.inf, np.inf]
    for index in (1, 2):
        if len(node.input) > index and node.input[index]:
            value = graph.scalar(node.input[index])
            if value is None:
                return None
            found[index - 1] = value
    return found[0], found[1]


def saturates(params: Params, low: float, high: float) -> bool:
    """Whether numbers at the bounds have the first and the last code already."""
    if params.scale.dtype != np.float32:
        return False
    first, last = params.limits
    fine = True
    for bound, code in ((low, first), (high, last)):
        if np.isfinite(bound):
            made = np.rint(np.float32(bound) / params.scale) + params.zero.astype(np.float32)
            fine &= bool(np.all(made <= code) if code == first else np.all(made >= code))
    return fine


def gather_codes(graph: PairEditor) -> int:
    """A table of which some rows are picked is dequantized after the picking, not whole in every run."""
    count = 0
    for node in graph.nodes:
        if not is_op(node, "Gather") or attribute(node, "axis", 0) != 0 or graph.kept(node.output[0]):
            continue
        found = graph.weight(node.input[0])
        if found is None or found[1].zero.dtype not in (np.int8, np.uint8):
            continue
        params, table = found[1], found[0].input[0]
        rows = graph.add("Gather", [table, node.input[1]], f"{table}_picked", axis=0)
        zero = graph.store(f"{table}_zero_point", params.zero)
        if params.per_tensor:
            scale = graph.store(f"{table}_scale", params.scale)
            made = graph.add(DEQUANTIZE, [rows, scale, zero], f"{table}_rows", like=node.output[0])
        elif params.axis == 0 and not params.zero.any() and (graph.rank(table) or 0) > 1:
            # One scale a row: picked as well, because DequantizeLinear takes no scale a sample.
            shape = [-1, *[1] * ((graph.rank(table) or 0) - 1)]
            scale = graph.add_constant(f"{table}_scale", params.scale.reshape(shape))
            factors = graph.add("Gather", [scale, node.input[1]], f"{table}_factors", axis=0)
            numbers = graph.add("Cast", [rows], f"{table}_numbers", to=FLOAT)
            made = graph.add("Mul", [numbers, factors], f"{table}_rows", like=node.output[0])
        else:
            continue
        count += graph.replace(node.output[0], made)
    return count
