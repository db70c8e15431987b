"""Who is better: pure functions of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.search.state import Seat, Variant

# A Pareto front in three dimensions: a difference below these is none.
_SPEED, _SIZE, _QUALITY = 0.03, 0.03, 1e-4
WHY = ("fastest", "smallest", "most accurate", "between")


def loss_of(quality: Mapping[str, Any] | None) -> float | None:
    """How much of the numbers is lost: of the metric where there is one, else of the agreement; None where unknown."""
    if quality is None:
        return None
    if quality.get("value") is not None and quality.get("parent") is not None:
        return float(quality["parent"]) - float(quality["value"])
    if quality.get("agreement") is not None:
        return 1 - float(quality["agreement"])
    if quality.get("sqnr_db") is not None:
        return float(10 ** (-float(quality["sqnr_db"]) / 20))
    return 0.0  # its SQNR is infinite


def badness(seat: Seat, variant: Variant, objective: str, cores: int) -> float:
    """What is to be small: time, time of a core, or bytes; infinite where it is not known.

    Args:
        seat: Measured.
        variant: Its model.
        objective: See `wish.OBJECTIVES`.
        cores: That the reference keeps busy.
    """
    if objective == "size":
        return float(variant.facts.get("size_bytes", math.inf))
    ratio = seat.ratio
    if ratio is None or ratio <= 0:
        return math.inf
    return (seat.best_place.cores / cores if objective == "cost" else 1.0) / ratio


def ranked(seats: Sequence[Seat], variants: Mapping[str, Variant], objective: str, cores: int) -> list[Seat]:
    """Seats that may win, the best first; equal ones in the order that does not hang on chance.

    What was never run may not, but for the exported model, which was compared with its source; on the first device,
    where that was done. What was measured to the end goes before what was only screened: of many, some seem fast.
    """
    run = [s for s in seats if s.open and s.ratio is not None]
    decided = objective != "size" and any(s.decision is not None for s in run)
    run.sort(
        key=lambda s: (
            decided and s.decision is None,
            badness(s, variants[s.place.model], objective, cores),
            preference(s, variants),
        )
    )
    return run + [s for s in seats if s.open and s.ratio is None and s.exported]


def overlap(one: Seat, other: Seat) -> bool:
    """Whether what was measured of two seats cannot tell them apart: their intervals have values in common."""
    a, b = (s.decision or s.screening or {} for s in (one, other))
    if "low" not in a or "low" not in b:
        return False
    return bool(a["low"] <= b["high"] and a["high"] >= b["low"])


def preference(seat: Seat, variants: Mapping[str, Variant]) -> tuple[bool, bool, bool, float, float, str]:
    """Among those that tie: float before integers, plain before native, the exported model, the smaller, the more
    accurate, by name.
    """
    variant = variants[seat.place.model]
    loss = loss_of(seat.quality)
    return (
        variant.quantized,
        seat.place.config.precision == "native",
        not seat.reference,
        float(variant.facts.get("size_bytes") or math.inf),
        loss if loss is not None else 0.0,
        seat.place.label,
    )


def pareto(seats: Sequence[Seat], variants: Mapping[str, Variant]) -> list[Seat]:
    """Those that nothing beats in speed, size and accuracy at once; of equal ones the first.

    Args:
        seats: Right, with a ratio; the preferred first.
        variants: By name.
    """
    front: list[Seat] = []
    for seat in seats:
        mine = _axes(seat, variants)
        if mine is None:
            continue
        others = [o for s in seats if s is not seat and (o := _axes(s, variants)) is not None]
        if any(_beats(other, mine) for other in others):
            continue
        if any(_near(kept, mine) for s in front if (kept := _axes(s, variants)) is not None):
            continue
        front.append(seat)
    return front


def _axes(seat: Seat, variants: Mapping[str, Variant]) -> tuple[float, float, float] | None:
    """Slowness, size and loss; None where its speed is not known."""
    ratio = seat.ratio
    if ratio is None:
        return None
    loss = loss_of(seat.quality)
    return 1 / ratio, float(variants[seat.place.model].facts.get("size_bytes") or math.inf), max(0.0, loss or 0.0)


def _beats(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    """Whether it is nowhere worse, and somewhere better by more than the tolerance."""
    nowhere = one[0] <= other[0] * (1 + _SPEED) and one[1] <= other[1] * (1 + _SIZE) and one[2] <= other[2] + _QUALITY
    faster, smaller = one[0] < other[0] * (1 - _SPEED), one[1] < other[1] * (1 - _SIZE)
    return nowhere and (faster or smaller or one[2] < other[2] - _QUALITY)


def _near(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    return (
        abs(one[0] / other[0] - 1) <= _SPEED
        and abs(one[1] / other[1] - 1) <= _SIZE
        and abs(one[2] - other[2]) <= _QUALITY
    )


def why_on_front(seat: Seat, front: Sequence[Seat], variants: Mapping[str, Variant]) -> str:
    """What it is best at; in speed, what was measured to the end is not compared with what was only screened."""
    axes = {id(s): a for s in front if (a := _axes(s, variants)) is not None}
    mine = axes[id(seat)]
    timed = {id(s) for s in front if s.decision is not None} or set(axes)
    for number, word in enumerate(WHY[:3]):
        among = axes if number else {key: a for key, a in axes.items() if key in timed}
        if id(seat) in among and mine[number] == min(a[number] for a in among.values()):
            return word
    return WHY[3]
