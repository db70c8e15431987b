"""KServe, OpenVINO Model Server, MLflow and BentoML: each read by its own library, or by the schema it documents.

BentoML and the KServe SDK bring hundreds of megabytes, and pins that contradict others. Their tests run where an
environment of their own is named: DEPLOYKIT_BENTOML_PYTHON (bentoml, onnxruntime, numpy) and DEPLOYKIT_KSERVE_PYTHON
(kserve) hold the path of its Python.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

import deploykit
from deploykit.errors import PackageError
from deploykit.runtimes import RuntimeSettings
from deploykit.serving.package_plan import TargetOptions

# What the server's own schema takes of a model (src/schema.cpp of openvinotoolkit/model_server), in our words.
OVMS_SCHEMA = {
    "type": "object",
    "required": ["model_config_list"],
    "additionalProperties": False,
    "properties": {
        "model_config_list": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["config"],
                "additionalProperties": False,
                "properties": {
                    "config": {
                        "type": "object",
                        "required": ["name", "base_path"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "base_path": {"type": "string"},
                            "batch_size": {"type": ["integer", "string"]},
                            "shape": {"type": ["object", "string"]},
                            "nireq": {"type": "integer", "minimum": 0},
                            "target_device": {"type": "string"},
                            "plugin_config": {"type": "object"},
                        },
                    }
                },
            },
        }
    },
}


_HEAVY = {
    "DEPLOYKIT_BENTOML_PYTHON": "BentoML weighs 270 MB and is not among the development requirements",
    "DEPLOYKIT_KSERVE_PYTHON": "KServe's SDK weighs 450 MB and is not among the development requirements",
}


def python_of(name: str) -> str:
    """The Python of an environment that holds a heavy library."""
    found = os.environ.get(name)
    if not found:
        pytest.skip(f"{_HEAVY[name]}; to run this, give an environment that has it: {name}=VENV/bin/python")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- OpenVINO Model Server --------------------------------------------------------------------------------------------


def test_ovms_configuration(artifact: Any, tmp_path: Path) -> None:
    RuntimeSettings("openvino:cpu", threads=1, concurrency=6, settings={"NUM_STREAMS": 3}).save(tmp_path / "t.json")
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="ovms", settings=tmp_path / "t.json")
    found = json.loads((bundle.path / "models" / "config.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, OVMS_SCHEMA)
    config = found["model_config_list"][0]["config"]
    assert (config["name"], config["base_path"], config["target_device"]) == ("net", "/models/net", "CPU")
    assert config["nireq"] == 6
    assert config["plugin_config"] == {
        "NUM_STREAMS": "3", "INFERENCE_NUM_THREADS": "3", "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    assert bundle.manifest.max_batch == 0


def test_openvino_takes_the_properties_that_ovms_would_set(artifact: Any, tmp_path: Path) -> None:
    import openvino

    bundle = deploykit.package(artifact().path, tmp_path / "out", target="ovms")
    config = json.loads((bundle.path / "models" / "config.json").read_text(encoding="utf-8"))["model_config_list"][0]
    compiled = openvino.Core().compile_model(str(bundle.model_path), "CPU", config["config"]["plugin_config"])
    assert compiled.get_property("NUM_STREAMS") == 1
    assert str(compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


def test_ovms_gets_ir_where_weights_lie_outside(artifact: Any, tmp_path: Path) -> None:
    bundle = deploykit.package(artifact(external=True).path, tmp_path / "out", target="ovms")
    place = bundle.path / "models" / "net" / "1"
    assert sorted(p.name for p in place.iterdir()) == ["model.bin", "model.xml"]
    assert deploykit.smoke(bundle.path)["passed"]


def test_ovms_takes_scalars_and_joins_nothing(artifact: Any, tmp_path: Path) -> None:
    made = artifact("scalar")
    assert deploykit.package(made.path, tmp_path / "out", target="ovms").manifest.replay["verdict"] == "passed"
    with pytest.raises(PackageError, match="does not join requests"):
        deploykit.package(made.path, tmp_path / "two", target="ovms", max_batch=4)
    RuntimeSettings("ort:cpu").save(tmp_path / "ort.json")
    with pytest.raises(PackageError, match=r"is for ort:cpu.*--save-settings"):
        deploykit.package(made.path, tmp_path / "two", target="ovms", settings=tmp_path / "ort.json")


# --- KServe -----------------------------------------------------------------------------------------------------------


def service_of(bundle: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((bundle.path / "inferenceservice.yaml").read_text(encoding="utf-8"))
    return found


def test_kserve_manifest(artifact: Any, tmp_path: Path) -> None:
    options = TargetOptions(storage_uri="s3://bucket/net")
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="kserve", options=options)
    found = service_of(bundle)
    assert (found["apiVersion"], found["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = found["spec"]["predictor"]
    model = predictor["model"]
    assert model["modelFormat"]["name"] == "onnx"
    assert (model["protocolVersion"], model["runtime"]) == ("v2", "kserve-tritonserver")
    assert model["storageUri"] == "s3://bucket/net"
    assert predictor["securityContext"]["runAsNonRoot"] is True
    assert model["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert model["args"] == ["--disable-auto-complete-config"]
    assert (bundle.path / "models" / "net" / "config.pbtxt").is_file()


def test_kserve_says_what_it_expects_where_no_address_is_given(artifact: Any, tmp_path: Path) -> None:
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="kserve")
    assert service_of(bundle)["spec"]["predictor"]["model"]["storageUri"] == "pvc://net/models"
    assert any("claim 'net'" in note for note in bundle.manifest.notes)


@pytest.mark.parametrize(
    ("name", "uri", "words"),
    [("My_Net", None, "give --name my-net"), ("9", None, "cannot be the name"), ("net", "file:///x", "no address")],
)
def test_kserve_refuses(artifact: Any, tmp_path: Path, name: str, uri: str | None, words: str) -> None:
    options = TargetOptions(storage_uri=uri)
    with pytest.raises(PackageError, match=words):
        deploykit.package(artifact().path, tmp_path / "out", target="kserve", name=name, options=options)
    assert not (tmp_path / "out").exists()


BUILD = """
import sys, yaml
from kserve import models
from kubernetes import client

