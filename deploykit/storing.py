"""The verbs `quantize_weights` and `quantize_half`: smaller weights, activations in floating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deploykit.artifact import Artifact
from deploykit.comparing import MIN_COSINE
from deploykit.deriving import derive
from deploykit.gating import DEFAULT_SECONDS
from deploykit.optimizers import HalfConfig, WeightsConfig
from deploykit.progress import Progress
from deploykit.quantizer import CHECKED_ROWS, Quantizer
from deploykit.quantizing import make_gate, make_goal
from deploykit.runtimes import Device

# Rounding to 11 bits of significance hardly shows.
HALF_COSINE = 0.999
# Devices that compute in float16.
_HALF_TARGETS = ("CUDA", "Tensorrt", "ROCM", "MIGraphX", "Dml", "CoreML", "GPU", "NPU")


def quantize_weights(
    model: str | Path,
    output: str | Path,
    *,
    config: WeightsConfig | None = None,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    min_cosine: float = MIN_COSINE,
    contract: Sequence[str] = (),
    eval_data: str | Path | None = None,
    metric: str | None = None,
    max_drop: float | str | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    output_name: str | None = None,
    check_rows: int = CHECKED_ROWS,
    escalate: bool = True,
    devices: Sequence[str | Device] = (),
    allow_slower: bool = False,
    gate_seconds: float = DEFAULT_SECONDS,
    progress: Progress | None = None,
) -> Artifact:
    """Round weights of matrix products in blocks of 8 or 4 bits; activations stay in floating point.

    Args:
        model: Artifact or `.onnx` file, in floating point.
        output: Where the artifact will stand.
        config: Bits, size of blocks, and form.
        data: Real inputs for the comparison with the parent.
        dims: Sizes of dynamic dimensions where inputs are made up.
        min_cosine: Smallest accepted cosine between an output and the parent's.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        eval_data: As in `quantize_dynamic`, and so are the following.
        metric: See there.
        max_drop: See there.
        min_sqnr: See there.
        min_agreement: See there.
        output_name: See there.
        check_rows: See there.
        escalate: Where the target is missed, try smaller blocks and 8 bits before layers stay in float.
        devices: Where it may not be slower; by default the CPU of every installed runtime. It is accepted where it is
            as fast, because it is smaller.
        allow_slower: Accept and record a model that is slower.
        gate_seconds: Timed seconds in all; 0 for no timing.
        progress: Told about steps and notes.

    Raises:
        OptimizationError: Nothing to quantize.
        ParityError: The outputs are too far from the parent's.
        AccuracyError: The target cannot be met, or the model collapsed.
        SpeedError: It is slower than its parent in one of the devices.
        ContractError: The result breaks the contract.
    """
    goal = make_goal(eval_data, metric, max_drop, min_sqnr, min_agreement, output_name)
    gate = replace(make_gate(devices, allow_slower, gate_seconds), tie_allowed=True)
    maker = Quantizer(config or WeightsConfig(), goal, escalate, eval_data, gate, check_rows=check_rows)
    return derive(
        "quantize-weights", model, output, maker, data=data, dims=dims, min_cosine=min_cosine, contract=contract,
        progress=progress,
    )  # fmt: skip


def quantize_half(
    model: str | Path,
    output: str | Path,
    *,
    config: HalfConfig | None = None,
    data: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    min_cosine: float = HALF_COSINE,
    contract: Sequence[str] = (),
    eval_data: str | Path | None = None,
    metric: str | None = None,
    max_drop: float | str | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    output_name: str | None = None,
    check_rows: int = CHECKED_ROWS,
    devices: Sequence[str | Device] = (),
    allow_slower: bool = False,
    gate_seconds: float = DEFAULT_SECONDS,
    progress: Progress | None = None,
) -> Artifact:
    """Store weights in 16-bit floating point; compute in float16 where the devices do.

    Args:
        model: Artifact or `.onnx` file, in float32.
        output: Where the artifact will stand.
        config: Precision, and what computes in it: "auto" is native where one of `devices` computes in float16.
        data: See `quantize_weights`, and so are the following.
        dims: See there.
        min_cosine: See there.
        contract: See there.
        eval_data: See there.
        metric: See there.
        max_drop: See there.
        min_sqnr: See there.
        min_agreement: See there.
        output_name: See there.
        check_rows: See there.
        devices: See there.
        allow_slower: See there.
        gate_seconds: See there.
        progress: See there.

    Raises:
        OptimizationError: Nothing to store.
        ParityError: The outputs are too far from the parent's.
        AccuracyError: The target is missed.
        SpeedError: It is slower than its parent in one of the devices.
        ContractError: The result breaks the contract.
    """
    goal = make_goal(eval_data, metric, max_drop, min_sqnr, min_agreement, output_name)
    gate = replace(make_gate(devices, allow_slower, gate_seconds), tie_allowed=True)
    asked = config or HalfConfig()
    if asked.compute == "auto":
        native = asked.precision == "fp16" and gate.named and any(_computes_in_half(d) for d in gate.devices)
        asked = replace(asked, compute="native" if native else "storage")
    maker = Quantizer(asked, goal, False, eval_data, gate, check_rows=check_rows)
    return derive(
        "quantize-half", model, output, maker, data=data, dims=dims, min_cosine=min_cosine, contract=contract,
        progress=progress,
    )  # fmt: skip


def _computes_in_half(device: Device) -> bool:
    return device.target.startswith(_HALF_TARGETS)
