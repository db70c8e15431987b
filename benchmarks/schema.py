"""What a report in JSON holds, as far as its readers rely on it. Keys that are not named here are allowed and kept.

Version 1 had neither scenarios nor a clock in its rounds; whatever version 2 added may be left out, so that one model
reads both.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError, model_validator

VERSIONS = (1, 2)
SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
# Nanoseconds and bytes have to fit NumPy's 64 bits.
_MOST = 2**53

Count = Annotated[int, Field(ge=0, le=_MOST, strict=True)]
Nanoseconds = Annotated[int, Field(ge=1, le=_MOST, strict=True)]
Positive = Annotated[FiniteFloat, Field(gt=0, le=1e15, strict=True)]
NotNegative = Annotated[FiniteFloat, Field(ge=0, le=1e15, strict=True)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1, strict=True)]


class OpenModel(BaseModel):
    """What may hold more than is named."""

    model_config = ConfigDict(extra="allow")


class RoundEntry(OpenModel):
    """One run of one candidate, in a process of its own."""

    samples_ns: list[Nanoseconds] = Field(min_length=1, description="every latency, in order")
    wall_ns: Nanoseconds
    load_ms: NotNegative
    first_ms: NotNegative
    peak_memory_bytes: Count | None = None
    position: Count | None = Field(default=None, description="place among the candidates of the round")
    round: Count | None = None
    started_s: NotNegative | None = Field(default=None, description="seconds since the measurement began")


class ComparisonEntry(OpenModel):
    """A candidate against another: how many times faster."""

    verdict: Literal["faster", "slower", "tie"]
    ratio: Positive
    low: NotNegative
    high: NotNegative


class AccuracyEntry(OpenModel):
    """Scores over labelled data."""

    samples: Annotated[int, Field(ge=1, le=_MOST, strict=True)]
    accuracy: Share
    f1: Share


class OutputsEntry(OpenModel):
    """Comparison of the outputs with the reference's; a cosine that is no number is NaN."""

    kind: Literal["equal", "near"]
    cosine: float | None = None


class PlacementEntry(OpenModel):
    """What ran where."""

    asked: str
    nodes: Count
    share_of_nodes: Share
    share_of_time: Share
    compute_precisions: dict[str, Count] = {}


class DriftEntry(OpenModel):
    """The second half of a round's requests against the first."""

    ratio: Positive
    flagged: bool


class SweepEntry(OpenModel):
    """Throughput at so many requests in flight."""

    concurrency: Annotated[int, Field(ge=1, le=_MOST, strict=True)]
    throughput_per_s: Positive
    p50_ms: NotNegative | None = None
    p99_ms: NotNegative | None = None


class RateEntry(OpenModel):
    """An open-loop run at one rate."""

    rate_per_s: Positive
    achieved_per_s: NotNegative
    p50_ms: NotNegative | None = None
    p99_ms: Positive | None = None
    queries: Count
    met: bool


class CandidateEntry(OpenModel):
    """A model on a device. Where it was timed, `rounds` and all figures are there."""

    name: str
    device: str
    model: str
    sha256: str
    size_bytes: Count
    precision: str
    status: str = Field(description='"ok", or why it is out of the race')
    settings: dict[str, JsonValue] | None
    outputs: OutputsEntry | None
    accuracy: AccuracyEntry | None
    placement: PlacementEntry | None
    samples: Count | None = None
    median_ms: Positive | None = None
    p50_ms: Positive | None = None
    p90_ms: Positive | None = None
    p95_ms: Positive | None = None
    p99_ms: Positive | None = None
    p999_ms: Positive | None = None
    throughput_per_s: Positive | None = None
    load_ms: NotNegative | None = None
    first_ms: NotNegative | None = None
    peak_memory_bytes: Count | None = None
    against_reference: ComparisonEntry | None = None
    confirmed: ComparisonEntry | None = None
    drift: DriftEntry | None = None
    concurrency: Count | None = None
    sweep: list[SweepEntry] | None = None
    knee: SweepEntry | None = None
    rates: list[RateEntry] | None = None
    highest_rate_per_s: Positive | None = None
    rounds: list[RoundEntry] | None = None
    rounds_again: list[RoundEntry] | None = None


class WinnerEntry(OpenModel):
    """The verdict; several candidates where they tie."""

    verdict: Literal["winner", "tie", "none"]
    candidates: list[str]
    models: list[str]
    reference: str
    against_reference: ComparisonEntry | None


class MachineEntry(OpenModel):
    """Facts about the machine that decide speed."""

    cpu: str
    architecture: str
    flags: dict[str, bool]
    cores_allowed: Annotated[int, Field(ge=1, le=_MOST, strict=True)]
    memory_bytes: Count | None


class EnvironmentEntry(OpenModel):
    """Where it was measured."""

    machine: MachineEntry
    python: str
    platform: str
    packages: dict[str, str]
    variables: dict[str, str] = {}


