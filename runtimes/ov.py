"""OpenVINO, any device."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from deploykit.errors import DeviceError, InferenceError, ModelError, first_line
from deploykit.extras import require
from deploykit.runtimes.base import Device, ExecutedNode, NodePlacement, Placement, Session, SessionOptions
from deploykit.specs import Array, Dim, Feeds, Signature, TensorSpec

_TYPES = {
    "f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16", "boolean": "bool",
    "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64",
    "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64", "string": "string",
}  # fmt: skip
_INTEGER = ("i8", "u8", "i4", "u4")
_HEADINGS = ("Exception from", "Check '", "While validating", "FrontEnd API failed", "Summary:")
# Virtual devices that choose a real one; they exist wherever any device does.
_VIRTUAL = ("AUTO", "MULTI", "HETERO", "BATCH")


def check_device(device: Device) -> None:
    """Refuse a device that OpenVINO does not find.

    Raises:
        DeviceError: It does not.
    """
    ov = require("openvino", extra="openvino")
    found = list(ov.Core().available_devices)
    base = device.target.split(":")[0]
    if base in _VIRTUAL and found:
        return
    if any(name == base or name.split(".")[0] == base for name in found):
        return
    raise DeviceError(
        f"OpenVINO {ov.__version__.split('-')[0]} finds no {device.target} (it finds: {', '.join(found) or 'nothing'})",
        hint="install the device's driver, or choose another --device; see: deploykit doctor",
    )


class OpenVinoSession(Session):
    """A model in OpenVINO, compiled for latency.

    The CPU plugin computes int64 in 32 bits: values of 2**31 and above wrap round, in silence. Parity shows it.

    Args:
        path: `.onnx`, or `.xml` with its `.bin`.
        device: With runtime "openvino".
        options: Threads and the like; `extra` holds OpenVINO properties and wins over everything set here.
    """

    def __init__(self, path: Path, device: Device, options: SessionOptions) -> None:
        ov = require("openvino", extra="openvino")
        check_device(device)
        self.device = device
        self._path = path
        self._ov = ov
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if device.target.startswith("CPU"):
            config |= {"INFERENCE_NUM_THREADS": options.threads, "NUM_STREAMS": 1}
        if options.precision == "fp32":
            config["INFERENCE_PRECISION_HINT"] = "f32"
        self.settings = config | dict(options.extra or {})
        core = ov.Core()
        if path.suffix == ".onnx":
            _check_external_data(path)
        try:
            self._model = core.read_model(str(path))
        except Exception as exc:
            raise ModelError(
                f"OpenVINO cannot read {path} ({_clean(exc)})", hint="check the file: deploykit inspect -m MODEL"
            ) from exc
        if not options.optimize:
            # OpenVINO has no such switch; a session that pretended to obey would be a lie.
            raise DeviceError("OpenVINO always optimizes the graph", hint="use --device ort:cpu")
        # Fusion gives a compiled port the names of inner tensors too; the model's own names are those before it.
        inputs = [_name(p, f"input_{i}") for i, p in enumerate(self._model.inputs)]
        outputs = [_name(p, f"output_{i}") for i, p in enumerate(self._model.outputs)]
        if path.suffix == ".onnx":
            inputs, outputs = _onnx_names(path, inputs, outputs)
        self._compiled = self._compile(core, self.settings)
        self._request = self._compiled.create_infer_request()
        self.signature = Signature(
            tuple(_spec(p, name) for name, p in zip(inputs, self._compiled.inputs, strict=True)),
            tuple(_spec(p, name) for name, p in zip(outputs, self._compiled.outputs, strict=True)),
        )
        self._outputs = outputs
        self._ports = {name: i for i, name in enumerate(inputs)}

    def _compile(self, core: Any, config: dict[str, Any]) -> Any:
        try:
            return core.compile_model(self._model, self.device.target, config)
        except Exception as exc:
            raise InferenceError(
                f"OpenVINO cannot compile {self._path} for {self.device.target} ({_clean(exc)})"
            ) from exc

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        ports = self._ports
        if len(feeds) != len(ports):
            raise KeyError("one array an input")
        for spec in self.signature.inputs:
            # OpenVINO would convert in silence.
            if feeds[spec.name].dtype.name != spec.dtype and spec.dtype != "string":
                raise TypeError(f"dtype of {spec.name}")
        results = self._request.infer({ports[name]: array for name, array in feeds.items()}, share_inputs=True)
        return {name: results[i] for i, name in enumerate(self._outputs)}

    def _translate(self, exc: Exception) -> Exception:
        return InferenceError(f"OpenVINO failed while it ran {self._path} ({_clean(exc)})")

    def _placement(self, feeds: Feeds, runs: int) -> Placement:
        """Compile once more with performance counters and read every executed node's precision and time."""
        compiled = self._compile(self._ov.Core(), self.settings | {"PERF_COUNT": True})
        request = compiled.create_infer_request()
        arrays = {self._ports[name]: array for name, array in feeds.items()}
        request.infer(arrays)
        times: dict[str, list[float]] = {}
        for _ in range(runs):
            request.infer(arrays)
            for info in request.profiling_info:
                times.setdefault(info.node_name, []).append(info.real_time.total_seconds() * 1e6)
        precisions, sizes = _runtime_precisions(compiled), _moved_bytes(compiled)
        devices = compiled.get_property("EXECUTION_DEVICES")
        on = devices[0] if devices else self.device.target
        asked = self.device.target if self.device.target.split(":")[0] not in _VIRTUAL else on
        nodes = []
        for info in request.profiling_info:
            # Constants, results and what was folded into a neighbour do not run.
            if info.status.name != "EXECUTED" or info.node_type in (
                "Parameter",
                "Input",
                "Output",
                "Result",
                "Constant",
            ):
                continue
            raw = precisions.get(info.node_name, info.exec_type.rpartition("_")[2])
            precision = "int8" if raw.lower() in _INTEGER else _TYPES.get(raw.lower(), raw)
            micros = median(times[info.node_name])
            moved = sizes.get(info.node_name, (0, 0))
            nodes.append(NodePlacement(info.node_name, info.node_type, on, precision, micros, *moved))
        return Placement(asked, tuple(nodes))

    def _executed(self) -> tuple[ExecutedNode, ...]:
        """Read the plugin's own graph: every node names the layers that were fused into it."""
        found = []
        for node in self._compiled.get_runtime_model().get_ops():
            info = {key: str(value.value) for key, value in node.get_rt_info().items() if hasattr(value, "value")}
            op, name = info.get("layerType", node.get_type_name()), node.get_friendly_name()
            if op in ("Const", "Input", "Output"):
                continue
            names = {part for part in (name, *info.get("originalLayersNames", "").split(",")) if part}
            raw = info.get("runtimePrecision", "").lower()
            precision = "int8" if raw in _INTEGER else _TYPES.get(raw, raw)
            found.append(ExecutedNode(name, op, precision, frozenset(_layer_name(n) for n in names)))
        return tuple(found)

    def close(self) -> None:
        """Free the compiled model."""
        self._request = self._compiled = self._model = None


