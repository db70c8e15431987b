"""Put a graph into the form that quantizers can read: new enough, weights as initializers, shapes known."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from deploykit.errors import OptimizationError, first_line
from deploykit.graphs import walk
from deploykit.nodes import quantized_ops
from deploykit.weights import put_back, set_aside

if TYPE_CHECKING:
    import onnx

# Per-channel QuantizeLinear came with opset 13.
_PER_CHANNEL_OPSET = 13
# DynamicQuantizeLinear came with opset 11.
_PER_TENSOR_OPSET = 11
_MIN_IR = 7  # that of opset 13


def prepare(
    model: onnx.ModelProto, *, per_channel: bool = True, quantized: bool = False
) -> tuple[onnx.ModelProto, list[str]]:
    """Make a quantizable copy.

    Args:
        model: Left as it is.
        per_channel: Whether the opset has to know one scale an output channel.
        quantized: Whether it may be quantized already.

    Returns:
        The copy, and notes on what was done.

    Raises:
        OptimizationError: It is quantized already, or its opset cannot be raised.
    """
    import onnx

    found = quantized_ops(model)
    if found and not quantized:
        raise OptimizationError(
            f"the model is quantized already (it has {', '.join(found[:3])})",
            expected="a floating-point model",
            hint="start from the model before quantization, or repair this one: deploykit quantize repair",
        )
    notes: list[str] = []
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _name_nodes(copy)
    have = next((o.version for o in copy.opset_import if o.domain in ("", "ai.onnx")), 0)
    if 0 < have < (_PER_CHANNEL_OPSET if per_channel else _PER_TENSOR_OPSET):  # 0: operators of other domains only
        copy, raised = raise_opset(copy, _PER_CHANNEL_OPSET, "8-bit weights")
        notes += raised
    # Before 4, weights had to be listed as inputs; those that quantizers add are not.
    copy.ir_version = max(copy.ir_version, _MIN_IR)
    lifted = _lift_constants(copy)
    _skip_copies(copy)
    if lifted:
        notes.append(f"{lifted} Constant nodes turned into initializers")
    return infer_shapes(copy), notes


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give nameless nodes names, and equal names numbers, so that each node can be chosen and excluded."""
    given = Counter(node.name for node in model.graph.node)
    taken = set(given) - {""}
    for number, node in enumerate(model.graph.node):
        if node.name and given[node.name] == 1:
            continue
        base = node.name or node.op_type
        name = f"{base}_{number}"
        while name in taken:
            name += "_"
        taken.add(name)
        node.name = name


def raise_opset(model: onnx.ModelProto, wanted: int, why: str) -> tuple[onnx.ModelProto, list[str]]:
    """The model in an opset that is new enough.

    Args:
        model: May be changed.
        wanted: The opset.
        why: What needs it.

    Returns:
        The model, and a note where it was raised.

    Raises:
        OptimizationError: It cannot be raised.
    """
    from onnx import version_converter

    have = next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), wanted)
    if have >= wanted:
        return model, []
    aside = set_aside(model)  # the converter reads every value
    try:
        raised = version_converter.convert_version(model, wanted)
    except Exception as exc:
        raise OptimizationError(
            f"opset {have} cannot be raised to {wanted} ({first_line(exc)})",
            hint=f"export the model from its source again, with --opset {max(18, wanted)}",
        ) from exc
    put_back(raised, aside)
    return raised, [f"opset raised from {have} to {wanted}: {why} need it"]


def _lift_constants(model: onnx.ModelProto) -> int:
    """Turn Constant nodes of the main graph that hold a tensor into initializers, in place."""
    import onnx

    kept, lifted = [], 0
    for node in model.graph.node:
        tensor = _constant_tensor(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        if tensor is None:
            kept.append(node)
            continue
        made = onnx.TensorProto()
        made.CopyFrom(tensor)
        made.name = node.output[0]
        model.graph.initializer.append(made)
        lifted += 1
    if lifted:
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return lifted


def _skip_copies(model: onnx.ModelProto) -> None:
    """Let readers of a weight's Identity read the weight, in place: TorchScript shares equal biases that way.

    A quantizer takes such a bias for an activation, and ONNX Runtime then leaves the convolution in float.
    """
    kept = {v.name for v in model.graph.output}
    kept |= {name for located in walk(model) if located.where for name in located.node.input}
    stored = {tensor.name for tensor in model.graph.initializer}
    same: dict[str, str] = {}
    rest = []
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
        if node.op_type == "Identity" and node.input[0] in stored and node.output[0] not in kept:
            same[node.output[0]] = node.input[0]
        else:
            rest.append(node)
    if same:
        del model.graph.node[:]
        model.graph.node.extend(rest)


def _constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    import numpy as np
    from onnx import numpy_helper

    for attribute in node.attribute:
        if attribute.name == "value":
            tensor: onnx.TensorProto = attribute.t
            return tensor
        if attribute.name in ("value_float", "value_floats"):
            value = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            return numpy_helper.from_array(np.asarray(value, np.float32))
        if attribute.name in ("value_int", "value_ints"):
            number = attribute.i if attribute.name == "value_int" else list(attribute.ints)
            return numpy_helper.from_array(np.asarray(number, np.int64))
    return None


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Shapes and types where ONNX can infer them; the model as it is where it cannot."""
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):
        # Over 2 GB, or a contradiction in the file: quantizers do with fewer shapes.
        return model
