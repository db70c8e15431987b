"""An image of its own: Dockerfile, locked requirements, compose file and Kubernetes manifest of `deploykit serve`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from deploykit.artifact import sha256_of
from deploykit.errors import PackageError
from deploykit.extras import DISTRIBUTION
from deploykit.serving import yaml_text
from deploykit.serving.bundles import MODELS
from deploykit.serving.loaded import Options
from deploykit.serving.package_artifact import write_artifact
from deploykit.serving.package_lock import Pin, check_lock, machine_of_image, needed, read_lock, resolve
from deploykit.serving.package_plan import Plan
from deploykit.serving.package_targets import Written
from deploykit.serving.package_wheel import write_wheel
from deploykit.serving.servers import Places

HTTP_PORT, GRPC_PORT, ADMIN_PORT = 8080, 8081, 8082
USER = 10001
_HOME = "/opt/deploykit"
_BASE = re.compile(r"[a-z0-9][a-z0-9._/:-]*@sha256:[0-9a-f]{64}")
_IMAGE = re.compile(r"[a-z0-9]+([._/:-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?")
# What the server takes beside the model: interpreters and buffers, and the memory that it shares with its workers.
_SERVER_MIB, _SHARED_MIB = 512, 512
# As long as a request that was accepted may take, and what the server's end takes beside.
_GRACE_S = round(Options().timeout_s + 2 * Places().linger_s) + 8


def write(plan: Plan, folder: Path) -> Written:
    """Write everything that `docker build` and `kubectl apply` take.

    Raises:
        PackageError: There are no hashes, or an option cannot be used.
    """
    base, image = _check_base(plan.options.base_image), image_name(plan)
    dtypes = {spec.dtype for spec in (*plan.inputs, *plan.outputs)}
    names = needed(plan.device.runtime, plan.artifact.model_path.suffix, dtypes)
    lock = plan.options.lock
    pins = read_lock(lock) if lock is not None else resolve(names)
    check_lock(pins, names, str(lock) if lock is not None else "what the package index offers")
    (folder / "wheels").mkdir()
    wheel = write_wheel(folder / "wheels", names)
    (folder / "requirements.txt").write_text(_requirements(pins, wheel), encoding="ascii")
    write_artifact(plan, folder / MODELS / plan.name)
    (folder / "Dockerfile").write_text(dockerfile(plan, base), encoding="utf-8")
    wanted = ["requirements.txt", "wheels", MODELS, "deploykit.json", "golden.npz"]
    (folder / ".dockerignore").write_text("*\n" + "".join(f"!{name}\n" for name in wanted), encoding="ascii")
    (folder / "compose.yaml").write_text(yaml_text.dump(compose(plan, image, base)), encoding="utf-8")
    (folder / "kubernetes.yaml").write_text(yaml_text.dump_all(kubernetes(plan, image)), encoding="utf-8")
    return Written(f"{MODELS}/{plan.name}", "v2", _readme(image, base))


def _check_base(base: str | None) -> str | None:
    if base is not None and not _BASE.fullmatch(base):
        raise PackageError(
            f"--base-image {base!r:.200} is not pinned", expected="IMAGE@sha256:… with 64 hexadecimal digits",
            hint="the digest: docker buildx imagetools inspect IMAGE",
        )  # fmt: skip
    return base


def image_name(plan: Plan) -> str:
    """The image's name and tag; by default the model's name and the artifact's digest.

    Raises:
        PackageError: It is none.
    """
    name = plan.options.image or plan.name.lower().strip("._-")
    if not _IMAGE.fullmatch(name):
        raise PackageError(f"{name!r:.200} cannot be an image's name", hint="give one with --image")
    tagged = ":" in name.rsplit("/", 1)[-1]
    return name if tagged else f"{name}:{plan.artifact.digest[:12]}"


def _requirements(pins: tuple[Pin, ...], wheel: Path) -> str:
    own = Pin(DISTRIBUTION, wheel.name.split("-")[1], (sha256_of(wheel),))
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}, linux {machine_of_image()}"
    return f"# For {tag}.\n" + "".join(f"{pin}\n" for pin in sorted((*pins, own), key=lambda p: p.name))


def serve_arguments(plan: Plan) -> list[str]:
    """What `deploykit serve` is told in the image."""
    told = [
        f"/{MODELS}/{plan.name}", "--host", "0.0.0.0", "--http-port", str(HTTP_PORT), "--grpc-port", str(GRPC_PORT),
        "--admin-port", str(ADMIN_PORT), "--max-batch", str(max(plan.max_batch, 1)),
    ]  # fmt: skip
    if plan.options.max_delay_ms is not None:
        told += ["--max-delay-ms", f"{plan.options.max_delay_ms:g}"]
    return told


def dockerfile(plan: Plan, base: str | None) -> str:
    """Two stages: the first installs what is locked and asks the golden requests, the second runs as nobody."""
    python = f"{_HOME}/bin/python"
    ready = f"http://127.0.0.1:{HTTP_PORT}/v2/health/ready"
    check = f"import urllib.request as u; u.urlopen('{ready}', timeout=3)"
    command = ", ".join(f'"{part}"' for part in [f"{_HOME}/bin/deploykit", "serve", *serve_arguments(plan)])
    release = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"""\
