"""TFLite files: LiteRT's interpreter is the reference, tf2onnx the road to ONNX.

tf2onnx reads TFLite's own graph; it needs TensorFlow for that. Quantized files become QuantizeLinear and
DequantizeLinear nodes; they are held to the interpreter's numbers like any other graph, and refused where a runtime
rounds another way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import ValueRange
from deploykit.errors import ExportError, SourceError, first_line
from deploykit.exporters.base import DEFAULT_OPSET, ExportOptions, Way
from deploykit.exporters.foreign_onnx import finish
from deploykit.exporters.shapes import observed_outputs
from deploykit.exporters.tensorflow_graph import import_tensorflow, refuse_foreign_operators, tflite_gelu
from deploykit.exporters.tensorflow_source import Callee, TensorFlowSource, declared
from deploykit.exporters.tflite_sparse import write_dense
from deploykit.extras import require, version_of
from deploykit.specs import Array, Feeds, Signature

_IDENTIFIER = b"TFL3"
_INTEGERS = (np.int8, np.uint8, np.int16)


class TFLiteSource(TensorFlowSource):
    """A `.tflite` file.

    Args:
        path: The file.
        options: What the user asked for.

    Raises:
        SourceError: Damaged, or with operators that the interpreter does not have.
    """

    def __init__(self, path: Path, options: ExportOptions) -> None:
        self._path = path
        self._interpreter = _open(path)
        takes, gives = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._takes, self._gives = _named(self._interpreter, takes, gives)
        inputs = tuple(
            declared(n, np.dtype(d["dtype"]).name if d["dtype"] is not np.bytes_ else "string",
                     [int(s) for s in _shape(d)], str(path))
            for n, d in self._takes.items()
        )  # fmt: skip
        ranges = {
            s.name: ValueRange(np.iinfo(s.dtype).min, np.iinfo(s.dtype).max)
            for s in inputs
            if s.dtype in ("int8", "uint8")
        }
        super().__init__(Callee(inputs, tuple(self._gives), lambda *_: (), ranges), options, str(path), "tflite")
        if any(d["quantization_parameters"]["scales"].size and d["dtype"] in _INTEGERS for d in self._details()):
            self.notes += (
                "the file is quantized; runtimes round sums of integers differently, so that equal numbers are not "
                "to be expected: export the float model, and quantize that",
            )

    def _details(self) -> list[dict[str, Any]]:
        details: list[dict[str, Any]] = self._interpreter.get_tensor_details()
        return details

    def _reference(self, feeds: Feeds) -> dict[str, Array]:
        run = self._interpreter
        for name, detail in self._takes.items():
            run.resize_tensor_input(detail["index"], feeds[name].shape)
        run.allocate_tensors()
        for name, detail in self._takes.items():
            run.set_tensor(detail["index"], feeds[name])
        run.invoke()
        return {name: np.array(run.get_tensor(detail["index"])) for name, detail in self._gives.items()}

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Convert TFLite's graph, and put names and shapes in order."""
        import_tensorflow()
        tf2onnx = require("tf2onnx", extra="tflite")
        try:
            handlers: dict[str, Any] = {"TFL_GELU": (tflite_gelu, [])}
            with tempfile.TemporaryDirectory(prefix="deploykit-tflite-") as folder:
                dense = write_dense(self._path, Path(folder) / "dense.tflite")
                model, _ = tf2onnx.convert.from_tflite(
                    str(dense), opset=opset or DEFAULT_OPSET, custom_op_handlers=handlers
                )
        except Exception as exc:
            raise ExportError(f"tf2onnx failed ({first_line(exc, 240)})", hint="export it from its source") from exc
        refuse_foreign_operators(model)
        wanted = Signature(
            self.signature.inputs if way.dynamic else self._fixed(), observed_outputs(self.cases_for(way))
        )
        finish(
            model, [d["name"] for d in self._takes.values()], [d["name"] for d in self._gives.values()], wanted, target
        )

    def tools(self) -> dict[str, str]:
        """LiteRT, TensorFlow, tf2onnx and onnx."""
        found = {n: version_of(n) for n in ("ai-edge-litert", "tensorflow", "tensorflow-cpu", "tf2onnx", "onnx")}
        return {name: version for name, version in found.items() if version}


def _open(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(8)
    if head[4:8] != _IDENTIFIER:
        raise SourceError(f"{path} is no TFLite file", expected="a FlatBuffer with the identifier TFL3")
    litert = require("ai_edge_litert.interpreter", extra="tflite")
    try:
        # XNNPACK would take shapes that change for an error; the reference is TFLite's own kernels anyway.
        kind = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = litert.Interpreter(str(path), experimental_op_resolver_type=kind, num_threads=1)
        interpreter.allocate_tensors()
    except Exception as exc:
        raise SourceError(
            f"cannot read {path} ({first_line(exc)})", expected="a TFLite file of built-in operators"
        ) from exc
    return interpreter


def _shape(detail: dict[str, Any]) -> list[int]:
    """-1 for a free dimension."""
    signature = detail["shape_signature"]
    return list(signature if len(signature) == len(detail["shape"]) else detail["shape"])


def _named(
    interpreter: Any, takes: list[dict[str, Any]], gives: list[dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Inputs and outputs by the names of the only signature, else by those of the tensors."""
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return {d["name"]: d for d in takes}, {d["name"]: d for d in gives}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    by_index = {d["index"]: d for d in (*takes, *gives)}
    named_in = {n: by_index[d["index"]] for n, d in runner.get_input_details().items() if d["index"] in by_index}
    named_out = {n: by_index[d["index"]] for n, d in runner.get_output_details().items() if d["index"] in by_index}
    if len(named_in) != len(takes) or len(named_out) != len(gives):
        return {d["name"]: d for d in takes}, {d["name"]: d for d in gives}
    return named_in, named_out
