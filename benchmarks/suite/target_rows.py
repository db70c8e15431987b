"""Measure the rows of deploykit/targets.toml for the runtimes that are installed.

python benchmarks/suite/target_rows.py [ort] [openvino]

Needs onnx, and onnxruntime or openvino. Each opset, IR version and operator is one tiny model; what the runtime refuses
is read from its error. Models are read in child processes, because some crash OpenVINO. Prints JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator

import onnx
from onnx import TensorProto, defs, helper

OPSETS = range(13, 33)
IR_VERSIONS = range(7, 19)
ML_OPSETS = range(2, 8)


def model(node: onnx.NodeProto, *, opset: int = 13, ir_version: int = 4, ml: int = 3) -> bytes:
    """One node from x to y, both float32[2]."""
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    opsets = [("", opset), ("ai.onnx.ml", ml), ("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in opsets])
    made.ir_version = ir_version
    return bytes(made.SerializeToString())


def node(op: str, domain: str = "", inputs: int = 1) -> onnx.NodeProto:
    """A node with as many inputs, all of them x."""
    return helper.make_node(op, ["x"] * inputs, ["y"], domain=domain)


def newest(numbers: Iterable[int], make: Callable[[int], bytes], refused: Callable[[bytes], str | None]) -> int | None:
    """The largest number up to which nothing is refused; None where none is."""
    last = None
    for number in numbers:
        if refused(make(number)) is not None:
            return last
        last = number
    return None


def ort_row(contrib: Iterable[str]) -> dict[str, object]:
    """Limits of the installed ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4

    def refused(raw: bytes) -> str | None:
        try:
            onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        except Exception as exc:
            return str(exc)
        return None

    scaler = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[0.0], scale=[1.0])
    known = [
        op for op in contrib if "is not a registered function" not in (refused(model(node(op, "com.microsoft"))) or "")
    ]
    return {
        "version": onnxruntime.__version__,
        "opset": newest(OPSETS, lambda n: model(node("Identity"), opset=n), refused),
        "ml_opset": newest(ML_OPSETS, lambda n: model(scaler, ml=n), refused),
        "ir": newest(IR_VERSIONS, lambda n: model(node("Identity"), ir_version=n), refused),
        "contrib": sorted(known),
    }


def openvino_row(contrib: Iterable[str]) -> dict[str, object]:
    """Operators that the installed OpenVINO lacks and knows."""
    import openvino

    def refused(raw: bytes) -> str | None:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                openvino.Core().read_model(raw, b"")
            except Exception as exc:
                os.write(writer, str(exc).encode()[-4000:])
            os._exit(0)
        os.close(writer)
        text = os.read(reader, 5000).decode(errors="replace")
        os.close(reader)
        # A crash comes after the look-up of the operator.
        os.waitpid(child, 0)
        return text or None

    def lacks(raw: bytes) -> bool:
        return bool(
            re.search("does not support the following ONNX operations|No conversion rule found", refused(raw) or "")
        )

    def standard(domain: str) -> Iterator[tuple[str, bytes]]:
        for name in sorted({s.name for s in defs.get_all_schemas_with_history() if s.domain == domain}):
            schema = defs.get_schema(name, domain=domain)
            opset = min(max(schema.since_version, 17), 28) if not domain else 17
            yield name, model(node(name, domain, max(schema.min_input, 1)), opset=opset, ir_version=10)

    return {
        "version": openvino.__version__.split("-")[0],
        "opset": newest(OPSETS, lambda n: model(node("Identity"), opset=n), refused),
        "ir": newest(IR_VERSIONS, lambda n: model(node("Identity"), opset=17, ir_version=n), refused),
        "missing": [name for name, raw in standard("") if lacks(raw)],
        "ml": [name for name, raw in standard("ai.onnx.ml") if not lacks(raw)],
        "contrib": sorted(op for op in contrib if not lacks(model(node(op, "com.microsoft"), opset=17, ir_version=8))),
    }


def main(runtimes: list[str]) -> None:
    """Print a row for each runtime."""
    import tomllib
    from pathlib import Path

    table = tomllib.loads((Path(__file__).parents[2] / "deploykit" / "targets.toml").read_text(encoding="utf-8"))
    contrib = sorted({op for ops in table["contrib"].values() for op in ops})
    rows = {"ort": ort_row, "openvino": openvino_row}
    print(json.dumps({name: rows[name](contrib) for name in runtimes or rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
