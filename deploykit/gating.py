"""Is the quantized model faster than its parent? Measured as `deploykit benchmark` does, with a short budget.

Before that, layers whose int8 kernel is slower than the float one are found from the profiles of both models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from deploykit.benchmarks import Candidate, Settings, measure
from deploykit.errors import BenchmarkError, DeploykitError, SpeedError
from deploykit.modelfile import model_bytes, read_model
from deploykit.models import LoadedModel
from deploykit.proof import Layer, layers_of
from deploykit.runtimes import Device, Session, open_session
from deploykit.runtimes.placement import is_compute

if TYPE_CHECKING:
    from deploykit.specs import Feeds

DEFAULT_SECONDS = 6.0
# A parent that answers faster is not timed: the call itself and the clock would be what is measured.
SMALLEST_MS = 0.3
_ROUNDS = 3
# Noise hid a difference where a tie is this far from 1: then as many rounds as this decide.
MORE_ROUNDS, _UNCLEAR = 9, 0.05
# The reference, once more the reference, and the candidate.
_RUNS = 3
_WARMUP_SHARE = 0.25
_SHORTEST_S = 0.02
_QUICK_S, _QUICK_RUNS, _TURNS = 0.2, 15, 3
_PROFILED_RUNS, _PROFILES = 9, 2
# A layer goes back to float where its kernel takes this much longer than the float one, and it matters to the whole.
_SLOWER, _MATTERS = 1.15, 0.01
# Dearer kernels of another kind must not hide behind a fused neighbour: only a gain of the whole is kept.
_GAIN = 1.01


@dataclass(frozen=True, slots=True)
class Gate:
    """How speed is judged.

    Attributes:
        devices: Where.
        named: Whether the user named them: then the result has to run on each.
        first_only: Whether the first device alone decides where the user named none; the others are recorded.
        allow_slower: Record a model that is not faster instead of refusing it.
        tie_allowed: Whether a model that is as fast as its parent is accepted, because it is smaller.
        seconds: Timed seconds in all, for the first rounds; 0 for no timing.
    """

    devices: tuple[Device, ...]
    named: bool = False
    first_only: bool = False
    allow_slower: bool = False
    tie_allowed: bool = False
    seconds: float = DEFAULT_SECONDS

    def decisive(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Those of the records that decide."""
        return records[:1] if self.first_only and not self.named else records


def quick_ms(path: Path, device: Device, feeds: Sequence[Feeds]) -> float:
    """The fastest of some runs in this process, in milliseconds: for choices between models, never for a claim."""
    with open_session(path, device) as session:
        return _fastest_ms(session, feeds)


def quick_times(paths: Sequence[Path], device: Device, feeds: Sequence[Feeds]) -> list[float | None]:
    """`quick_ms` of several models, in turns, so that a busy machine is busy for all; None where one does not run."""
    best: dict[int, float] = dict.fromkeys(range(len(paths)), math.inf)
    for _ in range(_TURNS):
        for number in list(best):
            try:
                best[number] = min(best[number], quick_ms(paths[number], device, feeds))
            except DeploykitError:
                del best[number]
    return [best.get(number) for number in range(len(paths))]


def _fastest_ms(session: Session, feeds: Sequence[Feeds]) -> float:
    clock, best, runs = time.perf_counter_ns, float("inf"), 0
    end = clock() + int(_QUICK_S * 1e9)
    while runs < _QUICK_RUNS or clock() < end:
        began = clock()
        session.run(feeds[runs % len(feeds)])
        best = min(best, clock() - began)
        runs += 1
    return best / 1e6


def time_against_parent(
    parent: LoadedModel, model: Path, gate: Gate, feeds: Sequence[Feeds], origin: str
) -> list[dict[str, Any]]:
    """Time a model against its parent on each device of the gate.

    Args:
        parent: Its parent.
        model: Its file.
        gate: Where, and for how long.
        feeds: Inputs of one request each, to rotate through.
        origin: Where they come from.

    Returns:
        One JSON-ready record a device: `verdict` is "faster", "slower", "tie", "failed" or "not timed".
    """
    return [time_on(device, parent, model, gate, feeds, origin) for device in gate.devices]


