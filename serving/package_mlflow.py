"""MLflow: a model directory of the flavours `onnx` and `python_function`: https://mlflow.org/docs/latest/ml/model/"""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploykit.errors import PackageError
from deploykit.extras import version_of
from deploykit.modelfile import copy_model
from deploykit.runtimes.ort_settings import CPU, LEVELS, level_of
from deploykit.serving import yaml_text
from deploykit.serving.bundles import MODELS
from deploykit.serving.package_plan import Plan
from deploykit.serving.package_targets import Written
from deploykit.specs import TensorSpec

# The numbers of onnxruntime.GraphOptimizationLevel.
_LEVELS = dict(zip(LEVELS, (0, 1, 2, 3, 99), strict=True))
# The first that passes `extra_session_config` on.
_MLFLOW = "2.4"
_EXAMPLE_LIMIT_BYTES = 1 << 20


def write(plan: Plan, folder: Path) -> Written:
    """Write `models/NAME/` with MLmodel, model, signature and requirements.

    Raises:
        PackageError: MLflow has no such tensors.
    """
    home = folder / MODELS / plan.name
    home.mkdir(parents=True)
    copy_model(plan.artifact.model_path, home / "model.onnx")
    requirements = [f"mlflow>={_MLFLOW}", *(_pinned(n) for n in ("numpy", "onnx", "onnxruntime"))]
    (home / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements), encoding="ascii")
    python = platform.python_version()
    environment = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    (home / "python_env.yaml").write_text(yaml_text.dump(environment), encoding="ascii")
    conda = {
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
        "name": "mlflow-env",
    }
    (home / "conda.yaml").write_text(yaml_text.dump(conda), encoding="ascii")
    (home / "MLmodel").write_text(yaml_text.dump(_mlmodel(plan, python)), encoding="utf-8")
    _write_example(plan, home)
    workers = f" --workers {plan.settings.sessions}" if plan.settings.sessions > 1 else ""
    readme = (
        f"```\nmlflow models serve -m {MODELS}/{plan.name} --env-manager local --port 5000{workers}\n```\n\n"
        f'Or in Python: `mlflow.pyfunc.load_model("{MODELS}/{plan.name}")`. MLflow joins no requests, and serves JSON.'
    )
    return Written(f"{MODELS}/{plan.name}/model.onnx", "mlflow", readme)


def _pinned(name: str) -> str:
    found = version_of(name)
    return f"{name}=={found}" if found else name


def _mlmodel(plan: Plan, python: str) -> dict[str, Any]:
    """The model's description."""
    digest = plan.artifact.digest
    return {
        "flavors": {
            "onnx": {
                "code": None,
                "data": "model.onnx",
                "onnx_session_options": _session_options(plan),
                "onnx_version": version_of("onnx") or "",
                "providers": [_provider(plan)],
            },
            "python_function": {
                "data": "model.onnx",
                "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
                "loader_module": "mlflow.onnx",
                "python_version": python,
            },
        },
        "metadata": {"deploykit_artifact": digest},
        "model_size_bytes": plan.artifact.size_bytes,
        "model_uuid": digest[:32],
        "signature": {
            "inputs": json.dumps([_tensor(spec) for spec in plan.inputs]),
            "outputs": json.dumps([_tensor(spec) for spec in plan.outputs]),
            "params": None,
        },
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """A tensor of the signature; strings are numpy's."""
    if spec.dtype in ("bfloat16", "complex64", "complex128"):
        raise PackageError(f"{spec.name!r} is {spec.dtype}, which MLflow cannot take from JSON")
    shape = [-1 if isinstance(dim, str) else dim for dim in spec.shape or ()]
    dtype = "str" if spec.dtype == "string" else spec.dtype
    return {"name": spec.name, "type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}


def _session_options(plan: Plan) -> dict[str, Any]:
    """Options of the session, by MLflow's names; what it cannot take is said."""
    settings, given = plan.settings, dict(plan.settings.settings)
    made: dict[str, Any] = {}
    threads = given.pop("intra_op_num_threads", settings.threads)
    if threads is not None:
        made["intra_op_num_threads"] = threads
    if "inter_op_num_threads" in given:
        made["inter_op_num_threads"] = given.pop("inter_op_num_threads")
    made["execution_mode"] = given.pop("execution_mode", "sequential")
    level = _LEVELS[given.pop("graph_optimization_level", level_of(settings.optimize))]
    if level:
        made["graph_optimization_level"] = level
    else:
        plan.notes.append("MLflow cannot switch graph optimization off, and takes all of it")
    config = {k: str(v) for k, v in given.items() if "." in k}
    if plan.device.target != CPU:
        config.setdefault("session.disable_cpu_ep_fallback", "1")
    if config:
        made["extra_session_config"] = config
    return made


def _provider(plan: Plan) -> Any:
    """The execution provider, with its options where it has any."""
    options = {k: str(v) for k, v in plan.settings.settings.items() if "." not in k}
    for name in ("intra_op_num_threads", "inter_op_num_threads", "execution_mode", "graph_optimization_level",
                 "device_buffers"):  # fmt: skip
        options.pop(name, None)
    if plan.device.target == "CUDAExecutionProvider" and plan.settings.precision == "fp32":
        options.setdefault("use_tf32", "0")
    return [plan.device.target, options] if options else plan.device.target


def _write_example(plan: Plan, home: Path) -> None:
    """The first golden request as a client of the scoring server sends it, where it is small."""
    inputs = plan.cases[0][0]
    if sum(a.nbytes for a in inputs.values()) > _EXAMPLE_LIMIT_BYTES:
        return
    text = json.dumps({"inputs": {name: array.tolist() for name, array in inputs.items()}})
    (home / "serving_input_example.json").write_text(text + "\n", encoding="utf-8")
