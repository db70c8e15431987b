"""OpenVINO IR for targets that want it: `model.xml` and `model.bin`, with the numbers as they were."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from deploykit.errors import ModelError, PackageError, first_line
from deploykit.extras import require
from deploykit.modelfile import read_model
from deploykit.specs import TensorSpec


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
