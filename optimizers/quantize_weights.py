"""Weight-only quantization: weights in blocks of 8 or 4 bits, activations in floating point.

It needs no data. The result is smaller, loses less than rounded activations do, and gains speed where reading weights
is what takes the time: one token at a time, or small batches of a large model. Two forms hold the same numbers:

- "qdq": ONNX's own DequantizeLinear in blocks (opset 21) before a MatMul. ONNX Runtime turns the two into one
  MatMulNBits, OpenVINO into a product with compressed weights.
- "nbits": ONNX Runtime's MatMulNBits itself, for versions that do not know the fusion; it needs no opset 21, and blocks
  need not divide the weight.
"""

from __future__ import annotations

import tempfile
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.errors import OptimizationError
from deploykit.optimizers.base import StepResult
from deploykit.optimizers.blocks import Blocks, pack_codes, pack_nbits, round_blocks
from deploykit.optimizers.editing import Editor, attributes, standard
from deploykit.optimizers.embeddings import quantize_embeddings
from deploykit.optimizers.prepare import infer_shapes, prepare, raise_opset
from deploykit.optimizers.quantize_config import WeightsConfig, tools
from deploykit.optimizers.select_nodes import check_excluded, kept_float
from deploykit.progress import Progress
from deploykit.specs import Array
from deploykit.weights import LightModel, open_light, write_copy, write_light

if TYPE_CHECKING:
    import onnx

BITS, SIZES, FORMS = (8, 4), (16, 32, 64, 128, 256), ("qdq", "nbits")
# Measured on MiniLM: 8 bits lose little, and larger blocks are faster; 4 bits need small ones.
_SIZES = {8: 128, 4: 32}
_BLOCKED_OPSET = 21
_MIN_IR = 10  # that of opset 21
# Smaller products take no time and no space.
_SMALLEST_ELEMENTS = 1 << 10
# Activations in int8, products summed in int32; source: onnxruntime's `docs/ContribOperators.md`.
_ACCURACY_LEVEL = 4


def check_options(config: WeightsConfig) -> None:
    """Refuse values that the form does not know.

    Raises:
        OptimizationError: One is unknown.
    """
    if config.bits not in BITS:
        raise OptimizationError(f"weights of {config.bits} bits", expected=" or ".join(map(str, BITS)))
    if config.block is not None and config.block not in SIZES:
        raise OptimizationError(f"blocks of {config.block} weights", expected=" or ".join(map(str, SIZES)))
    if config.form not in FORMS:
        raise OptimizationError(f"form {config.form!r}", expected=" or ".join(FORMS))


def quantize_weights(
    model: Path,
    config: WeightsConfig,
    target: Path,
    progress: Progress | None = None,
    keep_float: Path | None = None,
) -> StepResult:
    """Round weights of matrix products in blocks, and those of embeddings in rows.

    Args:
        model: Floating-point ONNX file.
        config: How.
        target: Where the result goes.
        progress: Told how far it is.
        keep_float: Where the graph goes as it is before it is quantized.

    Raises:
        OptimizationError: Nothing to quantize, or unusable options.
    """
    check_options(config)
    told = progress or Progress()
    size = config.block or _SIZES[config.bits]
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=target.parent) as scratch:
        light = open_light(model, Path(scratch))
        prepared, notes = prepare(light.proto)
        check_excluded(prepared, config.exclude)
        if config.form == "qdq":
            prepared, raised = raise_opset(prepared, _BLOCKED_OPSET, "blocks of weights")
            prepared.ir_version = max(prepared.ir_version, _MIN_IR)
            notes += raised
        excluded = kept_float(prepared, config.exclude)
        light = LightModel(infer_shapes(prepared), light.folder)
        chosen, left = _chosen(Editor(light), excluded, size if config.form == "qdq" else None)
        if not chosen:
            raise OptimizationError(
                "nothing to quantize: no matrix product has constant float32 weights that blocks would make smaller",
                hint="convolutional models want: deploykit quantize static --data FILE",
            )
        if keep_float is not None:
            write_copy(light, keep_float)
        editor = Editor(light)
        done = 0
        for number, name in enumerate(chosen):
            told.advance(number, len(chosen), "weights")
            problem = _replace(editor, name, config, size)
            done += not problem
            if problem:
                left.append(f"{name} ({problem})")
        if not done:
            raise OptimizationError(f"nothing to quantize: {'; '.join(left[:3])}", hint="keep it in floating point")
        embeddings = quantize_embeddings(light, excluded) if config.embeddings else []
        if config.form == "nbits" and not any(o.domain == "com.microsoft" for o in light.proto.opset_import):
            entry = light.proto.opset_import.add()
            entry.domain, entry.version = "com.microsoft", 1
        write_light(light, target)
    if left:
        notes.append(f"{len(left)} products stay in floating point: {', '.join(left[:3])}")
    if embeddings:
        notes.append(f"{len(embeddings)} embeddings in 8 bits, a scale a row: {', '.join(embeddings[:3])}")
    params = {
        "bits": config.bits,
        "block": size,
        "form": config.form,
        "exclude": list(config.exclude),
        "embeddings": config.embeddings,
        "quantized_nodes": done,
        "quantized_embeddings": len(embeddings),
    }
    return StepResult(True, tuple(notes), params, {"onnx": tools()["onnx"]})


