"""The verb `fuse`: graph fusions that are kept only where the result is right and faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.artifact import Artifact, Evidence
from deploykit.contract import contract_of
from deploykit.deriving import Work, derive
from deploykit.errors import OptimizationError
from deploykit.gating import DEFAULT_SECONDS, Gate
from deploykit.modelfile import read_model
from deploykit.optimizers import FuseConfig, StepResult, has_attention, optimize
from deploykit.progress import Progress
from deploykit.quantizer import prove_speed
from deploykit.quantizing import make_gate
from deploykit.runtimes import Device
from deploykit.targets import Target

PASSES = ("auto", "onnxscript", "transformers")
# Measured with masks of -inf: 1.19 refuses one mask for all heads, 1.20 gives other numbers, 1.22 the right ones.
_ATTENTION_SINCE = (1, 22)


def fuse(
    model: str | Path,
    output: str | Path,
    *,
    passes: str = "auto",
    timeout_s: float = 300.0,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    contract: Sequence[str] = (),
    devices: Sequence[str | Device] = (),
    allow_slower: bool = False,
    gate_seconds: float = DEFAULT_SECONDS,
    progress: Progress | None = None,
) -> Artifact:
    """Replace groups of nodes by fewer that do the same; compared with its parent, and timed against it.

    Where nothing can be fused, the artifact holds the model as it was, and says so.

    Args:
        model: Artifact or `.onnx` file.
        output: Where the artifact will stand.
        passes: "onnxscript": its optimizer and rewrite rules, within ONNX's operators; "transformers": attention,
            layer normalization, Gelu and embeddings as operators of ONNX Runtime; "auto": these where the model has
            attention and its contract names ONNX Runtime only, else those of onnxscript.
        timeout_s: Seconds for one tool.
        data: Real inputs for the comparison; golden or made-up ones by default.
        dims: Sizes of dynamic dimensions where inputs are made up.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        devices: Where it has to be faster, all of them; by default on the CPU of the first installed runtime (ONNX
            Runtime), while the others are timed and recorded.
        allow_slower: Accept and record a model that is not faster.
        gate_seconds: Timed seconds in all; 0 for no timing.
        progress: Told about steps and notes.

    Raises:
        ModelError: The model cannot be read.
        OptimizationError: No such passes, or ONNX Runtime cannot run the result.
        ParityError: The result differs from its parent.
        SpeedError: It is slower than its parent in one of the devices, or faster in none.
        ContractError: The result, or the model itself, breaks the contract.
    """
    if passes not in PASSES:
        raise OptimizationError(f"unknown passes {passes!r}", expected=", ".join(PASSES))
    gate = make_gate(devices, allow_slower, gate_seconds, first_only=True)
    return derive(
        "fuse", model, output, _Fuser(passes, timeout_s, tuple(contract), gate), data=data, dims=dims, min_cosine=None,
        contract=contract, progress=progress,
    )  # fmt: skip


@dataclass(slots=True)
class _Fuser:
    passes: str
    timeout_s: float
    contract: tuple[str, ...]
    gate: Gate
    _changed: bool = False

    @property
    def cure(self) -> None:
        return None

    @property
    def unfused(self) -> bool:
        return False

    def make(self, work: Work, target: Path) -> StepResult:
        held = contract_of(work.parent.lineage, self.contract)
        passes = choose_passes(work.parent.path, held) if self.passes == "auto" else self.passes
        config = FuseConfig(passes, self.timeout_s, attention=runs_attention(held))
        made = optimize(work.parent.path, config, target, check=work.check)
        self._changed = made.changed
        return made

    def prove(self, work: Work, target: Path) -> Evidence:
        """Time the model that will be committed.

        Raises:
            SpeedError: It is not faster.
        """
        if not self._changed:  # the parent's file
            return Evidence()
        speed, _ = prove_speed(work, target, self.gate, "fused")
        return Evidence(benchmark=speed)


def choose_passes(model: Path, held: Sequence[Target]) -> str:
    """What "auto" means for a model: operators of ONNX Runtime where they are worth it and its contract has no other.

    OpenVINO reads many of them, and takes them apart again.
    """
    if all(target.runtime == "ort" for target in held) and has_attention(read_model(model, weights=False)):
        return "transformers"
    return "onnxscript"


def runs_attention(held: Sequence[Target]) -> bool:
    """Whether every runtime of a contract is known to give the right numbers for joined attention with a mask."""
    return all(target.runtime == "ort" and _version(target) >= _ATTENTION_SINCE for target in held)


def _version(target: Target) -> tuple[int, ...]:
    return tuple(int(part) for part in target.version.split("."))
