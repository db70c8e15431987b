"""BentoML: a service in Python that needs the runtime and numpy only: https://docs.bentoml.com"""

from __future__ import annotations

import pprint
import re
from pathlib import Path
from typing import Any

from deploykit.errors import PackageError
from deploykit.extras import version_of
from deploykit.modelfile import copy_model
from deploykit.runtimes.ort_settings import level_of
from deploykit.serving import yaml_text
from deploykit.serving.bundles import MODELS
from deploykit.serving.package_ir import compile_properties, write_ir
from deploykit.serving.package_plan import Plan
from deploykit.serving.package_targets import Written

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_LEVELS = {
    "disabled": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_ALL", "all": "ORT_ENABLE_ALL",
}  # fmt: skip

_ORT = '''
def open_model():
    """The session, with the settings that the model was measured with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if THREADS:
        options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = SETTINGS["inter_op_num_threads"]
    options.execution_mode = getattr(onnxruntime.ExecutionMode, SETTINGS["execution_mode"])
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, SETTINGS["level"])
    for key, value in SETTINGS["config"].items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
    return lambda feeds: dict(zip(OUTPUTS, session.run(OUTPUTS, feeds)))
'''
_OPENVINO = '''
def open_model():
    """The compiled model, with the properties that it was measured with."""
    import openvino

    request = openvino.Core().compile_model(str(MODEL), DEVICE, SETTINGS).create_infer_request()

    def run(feeds):
        request.infer(feeds)
        return {name: np.array(request.get_tensor(name).data) for name in OUTPUTS}

    return run
'''
_HEAD = '''"""{name}, served by BentoML: bentoml serve service:Model"""

from pathlib import Path
from typing import Any, Dict, List

import bentoml
import numpy as np

MODEL = Path(__file__).parent / "{model}"
DEVICE = "{device}"
THREADS = {threads}
SETTINGS = {settings}
# Inputs by name: numpy's dtype, and the shape, with None for sizes that a request chooses.
INPUTS = {inputs}
OUTPUTS = {outputs}


def to_arrays(tensors, *, rows):
    """Nested lists as the model's arrays; `rows` says that each lacks its first dimension."""
    if sorted(tensors) != sorted(INPUTS):
        raise bentoml.exceptions.InvalidArgument(f"the inputs are {{sorted(INPUTS)}}, not {{sorted(tensors)}}")
    found = {{}}
    for name, (dtype, shape) in INPUTS.items():
        try:
            array = np.asarray(tensors[name], dtype=object if dtype == "string" else dtype)
        except (TypeError, ValueError, OverflowError) as exc:
            raise bentoml.exceptions.InvalidArgument(f"{{name}} is no array of {{dtype}}") from exc
        expected = shape[1:] if rows else shape
        fits = array.ndim == len(expected) and all(e in (None, d) for e, d in zip(expected, array.shape))
        if not fits:
            raise bentoml.exceptions.InvalidArgument(f"{{name}} has shape {{array.shape}}, not {{tuple(expected)}}")
        found[name] = array
    return found


def to_lists(outputs):
    """Arrays as JSON."""
    return {{name: array.tolist() for name, array in outputs.items()}}

'''
_SERVICE = '''

@bentoml.service(name="{name}", workers={workers}, threads=1, resources={{"cpu": "{cores}"}}, traffic={{"timeout": 60}})
class Model:
    """Answers with what the model computes."""

    def __init__(self) -> None:
        self.run = open_model()
        with np.load(Path(__file__).parent / "golden.npz") as golden:  # warm before it is ready
            self.run({{name: golden[f"0/in/{{name}}"] for name in INPUTS}})

    @bentoml.api
    def predict(self, inputs: Dict[str, Any]) -> Dict[str, Any]:
        """One request: nested lists by name of the input."""
        return to_lists(self.run(to_arrays(inputs, rows=False)))
'''
_BATCH = '''
    @bentoml.api(batchable=True, max_batch_size={max_batch})
    def predict_rows(self, rows: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Rows of several requests at once: nested lists by name, each without the first dimension.

        A row that does not fit is answered with {{"error": ...}}, so that the others are not lost.
        """
        arrays, groups, answers = {{}}, {{}}, [{{}} for _ in rows]
        for number, row in enumerate(rows):
            try:
                arrays[number] = to_arrays(row, rows=True)
            except bentoml.exceptions.InvalidArgument as exc:
                answers[number] = {{"error": str(exc)}}
                continue
            groups.setdefault(tuple(array.shape for array in arrays[number].values()), []).append(number)
        for numbers in groups.values():
            joined = {{name: np.stack([arrays[n][name] for n in numbers]) for name in INPUTS}}
            outputs = self.run(joined)
            for place, number in enumerate(numbers):
                answers[number] = to_lists({{name: array[place] for name, array in outputs.items()}})
        return answers
'''