def time_on(
    device: Device,
    parent: LoadedModel,
    model: Path,
    gate: Gate,
    feeds: Sequence[Feeds],
    origin: str,
    rounds: int = _ROUNDS,
) -> dict[str, Any]:
    """Time a model against its parent on one device.

    Args:
        device: One of the gate's, among which its seconds are shared out.
        parent: As for `time_against_parent`, and so are the following.
        model: See there.
        gate: See there.
        feeds: See there.
        origin: See there.
        rounds: `MORE_ROUNDS` where noise hid what had to be told.

    Returns:
        One record of `time_against_parent`.
    """
    seconds = max(_SHORTEST_S, gate.seconds / max(1, len(gate.devices)) / _ROUNDS / _RUNS)
    warmup = seconds * _WARMUP_SHARE
    settings = Settings(
        rounds=rounds, seconds=seconds - warmup, warmup_s=warmup, min_cosine=-1.0, inputs=origin, max_drop=1.0
    )
    record: dict[str, Any] = {"device": str(device), "against": parent.digest}
    try:
        alone = quick_ms(parent.path, device, feeds) if gate.seconds > 0 else 0.0
        if gate.seconds <= 0:
            record |= {"verdict": "not timed", "reason": "--gate-seconds 0"}
        elif alone < SMALLEST_MS:
            reason = f"too small: the parent runs in {alone:.3f} ms, less than {SMALLEST_MS:g} ms"
            record |= {"verdict": "not timed", "reason": reason}
        else:
            old, new = (
                Candidate(name, str(path), str(device), parent.digest, size)
                for name, path, size in (
                    ("parent", parent.path, parent.size_bytes),
                    ("quantized", model, model_bytes(model)),
                )
            )
            found = time_pair(old, new, feeds, settings)
            accepted = gate.allow_slower or gate.tie_allowed
            if found["verdict"] == "tie" and abs(found["ratio"] - 1) > _UNCLEAR and not accepted:
                found = time_pair(old, new, feeds, replace(settings, rounds=max(rounds, MORE_ROUNDS)))
            record |= found
    except DeploykitError as exc:
        record |= {"verdict": "failed", "reason": exc.what}
    return record | {"summary": _in_words(record)}


def time_pair(parent: Candidate, model: Candidate, feeds: Sequence[Feeds], settings: Settings) -> Mapping[str, Any]:
    """Interleaved rounds, a fresh process each: the candidate's verdict, ratio, interval, and both medians.

    Raises:
        BenchmarkError: One of them does not run.
    """
    report = measure([parent, model], feeds, settings)
    reference, candidate = report.candidates
    if not candidate.get("against_reference"):
        raise BenchmarkError(f"it cannot be timed: {candidate['status']}")
    return {
        **candidate["against_reference"],
        "parent_ms": round(reference["median_ms"], 4),
        "ms": round(candidate["median_ms"], 4),
        "noise_floor": report.data["noise_floor"],
        "rounds": settings.rounds,
        "seconds": round(settings.seconds, 3),
        "inputs": settings.inputs,
    }


def _in_words(record: Mapping[str, Any]) -> str:
    if "ratio" not in record:
        return f"{record['verdict']}: {record['reason']}"
    interval = f"{record['ratio']:.2f}x [{record['low']:.2f}, {record['high']:.2f}]"
    return f"{record['verdict']} {interval}, {record['parent_ms']:.3f} -> {record['ms']:.3f} ms"


