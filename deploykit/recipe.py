"""Recipes: TOML, one table a step, in the order in which they run.

    [export]                          # the table's name is the step's name, and its folder below the output
    source = "model.py:make"

    [int8]
    step = "quantize-static"          # which step; by default the table's name
    model = "export"                  # an earlier step, or a path; by default the step before
    data = "calib.npz"

    [benchmark]
    models = ["export", "int8"]       # by default all earlier ones
    data = "eval.npz"

Paths are relative to the recipe's folder. Every command prints the recipe that it amounts to with `--dry-run`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deploykit.benchmarks.metrics import check_metric
from deploykit.errors import DataError, RecipeError, first_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
_LIMIT_BYTES = 1 << 20
_DOTS = 1000


class _Step(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _known_metric(name: str) -> str:
    try:
        check_metric(name)
    except DataError as exc:
        raise ValueError(str(exc)) from exc
    return name


class ExportStep(_Step):
    """`deploykit export`."""

    step: Literal["export"] = "export"
    source: str
    dynamic: list[str] = []
    inputs: list[str] = []
    opset: int | None = None
    exporter: Literal["auto", "torch.export", "torchscript"] = "auto"
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    data: str | None = None
    dims: dict[str, int] = {}
    task: str | None = None
    part: str | None = None
    devices: list[str] = []
    contract: list[str] = []
    allow_unverified: bool = False


class _TrainingStep(_Step):
    """How a module is trained; a `clip_norm` of 0 is any norm."""

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=64, ge=1)
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "one-cycle", "step", "plateau", "constant"] = "cosine"
    warmup: float | None = Field(default=None, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    loss: Literal["cross-entropy", "focal", "mse", "cosine", "ctc"] = "cross-entropy"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    focal_gamma: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    ema: float | None = Field(default=None, gt=0, lt=1)
    clip_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    patience: int | None = Field(default=None, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)
    checkpoint_minutes: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    dynamic: list[str] = []
    inputs: list[str] = []
    dims: dict[str, int] = {}
    opset: int | None = None
    task: str | None = None
    devices: list[str] = []
    contract: list[str] = []


class FinetuneStep(_TrainingStep):
    """`deploykit finetune`."""

    step: Literal["finetune"] = "finetune"
    source: str
    data: str
    eval_data: str | None = None
    metric: str = "accuracy"
    part: str | None = None

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        return metric if metric == "loss" else _known_metric(metric)


class DistillStep(_TrainingStep):
    """`deploykit distill`."""

    step: Literal["distill"] = "distill"
    teacher: str
    student: str
    data: str
    eval_data: str | None = None
    metric: str | None = None
    max_drop: float | str | None = None
    kind: Literal["auto", "classification", "embedding", "frames"] = "auto"
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    weights: dict[Literal["logits", "embedding", "features", "attention", "task"], float] = {}
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    attention_layers: Literal["last", "all"] = "last"
    embedding_loss: Literal["auto", "cosine", "mse", "similarity"] = "auto"
    output_name: str | None = None
    cache: Literal["auto", "on", "off"] = "auto"

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str | None) -> str | None:
        return metric if metric is None or metric == "loss" else _known_metric(metric)


class PruneStep(_TrainingStep):
    """`deploykit prune`; `recovery` is whether it is trained afterwards, which needs data."""

    step: Literal["prune"] = "prune"
    source: str
    method: Literal["structured", "magnitude", "2:4"] = "structured"
    ratio: float | None = Field(default=None, gt=0, lt=1)
    speedup: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    latency_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    steps: int = Field(default=1, ge=1)
    round_to: int = Field(default=16, ge=1)
    importance: Literal["auto", "magnitude", "taylor"] = "auto"
    allocation: Literal["sensitivity", "uniform"] = "sensitivity"
    max_ratio: float = Field(default=0.9, gt=0, lt=1)
    keep: list[str] = []
    data: str | None = None
    recovery: bool = True
    eval_data: str | None = None
    metric: str | None = None
    max_drop: float | str | None = None
    allow_slower: bool = False
    gate_seconds: float = Field(default=6.0, ge=0, allow_inf_nan=False)
    allow_unverified: bool = False
    part: str | None = None

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str | None) -> str | None:
        return None if metric is None else _known_metric(metric)


class SimplifyStep(_Step):
    """`deploykit simplify`."""

    step: Literal["simplify"] = "simplify"
    model: str | None = None
    timeout_s: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    data: str | None = None
    dims: dict[str, int] = {}
    contract: list[str] = []


class FuseStep(_Step):
    """`deploykit fuse`."""

    step: Literal["fuse"] = "fuse"
    model: str | None = None
    passes: Literal["auto", "onnxscript", "transformers"] = "auto"
    timeout_s: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    data: str | None = None
    dims: dict[str, int] = {}
    devices: list[str] = []
    allow_slower: bool = False
    gate_seconds: float = Field(default=6.0, ge=0, allow_inf_nan=False)
    contract: list[str] = []


class _GoalStep(_Step):
    """What a smaller model is held to."""

    eval_data: str | None = None
    metric: str | None = None
    max_drop: float | str | None = None
    min_sqnr: float | None = Field(default=None, allow_inf_nan=False)
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    output_name: str | None = None
    check_rows: int = Field(default=256, ge=0)
    devices: list[str] = []
    allow_slower: bool = False
    gate_seconds: float = Field(default=6.0, ge=0, allow_inf_nan=False)

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str | None) -> str | None:
        return metric if metric is None else _known_metric(metric)


class _QuantizeStep(_GoalStep):
    """What may be tried to keep it."""

    escalate: bool = True


class DynamicStep(_QuantizeStep):
    """`deploykit quantize dynamic`."""

    step: Literal["quantize-dynamic"] = "quantize-dynamic"
    model: str | None = None
    data: str | None = None
    dims: dict[str, int] = {}
    exclude: list[str] = []
    weight_bits: Literal["auto", "8", "7"] = "auto"
    per_channel: bool = True
    smooth: Literal["auto", "off"] = "auto"
    min_cosine: float = Field(default=0.95, ge=-1, le=1)
    contract: list[str] = []


class StaticStep(_QuantizeStep):
    """`deploykit quantize static`."""

    step: Literal["quantize-static"] = "quantize-static"
    model: str | None = None
    data: str
    engine: Literal["deploykit", "nncf", "both"] = "deploykit"
    calibration: Literal["minmax", "percentile", "entropy", "mse", "auto"] = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)
    save_calibration: str | None = None
    merge: list[str] = []
    merge_only: bool = False
    batch_size: int = Field(default=8, ge=1)
    max_samples: int | None = Field(default=None, ge=1)
    exclude: list[str] = []
    weight_bits: Literal["auto", "8", "7"] = "auto"
    per_channel: bool = True
    smooth: Literal["off", "auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    equalize: bool = False
    bias_correction: Literal["auto", "off", "fast", "full"] = "auto"
    rounding: Literal["nearest", "adaround"] = "nearest"
    min_cosine: float = Field(default=0.95, ge=-1, le=1)
    contract: list[str] = []


class WeightsStep(_QuantizeStep):
    """`deploykit quantize weights`."""

    step: Literal["quantize-weights"] = "quantize-weights"
    model: str | None = None
    data: str | None = None
    dims: dict[str, int] = {}
    bits: Literal[8, 4] = 8
    block: Literal[16, 32, 64, 128, 256] | None = None
    form: Literal["qdq", "nbits"] = "qdq"
    embeddings: bool = True
    exclude: list[str] = []
    min_cosine: float = Field(default=0.95, ge=-1, le=1)
    contract: list[str] = []


class HalfStep(_GoalStep):
    """`deploykit quantize half`."""

    step: Literal["quantize-half"] = "quantize-half"
    model: str | None = None
    data: str | None = None
    dims: dict[str, int] = {}
    precision: Literal["fp16", "bf16"] = "fp16"
    compute: Literal["auto", "storage", "native"] = "auto"
    exclude: list[str] = []
    min_cosine: float = Field(default=0.999, ge=-1, le=1)
    contract: list[str] = []


class RepairStep(_Step):
    """`deploykit quantize repair`."""

    step: Literal["quantize-repair"] = "quantize-repair"
    model: str | None = None
    exact: bool = False
    data: str | None = None
    dims: dict[str, int] = {}
    min_cosine: float = Field(default=0.95, ge=-1, le=1)
    contract: list[str] = []


class ApplyStep(_Step):
    """`deploykit apply`: a step of another distribution, which reads its own options."""

    step: Literal["apply"] = "apply"
    name: str
    model: str | None = None
    options: dict[str, bool | int | float | str | list[str]] = {}
    data: str | None = None
    dims: dict[str, int] = {}
    contract: list[str] = []


class _PreprocessStep(_Step):
    """What is not given is the preset's, or the default."""

    model: str | None = None
    preset: str | None = None
    input: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    data: str | None = None
    dims: dict[str, int] = {}
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    contract: list[str] = []


