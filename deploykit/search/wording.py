"""What all views of a search say in the same words: who is where, why, how fast and how exact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.benchmarks.wording import plain, words
from deploykit.goals import Goal

# Where something may end, in the order in which it comes to that, and what it is called in a sentence.
PHASES: Mapping[str, str] = {
    "make": "making",
    "judge": "judging",
    "screen": "screening",
    "tune": "tuning",
    "limits": "checking the limits",
    "decide": "the decision",
}
_KEPT = {"winner": "winner", "tie": "tie", "front": "on the front", "open": "nothing decided"}


@dataclass(frozen=True, slots=True)
class Line:
    """A seat; or a variant that has none.

    Attributes:
        variant: A document's variant.
        seat: None where the variant could not be made, or came to no device.
    """

    variant: Mapping[str, Any]
    seat: Mapping[str, Any] | None

    @property
    def label(self) -> str:
        """Of the seat, else the variant's name."""
        return str(self.variant["name"] if self.seat is None else self.seat["label"])

    @property
    def status(self) -> str:
        """ "winner", "tie", "front", "dropped", or "open" where nothing is decided."""
        if self.seat is not None:
            return str(self.seat["status"])
        return "dropped" if self.variant["status"] == "dropped" else "open"

    @property
    def phase(self) -> str:
        """Where it was dropped; empty where it was not."""
        return str(self._dropped["phase"]) if self._dropped else ""

    @property
    def reason(self) -> str:
        """Why it was dropped; empty where it was not."""
        return str(self._dropped["reason"]) if self._dropped else ""

    @property
    def _dropped(self) -> Mapping[str, Any]:
        told = (self.variant if self.seat is None else self.seat).get("dropped")
        return told if told and self.status == "dropped" else {}

    @property
    def outcome(self) -> str:
        """Where it ended, and why."""
        if self.phase:
            return f"dropped in {PHASES.get(self.phase, self.phase)}: {self.reason}"
        return _KEPT.get(self.status, self.status)


def lines_of(document: Mapping[str, Any]) -> list[Line]:
    """One a seat, and one a variant without any, in the order in which they were made."""
    return list(_lines(document["tried"]))


def _lines(tried: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    for variant in tried:
        seats = list((variant.get("seats") or {}).values())
        for seat in seats or [None]:
            yield Line(variant, seat)


@dataclass(frozen=True, slots=True)
class Speed:
    """How many times as fast as the reference.

    Attributes:
        ratio: Times.
        low: Of its interval.
        high: Of its interval.
        decided: Whether it comes from the decision; else from the screening.
    """

    ratio: float
    low: float
    high: float
    decided: bool

    def __str__(self) -> str:
        text = f"{self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}]"
        return text if self.decided else f"{text} (screened)"


def speed_of(seat: Mapping[str, Any] | None) -> Speed | None:
    """From the decision, else from the screening; None where it was never timed."""
    for key in ("decision", "screening"):
        told = (seat or {}).get(key)
        if told and None not in (told.get("ratio"), told.get("low"), told.get("high")):
            return Speed(float(told["ratio"]), float(told["low"]), float(told["high"]), key == "decision")
    return None


def quality_text(quality: Mapping[str, Any] | None) -> str:
    """The figures of a quality in a few words; empty where it was not judged."""
    if not quality:
        return ""
    value, parent, agreement = (number(quality.get(k)) for k in ("value", "parent", "agreement"))
    parts = []
    if value is not None:
        lost = "" if parent is None else f" ({value - parent:+.4f})"
        parts.append(f"{quality.get('metric') or 'metric'} {value:.4f}{lost}")
    elif agreement is not None:
        parts.append(f"agreement {agreement:.4f}")
    sqnr = number(quality.get("sqnr_db"))
    none = str(quality.get("collapsed") or "no error")
    parts.append(none if sqnr is None else f"SQNR {sqnr:.1f} dB")
    return ", ".join(parts)


def settings_text(seat: Mapping[str, Any] | None) -> str:
    """What the tuner chose, and the precision where it is not float32; empty for the defaults."""
    if seat is None:
        return ""
    tuned = seat.get("tuned") or {}
    native = ["native precision"] if seat.get("precision") == "native" else []
    return ", ".join([*native, *([str(tuned["label"])] if tuned.get("label") else [])])


def runtime_text(settings: Mapping[str, Any] | None) -> str:
    """Settings of a result, as `settings.json` holds them, without the defaults and what names the machine."""
    usual = {"sessions": 1, "concurrency": 1, "batch": 1, "precision": "fp32", "optimize": True}
    found: dict[str, Any] = {}
    for key, value in (settings or {}).items():
        known = key in usual and value == usual[key] and not (isinstance(value, bool) ^ isinstance(usual[key], bool))
        if value is None or known or key in ("device", "machine", "model_sha256", "schema_version", "deploykit"):
            continue
        inner = key == "settings" and isinstance(value, Mapping)
        found |= {str(k): v for k, v in value.items()} if inner else {words(str(key)): value}
    return ", ".join(f"{k} {plain(v)}" for k, v in found.items()) or "defaults"


def size_text(size: int | None) -> str:
    """Megabytes; empty where it is not known."""
    return "" if size is None else f"{size / 1e6:.2f}" if size >= 100_000 else f"{size / 1e6:.2g}"


def front_line(entry: Mapping[str, Any]) -> str:
    """One line about a result on the front."""
    parts = [f"{entry['path']} ({entry['why']}): {entry['seat']}"]
    if entry.get("ratio") is not None:
        parts.append(ratio_text(entry))
    parts.append(f"{size_text(entry['size_bytes'])} MB")
    parts += [text] if (text := quality_text(entry.get("quality"))) else []
    return ", ".join(parts)


def ratio_text(entry: Mapping[str, Any]) -> str:
    """Times as fast as the reference, with its interval where that is known; empty where it is not known."""
    if entry.get("ratio") is None:
        return ""
    ends = entry.get("low"), entry.get("high")
    screened = " (screened)" if entry.get("decided") is False else ""
    return f"{entry['ratio']:.2f}x" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if None not in ends else "") + screened


