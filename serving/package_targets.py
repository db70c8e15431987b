"""The serving targets: a table, and one module each that is loaded when its target is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import PackageError

if TYPE_CHECKING:
    from deploykit.serving.bundles import Protocol
    from deploykit.serving.package_plan import Plan, TargetOptions


@dataclass(frozen=True, slots=True)
class Written:
    """What a target's module wrote.

    Attributes:
        model: The file, or artifact, below the bundle that is opened for a replay in process.
        protocol: What the server speaks.
        readme: How to start it, in Markdown.
        columns: Tensors [batch] that the server takes and gives as [batch, 1].
    """

    model: str
    protocol: Protocol
    readme: str
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A serving target.

    Attributes:
        name: As the user writes it.
        title: For a person.
        module: Holds its `write`.
        runs: Devices that it has, the preferred one first: a runtime ("openvino") or a device ("ort:cpu").
        takes: Which of `TargetOptions` it takes.
        joins: Whether the server joins requests.
    """

    name: str
    title: str
    module: str
    runs: tuple[str, ...]
    takes: frozenset[str] = frozenset()
    joins: bool = True

    def write(self, plan: Plan, folder: Path) -> Written:
        """Write the target's files into a directory.

        Raises:
            PackageError: The target cannot have this model.
        """
        module = importlib.import_module(f"deploykit.serving.{self.module}")
        writer: Callable[[Plan, Path], Written] = module.write
        return writer(plan, folder)

    def check_options(self, options: TargetOptions) -> None:
        """Refuse options that this target would not read.

        Raises:
            PackageError: There is one.
        """
        for option in fields(options):
            if getattr(options, option.name) is not None and option.name not in self.takes:
                takers = [t.name for t in TARGETS.values() if option.name in t.takes]
                raise PackageError(
                    f"--{option.name.replace('_', '-')} means nothing to {self.name}",
                    hint=f"it is for {', '.join(takers)}",
                )


_ALL = (
    Target(
        "triton", "Triton Inference Server", "package_triton",
        ("ort:cpu", "openvino:cpu", "ort:cuda", "ort:tensorrt", "ort:openvino", "openvino"),
        frozenset({"max_delay_ms"}),
    ),
    Target(
        "kserve", "KServe", "package_kserve",
        ("ort:cpu", "openvino:cpu", "ort:cuda", "ort:tensorrt"), frozenset({"max_delay_ms", "storage_uri"}),
    ),
    Target("ovms", "OpenVINO Model Server", "package_ovms", ("openvino:cpu", "openvino"), joins=False),
    Target("mlflow", "MLflow", "package_mlflow", ("ort:cpu", "ort"), joins=False),
    Target("bentoml", "BentoML", "package_bentoml", ("ort:cpu", "openvino:cpu")),
    Target(
        "docker", "an image of its own", "package_docker", ("ort:cpu", "openvino:cpu"),
        frozenset({"max_delay_ms", "lock", "base_image", "image"}),
    ),
)  # fmt: skip
TARGETS = {target.name: target for target in _ALL}


def find_target(name: str) -> Target:
    """A target by its name.

    Raises:
        PackageError: There is none.
    """
    if name not in TARGETS:
        raise PackageError(f"unknown target {name!r}", expected=" or ".join(TARGETS))
    return TARGETS[name]