def _runtime_precisions(compiled: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "runtimePrecision" in info:
            found[node.get_friendly_name()] = str(info["runtimePrecision"].value)
    return found


def _moved_bytes(compiled: Any) -> dict[str, tuple[int, int]]:
    """Size of inputs and outputs, and of the weights among them; nodes whose shapes depend on the run are left out."""
    found: dict[str, tuple[int, int]] = {}
    fixed: set[str] = set()  # constants, and what follows from constants: laid out once, when the model is compiled
    for node in compiled.get_runtime_model().get_ordered_ops():
        sources = [port.get_source_output().get_node().get_friendly_name() for port in node.inputs()]
        if _layer_type(node) == "Const" or (sources and fixed.issuperset(sources)):
            fixed.add(node.get_friendly_name())
        ports = [*node.inputs(), *node.outputs()]
        if all(port.get_partial_shape().is_static for port in ports):
            weights = sum(_port_bytes(p) for p, name in zip(node.inputs(), sources, strict=True) if name in fixed)
            found[node.get_friendly_name()] = (sum(map(_port_bytes, ports)), weights)
    return found


def _layer_type(node: Any) -> str:
    info = node.get_rt_info()
    return str(info["layerType"].value) if "layerType" in info else ""


def _port_bytes(port: Any) -> int:
    return int(math.prod(port.get_shape()) * port.get_element_type().size)


def _layer_name(name: str) -> str:
    """An ONNX node's or tensor's name, without what the front end and the fusions put behind it."""
    for mark in ("/WithoutBiases", "/Dequantization", "/transpose_b"):
        name = name.split(mark)[0]
    return name.removesuffix("_original")


def _check_external_data(path: Path) -> None:
    """Look at external data before the runtime does."""
    from deploykit.modelfile import read_model

    read_model(path, weights=False)


def _onnx_names(path: Path, inputs: list[str], outputs: list[str]) -> tuple[list[str], list[str]]:
    """The file's own names: ONNX keeps the order of inputs and outputs, and so does OpenVINO's front end."""
    from deploykit.modelfile import read_model, signature_of

    found = signature_of(read_model(path, weights=False))
    if (len(found.inputs), len(found.outputs)) != (len(inputs), len(outputs)):
        return inputs, outputs
    return [s.name for s in found.inputs], [s.name for s in found.outputs]


def _name(port: Any, fallback: str) -> str:
    return sorted(port.names)[0] if port.names else fallback


def _spec(port: Any, name: str) -> TensorSpec:
    kind = port.element_type.get_type_name()
    shape = port.partial_shape
    if shape.rank.is_dynamic:
        return TensorSpec(name, _TYPES.get(kind, kind), None)
    dims: list[Dim] = []
    for axis, dim in enumerate(shape):
        if dim.is_static:
            dims.append(int(dim.get_length()))
        else:
            dims.append(f"{name}_dim{axis}")
    return TensorSpec(name, _TYPES.get(kind, kind), tuple(dims))


def _clean(exc: Exception) -> str:
    """What OpenVINO's message says, without its source positions and headings, in one line."""
    lines = [line.strip() for line in str(exc).splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith(_HEADINGS))
    return first_line(RuntimeError(said)).removeprefix("RuntimeError: ") if said else first_line(exc)
