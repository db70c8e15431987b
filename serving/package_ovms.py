"""OpenVINO Model Server: `config.json` and a repository: https://docs.openvino.ai/2026/model-server/ovms_docs_parameters.html"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploykit.errors import PackageError
from deploykit.modelfile import copy_model, external_files, read_model
from deploykit.serving.bundles import MODELS
from deploykit.serving.package_ir import compile_properties, write_ir
from deploykit.serving.package_plan import Plan
from deploykit.serving.package_targets import Written
from deploykit.serving.smoke_http import v2_dtype

VERSION = "1"


def write(plan: Plan, folder: Path) -> Written:
    """Write `models/config.json` and `models/NAME/1/`: the ONNX file as it is, IR where its weights lie outside.

    Raises:
        PackageError: A tensor has a type that the protocol has not.
    """
    for spec in (*plan.inputs, *plan.outputs):
        v2_dtype(spec.dtype, spec.name)
        if not spec.name:
            raise PackageError("a tensor of the model has no name, and the server's clients ask for them by name")
    place = folder / MODELS / plan.name / VERSION
    place.mkdir(parents=True)
    source = plan.artifact.model_path
    if source.suffix == ".onnx" and not external_files(read_model(source, weights=False)):
        target = place / "model.onnx"
        copy_model(source, target)
    else:
        target = place / "model.xml"
        write_ir(source, target, plan.outputs)
    (folder / MODELS / "config.json").write_text(json.dumps(config(plan), indent=2) + "\n", encoding="utf-8")
    return Written(target.relative_to(folder).as_posix(), "v2", _readme(target.suffix))


def config(plan: Plan) -> dict[str, Any]:
    """The server's configuration: dynamic dimensions stay as they are in the model."""
    properties = compile_properties(plan)
    return {
        "model_config_list": [
            {
                "config": {
                    "name": plan.name,
                    "base_path": f"/{MODELS}/{plan.name}",
                    "target_device": plan.device.target,
                    # Requests in flight: as many as the settings were tuned for.
                    "nireq": max(plan.settings.concurrency, plan.lanes),
                    "plugin_config": {k: v if isinstance(v, bool) else str(v) for k, v in properties.items()},
                }
            }
        ]
    }


def _readme(suffix: str) -> str:
    from deploykit.extras import version_of

    made = (
        f" It holds IR of OpenVINO {version_of('openvino')}, which wants a server as new.\n\n"
        if suffix == ".xml"
        else ""
    )
    return (
        f"{made}```\ndocker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 -p 127.0.0.1:9000:9000 \\\n"
        f'    -v "$PWD/{MODELS}:/{MODELS}:ro" openvino/model_server:RELEASE \\\n'
        f"    --config_path /{MODELS}/config.json --rest_port 8000 --port 9000\n```\n\n"
        "HTTP is on port 8000, gRPC on port 9000. The server joins no requests."
    )
