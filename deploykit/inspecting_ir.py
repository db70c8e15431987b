"""What an OpenVINO IR file is and costs, as far as the openvino package tells. The keys are those of `inspecting`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.contract import Violation
from deploykit.errors import DataError, ModelError
from deploykit.extras import require
from deploykit.loading import reason_of
from deploykit.targets import Target

_BITS = {"boolean": 8, "bf16": 16, "nf4": 4, "f8e4m3": 8, "f8e5m2": 8, "f8e8m0": 8, "f4e2m1": 4}
_SAMPLES, _LENGTH = 1, 128
_COMPUTING = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
# They multiply in bulk, and are not counted here.
_BULK = (
    "LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell", "Einsum", "TensorIterator", "Loop",
    "If", "ScaledDotProductAttention", "DeformableConvolution", "DFT", "IDFT", "RDFT", "IRDFT", "BinaryConvolution",
    "STFT", "PagedAttentionExtension",
)  # fmt: skip


def describe_ir(file: Path, dims: Mapping[str, int]) -> dict[str, Any]:
    """Describe an `.xml` file and its `.bin`.

    Args:
        file: The `.xml` file.
        dims: Sizes of dynamic dimensions, called `<input>_dim<axis>`.

    Raises:
        ModelError: OpenVINO cannot read it.
        MissingDependencyError: OpenVINO is not installed.
        DataError: `dims` names a dimension that the model does not have.
    """
    ov = require("openvino", extra="openvino")
    with file.open("rb") as stream:
        # OpenVINO would try the readers of all other formats on it, loudly.
        if not stream.read(64).lstrip().startswith(b"<"):
            raise ModelError(f"{file} is not XML", expected="an OpenVINO IR file", hint="make it again")
    try:
        model = ov.Core().read_model(str(file))
    except Exception as exc:
        raise ModelError(f"OpenVINO cannot read {file} ({reason_of(str(exc))})", hint="make it again") from exc
    inputs = [_port(p, f"input_{i}") for i, p in enumerate(model.inputs)]
    outputs = [_port(p, f"output_{i}") for i, p in enumerate(model.outputs)]
    symbols = [d for port in inputs for d in port["shape"] or [] if isinstance(d, str)]
    unknown = next((name for name in dims if name not in symbols), None)
    if unknown is not None:
        raise DataError(
            f"--dim names {unknown!r}, which is no dynamic dimension of the model",
            expected=f"one of {', '.join(symbols) or 'none: all dimensions are fixed'}",
        )
    sizes = {name: dims.get(name, _SAMPLES if name.endswith("_dim0") else _LENGTH) for name in symbols}
    notes = _reshape(model, inputs, sizes)
    ops = model.get_ops()
    parameters = _parameters(ops)
    weights = file.with_suffix(".bin")
    files = {p.name: p.stat().st_size for p in (file, weights) if p.exists()}
    compute = [n for n in ops if n.get_type_name() not in ("Parameter", "Result", "Constant")]
    return {
        "format": "openvino",
        "invalid": None,
        "files": {"bytes": sum(files.values()), "external": len(files) - 1, "sizes": files},
        "ir_version": None,
        "producer": f"openvino {ov.__version__.split('-')[0]} read it",
        "opsets": _opsets(ops),
        "inputs": inputs,
        "outputs": outputs,
        "dynamic_axes": [
            {"tensor": p["name"], "axis": axis, "name": d, "size": sizes.get(d)}
            for p in (*inputs, *outputs)
            for axis, d in enumerate(p["shape"] or [])
            if isinstance(d, str)
        ],
        "nodes": {
            "total": len(compute), "main": len(compute), "subgraphs": None, "functions": 0, "local_functions": [],
            "by_op": dict(Counter(n.get_type_name() for n in compute).most_common()),
            "names": [n.get_friendly_name() for n in compute],
        },
        "custom_ops": [],
        "parameters": parameters,
        "compute": {"sizes": sizes, **_count(compute), "notes": notes},
        "memory": {
            "weight_bytes": parameters["bytes"], "peak_activation_bytes": None, "total_bytes": None, "at_node": None,
            "unknown_tensors": None,
        },
        "quantized": None,
        "unshaped": [],
    }  # fmt: skip


def ir_violations(file: Path, targets: Sequence[Target]) -> list[Violation]:
    """OpenVINO IR is for OpenVINO alone."""
    return [
        Violation(
            t.name, "format", None, None, None, None, f"{t} reads ONNX, and {file.name} is OpenVINO IR",
            "use the .onnx file that it was made from",
        )
        for t in targets
        if t.runtime != "openvino"
    ]  # fmt: skip


def _port(port: Any, fallback: str) -> dict[str, Any]:
    name = sorted(port.names)[0] if port.names else fallback
    shape = port.partial_shape
    dims: list[int | str] | None = None
    if not shape.rank.is_dynamic:
        dims = [int(d.get_length()) if d.is_static else f"{name}_dim{axis}" for axis, d in enumerate(shape)]
    return {"name": name, "dtype": _dtype(port.element_type), "shape": dims}


def _dtype(kind: Any) -> str:
    name = str(kind.get_type_name())
    long = {"bf16": "bfloat16", "boolean": "bool", "string": "string", "nf4": "nf4"}
    letters = {"f": "float", "i": "int", "u": "uint"}
    return long.get(name) or (letters[name[0]] + name[1:] if name[0] in letters and name[1:].isdigit() else name)


def _reshape(model: Any, inputs: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> list[str]:
    """Give the dynamic dimensions their sizes, in place; what could not be done is said."""
    if not sizes:
        return []
    shapes = {
        index: [sizes[d] if isinstance(d, str) else d for d in port["shape"]]
        for index, port in enumerate(inputs)
        if port["shape"] is not None
    }
    try:
        model.reshape(shapes)
    except Exception as exc:  # noqa: BLE001 - sizes that do not fit are the finding
        return [f"the model does not take these sizes ({reason_of(str(exc))})"]
    return []


def _opsets(ops: Sequence[Any]) -> dict[str, int]:
    """The newest operator set in use; one file may mix several."""
    numbers = [
        int(version.removeprefix("opset"))
        for n in ops
        if (version := n.get_type_info().version_id or "").removeprefix("opset").isdecimal()
    ]
    return {"openvino": max(numbers)} if numbers else {}


def _parameters(ops: Sequence[Any]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for node in ops:
        if node.get_type_name() == "Constant":
            kind = node.get_output_element_type(0)
            elements = math.prod(node.get_output_shape(0))
            raw = kind.get_type_name()
            bits = _BITS.get(raw) or int("".join(c for c in raw if c.isdigit()) or 0)
            counts[_dtype(kind)] += elements
            sizes[_dtype(kind)] += math.ceil(elements * bits / 8)
    return {
        "count": sum(counts.values()),
        "bytes": sum(sizes.values()),
        "by_dtype": {name: {"count": counts[name], "bytes": sizes[name]} for name, _ in sizes.most_common()},
        "shared_tensors": 0,
    }


def _count(ops: Sequence[Any]) -> dict[str, Any]:
    macs: Counter[str] = Counter()
    uncounted: list[dict[str, str]] = []
    nodes = 0
    for node in ops:
        op = node.get_type_name()
        if op not in _COMPUTING and op not in _BULK:
            continue
        nodes += 1
        reason = "it is not counted in OpenVINO IR" if op in _BULK else None
        shapes = [node.get_input_partial_shape(i) for i in range(node.get_input_size())]
        out = node.get_output_partial_shape(0)
        if reason is None and (out.is_dynamic or any(s.is_dynamic for s in shapes[:2])):
            reason = "a shape is not known"
        if reason is not None:
            uncounted.append({"node": repr(node.get_friendly_name()), "op": op, "reason": reason})
            continue
        dims = [[int(d.get_length()) for d in s] for s in (*shapes[:2], out)]
        macs[op] += _macs(op, node.get_attributes(), *dims)
    return {"macs": sum(macs.values()), "by_op": dict(macs.most_common()), "nodes": nodes, "uncounted": uncounted}


def _macs(op: str, attributes: Mapping[str, Any], data: list[int], weight: list[int], out: list[int]) -> int:
    """Layouts: https://docs.openvino.ai/2024/documentation/openvino-ir-format/operation-sets.html."""
    if op == "MatMul":
        return math.prod(out) * (data[-2] if attributes.get("transpose_a") and len(data) > 1 else data[-1])
    # Convolution: outputs, inputs, window; the others: [groups,] inputs, outputs of a group, window.
    kernel = weight[2:] if op.startswith("Group") else weight[1:]
    return math.prod(data if "Backprop" in op else out) * math.prod(kernel)
