"""What `optimize.json` holds, as far as its readers rely on it. Keys that are not named here are allowed and kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError

from deploykit.benchmarks.schema import (
    SCHEMA_ID,
    Count,
    EnvironmentEntry,
    NotNegative,
    OpenModel,
    Positive,
    TrialEntry,
    first_fault,
)

SCHEMA_VERSION = 1
# A chain of steps is a handful; what is far deeper was never written by a search.
_DEEPEST = 100


# Figures of any sign that can be drawn.
Figure = Annotated[float, Field(ge=-1e15, le=1e15, strict=True)]
# Times as fast as another.
Times = Annotated[float, Field(ge=1e-6, le=1e6, strict=True)]


class GoalEntry(OpenModel):
    """What a result has to keep; null where nothing was asked."""

    metric: str | None = None
    drop: NotNegative | None = None
    relative: bool | None = None
    min_sqnr_db: Figure | None = None
    min_agreement: NotNegative | None = None


class LimitsEntry(OpenModel):
    """What a result may take at most; null where nothing was asked."""

    max_latency_ms: Positive | None = None
    max_memory_mb: Positive | None = None
    max_size_mb: Positive | None = None


class WishEntry(OpenModel):
    """What was asked for."""

    source: str | None = None
    model: str | None = Field(default=None, description="where there is no source")
    data: str | None = None
    eval_data: str | None = None
    goal: GoalEntry
    objective: Literal["latency", "throughput", "size", "cost"]
    limits: LimitsEntry
    devices: list[str]
    batch: Annotated[int, Field(ge=1, strict=True)] | list[Annotated[int, Field(ge=1, strict=True)]] | None = 1
    dims: JsonValue = None
    contract: JsonValue = None
    budget_s: Positive | None = None
    executor: str | None = None


class QualityEntry(OpenModel):
    """How near to its parent a variant is."""

    summary: str
    sqnr_db: Figure | None = Field(default=None, description="null where there is no error at all, or no number")
    agreement: NotNegative | None = Field(default=None, description="share of rows with the parent's class")
    metric: str | None = None
    value: Figure | None = Field(default=None, description="of the metric")
    parent: Figure | None = Field(default=None, description="the parent's value of the metric")
    met: bool | None = None


class DroppedEntry(OpenModel):
    """Where something was left, and why."""

    phase: Literal["make", "judge", "screen", "tune", "decide", "limits"]
    reason: str


class RatioEntry(OpenModel):
    """How many times as fast as the reference, with its interval."""

    ratio: Times
    low: NotNegative
    high: NotNegative


class ScreeningEntry(OpenModel):
    """The first look, in a few turns; without figures where it failed."""

    ratio: Times | None = None
    low: NotNegative | None = None
    high: NotNegative | None = None
    turns: Count | None = None


class TunedEntry(OpenModel):
    """The settings that the tuner chose."""

    label: str
    ratio: Times | None = Field(default=None, description="over the default settings")
    settings: dict[str, JsonValue] | None = None


class DecisionEntry(RatioEntry):
    """The measurement that decides."""

    verdict: str
    median_ms: Positive | None = None
    p90_ms: Positive | None = None
    p99_ms: Positive | None = None
    throughput_per_s: Positive | None = None
    peak_memory_bytes: Count | None = None


class SeatEntry(OpenModel):
    """A variant on a device."""

    label: str
    device: str
    precision: str = "fp32"
    status: Literal["winner", "tie", "front", "dropped", "open"]
    dropped: DroppedEntry | None = None
    quality: QualityEntry | None = None
    placement: dict[str, JsonValue] | None = None
    screening: ScreeningEntry | None = None
    tuned: TunedEntry | None = None
    decision: DecisionEntry | None = None


class VariantEntry(OpenModel):
    """A model that was made, or that could not be."""

    name: str
    about: str
    parent: str | None = Field(description="name of the variant that it was made from")
    steps: list[dict[str, JsonValue]] = Field(default=[], description="tables of a recipe that lead here")
    status: Literal["kept", "dropped"]
    dropped: DroppedEntry | None = None
    size_bytes: Count | None = None
    nodes: Count | None = None
    seconds: NotNegative = 0.0
    cached: bool = False
    seats: dict[str, SeatEntry] = Field(default={})


class FrontEntry(OpenModel):
    """A result: nothing else is faster, smaller and more accurate at once."""

    name: str
    path: str
    seat: str
    device: str
    settings: dict[str, JsonValue] | None = None
    size_bytes: Count | None = None
    ratio: Times | None = None
    low: NotNegative | None = None
    high: NotNegative | None = None
    decided: bool | None = Field(default=None, description="whether the ratio is of the decision, or of the screening")
    quality: QualityEntry | None = None
    why: str


class PhaseEntry(OpenModel):
    """What the time went into."""

    name: str
    seconds: NotNegative
    began_s: NotNegative
    jobs: Count = 0
    cached: Count = 0


class FailureEntry(OpenModel):
    """A job that failed."""

    label: str
    error: str


class MachineRow(OpenModel):
    """The best on one type of machine."""

    label: str
    winner: str | None = None
    headline: str


class SearchDocument(OpenModel):
    """A search: everything that was tried, where it ended and why, and what is left; while it runs, less of that."""

    schema_version: Literal[1]
    deploykit: str = "of an unknown version"
    created: str = "at an unknown time"
    state: Literal["running", "done", "interrupted"]
    wish: WishEntry
    spent_s: NotNegative = 0.0
    environment: EnvironmentEntry | None = None
    headline: str = "nothing is found yet"
    winner: str | None = Field(default=None, description="path of the winner, relative to the document's folder")
    winner_seat: str | None = None
    tied: list[str] = Field(default=[], description="seats that cannot be told from the winner, and that itself")
    reference: str | None = None
    front: list[FrontEntry] = Field(default=[])
    tried: list[VariantEntry] = Field(default=[])
    phases: list[PhaseEntry] = Field(default=[])
    trials: list[TrialEntry] = Field(default=[])
    failures: list[FailureEntry] = Field(default=[])
    notes: list[str] = Field(default=[])
    machines: list[MachineRow] = Field(default=[])


def search_schema() -> dict[str, Any]:
    """The JSON Schema of `optimize.json`, draft 2020-12."""
    return {"$schema": SCHEMA_ID, "$id": "urn:deploykit:optimize:1", **SearchDocument.model_json_schema()}


def what_is_wrong(data: Any) -> str | None:
    """The first thing in which a document is none of a search, with its place; None where it is one."""
    try:
        found = SearchDocument.model_validate(data)
    except ValidationError as exc:
        return first_fault(exc)
    parents: dict[str, str | None] = {}
    if found.state == "done" and found.environment is None:
        return "environment: missing"
    for number, variant in enumerate(found.tried):
        place = f"tried.{number}"
        if variant.name in parents:
            return f"{place}: a second variant of the name {variant.name!r:.80}"
        parents[variant.name] = variant.parent
        if variant.status == "dropped" and variant.dropped is None and not variant.seats:
            return f"{place}: dropped without a reason"
        for device, seat in variant.seats.items():
            if seat.status == "dropped" and seat.dropped is None:
                return f"{place}.seats.{device:.80}: dropped without a reason"
    for number, variant in enumerate(found.tried):
        depth, name = 0, variant.parent
        while name is not None:
            depth += 1
            if name not in parents:
                return f"tried.{number}.parent: there is no variant {name!r:.80}"
            if depth > _DEEPEST:
                return f"tried.{number}.parent: a circle, or more than {_DEEPEST} steps"
            name = parents[name]
    return None
