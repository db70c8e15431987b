"""Triton Inference Server: a model repository with a complete configuration, for its ONNX Runtime or OpenVINO backend.

Facts from https://github.com/triton-inference-server: common/protobuf/model_config.proto, onnxruntime_backend and
openvino_backend. A complete configuration is written, and the server has to be started without its completion, which
would join requests of models whose rows depend on each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.contract import violations
from deploykit.errors import ContractError, PackageError
from deploykit.modelfile import copy_model, external_files, read_model
from deploykit.runtimes.ort_settings import level_of
from deploykit.serving.bundles import MODELS
from deploykit.serving.package_ir import compile_properties, write_ir
from deploykit.serving.package_plan import Plan
from deploykit.serving.package_targets import Written
from deploykit.serving.protobuf_text import Symbol, dump, parameters
from deploykit.serving.smoke_http import pack, v2_dtype
from deploykit.specs import Array, TensorSpec
from deploykit.targets import known_targets, parse_target

VERSION = "1"
_LEVELS = {"basic": -1, "extended": 1, "disabled": 2}
# Settings that the ONNX Runtime backend passes on; it knows no other session configuration.
_ORT_PARAMETERS = {
    "inter_op_num_threads": "inter_op_thread_count",
    "session.use_device_allocator_for_initializers": "session.use_device_allocator_for_initializers",
}
_OPENVINO_PARAMETERS = ("PERFORMANCE_HINT", "NUM_STREAMS", "INFERENCE_NUM_THREADS", "COMPILATION_NUM_THREADS")
_ACCELERATORS = {
    "TensorrtExecutionProvider": "tensorrt",
    "CUDAExecutionProvider": "cuda",
    "OpenVINOExecutionProvider": "openvino",
}


def write(plan: Plan, folder: Path) -> Written:
    """Write `models/NAME/config.pbtxt`, `models/NAME/1/` and the inputs of the warm-up.

    Raises:
        PackageError: Triton has no such tensors.
    """
    home = folder / MODELS / plan.name
    (home / VERSION).mkdir(parents=True)
    columns = tuple(s.name for s in (*plan.inputs, *plan.outputs) if len(s.shape or ()) == 1 and plan.max_batch)
    openvino = plan.device.runtime == "openvino"
    config: dict[str, Any] = {
        "name": plan.name,
        "backend": "openvino" if openvino else "onnxruntime",
        "max_batch_size": plan.max_batch,
        "input": [_tensor(s, plan) for s in plan.inputs],
        "output": [_tensor(s, plan) for s in plan.outputs],
    }
    model = _write_openvino(plan, home) if openvino else _write_onnx(plan, home)
    config |= _openvino_settings(plan) if openvino else _ort_settings(plan)
    if plan.max_batch > 1:
        config["dynamic_batching"] = _batching(plan)
    config["model_warmup"] = _warm_up(plan, home, columns)
    (home / "config.pbtxt").write_text(dump(config), encoding="ascii")
    return Written(model.relative_to(folder).as_posix(), "v2", _readme(plan, openvino), columns)


def _tensor(spec: TensorSpec, plan: Plan) -> dict[str, Any]:
    """An input or an output; dims leave the batch out."""
    kind = Symbol(f"TYPE_{triton_dtype(spec)}")
    if not spec.name:
        raise PackageError("a tensor of the model has no name, and Triton asks for them by name")
    shape = spec.shape or ()
    if not shape:
        raise PackageError(
            f"{spec.name!r} is a scalar, which Triton has not", expected="at least one dimension",
            hint="give it a dimension of size 1 in the model",
        )  # fmt: skip
    dims = [-1 if isinstance(d, str) else d for d in (shape[1:] if plan.max_batch else shape)]
    if 0 in dims:
        raise PackageError(f"{spec} has a dimension of size 0, which Triton refuses")
    made: dict[str, Any] = {"name": spec.name, "data_type": kind, "dims": dims or [1]}
    if not dims:  # [batch]: each request sends [batch, 1]
        made["reshape"] = {}
    return made


def triton_dtype(spec: TensorSpec) -> str:
    """Triton's name of a dtype, without its prefix.

    Raises:
        PackageError: It has none.
    """
    found = v2_dtype(spec.dtype, spec.name)
    return "STRING" if found == "BYTES" else found


def _write_onnx(plan: Plan, home: Path) -> Path:
    """The file as it is; with external data a directory `model.onnx`, which the backend looks into."""
    source = plan.artifact.model_path
    target = home / VERSION / "model.onnx"
    if external_files(read_model(source, weights=False)):
        target.mkdir()
        target = target / "model.onnx"
    copy_model(source, target)
    return target


def _write_openvino(plan: Plan, home: Path) -> Path:
    target = home / VERSION / "model.xml"
    write_ir(plan.artifact.model_path, target, plan.outputs)
    return target


def _ort_settings(plan: Plan) -> dict[str, Any]:
    """Threads, graph level and provider for the ONNX Runtime backend; what it cannot take is said."""
    settings, given = plan.settings, dict(plan.settings.settings)
    made: dict[str, str] = {}
    threads = given.pop("intra_op_num_threads", settings.threads)
    if threads is not None:
        made["intra_op_thread_count"] = str(threads)
    mode = given.pop("execution_mode", "sequential")
    made["execution_mode"] = "1" if mode == "parallel" else "0"
    for ours, theirs in _ORT_PARAMETERS.items():
        if ours in given:
            made[theirs] = str(given.pop(ours))
    level = given.pop("graph_optimization_level", level_of(settings.optimize))
    given.pop("device_buffers", None)
    found: dict[str, Any] = {}
    optimization: dict[str, Any] = {}
    if level in _LEVELS:
        optimization["graph"] = {"level": _LEVELS[level]}
    elif level == "layout":
        plan.notes.append("Triton has no graph level 'layout'; it takes all")
    accelerator = _ACCELERATORS.get(plan.device.target)
    if accelerator:
        options = {k: _text(given.pop(k)) for k in list(given) if "." not in k}
        optimization["execution_accelerators"] = _accelerator(plan, accelerator, options)
    if optimization:
        found["optimization"] = optimization
    _say_lost(plan, given, "Triton's ONNX Runtime backend")
    gpu = plan.device.target in ("CUDAExecutionProvider", "TensorrtExecutionProvider")
    found["instance_group"] = [{"count": settings.sessions, "kind": Symbol("KIND_GPU" if gpu else "KIND_CPU")}]
    found["parameters"] = [{"key": k, "value": {"string_value": v}} for k, v in made.items()]
    return found


def _accelerator(plan: Plan, name: str, options: dict[str, str]) -> dict[str, Any]:
    """TensorRT's own names are those of the backend, but for the precision."""
    if name == "cuda" and plan.settings.precision == "fp32":
        options.setdefault("use_tf32", "0")
    if name == "tensorrt":
        half = options.pop("trt_fp16_enable", "0").lower() in ("1", "true")
        options["precision_mode"] = "FP16" if half else "FP32"
        if "trt_max_workspace_size" in options:
            options["max_workspace_size_bytes"] = options.pop("trt_max_workspace_size")
        if plan.settings.precision == "fp32":
            plan.notes.append("start the server with NVIDIA_TF32_OVERRIDE=0: TensorRT takes TF32 for float32 otherwise")
    if name == "openvino":
        _say_lost(plan, options, "Triton's OpenVINO accelerator")
        return {"cpu_execution_accelerator": [{"name": name}]}
    made: dict[str, Any] = {"name": name}
    if options:
        made["parameters"] = parameters(options)
    return {"gpu_execution_accelerator": [made]}