# syntax=docker/dockerfile:1
# The base holds Python {release} and glibc 2.28 or later, and is named with its digest.
ARG BASE_IMAGE{f"={base}" if base else ""}
FROM ${{BASE_IMAGE}} AS build
WORKDIR /bundle
COPY requirements.txt ./
COPY wheels ./wheels
RUN python -m venv {_HOME} \\
    && {python} -m pip install --no-cache-dir --no-deps --require-hashes --only-binary=:all: \\
       --find-links wheels -r requirements.txt
COPY deploykit.json golden.npz ./
COPY {MODELS} ./{MODELS}
RUN {_HOME}/bin/deploykit smoke /bundle \\
    && {python} -m pip uninstall --yes --no-cache-dir pip \\
    && chmod -R a+rX {_HOME} /bundle/{MODELS}

FROM ${{BASE_IMAGE}}
COPY --from=build {_HOME} {_HOME}
COPY --from=build /bundle/{MODELS} /{MODELS}
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER {USER}:{USER}
EXPOSE {HTTP_PORT} {GRPC_PORT} {ADMIN_PORT}
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["{python}", "-c", "{check}"]
ENTRYPOINT [{command}]
"""


def _memory_mib(plan: Plan) -> int:
    """About what the server takes: each session holds the model and as much again for its activations."""
    model = plan.artifact.size_bytes / 2**20
    return _SERVER_MIB + _SHARED_MIB + round(2 * model * plan.settings.sessions)


def _cores(plan: Plan) -> int:
    return max(1, (plan.settings.threads or 1) * plan.lanes)


def compose(plan: Plan, image: str, base: str | None) -> dict[str, Any]:
    """One service that nobody but this machine reaches."""
    build: dict[str, Any] = {"context": "."}
    if base is None:
        build["args"] = {"BASE_IMAGE": "${BASE_IMAGE:?an image with its digest, see README.md}"}
    service: dict[str, Any] = {
        "image": image,
        "build": build,
        "read_only": True,
        "user": f"{USER}:{USER}",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": ["/tmp:size=64m,mode=1777"],
        "mem_limit": f"{_memory_mib(plan)}m",
        "ports": [f"127.0.0.1:{port}:{port}" for port in (HTTP_PORT, GRPC_PORT)],
        "stop_grace_period": f"{_GRACE_S}s",
        "restart": "unless-stopped",
    }
    if plan.tuned:
        service["cpus"] = float(_cores(plan))
    return {"services": {label(plan.name): service}}


def label(name: str) -> str:
    """A name as Kubernetes takes it: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/

    Raises:
        PackageError: Nothing is left of it.
    """
    made = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")[:50].strip("-")
    if not made:
        raise PackageError(f"{name!r} gives no name for Kubernetes", hint="give one with --name")
    return made if made[0].isalpha() else f"m-{made}"


def kubernetes(plan: Plan, image: str) -> list[dict[str, Any]]:
    """A deployment and its service."""
    name = label(plan.name)
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "deploykit"}

    def probe(path: str, **more: int) -> dict[str, Any]:
        return {"httpGet": {"path": f"/v2/health/{path}", "port": "http"}, "timeoutSeconds": 5, **more}

    memory = f"{_memory_mib(plan)}Mi"
    container = {
        "name": "server",
        "image": image,
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT},
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "metrics", "containerPort": ADMIN_PORT},
        ],
        "startupProbe": probe("ready", periodSeconds=2, failureThreshold=150),
        "readinessProbe": probe("ready", periodSeconds=5, failureThreshold=2),
        "livenessProbe": probe("live", periodSeconds=10, failureThreshold=3),
        "resources": {"requests": {"cpu": str(_cores(plan)), "memory": memory}, "limits": {"memory": memory}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": _GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app.kubernetes.io/name": name}},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "selector": {"app.kubernetes.io/name": name},
            "ports": [
                {"name": "http", "port": HTTP_PORT, "targetPort": "http"},
                {"name": "grpc", "port": GRPC_PORT, "targetPort": "grpc"},
            ],
        },
    }
    return [deployment, service]


def _readme(image: str, base: str | None) -> str:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pin = (
        ""
        if base
        else f"The base image is yours to choose and to pin, with Python {python} and glibc 2.28 or later:\n\n"
        f"```\ndocker buildx imagetools inspect python:{python}-slim    # shows its digest\n"
        f"export BASE_IMAGE=python:{python}-slim@sha256:DIGEST\n```\n\n"
    )
    argument = "" if base else '--build-arg BASE_IMAGE="$BASE_IMAGE" '
    return (
        f"{pin}```\ndocker build {argument}-t {image} .\n"
        f"docker compose up --detach            # HTTP on {HTTP_PORT}, gRPC on {GRPC_PORT}, of this machine only\n"
        f"kubectl apply -f kubernetes.yaml      # after: docker push {image}\n```\n\n"
        f"Prometheus reads `/metrics` on port {ADMIN_PORT}, which neither of the two publishes.\n"
        f"The requirements are locked for {machine_of_image()}. Golden requests are asked when the image is built.\n"
        "The server listens without encryption and without tokens: put it behind what has them, or see "
        "`deploykit serve --help`."
    )