class ImageStep(_PreprocessStep):
    """`deploykit preprocess image`."""

    step: Literal["preprocess-image"] = "preprocess-image"
    resize: str | None = None
    crop: str | None = None
    resample: Literal["bilinear", "bicubic"] | None = None
    antialias: bool | None = None
    rescale: float | None = Field(default=None, allow_inf_nan=False)
    layout: Literal["nhwc", "nchw"] | None = None
    color: Literal["rgb", "bgr"] | None = None
    model_color: Literal["rgb", "bgr"] | None = None
    model_layout: Literal["nhwc", "nchw"] | None = None
    size: str | None = None


class AudioStep(_PreprocessStep):
    """`deploykit preprocess audio`."""

    step: Literal["preprocess-audio"] = "preprocess-audio"
    sample_rate: int | None = None
    n_fft: int | None = None
    win: int | None = None
    hop: int | None = None
    mels: int | None = None
    fmin: float | None = None
    fmax: float | None = None
    mel_scale: Literal["htk", "slaney"] | None = None
    mel_norm: Literal["none", "slaney"] | None = None
    power: Literal[1, 2] | None = None
    center: bool | None = None
    pad_mode: Literal["reflect", "constant"] | None = None
    drop_last: bool | None = None
    log: Literal["none", "ln", "log10", "db"] | None = None
    offset: float | None = None
    floor: float | None = None
    top: float | None = None
    samples: int | None = None
    dtype: Literal["float32", "int16"] | None = None
    layout: Literal["bmt", "btm", "b1mt", "b1tm", "bmt1", "btm1"] | None = None