def _openvino_settings(plan: Plan) -> dict[str, Any]:
    """Streams and threads for the OpenVINO backend; as many instances as streams, so that all are used."""
    given = compile_properties(plan)
    made = {name: str(given.pop(name)) for name in _OPENVINO_PARAMETERS if name in given}
    single = given.pop("INFERENCE_PRECISION_HINT", None) == "f32"
    if plan.device.target != "CPU":
        made["TARGET_DEVICE"] = plan.device.target
    elif single:
        plan.notes.append(
            "Triton's OpenVINO backend cannot ask for single precision: where the CPU has AMX, it computes in bfloat16"
        )
    _say_lost(plan, given, "Triton's OpenVINO backend")
    return {
        "instance_group": [{"count": plan.lanes, "kind": Symbol("KIND_CPU")}],
        "parameters": [{"key": k, "value": {"string_value": v}} for k, v in made.items()],
    }


def _say_lost(plan: Plan, given: dict[str, Any], who: str) -> None:
    plan.notes.extend(f"{who} has no setting {name} (tuned: {value})" for name, value in sorted(given.items()))


def _text(value: Any) -> str:
    return ("1" if value else "0") if isinstance(value, bool) else str(value)


def _batching(plan: Plan) -> dict[str, Any]:
    made: dict[str, Any] = {"max_queue_delay_microseconds": round((plan.options.max_delay_ms or 0.0) * 1000)}
    if 1 < plan.settings.batch <= plan.max_batch:
        made = {"preferred_batch_size": [plan.settings.batch]} | made
    return made


