"""KServe: an InferenceService (serving.kserve.io/v1beta1) over Triton's model repository: https://kserve.github.io/website/

The runtime is the cluster's `kserve-tritonserver`, which gets `/mnt/models` as its repository.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit.errors import PackageError
from deploykit.serving import package_triton, yaml_text
from deploykit.serving.bundles import MODELS
from deploykit.serving.package_plan import Plan
from deploykit.serving.package_targets import Written

RUNTIME = "kserve-tritonserver"
# A DNS label, which Kubernetes wants the name of a service to be.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
_URI = re.compile(r"(pvc|s3|gs|https?|hf|hdfs|webhdfs|oci|azure)://\S+")
_USER = 1000
_SERVER_MIB = 1024


def write(plan: Plan, folder: Path) -> Written:
    """Write `inferenceservice.yaml` and the model repository.

    Raises:
        PackageError: KServe does not take the name or the address, or Triton the tensors.
    """
    if not _NAME.fullmatch(plan.name):
        fit = re.sub(r"[^a-z0-9-]+", "-", plan.name.lower()).strip("-")
        raise PackageError(
            f"{plan.name!r} cannot be the name of an InferenceService",
            expected="small letters, digits and dashes, 50 at most, a letter first",
            hint=f"give --name {fit if _NAME.fullmatch(fit) else 'NAME'}",
        )
    uri = plan.options.storage_uri
    if uri is None:
        uri = f"pvc://{plan.name}/{MODELS}"
        plan.notes.append(f"copy {MODELS}/ onto the volume of the claim {plan.name!r}, or name another --storage-uri")
    elif not _URI.fullmatch(uri):
        raise PackageError(
            f"--storage-uri {uri!r:.200} is no address of KServe's", expected="pvc://CLAIM/PATH, s3://BUCKET/PATH, ..."
        )
    written = package_triton.write(plan, folder)
    (folder / "inferenceservice.yaml").write_text(yaml_text.dump(inference_service(plan, uri)), encoding="utf-8")
    readme = (
        f"`{uri}` has to hold what is in `{MODELS}/`; then:\n\n"
        "```\nkubectl apply -f inferenceservice.yaml\n"
        f"kubectl wait --for=condition=Ready inferenceservice/{plan.name}\n"
        f"kubectl port-forward service/{plan.name}-predictor 8080:80\n```"
    )
    return replace(written, readme=readme)


def inference_service(plan: Plan, uri: str) -> dict[str, Any]:
    """The manifest."""
    cores = str(max(1, (plan.settings.threads or 1) * plan.lanes))
    memory = f"{_SERVER_MIB + round(2 * plan.artifact.size_bytes * plan.settings.sessions / 2**20)}Mi"
    resources: dict[str, Any] = {"requests": {"cpu": cores, "memory": memory}, "limits": {"memory": memory}}
    if plan.device.target in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        resources["limits"]["nvidia.com/gpu"] = "1"
    openvino = plan.device.runtime == "openvino"
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": plan.name, "labels": {"app.kubernetes.io/managed-by": "deploykit"}},
        "spec": {
            "predictor": {
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": _USER,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "model": {
                    "modelFormat": {"name": "triton", "version": "2"} if openvino else {"name": "onnx", "version": "1"},
                    "protocolVersion": "v2",
                    "runtime": RUNTIME,
                    "storageUri": uri,
                    # Triton's completion would join requests of models whose rows depend on each other.
                    "args": ["--disable-auto-complete-config"],
                    "resources": resources,
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "readinessProbe": {
                        "httpGet": {"path": f"/v2/models/{plan.name}/ready", "port": 8080},
                        "periodSeconds": 5,
                        "timeoutSeconds": 5,
                    },
                },
            }
        },
    }
