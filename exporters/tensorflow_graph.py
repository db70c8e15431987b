"""TensorFlow functions to ONNX with tf2onnx, and what has to be mended on the way.

Chosen by trial (TensorFlow 2.21, Keras 3.15, tf2onnx 1.17, onnx 1.23) over Keras's `model.export(format="onnx")`, which
calls the same converter without what is mended here, fixes the batch under the torch backend and names outputs
`Identity`; and over OpenVINO's front end, which reads SavedModels but writes no ONNX. Mended here:

- GELU became Erfc, which tf2onnx does not know: 1 - Erf.
- Keras compiles depthwise convolutions with XLA on the CPU; such calls are not inlined unless the mark is taken off.
- Tensors that a layer holds (Normalization) stay inputs of the frozen graph: they become constants.
- An operator without an ONNX form stays in the graph under its own name: it is refused, by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import DeploykitError, ExportError, first_line
from deploykit.exporters.foreign_onnx import finish
from deploykit.extras import require
from deploykit.specs import Signature

if TYPE_CHECKING:
    import onnx


def import_tensorflow() -> Any:
    """TensorFlow, without its greeting."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return require("tensorflow", extra="tensorflow")


def write_function(call: Callable[..., Sequence[Any]], wanted: Signature, to: Path, opset: int) -> None:
    """Write a function of tensors as ONNX.

    Args:
        call: Takes one tensor an input, in the order of ``wanted``; returns a flat sequence.
        wanted: Inputs, and outputs as observed; symbols become free dimensions.
        to: The file.
        opset: Of the default domain.

    Raises:
        ExportError: The function cannot be traced, or an operator has no ONNX form.
    """
    tf = import_tensorflow()
    tf2onnx = require("tf2onnx", extra="tensorflow")
    specs = [
        tf.TensorSpec([None if isinstance(d, str) else d for d in s.shape or ()], s.dtype, name=f"input_{i}")
        for i, s in enumerate(wanted.inputs)
    ]
    try:
        traced = tf.function(lambda *tensors: list(call(*tensors)), input_signature=specs).get_concrete_function()
        graph, inputs, outputs = _freeze(tf, traced, len(specs))
        model, _ = tf2onnx.convert.from_graph_def(
            graph, input_names=inputs, output_names=outputs, opset=opset, custom_op_handlers={"Erfc": (_erfc, [])}
        )
    except DeploykitError:
        raise
    except Exception as exc:
        raise ExportError(f"tf2onnx failed ({first_line(exc, 240)})", hint="export a smaller part") from exc
    refuse_foreign_operators(model)
    finish(model, inputs, outputs, wanted, to)


def _freeze(tf: Any, function: Any, count: int) -> tuple[Any, list[str], list[str]]:
    """Weights become constants. Gives the graph, and the names of its inputs and outputs."""
    constants = require("tensorflow.python.framework.convert_to_constants", extra="tensorflow")
    frozen = constants.convert_variables_to_constants_v2(function, lower_control_flow=False, aggressive_inlining=True)
    graph = frozen.graph.as_graph_def(add_shapes=True)
    held = {inner.name: outer for outer, inner in function.graph.captures if outer.dtype != tf.resource}
    for node in graph.node:
        if node.op == "Placeholder" and f"{node.name}:0" in held:
            value = tf.make_tensor_proto(held[f"{node.name}:0"].numpy())
            kind = node.attr["dtype"].type
            node.op = "Const"
            node.attr.clear()
            node.attr["dtype"].type = kind
            node.attr["value"].tensor.CopyFrom(value)
    for owner in (*graph.node, *graph.library.function, *(n for f in graph.library.function for n in f.node_def)):
        for mark in ("_XlaMustCompile", "_noinline"):
            owner.attr.pop(mark, None)
    inputs = [tensor.name for tensor in function.inputs[:count]]
    outputs = [tensor.name for tensor in frozen.outputs]
    return graph, inputs, outputs


def _erfc(context: Any, node: Any, name: str, _: Any) -> None:
    """`Erfc(x)` as `1 - Erf(x)`, in tf2onnx's terms."""
    import numpy as np

    utils = require("tf2onnx.utils", extra="tensorflow")
    source, outputs, shapes, kinds = node.input[0], node.output, node.output_shapes, node.output_dtypes
    one = context.make_const(f"{name}_one", np.array(1, utils.map_onnx_to_numpy_type(kinds[0])))
    context.remove_node(node.name)
    erf = context.make_node("Erf", [source], shapes=shapes, dtypes=kinds)
    context.make_node("Sub", [one.output[0], erf.output[0]], name=name, outputs=outputs, shapes=shapes, dtypes=kinds)


def tflite_gelu(context: Any, node: Any, name: str, _: Any) -> None:
    """`x/2 * (1 + erf(x / sqrt 2))`, or the tanh form where the file asks for that, in tf2onnx's terms."""
    import numpy as np

    approximate = bool(node.get_attr_value("approximate", 0))
    source, outputs, shapes, kinds = node.input[0], node.output, node.output_shapes, node.output_dtypes
    context.remove_node(node.name)

    def constant(part: str, value: float) -> str:
        made: str = context.make_const(f"{name}_{part}", np.array(value, np.float32)).output[0]
        return made

    def make(kind: str, *inputs: str) -> str:
        made: str = context.make_node(kind, list(inputs), shapes=shapes, dtypes=kinds).output[0]
        return made

    if approximate:
        cube = make("Mul", make("Mul", source, source), source)
        inner = make("Add", source, make("Mul", cube, constant("cubic", 0.044715)))
        bent = make("Tanh", make("Mul", inner, constant("scale", float(np.sqrt(2 / np.pi)))))
    else:
        bent = make("Erf", make("Mul", source, constant("scale", float(np.sqrt(0.5)))))
    half = make("Mul", source, constant("half", 0.5))
    factor = make("Add", bent, constant("one", 1.0))
    context.make_node("Mul", [half, factor], name=name, outputs=outputs, shapes=shapes, dtypes=kinds)


def refuse_foreign_operators(model: onnx.ModelProto) -> None:
    """tf2onnx leaves what it cannot convert in the graph.

    Raises:
        ExportError: There is such an operator.
    """
    import onnx

    graphs = [model.graph]
    strange: dict[str, None] = {}
    for graph in graphs:  # grows while it is walked
        for node in graph.node:
            graphs += [a.g for a in node.attribute if a.HasField("g")]
            standard = node.domain in ("", "ai.onnx", "ai.onnx.ml")
            if not standard or not onnx.defs.has(node.op_type, node.domain if node.domain == "ai.onnx.ml" else ""):
                strange[node.op_type] = None
    if strange:
        names = ", ".join(list(strange)[:8])
        raise ExportError(f"no ONNX form for the operator {names}", hint="export the part before or behind it")