def check_speed(records: Sequence[Mapping[str, Any]], gate: Gate, kind: str = "quantized") -> str:
    """Refuse a model that is slower somewhere, or faster nowhere.

    It has to be faster in at least one of the devices that decide, and slower in none; a tie is not faster.

    Args:
        records: Of `time_against_parent`.
        gate: Which of them decide, and what is allowed.
        kind: What the model is called: "quantized", "fused" or "pruned".

    Returns:
        What to say where it is accepted all the same; empty where it is faster.

    Raises:
        SpeedError: It is not, and that was not allowed.
    """
    counted = [r for r in gate.decisive(records) if "ratio" in r or (r["verdict"] == "failed" and gate.named)]
    slower = [r for r in counted if r["verdict"] in ("slower", "failed")]
    if not counted or (not slower and (gate.tie_allowed or any(r["verdict"] == "faster" for r in counted))):
        return ""
    told = "; ".join(f"{r['device']} {r['summary']}" for r in counted)
    what = f"{'slower than' if slower else 'not faster than'} its parent: {told}"
    if gate.allow_slower:
        return f"allowed, though it is {what}"
    others = [str(r["device"]) for r in counted if r["verdict"] == "faster"]
    where = f"name the runtime that it is for (--device {others[0]}), " if others else ""
    raise SpeedError(
        f"the {kind} model is {what}",
        expected="slower in no runtime" if gate.tie_allowed else "faster in one runtime, slower in none",
        hint=f"{where}keep the {'model in floating point' if kind == 'quantized' else 'parent'}, or take it as it is: "
        "--allow-slower",
    )


# --- layers that int8 slows down -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SlowLayer:
    """A layer whose integer kernel is slower.

    Attributes:
        name: Of its node.
        float_us: Microseconds of the float kernel.
        int8_us: Of the integer kernel.
    """

    name: str
    float_us: float
    int8_us: float

    @property
    def reason(self) -> str:
        """For the manifest."""
        return f"slower: int8 {self.int8_us:.0f} us, float {self.float_us:.0f} us"


def slow_layers(parent: Path, model: Path, device: Device, feeds: Feeds) -> list[SlowLayer]:
    """Layers whose int8 kernel takes longer than the float one did, from the profiles of several runs.

    Only kernels are compared: what a layer costs in conversions shows in the whole, which decides. A second pair of
    profiles has to say the same as the first, because trying it costs another calibration.

    Args:
        parent: In floating point.
        model: Quantized.
        device: Where.
        feeds: One request.
    """
    layers = [layer for layer in layers_of(read_model(model, weights=False)) if layer.quantized]
    found: list[SlowLayer] = []
    for number in range(_PROFILES):
        quick, slow = _kernel_times(parent, layers, device, feeds), _kernel_times(model, layers, device, feeds)
        total = sum(quick.values())
        pairs = [SlowLayer(n.name, quick[n.name], slow[n.name]) for n in layers if n.name in quick and n.name in slow]
        now = [s for s in pairs if s.int8_us > _SLOWER * s.float_us and s.int8_us - s.float_us > _MATTERS * total]
        found = [s for s in now if number == 0 or s.name in {f.name for f in found}]
        if not found:
            break
    return found


def _kernel_times(path: Path, layers: Sequence[Layer], device: Device, feeds: Feeds) -> dict[str, float]:
    """Microseconds of the kernel that holds a layer, by the layer's name; layers that share one are left out."""
    with open_session(path, device) as session:
        times = {n.name: n.time_us for n in session.placement(feeds, runs=_PROFILED_RUNS).nodes}
        kernels = [(n, times[n.name]) for n in session.executed() if is_compute(n.op) and n.name in times]
    found, owners = {}, dict.fromkeys((n.name for n, _ in kernels), 0)
    for layer in layers:
        known = layer.weights | layer.made | {layer.name} | {w.removesuffix("_quantized") for w in layer.weights}
        for node, micros in kernels:
            if known & node.sources:
                found[layer.name] = (node.name, micros)
                owners[node.name] += 1
                break
    return {name: micros for name, (kernel, micros) in found.items() if owners[kernel] == 1}


def faster_as_a_whole(before: Path, after: Path, devices: Sequence[Device], feeds: Sequence[Feeds]) -> bool:
    """Whether a model gains over all devices together, by the fastest of interleaved runs in this process."""
    ratios = []
    for device in devices:
        with open_session(before, device) as old, open_session(after, device) as new:
            pairs = [(_fastest_ms(old, feeds), _fastest_ms(new, feeds)) for _ in range(2)]
        ratios.append(min(old for old, _ in pairs) / min(new for _, new in pairs))
    return geometric_mean(ratios) > _GAIN