class SettingsEntry(OpenModel):
    """How it was measured."""

    rounds: Count
    seconds: NotNegative
    warmup_s: NotNegative
    threads: Count | None
    batch: Annotated[int, Field(ge=1, le=_MOST, strict=True)]
    precision: str
    inputs: str
    scenario: Literal["latency", "offline", "server"] | None = None
    slo_p99_ms: Positive | None = None
    labelled_data: str | None = None


class TrialEntry(OpenModel):
    """One trial of the tuner; `model` and `device` are the candidate's, `label` is short for its settings."""

    label: str
    model: str
    device: str
    settings: dict[str, JsonValue]
    threads: Count
    stage: str
    status: str = Field(default="ok", description='"ok", or why it is out')
    median_ms: Positive | None = None
    throughput_per_s: Positive | None = None
    kept: bool


class TuningEntry(OpenModel):
    """What the tuner tried."""

    objective: Literal["latency", "throughput"]
    trials: list[TrialEntry]
    chosen: dict[str, JsonValue] | None = None
    budget_s: NotNegative | None = None
    spent_s: NotNegative


class KernelEntry(OpenModel):
    """One kernel of a layer."""

    name: str
    op: str
    time_us: NotNegative


class LayerEntry(OpenModel):
    """One layer of a profile, and where it stands under the roofs; null where that is not known."""

    name: str
    op: str
    kernel: str
    on: str
    precision: str
    time_us: NotNegative
    share: NotNegative
    macs: Count | None
    bytes: Count | None
    gflops: NotNegative | None
    gbytes_per_s: NotNegative | None
    bound: str | None
    of_peak: NotNegative | None
    kernels: list[KernelEntry]


class FindingEntry(OpenModel):
    """Why something is slow, and what to do."""

    kind: str
    severity: str
    what: str
    cure: str
    nodes: list[str]
    cost_us: NotNegative | None


class PeakEntry(OpenModel):
    """What the machine can do at most."""

    fp32_gflops: NotNegative | None = None
    int8_gops: NotNegative | None = None
    native_gflops: NotNegative | None = None
    bytes_per_s: NotNegative | None = None
    threads: Count | None = None


class RooflineEntry(OpenModel):
    """All layers together under the roofs."""

    gflops: NotNegative | None = None
    gbytes_per_s: NotNegative | None = None
    of_compute_peak: NotNegative | None = None
    of_memory_peak: NotNegative | None = None


class ExplanationEntry(OpenModel):
    """Layers and findings of one candidate; no figures where its device refused it."""

    label: str | None = None
    device: str
    total_us: NotNegative | None
    profiled_us: NotNegative | None
    unattributed_us: NotNegative | None
    layers: list[LayerEntry]
    peak: PeakEntry
    roofline: RooflineEntry
    findings: list[FindingEntry]
    notes: list[str] = []

    @model_validator(mode="after")
    def _whole(self) -> ExplanationEntry:
        """Where there is a time, all that is said of it has to be there."""
        roofs = {"gflops", "gbytes_per_s", "of_compute_peak", "of_memory_peak"}
        if self.total_us is not None and not (
            self.profiled_us is not None and roofs <= self.roofline.model_fields_set and self.peak.threads is not None
        ):
            raise ValueError("a time without its profile, roofs or threads")
        return self


class ReportDocument(OpenModel):
    """A benchmark: raw samples, environment and verdicts."""

    schema_version: Literal[1, 2]
    deploykit: str
    created: str
    scenario: Literal["latency", "offline", "server"] | None = None
    settings: SettingsEntry
    environment: EnvironmentEntry
    notes: list[str]
    interrupted: bool = False
    interval: str
    noise_floor: NotNegative = Field(description="how far the reference strays from itself, as a share")
    winner: WinnerEntry
    candidates: list[CandidateEntry] = Field(min_length=1, description="the reference first")
    noise_floor_again: NotNegative | None = Field(default=None, description="the same over the rounds that confirm")
    reference_again: list[RoundEntry] = []
    reference_again_anew: list[RoundEntry] = []
    tuning: TuningEntry | None = None
    explain: dict[str, ExplanationEntry] | None = None


def report_schema() -> dict[str, Any]:
    """The JSON Schema of a report, draft 2020-12."""
    return {"$schema": SCHEMA_ID, "$id": "urn:deploykit:report:2", **ReportDocument.model_json_schema()}


def first_fault(exc: ValidationError) -> str:
    """The first of the faults, with its place."""
    error = exc.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in error["loc"])
    return f"{place or 'the document'}: {error['msg']}"


def what_is_wrong(data: Any) -> str | None:
    """The first thing in which a document is no report, with its place; None where it is one."""
    try:
        found = ReportDocument.model_validate(data)
    except ValidationError as exc:
        return first_fault(exc)
    for number, candidate in enumerate(found.candidates):
        figures = (candidate.median_ms, candidate.throughput_per_s, candidate.load_ms)
        if (candidate.median_ms is None and not candidate.rounds) or (candidate.rounds and None not in figures):
            continue
        return f"candidates.{number}: rounds without figures, or figures without rounds"
    if not found.candidates[0].rounds:
        return "candidates.0: the reference was not timed"
    return None