def _warm_up(plan: Plan, home: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The first golden request, and where requests are joined, its first row as often as the largest batch has rows."""
    (home / "warmup").mkdir()
    inputs = plan.cases[0][0]
    if not plan.max_batch:
        return [_sample("golden", 1, inputs, plan, home)]
    row = {n: (a[:1] if n not in columns else a[:1, None])[0] for n, a in inputs.items()}
    made = [_sample("one", 1, row, plan, home)]
    if plan.max_batch > 1:
        made.append(_sample("largest", plan.max_batch, row, plan, home))
    return made


def _sample(name: str, batch: int, arrays: dict[str, Array], plan: Plan, home: Path) -> dict[str, Any]:
    entries = []
    for number, spec in enumerate(plan.inputs):
        file = f"input-{number}"
        (home / "warmup" / file).write_bytes(pack(np.asarray(arrays[spec.name])))
        value = {
            "data_type": Symbol(f"TYPE_{triton_dtype(spec)}"),
            "dims": list(arrays[spec.name].shape),
            "input_data_file": file,
        }
        entries.append({"key": spec.name, "value": value})
    return {"name": name, "batch_size": batch, "inputs": entries}


def releases(path: Path) -> list[str]:
    """Known releases of Triton whose ONNX Runtime reads a model, oldest first."""
    model = read_model(path, weights=False)
    found = []
    for name in known_targets():
        if name.startswith("triton:"):
            with contextlib.suppress(ContractError):  # of some, no limits are published
                if not violations(model, [parse_target(name)]):
                    found.append(name.removeprefix("triton:"))
    return found


def _readme(plan: Plan, openvino: bool) -> str:
    lines = []
    release = "YY.MM"
    if not openvino:
        found = releases(plan.artifact.model_path)
        if found:
            release = found[-1]
            span = f"{found[0]} to {found[-1]}" if len(found) > 1 else found[0]
            lines.append(f"Of the releases that DeployKit knows, {len(found)} read the model: {span}.\n")
        else:
            plan.notes.append(
                "no release of Triton that DeployKit knows reads this model; export it with --for triton:..."
            )
    gpu = plan.device.target in ("CUDAExecutionProvider", "TensorrtExecutionProvider")
    lines.append(
        "```\ndocker run --rm --read-only --tmpfs /tmp --shm-size 256m "
        + ("--gpus all " if gpu else "")
        + "-p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 \\\n"
        f'    -v "$PWD/{MODELS}:/models:ro" nvcr.io/nvidia/tritonserver:{release}-py3 \\\n'
        "    tritonserver --model-repository=/models --disable-auto-complete-config\n```\n\n"
        "Without `--disable-auto-complete-config` Triton would join requests also where `max_batch_size` is 0.\n"
        "HTTP is on port 8000, gRPC on port 8001."
    )
    return "\n".join(lines)
