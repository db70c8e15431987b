"""Which layers really run in integers, read from the graph that each runtime made of the file.

A file that holds Q/DQ pairs proves nothing: a pair that a fusion does not take leaves a float kernel between two
conversions. ONNX Runtime's optimized graph and OpenVINO's runtime model say what is executed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import DeploykitError
from deploykit.modelfile import read_model
from deploykit.optimizers.select_nodes import PREPROCESS
from deploykit.runtimes import Device, open_session
from deploykit.runtimes.placement import ExecutedNode, is_compute

if TYPE_CHECKING:
    import onnx

# Operators that quantization is about: what each is called in a table, and which inputs hold its weights.
_LAYERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "Conv": ("Conv", (1,)), "ConvTranspose": ("ConvTranspose", (1,)), "MatMul": ("MatMul", (1,)),
    "Gemm": ("Gemm", (1,)), "LSTM": ("LSTM", (1, 2)), "GRU": ("GRU", (1, 2)), "RNN": ("RNN", (1, 2)),
    "ConvInteger": ("Conv", (1,)), "MatMulInteger": ("MatMul", (1,)), "DynamicQuantizeMatMul": ("MatMul", (1,)),
    "MatMulIntegerToFloat": ("MatMul", (1,)), "DynamicQuantizeLSTM": ("LSTM", (1, 2)), "MatMulNBits": ("MatMul", (1,)),
    "QLinearConv": ("Conv", (3,)), "QLinearMatMul": ("MatMul", (3,)), "QGemm": ("Gemm", (3,)),
    "Attention": ("Attention", (1,)), "QAttention": ("Attention", (1,)),
}  # fmt: skip
# onnxruntime's dynamic quantizer appends "_quant" to the names of these.
_RENAMED = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM", "QAttention")
_PASSED_ON = ("DequantizeLinear", "Transpose", "Cast", "Reshape", "Identity")
# onnx.TensorProto.DataType: UINT8, INT8, UINT4, INT4
_INTEGERS = (2, 3, 21, 22)
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution, matrix product or recurrence of a file.

    Attributes:
        name: Of the node before quantization.
        bias: Of the Add or Sum behind it that nothing else stands between; OpenVINO names the two after that.
        op: Operator type before quantization.
        weights: Names of the stored weights; none for a product of two activations.
        outputs: Those of its tensors that the model gives out; OpenVINO names a node after them.
        made: All of its tensors; ONNX Runtime names float convolutions after them.
        quantized: Whether its weights are integers.
    """

    name: str
    op: str
    weights: frozenset[str]
    outputs: frozenset[str]
    made: frozenset[str]
    quantized: bool
    bias: str = ""


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    """The layers of a model's main graph, in its order, quantized or not."""
    makers = {output: node for node in model.graph.node for output in node.output}
    stored = {t.name: t.data_type for t in model.graph.initializer}
    names, given = {node.name for node in model.graph.node}, frozenset(v.name for v in model.graph.output)
    readers = Counter(name for node in model.graph.node for name in node.input)
    adds = {name: node.name for node in model.graph.node if node.op_type in ("Add", "Sum") for name in node.input}
    found = []
    for number, node in enumerate(model.graph.node):
        if node.op_type not in _LAYERS:
            continue
        op, places = _LAYERS[node.op_type]
        held = [_stored_name(node.input[i], makers, stored) for i in places if i < len(node.input)]
        weights = frozenset(filter(None, held))
        name = node.name or f"{node.op_type}_{number}"
        if node.op_type in _RENAMED:
            name = name.removesuffix("_quant")
        # onnxruntime's dynamic quantizer splits a Gemm into a product of this name and an Add.
        if node.op_type == "MatMulInteger" and name.endswith("_MatMul") and f"{name[:-7]}_Add" in names:
            op, name = "Gemm", name.removesuffix("_MatMul")
        integers = bool(weights) and all(stored[w] in _INTEGERS for w in weights)
        made, outputs = frozenset(node.output), given.intersection(node.output)
        bias = adds.get(node.output[0], "") if weights and readers[node.output[0]] == 1 and not outputs else ""
        found.append(Layer(name, op, weights, outputs, made, integers, bias))
    return found


def _stored_name(name: str, makers: Mapping[str, onnx.NodeProto], stored: Collection[str]) -> str:
    """The initializer behind a tensor; empty where it follows from activations."""
    for _ in range(len(_PASSED_ON)):
        if name in stored or name not in makers or makers[name].op_type not in _PASSED_ON:
            break
        name = makers[name].input[0]
    return name if name in stored else ""


def runs_in_integers(layer: Layer, executed: Sequence[ExecutedNode]) -> bool:
    """Whether a layer is in an executed node that computes in int8."""
    known = layer.weights | layer.outputs | {layer.name, layer.bias} - {""}
    return any(n.precision == "int8" and is_compute(n.op) and known & n.sources for n in executed)


def prove_placement(path: Path, device: Device, reasons: Mapping[str, str]) -> dict[str, Any]:
    """Count the layers of a file that a device runs in int8.

    Args:
        path: The quantized `.onnx` file.
        device: Where.
        reasons: Why a layer was left in floating point, by its name or operator type.

    Returns:
        A JSON-ready record for the manifest; `layers` is None where the runtime does not tell, with the `reason`.
    """
    layers = layers_of(read_model(path, weights=False))
    try:
        with open_session(path, device) as session:
            executed = session.executed()
    except DeploykitError as exc:
        return {"device": str(device), "layers": None, "reason": exc.what, "summary": f"not known: {exc.what}"}
    return count_layers(layers, executed, device, reasons)


def count_layers(
    layers: Sequence[Layer], executed: Sequence[ExecutedNode], device: Device, reasons: Mapping[str, str]
) -> dict[str, Any]:
    """The record of `prove_placement` from what a runtime executes."""
    counts: dict[str, dict[str, int]] = {}
    floats: list[dict[str, str]] = []
    for layer in layers:
        integer = runs_in_integers(layer, executed)
        entry = counts.setdefault(layer.op, {"int8": 0, "total": 0})
        entry["total"] += 1
        entry["int8"] += integer
        if not integer:
            floats.append({"name": layer.name, "op": layer.op, "why": _why(layer, reasons)})
    return {"device": str(device), "layers": counts, "float": floats, "summary": _summary(counts, floats)}


def _why(layer: Layer, reasons: Mapping[str, str]) -> str:
    found = reasons.get(layer.name) or reasons.get(layer.op)
    if found:
        return found
    if layer.name.startswith(PREPROCESS):
        return "prepares the input"
    if layer.quantized:
        return "int8 in the file, float in this runtime"
    return "left out by the quantizer" if layer.weights else "two activations"


def _summary(counts: Mapping[str, Mapping[str, int]], floats: Sequence[Mapping[str, str]]) -> str:
    if not counts:
        return "no convolution, matrix product or recurrence"
    parts = [f"{n['int8']} of {n['total']} {op} int8" for op, n in counts.items()]
    if not floats:
        return ", ".join(parts)
    named = [f"{f['name']} ({f['why']})" for f in floats[:_SHOWN]]
    more = [f"and {len(floats) - _SHOWN} more"] if len(floats) > _SHOWN else []
    return f"{', '.join(parts)}, {len(floats)} float: {', '.join([*named, *more])}"