def write(plan: Plan, folder: Path) -> Written:
    """Write `service.py`, `bentofile.yaml`, `requirements.txt` and the model.

    Raises:
        PackageError: BentoML does not take the name, or JSON the tensors.
    """
    if not _NAME.fullmatch(plan.name):
        raise PackageError(
            f"{plan.name!r} cannot be the name of a Bento",
            expected="small letters, digits, dots, dashes and underscores, a letter or digit at both ends",
            hint="give one with --name",
        )
    for spec in (*plan.inputs, *plan.outputs):
        if spec.dtype in ("bfloat16", "complex64", "complex128"):
            raise PackageError(f"{spec.name!r} is {spec.dtype}, which cannot be taken from JSON")
    home = folder / MODELS / plan.name
    home.mkdir(parents=True)
    openvino = plan.device.runtime == "openvino"
    source = plan.artifact.model_path
    model = home / ("model.xml" if source.suffix == ".xml" else "model.onnx")
    if source.suffix == ".xml":
        write_ir(source, model, plan.outputs)
    else:
        copy_model(source, model)
    relative = model.relative_to(folder).as_posix()
    (folder / "service.py").write_text(_service(plan, relative, openvino), encoding="utf-8")
    wheels = ["bentoml>=1.4", *(_pinned(name) for name in ("numpy", "openvino" if openvino else "onnxruntime"))]
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in wheels), encoding="ascii")
    bento = {
        "service": "service:Model",
        "labels": {"made-by": "deploykit", "artifact": plan.artifact.digest[:12]},
        "include": ["service.py", "golden.npz", f"{MODELS}/**"],
        "python": {"requirements_txt": "requirements.txt"},
    }
    (folder / "bentofile.yaml").write_text(yaml_text.dump(bento), encoding="utf-8")
    readme = (
        "```\npip install -r requirements.txt\nbentoml serve service:Model --host 127.0.0.1 --port 3000\n"
        "bentoml build && bentoml containerize " + plan.name + ":latest\n```\n\n"
        "`/predict` takes one request"
        + (", `/predict_rows` a list of rows, which BentoML joins with those of others." if plan.max_batch > 1 else ".")
    )
    return Written(relative, "bentoml", readme)


def _pinned(name: str) -> str:
    found = version_of(name)
    return f"{name}=={found}" if found else name


def _service(plan: Plan, model: str, openvino: bool) -> str:
    inputs = {s.name: (s.dtype, tuple(None if isinstance(d, str) else d for d in s.shape or ())) for s in plan.inputs}
    # By the runtime's own name they win, as where it is opened here.
    threads = plan.settings.settings.get("intra_op_num_threads", plan.settings.threads)
    cores = max(1, (plan.settings.threads or 1) * plan.lanes)
    head = _HEAD.format(
        name=plan.name, model=model, device=plan.device.target, threads=threads,
        settings=_literal(compile_properties(plan) if openvino else _ort_settings(plan)), inputs=_literal(inputs),
        outputs=_literal([s.name for s in plan.outputs]),
    )  # fmt: skip
    service = _SERVICE.format(name=plan.name, workers=plan.settings.sessions, cores=cores)
    batch = _BATCH.format(max_batch=plan.max_batch) if plan.max_batch > 1 else ""
    return head + (_OPENVINO if openvino else _ORT) + service + batch


def _literal(value: Any) -> str:
    return pprint.pformat(value, width=110, sort_dicts=False)


def _ort_settings(plan: Plan) -> dict[str, Any]:
    """Settings of ONNX Runtime's CPU provider, which has no options of its own."""
    given = dict(plan.settings.settings)
    mode = given.get("execution_mode", "sequential")
    return {
        "inter_op_num_threads": given.get("inter_op_num_threads", 1),
        "execution_mode": "ORT_PARALLEL" if mode == "parallel" else "ORT_SEQUENTIAL",
        "level": _LEVELS[given.get("graph_optimization_level", level_of(plan.settings.optimize))],
        "config": {key: str(value) for key, value in given.items() if "." in key},
    }