def asked(document: Mapping[str, Any]) -> str:
    """What was wished for, in one line."""
    wish = document["wish"]
    goal, limits = wish["goal"], wish["limits"]
    kept = Goal(
        goal.get("metric"), goal.get("drop") or 0.0, bool(goal.get("relative")), goal.get("min_sqnr_db"),
        goal.get("min_agreement"),
    ).describe()  # fmt: skip
    parts = [
        f"objective {wish['objective']}",
        kept or "no accuracy asked for",
        *(f"at most {limits[key]:g} {unit}" for key, unit in _LIMITS if limits.get(key) is not None),
        "any batch" if (batch := wish.get("batch", 1)) is None else f"batch {plain(batch)}",
        f"devices {plain(wish['devices'])}",
    ]
    return ", ".join(parts)


_LIMITS = (("max_latency_ms", "ms"), ("max_memory_mb", "MB of memory"), ("max_size_mb", "MB of file"))


def spent(document: Mapping[str, Any]) -> str:
    """How long it took, of what it was allowed to take."""
    budget = document["wish"].get("budget_s")
    made = sum(was_made(v) for v in document["tried"])
    seats = sum(len(v.get("seats") or {}) for v in document["tried"])
    cached = sum(bool(v.get("cached")) for v in document["tried"])
    text = f"{document['spent_s']:.0f} s" + ("" if budget is None else f" of {budget:g} s")
    if not document["tried"]:
        return text
    text += f": {len(document['tried'])} variants, {made} made, on {seats} seats"
    return text + (f"; {cached} came from the cache" if cached else "")


def tied_with_winner(document: Mapping[str, Any]) -> list[str]:
    """Seats that cannot be told from the winner's."""
    return [str(label) for label in document.get("tied") or () if label != document.get("winner_seat")]


def was_made(variant: Mapping[str, Any]) -> bool:
    """Whether there is a model of it, whatever became of that."""
    return (variant.get("dropped") or {}).get("phase") != "make"


def notes_of(document: Mapping[str, Any]) -> list[str]:
    """What the user must know."""
    state = document["state"]
    unfinished = {"running": "the search is still running, or was killed", "interrupted": "the search was interrupted"}
    first = [f"{unfinished[state]}: go on with --resume"] if state in unfinished else []
    return [*first, *(str(note) for note in document.get("notes") or ())]


def number(value: object) -> float | None:
    """A finite number, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]
