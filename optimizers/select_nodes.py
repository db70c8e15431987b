"""Which nodes static quantization takes.

Taken are the nodes whose int8 kernels pay, and those between them that would otherwise force a way back to float. What
is left out matters as much: an Add that applies an attention mask has a range of 1e38 and destroys the model, and
products of two activations run in float in OpenVINO anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from typing import TYPE_CHECKING

from deploykit.errors import OptimizationError

if TYPE_CHECKING:
    import onnx

_CONV = ("Conv", "ConvTranspose")
# Inside a convolutional trunk these keep integers integers.
_TRUNK = (
    "Relu",
    "Clip",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Flatten",
    "Concat",
    "Reshape",
    "Transpose",
)
_COMPUTE_INPUTS = 2
_STANDARD, _MICROSOFT = ("", "ai.onnx"), ("com.microsoft",)
_HANDS_ON = ("MaxPool", "Reshape", "Transpose", "Flatten")
# What the names of nodes begin with that prepare an input (`preprocess_graph`).
PREPROCESS = "preprocess/"
# onnx.TensorProto.DataType
_FLOAT, _OTHER_FLOATS = 1, (10, 11, 16)
# Inputs that hold weights.
_WEIGHTS = {"Gather": (0,), "LSTM": (1, 2)}


def check_excluded(model: onnx.ModelProto, excluded: Iterable[str]) -> None:
    """Refuse names that would leave nothing out.

    Raises:
        OptimizationError: A name is neither a node's nor an operator type of the model.
    """
    known = {n.name for n in model.graph.node} | {n.op_type for n in model.graph.node}
    unknown = [name for name in excluded if name not in known]
    if unknown:
        raise OptimizationError(
            f"--exclude {unknown[0]!r} names no node and no operator type of the model",
            hint="see the names: deploykit inspect -m MODEL --json",
        )


def kept_float(model: onnx.ModelProto, excluded: Iterable[str]) -> frozenset[str]:
    """Names and operator types that stay in floating point: those asked for, and all that prepares an input.

    A Fourier transform or a resize in 8 bits would spoil what every layer sees, and costs next to nothing.
    """
    return frozenset(excluded) | {node.name for node in model.graph.node if node.name.startswith(PREPROCESS)}


def dynamic_nodes(
    model: onnx.ModelProto, ops: Iterable[str], excluded: Set[str] = frozenset()
) -> tuple[list[str], str | None]:
    """Names of the nodes that dynamic quantization can take.

    Args:
        model: Constants are initializers, and every node has a name of its own.
        ops: Operator types to quantize.
        excluded: Names and operator types that stay in floating point.

    Returns:
        The names, and the type of the weights of a node that was left out because they are not float32.
    """
    import onnx

    weights = {w.name: w for w in model.graph.initializer}
    wanted, chosen, other = frozenset(ops), [], None
    for node in model.graph.node:
        # Since opset 23 the standard has an Attention of its own, which onnxruntime's quantizer takes for its own.
        domain = _MICROSOFT if node.op_type == "Attention" else _STANDARD
        if node.op_type not in wanted or node.domain not in domain or {node.name, node.op_type} & set(excluded):
            continue
        held = [weights[node.input[i]] for i in _WEIGHTS.get(node.op_type, (1,)) if node.input[i] in weights]
        if any(w.data_type in _OTHER_FLOATS for w in held):
            other = onnx.TensorProto.DataType.Name(held[0].data_type).lower()
        elif held and all(w.data_type == _FLOAT for w in held):
            chosen.append(node.name)
    return chosen, other


def select_nodes(model: onnx.ModelProto, excluded: Set[str] = frozenset()) -> list[str]:
    """Names of the nodes to quantize.

    Args:
        model: Constants are initializers, and every node has a name of its own.
        excluded: Names and operator types that stay in floating point.
    """
    # onnxruntime's kernels behind Q/DQ pairs compute for float32.
    weights = {w.name: w for w in model.graph.initializer if w.data_type == _FLOAT}
    constants = {w.name for w in model.graph.initializer}
    trunk: set[str] = set()
    chosen = []
    for node in model.graph.node:
        if node.name in excluded or node.op_type in excluded or node.domain not in _STANDARD:
            continue
        if node.op_type in _CONV:
            if node.input[1] in weights:
                chosen.append(node.name)
                trunk.add(node.output[0])
        elif node.op_type in ("MatMul", "Gemm"):
            if node.input[1] in weights and len(weights[node.input[1]].dims) == _COMPUTE_INPUTS:
                chosen.append(node.name)
        elif (node.op_type == "Add" and set(node.input) <= trunk) or (
            # A shape put together from constants is no activation.
            node.op_type in _TRUNK and set() < {i for i in node.input if i and i not in constants} <= trunk
        ):
            chosen.append(node.name)
            trunk.update(node.output)
    return chosen


def check_selected(nodes: Collection[str]) -> None:
    """Refuse to quantize nothing.

    Raises:
        OptimizationError: There is no node.
    """
    if not nodes:
        raise OptimizationError(
            "nothing to quantize: no convolution or matrix product with constant float32 weights is left",
            hint="simplify it first (deploykit simplify), drop --exclude, or keep it in floating point",
        )


def watched_tensors(model: onnx.ModelProto, nodes: Set[str]) -> list[str]:
    """Floating-point activations that touch the chosen nodes: those that need a range.

    Outputs of matrix products are not quantized where no other chosen node reads them.
    """
    weights = {w.name for w in model.graph.initializer}
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.name in nodes:
            # The shape of Reshape and the bounds of Clip are no activations.
            data = node.input if node.op_type in ("Add", "Concat", "MatMul") else node.input[:1]
            made = () if node.op_type in ("MatMul", "Gemm") else node.output
            found |= dict.fromkeys(n for n in (*data, *made) if n and n not in weights)
    return list(found)


def stand_ins(model: onnx.ModelProto, nodes: Set[str]) -> dict[str, str]:
    """Tensors that need no watching, because another one's range serves them.

    What MaxPool and the like hand on has the range of their input. What only a Relu or Clip reads is quantized with the
    range behind that, which makes the activation part of the rounding.

    Returns:
        The other tensor, by tensor.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outside = {v.name for v in model.graph.output}
    direct: dict[str, str] = {}
    for node in model.graph.node:
        if node.name not in nodes:
            continue
        after = readers.get(node.output[0], [])
        if node.op_type in _HANDS_ON:
            direct[node.output[0]] = node.input[0]
        elif (
            len(after) == 1 and after[0].op_type in ("Relu", "Clip") and after[0].name in nodes
            and node.output[0] not in outside
        ):  # fmt: skip
            direct[node.output[0]] = after[0].output[0]

    def last(name: str) -> str:
        for _ in range(len(direct)):
            if name not in direct:
                break
            name = direct[name]
        return name

    return {name: last(name) for name in direct}
