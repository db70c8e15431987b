"""The verb `apply`: a step of another distribution, compared with its parent like every other step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, Evidence
from deploykit.deriving import Work, derive
from deploykit.optimizers import StepResult
from deploykit.optimizers.plugged import PluggedStep, find_step
from deploykit.progress import Progress


def apply(
    step: str,
    model: str | Path,
    output: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    contract: Sequence[str] = (),
    progress: Progress | None = None,
) -> Artifact:
    """Apply a step that another distribution brings.

    The result is compared with its parent: exactly, or down to the cosine that a step declares which changes numbers.

    Args:
        step: Its name; `deploykit doctor` lists those that are installed.
        model: Artifact or `.onnx` file.
        output: Where the artifact will stand.
        options: The step's own, by name.
        data: Real inputs for the comparison with the parent; golden or made-up ones by default.
        dims: Sizes of dynamic dimensions where inputs are made up.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        progress: Told about steps and notes.

    Raises:
        OptimizationError: There is no such step, an option does not fit, or the step cannot be applied.
        PluginError: The step does not load, or is not what a step has to be.
        ParityError: The result differs from its parent.
        ContractError: The result breaks the contract.
    """
    found = find_step(step, options or {})
    return derive(
        "apply", model, output, _Applied(found), data=data, dims=dims, min_cosine=found.min_cosine, contract=contract,
        progress=progress,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Applied:
    step: PluggedStep

    @property
    def cure(self) -> str:
        return f"leave the step out, and tell the makers of {self.step.plugin.distribution}"

    @property
    def unfused(self) -> bool:
        return False

    def make(self, work: Work, target: Path) -> StepResult:
        return self.step.apply(work.parent.path, target)

    def prove(self, work: Work, target: Path) -> Evidence:
        return Evidence()
