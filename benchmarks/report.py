"""The report: raw samples, environment and verdicts. JSON is the source, the table is a view."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

import deploykit
from deploykit.benchmarks.plan import MIN_ROUNDS, Entry, Settings
from deploykit.benchmarks.rates import RATE_FLOOR
from deploykit.benchmarks.statistics import (
    Comparison,
    Outcome,
    decide,
    drift_of,
    floor_of,
    log_ratios,
    pace_of,
    percentile,
)

SCHEMA_VERSION = 2
_INTERVAL = (
    "mean over rounds of the logarithm of the ratio; paired percentile bootstrap over rounds, expanded for few rounds, "
    "and never narrower than Student's t interval; nominal 95 %"
)
# Half of a round's requests slower than the other by this much, or by the noise floor: no steady state.
_DRIFT = 0.05
_MS = 1e6


@dataclass(frozen=True, slots=True)
class Report:
    """A finished measurement.

    Attributes:
        data: The JSON document.
    """

    data: dict[str, Any]

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """One entry a candidate, the reference first."""
        found: list[dict[str, Any]] = self.data["candidates"]
        return found

    @property
    def winner(self) -> dict[str, Any]:
        """`verdict` is "winner" or "tie"; `candidates` names the one, or those that tie."""
        found: dict[str, Any] = self.data["winner"]
        return found

    @property
    def interrupted(self) -> bool:
        """Whether an interrupt ended the measurement before all rounds were done."""
        return bool(self.data.get("interrupted"))

    def to_json(self) -> str:
        """The JSON document as text; JSON has no NaN and no infinity, so that these are null."""
        try:
            return json.dumps(self.data, indent=1, allow_nan=False) + "\n"
        except ValueError:
            return json.dumps(finite(self.data), indent=1, allow_nan=False) + "\n"

    def headline(self) -> str:
        """One sentence: who won, or that it is a tie."""
        winner = self.winner
        if winner["verdict"] == "none":
            return "no winner: no candidate met the objective and kept the accuracy"
        names = ", ".join(winner["candidates"])
        if winner["verdict"] == "tie":
            return f"tie: {names} (no difference outside the noise)"
        if winner["against_reference"] is None and names != winner["reference"]:
            return f"winner: {names}; the reference did not keep the objective in every round"
        if winner["against_reference"] is None:
            return f"winner: {names}, the reference; nothing else was faster and right"
        found = winner["against_reference"]
        ratio = f"{found['ratio']:.2f}x [{found['low']:.2f}, {found['high']:.2f}]"
        anew = " on new rounds" if names in winner.get("measured_again", ()) else ""
        return f"winner: {names}, {ratio} as fast as {winner['reference']}{anew}"


def finite(value: Any) -> Any:
    """A copy with null for what JSON cannot say; lists of samples, which are integers and many, are shared."""
    if isinstance(value, dict):
        return {key: found if key == "samples_ns" else finite(found) for key, found in value.items()}
    if isinstance(value, list | tuple):
        return [finite(found) for found in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict_of(candidate: Mapping[str, Any]) -> dict[str, Any] | None:
    """A candidate against the reference: over the new rounds, which decide, where it was in them."""
    return candidate.get("confirmed") or candidate.get("against_reference")


def build_report(
    entries: Sequence[Entry],
    twin: Entry,
    settings: Settings,
    environment: dict[str, Any],
    *,
    notes: Sequence[str],
    labelled: str | None,
    interrupted: bool = False,
) -> Report:
    """Derive medians, percentiles and verdicts from raw samples.

    Args:
        entries: One a candidate, the reference first.
        twin: The reference measured once more, for the noise floor.
        settings: How it was measured.
        environment: Where.
        notes: What the user must know.
        labelled: The dataset that accuracy was measured on.
        interrupted: Whether fewer rounds were measured than asked for.
    """
    judge = _Judge(entries, twin, settings)
    data = {
        "schema_version": SCHEMA_VERSION,
        "deploykit": deploykit.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "scenario": settings.scenario,
        "settings": settings.as_dict() | {"labelled_data": labelled},
        "environment": environment,
        "notes": list(notes),
        "interrupted": interrupted,
        "interval": _INTERVAL,
        "noise_floor": round(judge.floor, 4),
        "noise_floor_again": round(judge.floor_again, 4) if twin.again else None,
        "winner": judge.winner(),
        "candidates": [_entry(entry, place, judge, settings) for place, entry in enumerate(entries)],
        "reference_again": list(twin.rounds),
        "reference_again_anew": list(twin.again),
    }
    return Report(data)


class _Judge:
    """Verdicts: over all rounds, and over the new ones of those that were measured again."""

    def __init__(self, entries: Sequence[Entry], twin: Entry, settings: Settings) -> None:
        self._entries = entries
        self._seed = settings.seed
        self._timed = [i for i, e in enumerate(entries) if e.rounds]
        least = RATE_FLOOR if settings.scenario == "server" else 0.0
        self.floor = max(least, floor_of(log_ratios(entries[0].rounds, twin.rounds)))
        done = min([len(twin.again), *(len(e.again) for e in entries if e.again)])
        done = done if done >= MIN_ROUNDS else 0
        self._again = [i for i, e in enumerate(entries) if e.again] if done else []
        anew = floor_of(log_ratios(entries[0].again[:done], twin.again[:done])) if done else self.floor
        self.floor_again = max(least, anew)
        self._done = done
        self.eligible = [
            i for i in self._timed
            if keeps_accuracy(entries[i], entries[0], settings.max_drop) and not missed_rounds(entries[i])
        ]  # fmt: skip

    def against(self, other: int, this: int) -> Comparison | None:
        """How many times faster `this` is; None where a round of either has no rate that met the objective."""
        if missed_rounds(self._entries[other]) or missed_rounds(self._entries[this]):
            return None
        return decide(log_ratios(self._entries[other].rounds, self._entries[this].rounds), self.floor, self._seed)

    def confirmed(self, other: int, this: int) -> Comparison | None:
        """The same over the new rounds; None where there are none of both."""
        if not self._done or not {other, this} <= set(self._again) or self.against(other, this) is None:
            return None
        pair = self._entries[other].again[: self._done], self._entries[this].again[: self._done]
        return decide(log_ratios(*pair), self.floor_again, self._seed)

    def winner(self) -> dict[str, Any]:
        """The fastest eligible candidate, with all that cannot be told from it."""
        entries = self._entries
        if not self.eligible:
            return {
                "verdict": "none", "candidates": [], "models": [], "reference": entries[0].candidate.label,
                "against_reference": None,
            }  # fmt: skip
        order = [self.eligible[i] for i in ranking([entries[i].rounds for i in self.eligible])]
        # The new rounds decide among those that were in them; the others were behind already, or tie.
        anew = [i for i in self._again if i in self.eligible]
        leaders = [anew[i] for i in ranking([entries[i].again[: self._done] for i in anew])]
        best = leaders[0] if leaders else order[0]
        tied = [i for i in [*leaders, *(i for i in order if i not in leaders)] if i == best or self._ties(i, best)]
        against = (self.confirmed(0, best) or self.against(0, best)) if best else None
        return {
            "verdict": "tie" if len(tied) > 1 else "winner",
            "candidates": [entries[i].candidate.label for i in tied],
            "models": [entries[i].candidate.path for i in tied],
            "reference": entries[0].candidate.label,
            "against_reference": against.as_dict() if against else None,
            "measured_again": [entries[i].candidate.label for i in self._again],
        }

    def _ties(self, this: int, best: int) -> bool:
        found = self.confirmed(best, this) or self.against(best, this)
        return found is not None and found.outcome is not Outcome.SLOWER


def ranking(rounds: Sequence[Sequence[dict[str, Any]]]) -> list[int]:
    """Numbers of candidates, the fastest first, by the rounds of each."""
    if not rounds:
        return []
    means = [float(np.mean(log_ratios(rounds[0], found))) for found in rounds]
    return sorted(range(len(rounds)), key=lambda i: -means[i])


def keeps_accuracy(entry: Entry, reference: Entry, max_drop: float) -> bool:
    """Whether a candidate is as accurate as the reference, but for ``max_drop``; without labels, nothing says no."""
    have, want = entry.probe.get("accuracy"), reference.probe.get("accuracy")
    return have is None or want is None or bool(have["accuracy"] >= want["accuracy"] - max_drop)


def missed_rounds(entry: Entry) -> int:
    """In how many rounds no rate met the objective."""
    return sum(not found.get("met", True) for found in [*entry.rounds, *entry.again])


def _status(entry: Entry, place: int, judge: _Judge, settings: Settings) -> str:
    if not entry.rounds or place in judge.eligible:
        return entry.status
    missed, rounds = missed_rounds(entry), len(entry.rounds) + len(entry.again)
    if missed:
        return f"no rate kept its p99 within {settings.slo_p99_ms:g} ms in {missed} of {rounds} rounds"
    return f"accuracy dropped by more than {settings.max_drop}"


def _entry(entry: Entry, place: int, judge: _Judge, settings: Settings) -> dict[str, Any]:
    candidate, probe = entry.candidate, entry.probe
    found: dict[str, Any] = {
        "name": candidate.name,
        "device": candidate.device,
        "model": candidate.path,
        "sha256": candidate.sha256,
        "size_bytes": candidate.size_bytes,
        "precision": candidate.precision or settings.precision,
        "status": _status(entry, place, judge, settings),
        "settings": probe.get("settings"),
        "tuned": candidate.identity if candidate.tuned else None,
        "outputs": entry.parity,
        "accuracy": probe.get("accuracy"),
        "placement": probe.get("placement"),
    }
    if not entry.rounds:
        return found
    compared = judge.against(0, place) if place else None
    anew = judge.confirmed(0, place) if place else None
    return found | _figures(entry, settings, judge.floor) | {
        "against_reference": compared.as_dict() if compared else None,
        "confirmed": anew.as_dict() if anew else None,
        "rounds": entry.rounds,
        "rounds_again": entry.again,
    }  # fmt: skip


def _figures(entry: Entry, settings: Settings, floor: float) -> dict[str, Any]:
    """Percentiles over all samples; medians over rounds."""
    rounds = entry.rounds
    samples = np.concatenate([np.asarray(r["samples_ns"], np.int64) for r in rounds])
    wall = sum(r["wall_ns"] for r in rounds)
    memory = [r["peak_memory_bytes"] for r in rounds if r["peak_memory_bytes"] is not None]
    ms = {q: None if (v := percentile(samples, q)) is None else v / _MS for q in (50.0, 90.0, 95.0, 99.0, 99.9)}
    drift = drift_of(rounds)
    found = {
        "samples": int(samples.size),
        "median_ms": float(np.median([np.median(r["samples_ns"]) for r in rounds])) / _MS,
        "p50_ms": ms[50.0], "p90_ms": ms[90.0], "p95_ms": ms[95.0], "p99_ms": ms[99.0], "p999_ms": ms[99.9],
        "throughput_per_s": samples.size * settings.batch / (wall / 1e9),
        "load_ms": float(np.median([r["load_ms"] for r in rounds])),
        "first_ms": float(np.median([r["first_ms"] for r in rounds])),
        "peak_memory_bytes": max(memory) if memory else None,
        "drift": {"ratio": round(drift, 4), "flagged": abs(drift - 1) > max(_DRIFT, floor)},
    }  # fmt: skip
    if settings.scenario == "offline":
        pace = float(np.median([pace_of(r) for r in rounds]))
        found |= {
            "concurrency": entry.concurrency, "sweep": entry.probe["sweep"], "knee": entry.probe["knee"],
            "throughput_per_s": settings.batch * 1e9 / pace,
        }  # fmt: skip
    elif settings.scenario == "server":
        trials = [*entry.probe["trials"], *(t for r in rounds for t in r["trials"])]
        met = [r["rate_per_s"] for r in rounds if r["met"]]
        found |= {
            "concurrency": entry.concurrency, "rates": sorted(trials, key=lambda t: t["rate_per_s"]),
            "highest_rate_per_s": float(np.median(met)) if len(met) == len(rounds) else None,
        }  # fmt: skip
    return found


COLUMNS = (
    "model", "device", "size MB", "median ms", "p90 ms", "p99 ms", "per s", "in flight", "rate/s", "load ms", "mem MB",
    "placed", "int8", "outputs", "accuracy", "F1", "vs first",
)  # fmt: skip


def table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table for a person; columns without any value are left out."""
    rows = [_cells(c, reference=i == 0) for i, c in enumerate(report.candidates)]
    used = [n for n in range(len(COLUMNS)) if any(row[n] for row in rows)]
    return tuple(COLUMNS[n] for n in used), [tuple(row[n] or "-" for n in used) for row in rows]


