"""What a search knows: variants of the model, seats (a variant on a device with settings), and how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit.benchmarks.tuner_space import Config
from deploykit.runtimes.settings import RuntimeSettings, wheels_of

Table = Mapping[str, Any]


@dataclass(slots=True)
class Variant:
    """A model that was, or was to be, made out of another.

    Attributes:
        name: Of the variant, and of the step that makes it.
        about: What it is, in a few words.
        parent: The variant that it is made from; None for the first.
        table: The recipe's step that makes it; None where it was given.
        state: Of a static scheme: what parts of the calibration data add up to, where it is made from that.
        path: Its artifact; None until it is made.
        facts: See `graphs.facts_of`.
        seconds: That it took.
        cached: Whether it was made earlier.
        dropped: In which phase and why it went no further; None while it does.
    """

    name: str
    about: str
    parent: str | None
    table: Table | None
    path: Path | None = None
    state: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False
    dropped: dict[str, str] | None = None

    @property
    def quantized(self) -> bool:
        """Whether integers take part."""
        return bool(self.facts.get("quantized"))

    @property
    def lossy(self) -> bool:
        """Whether the step that made it changes the numbers, in whatever format: integers, halves or blocks."""
        return self.quantized or str((self.table or {}).get("step", "")).startswith("quantize")

    def drop(self, phase: str, reason: str) -> None:
        """It goes no further."""
        self.dropped = {"phase": phase, "reason": reason}


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how a variant runs.

    Attributes:
        model: Name of the variant.
        device: Device name.
        config: Threads, sessions, requests in flight, precision, settings.
        tuned: Whether they were searched for.
    """

    model: str
    device: str
    config: Config
    tuned: bool = False

    @property
    def name(self) -> str:
        """Of the variant, with what is not the default."""
        native = " native" if self.config.precision == "native" else ""
        how = " tuned" if self.tuned else " side by side" if self.config.concurrency > 1 else ""
        return f"{self.model}{native}{how}"

    @property
    def label(self) -> str:
        """With the device; as `benchmarks.Candidate.label`."""
        return f"{self.name} on {self.device}"

    @property
    def cores(self) -> int:
        """Cores that it keeps busy."""
        streams = dict(self.config.settings).get("NUM_STREAMS")
        lanes = max(self.config.sessions, streams if isinstance(streams, int) else 1)
        return self.config.threads * lanes

    def as_params(self, objective: str) -> dict[str, Any]:
        """What a timed job is told."""
        config = self.config
        return {
            "label": self.name, "model": self.model, "device": self.device, "precision": config.precision,
            "threads": config.threads, "sessions": config.sessions,
            "concurrency": config.concurrency if timed_by_wall(objective) else None,
            "optimize": config.optimize, "settings": dict(config.settings), "tuned": self.tuned,
        }  # fmt: skip

    def settings_for(self, digest: str | None, machine: Mapping[str, Any]) -> RuntimeSettings:
        """What serving is told.

        Args:
            digest: sha256 of the model's file.
            machine: `machine_of` where it was measured.
        """
        config = self.config
        return RuntimeSettings(
            device=self.device, threads=config.threads, sessions=config.sessions, concurrency=config.concurrency,
            precision=config.precision, batch=config.batch, optimize=config.optimize, settings=dict(config.settings),
            machine=_fingerprint(self.device, machine), model_sha256=digest,
        )  # fmt: skip


def _fingerprint(device: str, machine: Mapping[str, Any]) -> dict[str, Any]:
    """As `machine_fingerprint` of that machine would be."""
    kept = {k: machine[k] for k in ("cpu", "architecture", "flags", "cores_allowed") if k in machine}
    wheels = wheels_of(device)
    versions = machine.get("runtimes") or {}
    runtime = next((f"{name} {versions[name]}" for name in wheels if name in versions), None)
    return kept | ({"runtime": runtime} if runtime else {})


def timed_by_wall(objective: str) -> bool:
    """Whether samples a second count, and not the time of one request."""
    return objective in ("throughput", "cost")


def timed_sets(batch: int) -> int:
    """How many sets of inputs a timed job rotates through: 16 samples, but no fewer than four sets.

    Each candidate runs all of them before it is timed, and of a slow model that would take longer than timing it.
    """
    return max(4, 16 // batch)


@dataclass(slots=True)
class Seat:
    """A place, and all that was found out about it.

    Attributes:
        place: Where and how.
        status: "open", "dropped", "front", "tie" or "winner".
        dropped: Phase and reason.
        quality: On real data against the exported model; None where it was not judged.
        placement: What ran on integers, see `proof.prove_placement`.
        reference: Whether it is what all others are compared with.
        exported: Whether it is the exported model as it is.
        lossy: Whether its numbers may be others than the exported model's: nothing of the kind is kept unjudged.
        missed: Whether the target is missed, so that it is timed only to see whether a better one is worth making.
        screening: See `Screened.as_dict`.
        tuned: The place with the settings that were found, and its label.
        decision: Of the last measurement.
    """

    place: Place
    status: str = "open"
    dropped: dict[str, str] | None = None
    quality: dict[str, Any] | None = None
    placement: dict[str, Any] | None = None
    reference: bool = False
    exported: bool = False
    lossy: bool = False
    missed: bool = False
    screening: dict[str, Any] | None = None
    tuned: Place | None = None
    decision: dict[str, Any] | None = None

    @property
    def open(self) -> bool:
        """Whether it may still win."""
        return self.status == "open" and not self.missed

    @property
    def best_place(self) -> Place:
        """With the settings that were found for it, where there are any."""
        return self.tuned or self.place

    def drop(self, phase: str, reason: str) -> None:
        """It goes no further; the first reason stays."""
        if self.dropped is None:
            self.status, self.dropped = "dropped", {"phase": phase, "reason": reason}

    @property
    def ratio(self) -> float | None:
        """How many times faster than the reference, by the best measurement there is."""
        for found in (self.decision, self.screening):
            if found is not None and found.get("ratio") is not None:
                return float(found["ratio"])
        return None


def first_place(model: str, device: str, cores: int, batch: int, precision: str = "fp32") -> Place:
    """All cores in one request at a time."""
    return Place(model, device, Config(cores, batch=batch, precision=precision))


def side_by_side(place: Place, cores: int) -> Place:
    """As many requests at a time as there are cores, each on one."""
    config = replace(place.config, threads=1, concurrency=cores)
    if place.device.startswith("openvino"):
        return replace(place, config=config.having(NUM_STREAMS=cores))
    return replace(place, config=replace(config, sessions=cores))


@dataclass(frozen=True, slots=True)
class Event:
    """What a caller is told while the search goes on.

    Attributes:
        kind: "phase", "made", "dropped", "best" or "done".
        text: For people.
        spent_s: Seconds so far.
        budget_s: Seconds allowed.
        best: Label of the best so far; None before there is one.
    """

    kind: str
    text: str
    spent_s: float
    budget_s: float
    best: str | None = None


@dataclass(slots=True)
class Phase:
    """How long a phase took.

    Attributes:
        name: Of the phase.
        began_s: Since the search began.
        seconds: That it took.
        jobs: That it asked for.
        cached: Of those, how many had been done earlier.
    """

    name: str
    began_s: float
    seconds: float = 0.0
    jobs: int = 0
    cached: int = 0
