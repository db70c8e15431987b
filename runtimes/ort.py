"""ONNX Runtime, any execution provider."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from deploykit.errors import DeviceError, InferenceError, ModelError, first_line
from deploykit.extras import require
from deploykit.runtimes.base import Session, SessionOptions, check_dtypes, dtypes_of
from deploykit.runtimes.device import Device
from deploykit.runtimes.onnx_check import check_onnx
from deploykit.runtimes.ort_binding import DeviceBinding, ReusedOutputs, device_of
from deploykit.runtimes.ort_settings import plan
from deploykit.runtimes.placement import ExecutedNode, NodePlacement, Placement, traffic_bytes
from deploykit.runtimes.requests import Bound
from deploykit.specs import Array, Dim, Feeds, Signature, TensorSpec

_WHEELS = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "DmlExecutionProvider": "onnxruntime-directml",
    "ROCMExecutionProvider": "onnxruntime-rocm",
    "MIGraphXExecutionProvider": "onnxruntime-rocm",
    "QNNExecutionProvider": "onnxruntime-qnn",
}
_TYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bfloat16": "bfloat16", "bool": "bool",
    "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64",
    "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
    "string": "string", "complex64": "complex64", "complex128": "complex128",
}  # fmt: skip
# Kernels that compute on integers whatever the type of their first input says.
_INT8_OPS = ("QLinear", "Integer", "QGemm", "QAttention", "DynamicQuantize", "QMoE")
# What providers say to an option that they do not have.
_REFUSED = re.compile(r"(invalid|unknown)[^.()]{0,40}\boption\b.{0,200}", re.IGNORECASE)
# What ONNX Runtime appends to names when it changes a layout, makes a name its own, or fuses.
_SUFFIXES = re.compile(r"(_nchwc|_token_\d+|/MatmulTransposeFusion/)+$")


def check_provider(device: Device) -> None:
    """Refuse a provider that the installed wheel was not built with.

    Raises:
        DeviceError: It was not.
    """
    ort = require("onnxruntime", extra="ort")
    built = ort.get_available_providers()
    if device.target in built:
        return
    wheel = _WHEELS.get(device.target)
    raise DeviceError(
        f"onnxruntime {ort.__version__} here has no {device.target} (it has: {', '.join(built)})",
        hint=(f"run: pip uninstall onnxruntime; pip install {wheel}; " if wheel else "") + "see: deploykit doctor",
    )


class OrtSession(Session):
    """A model in ONNX Runtime; nodes never fall back to the CPU unasked.

    Args:
        path: The `.onnx` file.
        device: With runtime "ort".
        options: Threads and the like; `extra` entries with a dot in their name are session configuration, those in
            `ort_settings.NAMED` are what they say there, and all others are options of the provider.
    """

    def __init__(self, path: Path, device: Device, options: SessionOptions) -> None:
        ort = require("onnxruntime", extra="ort")
        if path.suffix not in device.reads:
            other = "torch:cpu" if path.suffix == ".pt2" else "openvino:cpu"
            raise ModelError(f"ONNX Runtime cannot read {path}", expected="an .onnx file", hint=f"use --device {other}")
        check_provider(device)
        seal = check_onnx(path)
        self.device = device
        self._path = path
        self._ort = ort
        self._plan = plan(ort, device, options)
        self.settings = {"optimize": options.optimize, **self._plan.as_dict()}
        self._session = self._create(self._plan.apply(ort))
        seal.check()
        used = self._session.get_providers()
        if not used or used[0] != device.target:
            raise DeviceError(
                f"{device.target} could not be started (onnxruntime offered {', '.join(used)})",
                hint="check driver and libraries, see: deploykit doctor",
            )
        self.signature = Signature(
            tuple(_spec(v) for v in self._session.get_inputs()),
            tuple(_spec(v) for v in self._session.get_outputs()),
        )
        self._outputs = [s.name for s in self.signature.outputs]
        self._dtypes = dtypes_of(self.signature.inputs)
        self._binding = self._bindings() if self._plan.device_buffers else None

    def _create(self, made: Any) -> Any:
        providers = [(self.device.target, dict(self._plan.provider))]
        try:
            # With its fallback, Python's side would print and go on with the CPU.
            return self._ort.InferenceSession(str(self._path), made, providers=providers, enable_fallback=0)
        except Exception as exc:
            text = str(exc)
            if "disable_cpu_ep_fallback" in text or "fallback to CPU EP" in text:
                raise DeviceError(
                    f"{self._path}: not every node can run on {self.device.target}, or it did not start",
                    hint="choose another --device, or check its settings and driver: deploykit doctor",
                ) from exc
            if refused := _REFUSED.search(text):
                raise DeviceError(f"{self.device.target} refuses its settings ({refused.group().strip()})") from exc
            raise InferenceError(
                f"ONNX Runtime cannot load {self._path} ({_clean(exc)})",
                hint="check it: deploykit inspect -m " + str(self._path),
            ) from exc

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        if self._binding is not None:
            return self._request_on(self._binding, feeds)
        for name, array in feeds.items():
            # ONNX Runtime takes the bytes as they lie there.
            if not array.dtype.isnative:
                raise TypeError(f"byte order of {name}")
        return dict(zip(self._outputs, self._session.run(None, feeds), strict=True))

    def _request(self) -> Callable[[Feeds], dict[str, Array]]:
        """A session runs for any number of threads at once; a binding belongs to one."""
        if not self._plan.device_buffers:
            return self._run
        binding = self._bindings()
        return lambda feeds: self._request_on(binding, feeds)

    def _request_on(self, binding: DeviceBinding, feeds: Feeds) -> dict[str, Array]:
        if self._session is None:
            raise RuntimeError("the session is closed")
        # A binding keeps what it was given before, and takes bytes as they are: all has to be there, and right.
        check_dtypes(self._dtypes, feeds)
        return binding.request(feeds)

    def _reusing(self) -> Callable[[Feeds], dict[str, Array]]:
        if self.device.target != "CPUExecutionProvider":
            return self._run
        outputs = ReusedOutputs(self._ort, self._session, self._outputs)

        def run(feeds: Feeds) -> dict[str, Array]:
            if self._session is None:
                raise RuntimeError("the session is closed")
            # A bound array is taken as it lies there: all has to be there, and right.
            if feeds.keys() != {name for name, _ in self._dtypes}:
                raise KeyError("one array an input")
            check_dtypes(self._dtypes, feeds)
            return outputs.run(feeds)

        return run

    def _bind(self, feeds: Feeds) -> Bound:
        binding = self._bindings()
        binding.put(feeds)
        binding.ask()
        binding.run()
        binding.keep()

        def run() -> None:
            if self._session is None:
                raise RuntimeError("the session is closed")
            binding.run()

        return Bound(self, feeds, run, binding.take)

    def _bindings(self) -> DeviceBinding:
        return DeviceBinding(
            self._ort, self._session, self._outputs, device_of(self.device.target, self._plan.provider)
        )

    def _translate(self, exc: Exception) -> Exception:
        return InferenceError(f"ONNX Runtime failed while it ran {self._path} ({_clean(exc)})")

    def _placement(self, feeds: Feeds, runs: int) -> Placement:
        """Profile runs (after one to warm up) in a session of its own; every executed node, with its provider."""
        with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
            made = self._plan.apply(self._ort)
            made.enable_profiling = True
            made.profile_file_prefix = str(Path(folder) / "profile")
            session = self._create(made)
            for _ in range(runs + 1):
                session.run(None, dict(feeds))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        seen: dict[str, list[NodePlacement]] = {}
        for event in events:
            if event.get("cat") == "Node" and event.get("name", "").endswith("_kernel_time"):
                seen.setdefault(event["name"], []).append(_node(event))
        # The first run allocates; a node of a loop's body runs several times in each.
        nodes = [
            replace(n[-1], time_us=median(m.time_us for m in n[len(n) // (runs + 1) :]) * max(1, len(n) / (runs + 1)))
            for n in seen.values()
        ]
        return Placement(self.device.target, tuple(nodes))

    def _executed(self) -> tuple[ExecutedNode, ...]:
        """Read the graph that ONNX Runtime saves once it has optimized it; weights go beside it."""
        with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
            saved = Path(folder) / "optimized.onnx"
            made = self._plan.apply(self._ort)
            made.optimized_model_filepath = str(saved)
            # Weights are not looked at: in a file of their own they need not be parsed.
            made.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.data")
            made.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
            self._create(made)
            return _read_optimized(saved)

    def close(self) -> None:
        """Free the session."""
        self._session = self._binding = None


def _read_optimized(path: Path) -> tuple[ExecutedNode, ...]:
    onnx = require("onnx", extra="ort")
    graph = onnx.load(str(path), load_external_data=False).graph
    types = {t.name: onnx.TensorProto.DataType.Name(t.data_type).lower() for t in graph.initializer}
    found = []
    for node in graph.node:
        kinds = [_TYPES.get(types[name], types[name]) for name in node.input if name in types]
        floats = [kind for kind in kinds if "float" in kind]
        integer = any(mark in node.op_type for mark in _INT8_OPS) or _rounds_inputs(node)
        precision = "int8" if integer else floats[0] if floats else ""
        names = {node.name, *node.output, *(name for name in node.input if name in types)} - {""}
        found.append(
            ExecutedNode(node.name, node.op_type, precision, frozenset(_SUFFIXES.sub("", name) for name in names))
        )
    return tuple(found)


def _rounds_inputs(node: Any) -> bool:
    """Whether a MatMulNBits was told to round activations to int8 and to sum in int32 (accuracy level 4)."""
    return node.op_type == "MatMulNBits" and any(a.name == "accuracy_level" and a.i == 4 for a in node.attribute)


def _node(event: dict[str, Any]) -> NodePlacement:
    args = event.get("args", {})
    op = args.get("op_name", "")
    types = [t for entry in args.get("input_type_shape", []) for t in entry]
    precision = "int8" if any(mark in op for mark in _INT8_OPS) else _TYPES.get(types[0], types[0]) if types else ""
    return NodePlacement(
        event["name"].removesuffix("_kernel_time"),
        op,
        args.get("provider", ""),
        precision,
        float(event.get("dur", 0)),
        traffic_bytes(op, _sizes(args.get("input_type_shape", [])), _sizes(args.get("output_type_shape", []))),
        int(args.get("parameter_size", 0)),
    )


def _sizes(tensors: list[dict[str, list[int]]]) -> list[int]:
    """Bytes of tensors as the profiler lists them: one `{type: shape}` each."""
    widths = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "string": 0,
              "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}  # fmt: skip
    return [
        widths.get(_TYPES.get(kind, kind), 1) * math.prod(shape) for entry in tensors for kind, shape in entry.items()
    ]


def _spec(value: Any) -> TensorSpec:
    kind = value.type
    if not kind.startswith("tensor("):
        raise ModelError(f"{value.name!r} is a {kind}", expected="tensors as inputs and outputs")
    inner = kind.removeprefix("tensor(").removesuffix(")")
    dims: list[Dim] = [
        int(d) if isinstance(d, int) else str(d) if d else f"{value.name}_dim{axis}"
        for axis, d in enumerate(value.shape)
    ]
    return TensorSpec(value.name, _TYPES.get(inner, inner), tuple(dims))


def _clean(exc: Exception) -> str:
    """ONNX Runtime's message without its error class and source positions."""
    text = first_line(exc)
    return text.split(" : ", 2)[-1] if " : " in text else text