def _chosen(editor: Editor, excluded: Set[str], divisor: int | None) -> tuple[list[str], list[str]]:
    """Names of the products to take, and of those that cannot be taken, with the reason."""
    chosen, left = [], []
    for node in editor.light.proto.graph.node:
        if not _is_product(node) or {node.name, node.op_type} & excluded or not editor.is_weight(node.input[1]):
            continue
        dims = editor.dims(node.input[1])
        if len(dims) != 2 or dims[0] * dims[1] < _SMALLEST_ELEMENTS:
            continue
        inputs = dims[1] if _is_turned(node) else dims[0]
        if divisor is not None and _divisor(inputs, divisor) is None:
            left.append(f"{node.name} (blocks do not divide {inputs} inputs: --form nbits)")
        elif editor.is_shared(node.input[1]):
            left.append(f"{node.name} (its weight is read elsewhere too)")
        else:
            chosen.append(node.name)
    return chosen, left


def _is_product(node: onnx.NodeProto) -> bool:
    """Whether a node is a MatMul, or a Gemm that is a MatMul and perhaps an Add."""
    if standard(node, "Gemm"):
        given = attributes(node)
        return given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
    return standard(node, "MatMul")


def _is_turned(node: onnx.NodeProto) -> bool:
    """Whether a product's weight is `[outputs, inputs]`."""
    return node.op_type == "Gemm" and bool(attributes(node).get("transB", 0))


def _divisor(inputs: int, size: int) -> int | None:
    """The largest size of a block up to ``size`` that divides the inputs."""
    return next((s for s in reversed(SIZES) if s <= size and inputs % s == 0), None)


def _replace(editor: Editor, name: str, config: WeightsConfig, size: int) -> str:
    """Let a product read rounded weights, in place.

    Returns:
        Why it was left as it was; empty where it was not.
    """
    node = next(n for n in editor.light.proto.graph.node if n.name == name)
    weight = str(node.input[1])
    values = editor.read(weight).T if _is_turned(node) else editor.read(weight)
    if not np.isfinite(values).all():
        return "weights that are not finite"
    if config.form == "qdq":
        size = _divisor(values.shape[0], size) or size
    blocks = round_blocks(values, config.bits, size, symmetric=config.bits == 8)
    made, bias = str(node.output[0]), [name for name in node.input[2:3] if name]
    product = editor.free_name(f"{made}_product") if bias else made
    fresh = (_dequantized if config.form == "qdq" else _nbits)(editor, node, product, blocks)
    if bias:
        fresh.append(_sum(product, bias[0], made, f"{name}_bias"))
    elif config.form == "qdq" and len(editor.shape(node.input[0]) or ()) < 3:
        for reader in editor.readers[made]:
            if standard(reader, "Add"):
                reader.op_type = "Sum"
    _put(editor.light.proto.graph, node.name, fresh)
    _remove_weight(editor.light, weight)
    return ""


def _sum(data: str, bias: str, made: str, name: str) -> onnx.NodeProto:
    """Add a bias with Sum: of a MatMul of two axes and an Add, ONNX Runtime makes a Gemm, and then no MatMulNBits.

    The weights would be unpacked in every inference.
    """
    from onnx import helper

    return helper.make_node("Sum", [data, bias], [made], name)


def _put(graph: onnx.GraphProto, name: str, fresh: list[onnx.NodeProto]) -> None:
    """Put nodes in the place of one."""
    place = next(i for i, n in enumerate(graph.node) if n.name == name)
    del graph.node[place]
    for offset, node in enumerate(fresh):
        graph.node.insert(place + offset, node)


def _dequantized(editor: Editor, node: onnx.NodeProto, product: str, blocks: Blocks) -> list[onnx.NodeProto]:
    from onnx import TensorProto, helper, numpy_helper

    weight = str(node.input[1])
    kind = TensorProto.UINT4 if blocks.bits == 4 else TensorProto.UINT8
    names = [editor.free_name(f"{weight}_{part}") for part in ("quantized", "scale", "zero_point", "dequantized")]
    editor.light.proto.graph.initializer.extend(
        [
            _raw(names[0], kind, blocks.codes, blocks.bits),
            numpy_helper.from_array(blocks.scales, names[1]),
            _raw(names[2], kind, blocks.zeros, blocks.bits),
        ]
    )
    return [
        helper.make_node(
            "DequantizeLinear", names[:3], names[3:], f"{node.name}_weight", axis=0, block_size=blocks.size
        ),
        helper.make_node("MatMul", [node.input[0], names[3]], [product], node.name),
    ]


def _raw(name: str, kind: int, codes: Array, bits: int) -> onnx.TensorProto:
    from onnx import helper

    return helper.make_tensor(name, kind, codes.shape, pack_codes(codes.reshape(-1), bits).tobytes(), raw=True)


def _nbits(editor: Editor, node: onnx.NodeProto, product: str, blocks: Blocks) -> list[onnx.NodeProto]:
    from onnx import helper, numpy_helper

    weight, names = str(node.input[1]), []
    for part, values in zip(("quantized", "scale", "zero_point"), pack_nbits(blocks), strict=True):
        if values is not None:
            names.append(editor.free_name(f"{weight}_{part}"))
            editor.light.proto.graph.initializer.append(numpy_helper.from_array(values, names[-1]))
    inputs, outputs = blocks.codes.shape
    made = helper.make_node(
        "MatMulNBits", [node.input[0], *names], [product], node.name, domain="com.microsoft", K=inputs, N=outputs,
        bits=blocks.bits, block_size=blocks.size, accuracy_level=_ACCURACY_LEVEL,
    )  # fmt: skip
    return [made]


def _remove_weight(light: LightModel, name: str) -> None:
    for values in (light.proto.graph.initializer, light.proto.graph.input):
        place = next((i for i, value in enumerate(values) if value.name == name), None)
        if place is not None:
            del values[place]