class BenchmarkStep(_Step):
    """`deploykit benchmark`."""

    step: Literal["benchmark"] = "benchmark"
    models: list[str] = []
    devices: list[str] = []
    data: str | None = None
    scenario: Literal["latency", "offline", "server"] = "latency"
    slo_p99_ms: float | None = Field(default=None, gt=0)
    concurrency: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    rounds: int = Field(default=5, ge=3)
    seconds: float = Field(default=2.0, gt=0)
    warmup_s: float = Field(default=1.0, ge=0)
    precision: Literal["fp32", "native"] = "fp32"
    max_drop: float = Field(default=0.01, ge=0, le=1)
    min_cosine: float = Field(default=0.95, ge=-1, le=1)
    confirm: bool = True
    tune: bool = False
    budget_s: float = Field(default=120.0, gt=0)
    tuned: list[str] = []
    save_settings: str | None = None
    dims: dict[str, int] = {}
    seed: int = 0
    explain: bool = False


Step = (
    ExportStep
    | FinetuneStep
    | DistillStep
    | PruneStep
    | SimplifyStep
    | FuseStep
    | DynamicStep
    | StaticStep
    | WeightsStep
    | HalfStep
    | RepairStep
    | ApplyStep
    | ImageStep
    | AudioStep
    | BenchmarkStep
)
_STEPS: dict[str, type[Step]] = {
    "export": ExportStep,
    "finetune": FinetuneStep,
    "distill": DistillStep,
    "prune": PruneStep,
    "simplify": SimplifyStep,
    "fuse": FuseStep,
    "quantize-dynamic": DynamicStep,
    "quantize-static": StaticStep,
    "quantize-weights": WeightsStep,
    "quantize-half": HalfStep,
    "quantize-repair": RepairStep,
    "apply": ApplyStep,
    "preprocess-image": ImageStep,
    "preprocess-audio": AudioStep,
    "benchmark": BenchmarkStep,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps by name, in order.

    Attributes:
        steps: The steps.
        folder: What relative paths are relative to.
    """

    steps: dict[str, Step]
    folder: Path

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            RecipeError: Missing, no TOML, or a step that does not say what to do.
        """
        file = Path(path)
        try:
            raw = file.read_bytes()
        except OSError as exc:
            raise RecipeError(f"cannot read the recipe {file}: {exc.strerror or exc}", expected="a .toml file") from exc
        if len(raw) > _LIMIT_BYTES:
            raise RecipeError(f"{file} is larger than {_LIMIT_BYTES} bytes", expected="a recipe")
        if max((line.count(b".") for line in raw.splitlines()), default=0) > _DOTS:
            # Python's reader takes a time that grows with the square of a name's parts.
            raise RecipeError(f"{file} has a line of more than {_DOTS} dots", expected="a recipe")
        try:
            tables = tomllib.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as exc:  # TOMLDecodeError, and numbers of thousands of digits
            raise RecipeError(f"{file} is not TOML ({first_line(exc)})", hint="mend the file") from exc
        return cls.from_tables(tables, file.parent)

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], folder: Path) -> Recipe:
        """Check tables, one a step.

        Raises:
            RecipeError: An unknown step, a missing or unknown key, or a reference to a step that is not there.
        """
        if not tables:
            raise RecipeError("the recipe is empty", expected="one table a step, like [export]")
        steps: dict[str, Step] = {}
        for name, table in tables.items():
            steps[name] = _read_step(name, table)
            _check_references(name, steps)
        return cls(steps, folder)

    def tables(self) -> dict[str, dict[str, Any]]:
        """The recipe with all its defaults, as tables."""
        return {
            name: {k: v for k, v in step.model_dump().items() if v is not None} for name, step in self.steps.items()
        }


