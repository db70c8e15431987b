"""The verbs `quantize_dynamic` and `quantize_static`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deploykit.artifact import Artifact
from deploykit.benchmarks.metrics import check_metric
from deploykit.comparing import MIN_COSINE, find_targets
from deploykit.deriving import derive
from deploykit.errors import DataError
from deploykit.gating import DEFAULT_SECONDS, Gate
from deploykit.goals import DEFAULT_DROP, Goal, read_drop
from deploykit.optimizers import DynamicConfig, StaticConfig, check_engine, require_nncf
from deploykit.progress import Progress
from deploykit.quantizer import CHECKED_ROWS, Quantizer
from deploykit.runtimes import Device


def quantize_dynamic(
    model: str | Path,
    output: str | Path,
    *,
    config: DynamicConfig | None = None,
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
    """Quantize weights to int8; activations are quantized while the model runs.

    Args:
        model: Artifact or `.onnx` file, in floating point.
        output: Where the artifact will stand.
        config: What to quantize.
        data: Real inputs for the comparison with the parent.
        dims: Sizes of dynamic dimensions where inputs are made up.
        min_cosine: Smallest accepted cosine between an output and the parent's.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        eval_data: Real inputs, with `labels` for a metric; `data` by default for the targets without labels.
        metric: "accuracy", "f1", "precision", "recall" or a plugin's; accuracy where `eval_data` are all that is given.
        max_drop: How much of it may be lost: 0.01 in its units (the default), or "1%" of the parent's value.
        min_sqnr: Smallest ratio of signal to error power of the judged output, in dB.
        min_agreement: Smallest share of rows whose class is the parent's.
        output_name: The output that is judged; the first [batch, classes] by default.
        check_rows: Without a target, rows of the real data that it is compared with its parent on; 0 for none, where
            something else judges it.
        escalate: Where the target is missed, try settings that keep more (see `optimizers.escalation`) before layers
            stay in float.
        devices: Where it has to be faster, all of them; by default on the CPU of the first installed runtime (ONNX
            Runtime), while the others are timed and recorded.
        allow_slower: Accept and record a model that is not faster.
        gate_seconds: Timed seconds in all; 0 for no timing.
        progress: Told about steps and notes.

    Raises:
        OptimizationError: Nothing to quantize, or the quantizer failed.
        ParityError: The outputs are too far from the parent's.
        AccuracyError: The target cannot be met, or the model collapsed.
        SpeedError: It is slower than its parent in one of the devices, or faster in none.
        ContractError: The result breaks the contract.
    """
    goal = make_goal(eval_data, metric, max_drop, min_sqnr, min_agreement, output_name)
    # OpenVINO turns dynamic quantization back into floating point, whatever the model: it cannot be held to gain.
    gate = make_gate(devices, allow_slower, gate_seconds, first_only=True)
    maker = Quantizer(config or DynamicConfig(), goal, escalate, eval_data, gate, check_rows=check_rows)
    return derive(
        "quantize-dynamic", model, output, maker, data=data, dims=dims, min_cosine=min_cosine, contract=contract,
        progress=progress,
    )  # fmt: skip


def quantize_static(
    model: str | Path,
    output: str | Path,
    *,
    data: str | Path,
    config: StaticConfig | None = None,
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
    """Quantize weights and activations to 8 bits, with ranges from calibration data.

    Args:
        model: Artifact or `.onnx` file, in floating point.
        output: Where the artifact will stand.
        data: Calibration data, anything that `Dataset.open` reads.
        config: How to quantize.
        min_cosine: Smallest accepted cosine between an output and the parent's.
        contract: Runtimes that have to be able to run it, beside those that the parent was made for.
        eval_data: As in `quantize_dynamic`, and so are the following.
        metric: See there.
        max_drop: See there.
        min_sqnr: See there.
        min_agreement: See there.
        output_name: See there.
        check_rows: See there.
        escalate: See there.
        devices: Where it may not be slower, and has to be faster in one at least; by default the CPU of every installed
            runtime.
        allow_slower: See there.
        gate_seconds: See there.
        progress: Told about steps and notes.

    Raises:
        DataError: The data cannot be read, or do not fit the model.
        OptimizationError: Nothing to quantize, or the quantizer failed.
        ParityError: The outputs are too far from the parent's.
        AccuracyError: The target cannot be met, or the model collapsed.
        SpeedError: It is slower than its parent in one of the devices, or faster in none.
        ContractError: The result breaks the contract.
    """
    goal = make_goal(eval_data, metric, max_drop, min_sqnr, min_agreement, output_name)
    config = config or StaticConfig()
    check_engine(config)
    if config.engine != "deploykit":
        require_nncf()  # before anything is run
    gate = make_gate(devices, allow_slower, gate_seconds)
    maker = Quantizer(config, goal, escalate, eval_data, gate, min_cosine, check_rows=check_rows)
    return derive(
        "quantize-static", model, output, maker, data=data, dims=None, min_cosine=min_cosine, contract=contract,
        progress=progress,
    )  # fmt: skip


def make_goal(
    eval_data: str | Path | None,
    metric: str | None,
    max_drop: float | str | None,
    min_sqnr: float | None,
    min_agreement: float | None,
    output_name: str | None,
) -> Goal:
    """Put together what the options ask for.

    Raises:
        DataError: They do not go together.
    """
    if metric is None and eval_data is not None and min_sqnr is None and min_agreement is None:
        metric = "accuracy"
    if metric is not None:
        check_metric(metric)
    if eval_data is None and (metric is not None or max_drop is not None):
        raise DataError(
            "a metric needs evaluation data",
            expected="inputs and their labels, which calibration has not seen",
            hint="add --eval DATA, or hold the model to its parent: --min-sqnr DB or --min-agreement SHARE",
        )
    if max_drop is not None and metric is None:
        raise DataError("--max-drop is about a metric", hint="add --metric accuracy")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise DataError(f"min agreement {min_agreement:g}", expected="a share, 0 to 1")
    drop, relative = read_drop(DEFAULT_DROP if max_drop is None else max_drop)
    return Goal(metric, drop, relative, min_sqnr, min_agreement, output_name)


def make_gate(devices: Sequence[str | Device], allow_slower: bool, seconds: float, *, first_only: bool = False) -> Gate:
    """What speed is held to; see `Gate`.

    Raises:
        DeviceError: A device cannot be had.
    """
    targets, named = find_targets(devices)
    return Gate(targets, named, first_only, allow_slower, seconds=seconds)
