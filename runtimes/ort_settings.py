"""What may be set on ONNX Runtime, and what every execution provider needs."""

from __future__ import annotations

import difflib
import json
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.errors import DeviceError
from deploykit.runtimes.base import SessionOptions
from deploykit.runtimes.device import Device

CPU = "CPUExecutionProvider"
_CUDA, _TENSORRT, _OPENVINO = "CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
_DIRECTML, _XNNPACK = "DmlExecutionProvider", "XnnpackExecutionProvider"

LEVELS = ("disabled", "basic", "extended", "layout", "all")
_MODES = ("sequential", "parallel")
# Settings by name that are neither session configuration (a dot in the name) nor options of a provider.
NAMED = (
    "intra_op_num_threads",
    "inter_op_num_threads",
    "execution_mode",
    "graph_optimization_level",
    "device_buffers",
)
# ONNX Runtime takes any session configuration in silence, also a misspelt one. These are known to exist; others are
# looked up in the runtime's own library.
_CONFIG = frozenset({
    "session.intra_op.allow_spinning", "session.inter_op.allow_spinning", "session.force_spinning_stop",
    "session.dynamic_block_base", "session.set_denormal_as_zero", "session.disable_prepacking",
    "session.intra_op_thread_affinities", "session.use_env_allocators", "session.disable_cpu_ep_fallback",
    "session.use_device_allocator_for_initializers", "session.x64quantprecision", "session.qdqisint8allowed",
    "session.disable_quant_qdq", "session.disable_double_qdq_remover", "session.enable_quant_qdq_cleanup",
    "optimization.enable_gelu_approximation", "optimization.disable_specified_optimizers",
})  # fmt: skip
# Options that have a provider load a shared library: TensorRT's plugins, other providers' custom operators.
_LIBRARIES = re.compile(r"plugin_lib|custom_op|op_package|extra_lib|library_path|backend_path", re.IGNORECASE)
# Providers that ignore options they do not know, and those they know. The others refuse, in their own words.
_OPTIONS: Mapping[str, frozenset[str]] = {CPU: frozenset(), _XNNPACK: frozenset({"intra_op_num_threads"})}
# Flags that make TensorRT compute floating-point models in 16 bits.
_TENSORRT_HALF = ("trt_fp16_enable", "trt_bf16_enable")
_TF32 = "NVIDIA_TF32_OVERRIDE"


@dataclass(frozen=True, slots=True)
class OrtPlan:
    """Everything that a session is made with.

    Attributes:
        intra: Threads of one request.
        inter: Threads that run nodes side by side; more than 1 in parallel mode only.
        parallel: Whether nodes that do not depend on each other run side by side.
        level: One of `LEVELS`.
        config: Session configuration.
        provider: Options of the execution provider.
        memory_pattern: Whether memory is planned from the first run.
        device_buffers: Whether `run` goes through an IOBinding with buffers on the device.
        environment: Environment variables of this process that were set, because there is no other way.
    """

    intra: int
    inter: int
    parallel: bool
    level: str
    config: dict[str, str]
    provider: dict[str, str]
    memory_pattern: bool
    device_buffers: bool
    environment: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        found: dict[str, Any] = {
            "intra_op_num_threads": self.intra,
            "inter_op_num_threads": self.inter,
            "execution_mode": _MODES[self.parallel],
            "graph_optimization_level": self.level,
        }
        if self.device_buffers:
            found["device_buffers"] = True
        return found | self.config | self.provider | self.environment

    def apply(self, ort: Any) -> Any:
        """The runtime's own options."""
        made = ort.SessionOptions()
        made.intra_op_num_threads = self.intra
        made.inter_op_num_threads = self.inter
        made.execution_mode = ort.ExecutionMode.ORT_PARALLEL if self.parallel else ort.ExecutionMode.ORT_SEQUENTIAL
        made.log_severity_level = 4
        made.enable_mem_pattern = self.memory_pattern
        levels = ort.GraphOptimizationLevel
        names = {"disabled": "ORT_DISABLE_ALL"} | {name: f"ORT_ENABLE_{name.upper()}" for name in LEVELS[1:]}
        # A runtime without the level "layout" does that work on "all".
        made.graph_optimization_level = getattr(levels, names[self.level], levels.ORT_ENABLE_ALL)
        for key, value in self.config.items():
            made.add_session_config_entry(key, value)
        return made


def plan(ort: Any, device: Device, options: SessionOptions) -> OrtPlan:
    """Put together what was asked for and what the provider needs.

    Raises:
        DeviceError: A setting that does not exist, has an impossible value, or would have no effect.
    """
    given = dict(options.extra or {})
    named = {key: given.pop(key) for key in NAMED if key in given}
    config = {key: _text(given.pop(key)) for key in list(given) if "." in key}
    _check_config(ort, config)
    _refuse_libraries([*given, *config])
    threads = _count("intra_op_num_threads", named.get("intra_op_num_threads", options.threads))
    inter = _count("inter_op_num_threads", named.get("inter_op_num_threads", 1))
    mode = _choice("execution_mode", named.get("execution_mode", _MODES[0]), _MODES)
    if inter > 1 and mode == _MODES[0]:
        raise DeviceError(
            f"inter_op_num_threads {inter} has no effect in sequential mode", hint='add execution_mode "parallel"'
        )
    buffers = named.get("device_buffers", False)
    if not isinstance(buffers, bool):
        raise DeviceError(f"device_buffers is {buffers!r}", expected="true or false")
    default = level_of(options.optimize)
    if device.target == _OPENVINO and options.optimize is True:
        default = LEVELS[0]  # OpenVINO fuses what it knows itself, and ONNX Runtime's fusions hide that from it
    level = _choice("graph_optimization_level", named.get("graph_optimization_level", default), LEVELS)
    if device.target == _DIRECTML and mode == _MODES[1]:
        raise DeviceError("DirectML runs nodes one after another", hint="leave execution_mode out")
    known = _OPTIONS.get(device.target)
    for key in given if known is not None else ():
        if key not in (known or ()):
            raise DeviceError(f"{device.target} has no option {key!r}{_like(key, (*NAMED, *(known or ())))}")
    if device.target != CPU:
        config.setdefault("session.disable_cpu_ep_fallback", "1")
    intra, environment = threads, _environment(device, options)
    if device.target == _XNNPACK:
        # It has a thread pool of its own, and the session's would only be in its way.
        given["intra_op_num_threads"] = threads
        config.setdefault("session.intra_op.allow_spinning", "0")
    if device.target in (_XNNPACK, _OPENVINO):
        intra = 1
    provider = {key: _text(value) for key, value in _provider(device, options, given, threads).items()}
    return OrtPlan(
        intra, inter, mode == _MODES[1], level, config, provider, device.target != _DIRECTML, buffers, environment
    )


