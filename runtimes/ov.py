"""OpenVINO, any device."""

from __future__ import annotations

import math
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from deploykit.errors import DeviceError, InferenceError, ModelError, first_line
from deploykit.extras import require
from deploykit.modelfile import check_beside
from deploykit.runtimes.base import Session, SessionOptions, check_dtypes, dtypes_of
from deploykit.runtimes.device import Device
from deploykit.runtimes.onnx_check import check_onnx
from deploykit.runtimes.ov_settings import VIRTUAL, configure
from deploykit.runtimes.placement import ExecutedNode, NodePlacement, Placement, traffic_bytes
from deploykit.runtimes.requests import Bound
from deploykit.sealed import Seal
from deploykit.specs import Array, Dim, Feeds, Signature, TensorSpec

_TYPES = {
    "f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16", "boolean": "bool",
    "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64",
    "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64", "string": "string",
}  # fmt: skip
_INTEGER = ("i8", "u8", "i4", "u4")
# What HETERO puts before the names of the nodes of each part.
_SUBGRAPH = re.compile(r"^subgraph\d+: ")
_HEADINGS = ("Exception from", "Check '", "While validating", "FrontEnd API failed", "Summary:")


def check_device(device: Device) -> None:
    """Refuse a device that OpenVINO does not find.

    Raises:
        DeviceError: It does not.
    """
    ov = require("openvino", extra="openvino")
    found = list(ov.Core().available_devices)
    base = device.target.split(":")[0]
    if base in VIRTUAL and found:
        return
    if any(name == base or name.split(".")[0] == base for name in found):
        return
    raise DeviceError(
        f"OpenVINO {ov.__version__.split('-')[0]} finds no {device.target} (it finds: {', '.join(found) or 'nothing'})",
        hint="install the device's driver, or choose another --device; see: deploykit doctor",
    )