def build(value, kind):
    if kind.startswith(("list[", "List[")):
        return [build(item, kind[5:-1]) for item in value]
    own = getattr(models, kind, None)
    if own is not None:  # KServe's: each field has to be one that it knows
        fields = {theirs: ours for ours, theirs in own.attribute_map.items()}
        return own(**{fields[k]: build(v, own.openapi_types[fields[k]]) for k, v in value.items()})
    kubernetes = getattr(client, kind, None)
    if kubernetes is None:
        return value
    made = kubernetes.from_dict(value)
    known = client.ApiClient().sanitize_for_serialization(made)
    assert known == value, (kind, known, value)
    return made

made = build(yaml.safe_load(open(sys.argv[1])), "V1beta1InferenceService")
model = made.spec.predictor.model
print(type(made).__name__, model.model_format.name, model.runtime, model.security_context.capabilities.drop)
"""


@pytest.mark.parametrize("device", ["ort:cpu", "openvino:cpu"])
def test_the_sdk_of_kserve_knows_every_field(artifact: Any, tmp_path: Path, device: str) -> None:
    python = python_of("DEPLOYKIT_KSERVE_PYTHON")
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="kserve", device=device)
    done = subprocess.run(
        [python, "-c", BUILD, bundle.path / "inferenceservice.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    form = "triton" if device.startswith("openvino") else "onnx"
    assert done.stdout.split(maxsplit=3) == [
        "V1beta1InferenceService", form, "kserve-tritonserver", "['ALL']\n",
    ]  # fmt: skip


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "text", "steps", "fixed"])
def test_mlflow_loads_and_predicts(artifact: Any, tmp_path: Path, kind: str) -> None:
    import mlflow

    bundle = deploykit.package(artifact(kind).path, tmp_path / "out", target="mlflow")
    loaded = mlflow.pyfunc.load_model(str(bundle.path / "models" / "net"))
    for inputs, golden in bundle.golden():
        found = loaded.predict(inputs)
        for name, want in golden.items():
            assert np.array_equal(found[name], want) if want.dtype.kind in "iU" else np.allclose(found[name], want)
    signature = loaded.metadata.signature
    assert [s.name for s in signature.inputs] == [s.name for s in bundle.signature.inputs]
    assert [s.name for s in signature.outputs] == [s.name for s in bundle.signature.outputs]
    with pytest.raises(mlflow.exceptions.MlflowException):
        loaded.predict({"unknown": np.zeros((1, 4), np.float32)})


def test_mlflow_keeps_external_data_and_its_native_flavour(artifact: Any, tmp_path: Path) -> None:
    import mlflow

    bundle = deploykit.package(artifact(external=True).path, tmp_path / "out", target="mlflow")
    model = mlflow.onnx.load_model(str(bundle.path / "models" / "net"))
    assert {i.name for i in model.graph.initializer} == {"w", "axis"}
    inputs, golden = bundle.golden()[0]
    loaded = mlflow.pyfunc.load_model(str(bundle.path / "models" / "net"))
    assert np.allclose(loaded.predict(inputs)["y"], golden["y"])


def test_mlflow_opens_the_session_with_the_tuned_settings(
    artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import onnxruntime

    RuntimeSettings(
        "ort:cpu", threads=2, sessions=3, optimize="extended", settings={"session.intra_op.allow_spinning": "0"}
    ).save(tmp_path / "t.json")
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="mlflow", settings=tmp_path / "t.json")
    seen: list[Any] = []
    real = onnxruntime.InferenceSession

    def spy(path: str, providers: Any = None, sess_options: Any = None) -> Any:
        seen.append((sess_options, providers))
        return real(path, sess_options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    mlflow.pyfunc.load_model(str(bundle.path / "models" / "net"))
    ((options, providers),) = seen
    assert providers == ["CPUExecutionProvider"]
    assert options.intra_op_num_threads == 2
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert "--workers 3" in (bundle.path / "README.md").read_text(encoding="utf-8")


def test_the_example_is_what_mlflow_serves(artifact: Any, tmp_path: Path) -> None:
    from mlflow.models.utils import ModelInputExample  # noqa: F401 - the module that reads such files
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    bundle = deploykit.package(artifact().path, tmp_path / "out", target="mlflow")
    text = (bundle.path / "models" / "net" / "serving_input_example.json").read_text(encoding="utf-8")
    import mlflow

    loaded = mlflow.pyfunc.load_model(str(bundle.path / "models" / "net"))
    found = loaded.predict(infer_and_parse_data(json.loads(text), loaded.metadata.get_input_schema()))
    assert np.allclose(found["y"], bundle.golden()[0][1]["y"])


def test_mlflows_own_server_passes_the_smoke_test(artifact: Any, tmp_path: Path) -> None:
    import mlflow
    import uvicorn
    from mlflow.pyfunc.scoring_server import init

    bundle = deploykit.package(artifact().path, tmp_path / "out", target="mlflow")
    app = init(mlflow.pyfunc.load_model(str(bundle.path / "models" / "net")))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert deploykit.smoke(bundle.path, f"http://127.0.0.1:{port}", wait_s=30)["passed"]
    finally:
        server.should_exit = True
        thread.join(timeout=30)


# --- BentoML ----------------------------------------------------------------------------------------------------------

CALL = """
import json, sys
import numpy as np
import service
model = service.Model()
golden = np.load("golden.npz")
cases = sorted({key.split("/")[0] for key in golden.files})
worst = 0.0
for case in cases:
    inputs = {n: golden[f"{case}/in/{n}"].tolist() for n in service.INPUTS}
    outputs = model.predict(inputs=inputs)
    for name in service.OUTPUTS:
        want = golden[f"{case}/out/{name}"]
        have = np.array(outputs[name])
        assert have.shape == want.shape, (have.shape, want.shape)
        worst = max(worst, float(np.abs(have - want).max()) if want.dtype.kind in "fi" else float((have != want).any()))
    if hasattr(model, "predict_rows"):
        count = len(next(iter(inputs.values())))
        rows = [{n: v[i] for n, v in inputs.items()} for i in range(count)]
        answers = model.predict_rows(rows=[*rows, {"wrong": 1}])
        assert "error" in answers[-1]
        for name in service.OUTPUTS:
            have = np.array([answer[name] for answer in answers[:-1]])
            assert np.allclose(have, golden[f"{case}/out/{name}"], atol=1e-5)