def level_of(optimize: bool | str) -> str:
    """The name of a level of graph optimization.

    Raises:
        DeviceError: There is no such level.
    """
    if isinstance(optimize, bool):
        return LEVELS[-1] if optimize else LEVELS[0]
    return _choice("optimize", optimize, LEVELS)


def _provider(device: Device, options: SessionOptions, given: dict[str, Any], threads: int) -> dict[str, Any]:
    """Options of the provider, with the defaults that keep what `SessionOptions` promises."""
    made = dict(given)
    single = options.precision == "fp32"
    if device.target == _CUDA and single:
        made.setdefault("use_tf32", "0")
    if device.target == _TENSORRT:
        asked = [flag for flag in _TENSORRT_HALF if _text(made.get(flag, False)).lower() in ("1", "true")]
        if single and asked:
            raise DeviceError(f"{asked[0]} contradicts precision fp32", hint="use precision native")
        if "trt_engine_cache_path" in made:  # without this, TensorRT would not look at the path
            made.setdefault("trt_engine_cache_enable", "1")
        if "trt_timing_cache_path" in made:
            made.setdefault("trt_timing_cache_enable", "1")
    if device.target == _OPENVINO:
        made = _openvino(made, single, threads)
    return made


def _openvino(given: dict[str, Any], single: bool, threads: int) -> dict[str, Any]:
    """Options of the OpenVINO provider: `load_config` may be a dictionary, the text of one, or a JSON file."""
    made = {"device_type": "CPU"} | given
    config = made.pop("load_config", {})
    if isinstance(config, str):
        try:
            text = Path(config).read_text(encoding="utf-8") if config.endswith(".json") else config
            config = json.loads(text)
        except (OSError, ValueError) as exc:
            raise DeviceError(f"load_config cannot be read ({exc})", expected="JSON, or a file of it") from exc
    if not isinstance(config, dict):
        raise DeviceError("load_config is no JSON object", expected='{"CPU": {"NUM_STREAMS": "1"}}')
    if made["device_type"] == "CPU":
        own = {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1"}
        for option, name in (("num_of_threads", "INFERENCE_NUM_THREADS"), ("num_streams", "NUM_STREAMS")):
            if option in made:
                own.pop(name)
        if single and "precision" not in made:
            own["INFERENCE_PRECISION_HINT"] = "f32"
        config = config | {"CPU": own | dict(config.get("CPU", {}))}
    elif single:
        made.setdefault("precision", "FP32")
    if config:
        made["load_config"] = json.dumps(config)
    return made


def _environment(device: Device, options: SessionOptions) -> dict[str, str]:
    """TensorRT takes TF32 for float32 unless this variable says no; it is read once, at the first session."""
    if device.target != _TENSORRT or options.precision != "fp32":
        return {}
    os.environ.setdefault(_TF32, "0")
    return {_TF32: os.environ[_TF32]}


def _refuse_libraries(keys: Iterable[str]) -> None:
    """Native code from elsewhere runs with all rights of this process, and there is no way to name it with its hash."""
    for key in keys:
        if _LIBRARIES.search(key):
            raise DeviceError(f"{key} would load native code from a file", expected="operators that the runtime has")


def _check_config(ort: Any, config: Mapping[str, str]) -> None:
    for key in config:
        # "ep.": of a provider, which may live in a library of its own.
        if key in _CONFIG or key.startswith("ep.") or _in_library(ort, key):
            continue
        raise DeviceError(
            f"onnxruntime {ort.__version__} has no setting {key!r}{_like(key, _CONFIG)}, and would ignore it"
        )


def _in_library(ort: Any, key: str) -> bool:
    """Whether the runtime's library holds the name of a setting; True where there is no library to look into."""
    folder = Path(ort.__file__).parent / "capi"
    libraries = [p for p in folder.glob("*onnxruntime*") if p.suffix in (".so", ".pyd", ".dll", ".dylib")]
    for library in libraries:
        with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(key.encode() + b"\0") >= 0:  # the whole of a name, and not the beginning of a longer one
                return True
    return not libraries


def _like(key: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(key, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DeviceError(f"{name} is {value!r}", expected="a whole number, 1 or more")
    return value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise DeviceError(f"{name} is {value!r}", expected=" or ".join(choices))
    return str(value)


def _text(value: Any) -> str:
    """ONNX Runtime reads "1" and "0", and takes "True" for a no."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