def _cells(c: dict[str, Any], *, reference: bool) -> tuple[str, ...]:
    timed = "median_ms" in c
    outputs = c["outputs"]
    accuracy = c["accuracy"] or {}
    placement = c["placement"] or {}
    precisions = placement.get("compute_precisions", {})
    rate = c.get("highest_rate_per_s")
    compared = verdict_of(c)
    verdict = "reference" if reference else ""
    if compared:
        verdict = f"{compared['verdict']} {compared['ratio']:.2f}x [{compared['low']:.2f}, {compared['high']:.2f}]"
    if c.get("drift", {}).get("flagged"):
        verdict += f"{', ' if verdict else ''}drifts {c['drift']['ratio']:.2f}x"
    if c["status"] != "ok":
        verdict = f"{verdict}, {c['status']}" if verdict else c["status"][:80]
    return (
        c["name"],
        c["device"],
        f"{c['size_bytes'] / 1e6:.2f}",
        f"{c['median_ms']:.3f}" if timed else "",
        _or_na(c.get("p90_ms"), timed=timed),
        _or_na(c.get("p99_ms"), timed=timed),
        f"{c['throughput_per_s']:.0f}" if timed else "",
        str(c.get("concurrency", "")),
        "" if rate is None else f"{rate:.4g}",
        f"{c['load_ms']:.0f}" if timed else "",
        f"{c['peak_memory_bytes'] / 1e6:.0f}" if timed and c["peak_memory_bytes"] else "",
        f"{placement['share_of_nodes']:.0%}/{placement['share_of_time']:.0%}" if placement else "",
        f"{precisions.get('int8', 0)}/{sum(precisions.values())}" if precisions else "",
        _likeness(outputs),
        f"{accuracy['accuracy']:.4f}" if accuracy else "",
        f"{accuracy['f1']:.4f}" if accuracy else "",
        verdict,
    )


def _likeness(outputs: dict[str, Any] | None) -> str:
    if outputs is None:
        return ""
    if outputs["kind"] == "equal":
        return "equal"
    cosine = outputs["cosine"]
    return "no cosine" if cosine is None or not math.isfinite(cosine) else f"cos {cosine:.4f}"


def _or_na(value: float | None, *, timed: bool) -> str:
    return "" if not timed else "n/a" if value is None else f"{value:.3f}"