try:
    model.predict(inputs={"unknown": [1]})
except Exception as exc:
    print(type(exc).__name__)
print(worst)
"""


def test_the_service_is_python_without_faults(artifact: Any, tmp_path: Path) -> None:
    """It is code that a person reads and changes; the linter of this project judges it."""
    import sysconfig

    bundle = deploykit.package(artifact().path, tmp_path / "out", target="bentoml")
    source = bundle.path / "service.py"
    compile(source.read_text(encoding="utf-8"), str(source), "exec")
    ruff = Path(sysconfig.get_path("scripts")) / "ruff"
    done = subprocess.run(
        [ruff, "check", "--isolated", "--line-length", "120", "--select", "E,F,W,B", "--ignore", "B905", source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    bento = yaml.safe_load((bundle.path / "bentofile.yaml").read_text(encoding="utf-8"))
    assert bento["service"] == "service:Model"


def test_bentoml_takes_threads_by_the_name_that_they_were_tuned_by(artifact: Any, tmp_path: Path) -> None:
    RuntimeSettings("ort:cpu", threads=2, settings={"intra_op_num_threads": 3}).save(tmp_path / "t.json")
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="bentoml", settings=tmp_path / "t.json")
    assert "\nTHREADS = 3\n" in (bundle.path / "service.py").read_text(encoding="utf-8")


def test_bentoml_refuses_names_that_are_no_tags(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="name of a Bento"):
        deploykit.package(artifact().path, tmp_path / "out", target="bentoml", name="Net")


@pytest.mark.parametrize("kind", ["rows", "text", "steps", "scalar", "fixed"])
def test_bentoml_imports_and_calls_the_service(artifact: Any, tmp_path: Path, kind: str) -> None:
    python = python_of("DEPLOYKIT_BENTOML_PYTHON")
    bundle = deploykit.package(artifact(kind).path, tmp_path / "out", target="bentoml")
    done = subprocess.run([python, "-c", CALL], cwd=bundle.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, worst = done.stdout.strip().splitlines()[-2:]
    assert refused == "InvalidArgument"
    assert float(worst) < 1e-5


def test_bentoml_serves_and_the_smoke_test_passes(artifact: Any, tmp_path: Path) -> None:
    python = python_of("DEPLOYKIT_BENTOML_PYTHON")
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="bentoml")
    port = free_port()
    env = {**os.environ, "BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "True"}
    command = [python, "-m", "bentoml", "serve", "service:Model", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(
        command, cwd=bundle.path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            assert deploykit.smoke(bundle.path, f"http://127.0.0.1:{port}", wait_s=60)["passed"]
        finally:
            os.killpg(server.pid, 15)
