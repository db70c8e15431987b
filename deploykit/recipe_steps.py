"""The steps of a recipe: their keys, types and defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from deploykit.benchmarks.metrics import check_metric
from deploykit.errors import DataError


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
    trim_padding: bool = False
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


class QatStep(_TrainingStep):
    """`deploykit quantize qat`."""

    step: Literal["quantize-qat"] = "quantize-qat"
    source: str
    data: str
    eval_data: str | None = None
    metric: str = "accuracy"
    max_drop: float | str | None = None
    weight_bits: Literal["auto", "8", "7"] = "auto"
    epochs: int = Field(default=5, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    allow_slower: bool = False
    gate_seconds: float = Field(default=6.0, ge=0, allow_inf_nan=False)

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        return metric if metric == "loss" else _known_metric(metric)


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
    | QatStep
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
STEPS: dict[str, type[Step]] = {
    "export": ExportStep,
    "finetune": FinetuneStep,
    "distill": DistillStep,
    "prune": PruneStep,
    "quantize-qat": QatStep,
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
# Those that bring a model of their own.
SOURCE_STEPS = (ExportStep, FinetuneStep, DistillStep, PruneStep, QatStep)
