"""The report: raw samples, environment and verdicts. JSON is the source, the table is a view."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

import deploykit
from deploykit.benchmarks.plan import Candidate, Settings
from deploykit.benchmarks.statistics import Comparison, Outcome, compare_rounds, noise_floor, percentile

SCHEMA_VERSION = 1
_MS = 1e6


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one candidate, raw.

    Attributes:
        candidate: What.
        status: "ok", or why it was not timed.
        probe: Load time, placement, accuracy.
        parity: Comparison with the reference; None for the reference.
        rounds: Raw samples, one entry a round.
    """

    candidate: Candidate
    status: str
    probe: dict[str, Any]
    parity: dict[str, Any] | None
    rounds: list[dict[str, Any]]


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
        """The JSON document as text."""
        return json.dumps(self.data, indent=1) + "\n"

    def headline(self) -> str:
        """One sentence: who won, or that it is a tie."""
        winner = self.winner
        names = ", ".join(winner["candidates"])
        if winner["verdict"] == "tie":
            return f"tie: {names} (no difference outside the noise)"
        if winner["against_reference"] is None:
            return f"winner: {names}, the reference; nothing else was faster and right"
        found = winner["against_reference"]
        ratio = f"{found['ratio']:.2f}x [{found['low']:.2f}, {found['high']:.2f}]"
        return f"winner: {names}, {ratio} as fast as {winner['reference']}"


def build_report(
    rows: Sequence[Row],
    twin: Sequence[dict[str, Any]],
    settings: Settings,
    environment: dict[str, Any],
    *,
    notes: Sequence[str],
    labelled: str | None,
    interrupted: bool = False,
) -> Report:
    """Derive medians, percentiles and verdicts from raw samples.

    Args:
        rows: One a candidate, the reference first.
        twin: Rounds of the reference measured once more, for the noise floor.
        settings: How it was measured.
        environment: Where.
        notes: What the user must know.
        labelled: The dataset that accuracy was measured on.
        interrupted: Whether fewer rounds were measured than asked for.
    """
    medians = {i: _medians(row.rounds) for i, row in enumerate(rows) if row.rounds}
    floor = noise_floor(medians[0], _medians(twin), settings.seed)
    compared = {i: compare_rounds(medians[0], found, floor, settings.seed) for i, found in medians.items() if i}
    eligible = [i for i in medians if _keeps_accuracy(rows[i], rows[0], settings.max_drop)]
    entries = [
        _entry(row, compared.get(i), settings, accurate=i not in medians or i in eligible) for i, row in enumerate(rows)
    ]
    data = {
        "schema_version": SCHEMA_VERSION,
        "deploykit": deploykit.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.as_dict() | {"labelled_data": labelled},
        "environment": environment,
        "notes": list(notes),
        "interrupted": interrupted,
        "interval": "paired percentile bootstrap over rounds, nominal 95 %; below 10 rounds it covers less",
        "noise_floor": round(floor, 4),
        "winner": _winner(rows, medians, eligible, floor, settings.seed),
        "candidates": entries,
        "reference_again": list(twin),
    }
    return Report(data)


def _medians(rounds: Sequence[dict[str, Any]]) -> list[float]:
    return [float(np.median(r["samples_ns"])) for r in rounds]


def _keeps_accuracy(row: Row, reference: Row, max_drop: float) -> bool:
    have, want = row.probe.get("accuracy"), reference.probe.get("accuracy")
    return have is None or want is None or have["accuracy"] >= want["accuracy"] - max_drop


def _entry(row: Row, compared: Comparison | None, settings: Settings, *, accurate: bool) -> dict[str, Any]:
    candidate, probe = row.candidate, row.probe
    entry: dict[str, Any] = {
        "name": candidate.name,
        "device": candidate.device,
        "model": candidate.path,
        "sha256": candidate.sha256,
        "size_bytes": candidate.size_bytes,
        "precision": candidate.precision or settings.precision,
        "status": row.status if accurate else f"accuracy dropped by more than {settings.max_drop}",
        "settings": probe.get("settings"),
        "outputs": row.parity,
        "accuracy": probe.get("accuracy"),
        "placement": probe.get("placement"),
    }
    if not row.rounds:
        return entry
    samples = np.concatenate([np.asarray(r["samples_ns"], np.int64) for r in row.rounds])
    wall = sum(r["wall_ns"] for r in row.rounds)
    memory = [r["peak_memory_bytes"] for r in row.rounds if r["peak_memory_bytes"] is not None]
    ms = {q: None if (found := percentile(samples, q)) is None else found / _MS for q in (50.0, 90.0, 99.0)}
    return entry | {
        "samples": int(samples.size),
        "median_ms": float(np.median(_medians(row.rounds))) / _MS,
        "p50_ms": ms[50.0],
        "p90_ms": ms[90.0],
        "p99_ms": ms[99.0],
        "throughput_per_s": samples.size * settings.batch / (wall / 1e9),
        "load_ms": float(np.median([r["load_ms"] for r in row.rounds])),
        "first_ms": float(np.median([r["first_ms"] for r in row.rounds])),
        "peak_memory_bytes": max(memory) if memory else None,
        "against_reference": compared.as_dict() if compared else None,
        "rounds": row.rounds,
    }


def _winner(
    rows: Sequence[Row], medians: dict[int, list[float]], eligible: Sequence[int], floor: float, seed: int
) -> dict[str, Any]:
    """The fastest eligible candidate, with all that cannot be told from it."""

    def total(i: int) -> float:
        return float(np.log(medians[i]).mean())

    best = min(eligible, key=total)
    tied = [
        i
        for i in eligible
        if i == best or compare_rounds(medians[i], medians[best], floor, seed).outcome is Outcome.TIE
    ]
    against = compare_rounds(medians[0], medians[best], floor, seed).as_dict() if best else None
    return {
        "verdict": "tie" if len(tied) > 1 else "winner",
        "candidates": [rows[i].candidate.label for i in sorted(tied, key=total)],
        "models": [rows[i].candidate.path for i in sorted(tied, key=total)],
        "reference": rows[0].candidate.label,
        "against_reference": against,
    }


COLUMNS = (
    "model", "device", "size MB", "median ms", "p90 ms", "p99 ms", "per s", "load ms", "mem MB", "int8", "outputs",
    "accuracy", "F1", "vs first",
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
    precisions = (c["placement"] or {}).get("compute_precisions", {})
    compared = c.get("against_reference")
    verdict = "reference" if reference else ""
    if compared:
        verdict = f"{compared['verdict']} {compared['ratio']:.2f}x [{compared['low']:.2f}, {compared['high']:.2f}]"
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
        f"{c['load_ms']:.0f}" if timed else "",
        f"{c['peak_memory_bytes'] / 1e6:.0f}" if timed and c["peak_memory_bytes"] else "",
        f"{precisions.get('int8', 0)}/{sum(precisions.values())}" if precisions else "",
        "" if outputs is None else "equal" if outputs["kind"] == "equal" else f"cos {outputs['cosine']:.4f}",
        f"{accuracy['accuracy']:.4f}" if accuracy else "",
        f"{accuracy['f1']:.4f}" if accuracy else "",
        verdict,
    )


def _or_na(value: float | None, *, timed: bool) -> str:
    return "" if not timed else "n/a" if value is None else f"{value:.3f}"