class _InferRequest:
    """One request of a compiled model; for one thread at a time.

    OpenVINO's own `infer` looks at every array anew and wraps the results in a mapping of its own. With inputs that are
    known to be of the right dtype, its lower half alone does, in half the time on a tiny model.

    Args:
        ov: The module `openvino`.
        compiled: A compiled model.
        signature: Its inputs and outputs.
    """

    def __init__(self, ov: Any, compiled: Any, signature: Signature) -> None:
        self._raw = compiled.create_infer_request()
        lower: Any = super(type(self._raw), self._raw)
        self._lower = lower.infer
        self._tensor = ov.Tensor
        self._dtypes = dtypes_of(signature.inputs)
        self._ports = {spec.name: i for i, spec in enumerate(signature.inputs)}
        self._names = [spec.name for spec in signature.outputs]
        # Strings and bfloat16 need OpenVINO's conversions.
        self._plain = all(spec.dtype not in ("string", "bfloat16") for spec in signature)
        self._bfloat16: dict[str, Any] = dict(dtypes_of(s for s in signature.outputs if s.dtype == "bfloat16"))
        self._held: dict[int, Any] = {}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """One whole request."""
        ports = self._ports
        if len(feeds) != len(ports):
            raise KeyError("one array an input")
        check_dtypes(self._dtypes, feeds)
        if not self._plain:
            results = self._raw.infer({ports[k]: _unboxed(v) for k, v in feeds.items()}, share_inputs=True)
            return self._views({name: results[i] for i, name in enumerate(self._names)})
        # The tensors lie over the arrays' own memory, and have to live as long as the request may read them.
        self._held = held = {port: self._shared(feeds[name]) for name, port in ports.items()}
        return dict(zip(self._names, self._lower(held, False, True).values(), strict=True))

    def _shared(self, array: Array) -> Any:
        flags = array.flags
        if flags.c_contiguous and flags.writeable:
            return self._tensor(array, shared_memory=True)
        return self._tensor(np.array(array, order="C"), shared_memory=False)

    def again(self) -> None:
        """Run on the inputs of the latest `run`; the results stay where they are."""
        if self._plain:
            self._lower({}, True, True)
        else:
            self._raw.infer(share_outputs=True)

    def outputs(self) -> dict[str, Array]:
        """Copies of the latest results."""
        tensors = [self._raw.get_output_tensor(i) for i in range(len(self._names))]
        arrays = [t.str_data if t.element_type.get_type_name() == "string" else t.data.copy() for t in tensors]
        return self._views(dict(zip(self._names, arrays, strict=True)))

    def _views(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """OpenVINO hands bfloat16 out as float16, with bits that mean something else."""
        return {k: v.view(self._bfloat16[k]) if k in self._bfloat16 else v for k, v in outputs.items()}

    def close(self) -> None:
        """Free it; `run` fails from now on."""
        self._raw = self._lower = None
        self._held = {}


class OpenVinoSession(Session):
    """A model in OpenVINO, compiled for latency unless `options` say otherwise.

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
        if path.suffix not in device.reads:
            raise ModelError(
                f"OpenVINO cannot read {path}", expected="an .onnx or an .xml file", hint="use --device torch:cpu"
            )
        core = ov.Core()
        self.settings = configure(core, device, options)
        seal = check_onnx(path) if path.suffix == ".onnx" else _check_ir(path)
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
        seal.check()
        self.signature = Signature(
            tuple(_spec(p, name) for name, p in zip(inputs, self._compiled.inputs, strict=True)),
            tuple(_spec(p, name) for name, p in zip(outputs, self._compiled.outputs, strict=True)),
        )
        self._ports = {name: i for i, name in enumerate(inputs)}
        # Those that nobody holds any more are freed before the session is closed.
        self._made: weakref.WeakSet[_InferRequest] = weakref.WeakSet()
        self._run_one = self._new().run

    def _new(self) -> _InferRequest:
        made = _InferRequest(self._ov, self._compiled, self.signature)
        self._made.add(made)
        return made

    def _compile(self, core: Any, config: dict[str, Any]) -> Any:
        try:
            return core.compile_model(self._model, self.device.target, config)
        except Exception as exc:
            raise InferenceError(
                f"OpenVINO cannot compile {self._path} for {self.device.target} ({_clean(exc)})"
            ) from exc

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        return self._run_one(feeds)

    def _request(self) -> Callable[[Feeds], dict[str, Array]]:
        return self._new().run

    def _bind(self, feeds: Feeds) -> Bound:
        made = self._new()
        made.run(feeds)
        return Bound(self, feeds, made.again, made.outputs)

    def _translate(self, exc: Exception) -> Exception:
        return InferenceError(f"OpenVINO failed while it ran {self._path} ({_clean(exc)})")

    def _placement(self, feeds: Feeds, runs: int) -> Placement:
        """Compile once more with performance counters and read every executed node's precision and time."""
        compiled = self._compile(self._ov.Core(), self.settings | {"PERF_COUNT": True})
        request = compiled.create_infer_request()
        arrays = {self._ports[name]: _unboxed(array) for name, array in feeds.items()}
        request.infer(arrays)
        times: dict[str, list[float]] = {}
        for _ in range(runs):
            request.infer(arrays)
            for info in request.profiling_info:
                times.setdefault(info.node_name, []).append(info.real_time.total_seconds() * 1e6)
        precisions, sizes = _runtime_precisions(compiled), _moved_bytes(compiled)
        # "(CPU)" is what AUTO calls the CPU that it only begins on.
        devices = [str(name).strip("()") for name in compiled.get_property("EXECUTION_DEVICES")]
        on = ",".join(devices) or self.device.target
        # "GPU" is another name of "GPU.0", and that is how a compiled model calls it.
        virtual = self.device.target.split(":")[0] in VIRTUAL
        asked = on if virtual or on == f"{self.device.target}.0" else self.device.target
        chosen = self._chosen()
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
            name = _SUBGRAPH.sub("", info.node_name)
            raw = precisions.get(name, info.exec_type.rpartition("_")[2])
            precision = "int8" if raw.lower() in _INTEGER else _TYPES.get(raw.lower(), raw)
            micros = median(times[info.node_name])
            moved = sizes.get(info.node_name, (0, 0))
            where = chosen.get(name, on)
            nodes.append(NodePlacement(info.node_name, info.node_type, where, precision, micros, *moved))
        return Placement(asked, tuple(nodes))

    def _chosen(self) -> dict[str, str]:
        """Device by node where a model is split over several; a plugin's own nodes, such as reorders, are not in it."""
        if not self.device.target.startswith("HETERO"):
            return {}
        found = self._ov.Core().query_model(self._model, self.device.target)
        return {str(name): str(device) for name, device in found.items()}

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
        for made in list(self._made):
            made.close()
        self._compiled = self._model = None


def _unboxed(array: Array) -> Array:
    """OpenVINO takes numpy's own strings only."""
    return array.astype(str) if array.dtype.kind == "O" else array


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
            moved = traffic_bytes(_layer_type(node), map(_port_bytes, node.inputs()), map(_port_bytes, node.outputs()))
            found[node.get_friendly_name()] = (moved, min(weights, moved))
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


def _check_ir(path: Path) -> Seal:
    """Look at a model in OpenVINO's own format; its weights lie beside it, under its name."""
    seal = Seal()
    weights = path.with_suffix(".bin")
    beside = [weights] if os.path.lexists(weights) else []
    for file in beside:
        check_beside(file)
    try:
        seal.add([path, *beside])
    except OSError as exc:
        raise ModelError(f"cannot read {exc.filename or path}: {exc.strerror or exc}") from exc
    return seal


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