def _read_step(name: str, table: Any) -> Step:
    if not _NAME.fullmatch(name) or name.endswith(".json"):
        raise RecipeError(f"step name {name!r}", expected="letters, digits, '-', '_' and '.', and no .json at the end")
    if not isinstance(table, dict):
        raise RecipeError(f"{name} is {type(table).__name__}, not a table", expected=f"[{name}]")
    kind = table.get("step", name)
    if not isinstance(kind, str) or kind not in _STEPS:
        raise RecipeError(f"[{name}] is step {kind!r}", expected=f"step = one of {', '.join(_STEPS)}")
    try:
        return _STEPS[kind].model_validate(table)
    except ValidationError as exc:
        error = exc.errors()[0]
        key = ".".join(str(p) for p in error["loc"])
        known = ", ".join(_STEPS[kind].model_fields)
        raise RecipeError(f"[{name}] {key}: {error['msg'].lower()}", expected=f"keys of {kind}: {known}") from exc


def _check_references(name: str, steps: Mapping[str, Step]) -> None:
    """The first step has to bring its own model; a benchmark is no model."""
    step = steps[name]
    before = [n for n, s in steps.items() if n != name and not isinstance(s, BenchmarkStep)]
    if isinstance(step, ExportStep | FinetuneStep | DistillStep | PruneStep):
        return
    named = step.models if isinstance(step, BenchmarkStep) else [step.model] if step.model is not None else []
    if not named and not before:
        raise RecipeError(
            f"[{name}] has no model, and no step before it makes one", expected="model = a step or a path"
        )
    for reference in named:
        if reference in steps and isinstance(steps[reference], BenchmarkStep):
            raise RecipeError(
                f"[{name}] takes {reference!r}, which is a benchmark", expected="a step that makes a model"
            )


def dump(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables as TOML text."""
    blocks = []
    for name, table in tables.items():
        lines = [f"[{name}]"]
        lines += [f"{key} = {_value(value)}" for key, value in table.items() if value is not None]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()) + "}"
    # A JSON string is a TOML basic string, but for the escape of DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
