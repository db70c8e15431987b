"""The verb `quantize_repair`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, Evidence
from deploykit.comparing import MIN_COSINE, integer_kernels, not_same_bits
from deploykit.deriving import Work, derive, memory_short
from deploykit.errors import DeploykitError
from deploykit.optimizers import RepairConfig, StepResult, optimize
from deploykit.progress import Progress
from deploykit.runtimes import default_devices


def quantize_repair(
    model: str | Path,
    output: str | Path,
    *,
    config: RepairConfig | None = None,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    min_cosine: float = MIN_COSINE,
    contract: Sequence[str] = (),
    progress: Progress | None = None,
) -> Artifact:
    """Bring a model that another tool quantized with Q/DQ pairs into the form that runtimes run in integer kernels.

    What changes no bit is proven bit for bit, by running both graphs without fusions; the whole is compared with the
    model as it came, with fusions. How many products ran on integers before and after is counted in each runtime.

    Args:
        model: Artifact or `.onnx` file with Q/DQ pairs.
        output: Where the artifact will stand.
        config: How far to go.
        data: Real inputs for the comparison with the parent.
        dims: Sizes of dynamic dimensions where inputs are made up.
        min_cosine: Smallest accepted cosine between an output and the parent's.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        progress: Told about steps and notes.

    Raises:
        OptimizationError: It is not quantized, or not with Q/DQ pairs.
        ParityError: The outputs are too far from the parent's.
        ContractError: The result breaks the contract.
    """
    maker = _Repairer(config or RepairConfig())
    return derive(
        "quantize-repair", model, output, maker, data=data, dims=dims, min_cosine=min_cosine, contract=contract,
        progress=progress,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Repairer:
    config: RepairConfig

    @property
    def cure(self) -> str:
        return (
            "keep to what changes no bit: --exact; or accept the distance from a badly quantized parent: --min-cosine X"
        )

    @property
    def unfused(self) -> bool:
        return True

    def make(self, work: Work, target: Path) -> StepResult:
        def compare_bits(candidate: Path) -> str | None:
            return not_same_bits(work.parent.path, candidate, work.feeds)

        same_bits = compare_bits if work.device.runtime == "ort" else None
        return optimize(work.parent.path, self.config, target, check=work.check, same_bits=same_bits)

    def prove(self, work: Work, target: Path) -> Evidence:
        """Count how many convolutions and products ran on integers before and after, in each runtime."""
        records: list[dict[str, Any]] = []
        for number, device in enumerate(default_devices()):
            if number and memory_short(device, work.parent, target):
                continue
            try:
                after = integer_kernels(target, device, work.feeds[0])
            except DeploykitError as exc:
                work.told.note(f"kernels not counted in {device}: {exc.what}")
                continue
            try:
                before = integer_kernels(work.parent.path, device, work.feeds[0])
                had = f"{before['integer']} of {before['all']} convolutions and products ran on integers before"
            except DeploykitError as exc:
                before, had = {"failed": exc.what}, "the model did not run before"
            work.told.note(f"{device}: {had}, {after['integer']} of {after['all']} now")
            records.append({"device": str(device), "before": before, "after": after})
        return Evidence(placement=records)
