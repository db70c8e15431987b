"""OpenVINO for servers that run it: IR with the numbers as they were, and the properties that it is compiled with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import ModelError, PackageError, first_line
from deploykit.extras import require
from deploykit.modelfile import read_model
from deploykit.specs import TensorSpec

if TYPE_CHECKING:
    from deploykit.serving.package_plan import Plan


def write_ir(source: Path, target: Path, outputs: Sequence[TensorSpec]) -> None:
    """Copy IR, or convert ONNX to it.

    Args:
        source: `.xml` with its `.bin`, or `.onnx`.
        target: `.xml`; nothing may be there.
        outputs: That the server will be asked for by name.

    Raises:
        PackageError: An output lost its name.
        ModelError: OpenVINO cannot read the model.
        MissingDependencyError: It has to be converted, and OpenVINO is not installed.
    """
    if source.suffix == ".xml":
        shutil.copyfile(source, target)
        weights = source.with_suffix(".bin")
        if weights.exists():
            shutil.copyfile(weights, target.with_suffix(".bin"))
        return
    openvino = require("openvino", extra="openvino")
    read_model(source, weights=False)  # external data are looked at before a runtime sees the file
    try:
        model = openvino.Core().read_model(str(source))
        names = {name for output in model.outputs for name in output.get_names()}
        openvino.save_model(model, str(target), compress_to_fp16=False)
    except RuntimeError as exc:
        raise ModelError(
            f"OpenVINO cannot read {source} ({first_line(exc)})", hint="package for another target"
        ) from exc
    lost = [spec.name for spec in outputs if spec.name not in names]
    if lost:
        raise PackageError(f"output {lost[0]!r} has no name in OpenVINO, and the server asks for it by name")


def compile_properties(plan: Plan) -> dict[str, Any]:
    """Properties as `open_session` sets them: latency unless streams are set, single precision unless native."""
    given = dict(plan.settings.settings)
    made: dict[str, Any] = {} if {"NUM_STREAMS", "PERFORMANCE_HINT"} & given.keys() else {"PERFORMANCE_HINT": "LATENCY"}
    if plan.device.target == "CPU":
        if not {"NUM_STREAMS", "PERFORMANCE_HINT"} & given.keys():
            made["NUM_STREAMS"] = 1
        if plan.settings.threads is not None:
            made["INFERENCE_NUM_THREADS"] = plan.settings.threads * plan.lanes
    if plan.settings.precision == "fp32":
        made["INFERENCE_PRECISION_HINT"] = "f32"
    return made | given
