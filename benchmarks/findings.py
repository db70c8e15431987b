"""Findings: what makes a model slow, with the act that cures it; and its layers under the roofs, for a report.

`rules` reads them from a profile, `experiments` tries them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deploykit.benchmarks.profile import Kernel, Profile
from deploykit.benchmarks.roofline import Peaks, position

SEVERITIES = ("high", "medium", "low")
# Shares of the time in all kernels from which a finding is medium, and high.
MEDIUM, HIGH = 0.08, 0.25
_MISSING = 0.3
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason why it is slow.

    Attributes:
        kind: Short name of the rule.
        severity: "high", "medium" or "low".
        what: One sentence with names and figures.
        cure: A command, or a concrete act.
        nodes: The nodes it is about, by the names of the file where those are known.
        cost_us: Microseconds of one run that it costs, at most; None where that is not known.
    """

    kind: str
    severity: str
    what: str
    cure: str
    nodes: tuple[str, ...] = ()
    cost_us: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self) | {"nodes": list(self.nodes)}


@dataclass(frozen=True, slots=True)
class Context:
    """What the rules need to know besides the profile.

    Attributes:
        model: The file, as commands name it.
        peaks: Of this machine.
        int8_dot: Whether its CPU sums 8-bit products without detours (VNNI, AMX, Arm's dot product).
        x86: Whether it is an x86 CPU.
        others: Cores that other processes kept busy meanwhile; None where not known.
        cores: Cores of the machine.
        threads: That work on the model, as far as there are cores for them.
    """

    model: str
    peaks: Peaks
    int8_dot: bool = True
    x86: bool = True
    others: float | None = None
    cores: int = 1
    threads: int = 1

    @property
    def loaded(self) -> bool:
        """Whether others left fewer cores than there are threads."""
        return self.others is not None and self.others + self.threads - self.cores >= _MISSING


def in_order(found: Sequence[Finding]) -> list[Finding]:
    """The gravest first, and of those the dearest."""
    return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), -(f.cost_us or 0)))


def named(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def severity(share: float, medium: float = MEDIUM, high: float = HIGH) -> str:
    """How grave a share of the time is."""
    return "high" if share >= high else "medium" if share >= medium else "low"


def labels(kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """The layers that kernels belong to, the dearest first."""
    return tuple(dict.fromkeys(k.label for k in sorted(kernels, key=lambda k: -k.time_us)))


def micros(kernels: Sequence[Kernel]) -> float:
    """Microseconds that kernels take together."""
    return round(sum(k.time_us for k in kernels), 1)


def percent(share: float) -> str:
    """A share for a sentence."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def rows(profile: Profile, peaks: Peaks) -> list[dict[str, Any]]:
    """The layers, the dearest first, JSON-ready."""
    found = []
    for layer in profile.layers:
        kernel = layer.kernels[0]
        place = position(layer.macs, layer.moved_bytes, layer.time_us, layer.precision, peaks)
        found.append(
            {
                "name": layer.name, "op": layer.op, "kernel": kernel.op, "on": kernel.on, "precision": layer.precision,
                "time_us": round(layer.time_us, 2), "share": round(profile.share(layer.kernels), 4),
                "macs": layer.macs or None, "bytes": layer.moved_bytes or None, **_rounded(place.as_dict()),
                "kernels": [{"name": k.name, "op": k.op, "time_us": round(k.time_us, 2)} for k in layer.kernels],
                "holds": [n.name for n in dict.fromkeys(n for k in layer.kernels for n in k.nodes)][:16],
            }
        )  # fmt: skip
    return found


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}


def whole(profile: Profile, peaks: Peaks) -> dict[str, Any]:
    """All kernels together under the roofs, JSON-ready."""
    time_us = profile.profiled_us
    macs = sum(layer.macs for layer in profile.layers)
    moved = sum(layer.moved_bytes for layer in profile.layers)
    at_peak = sum(
        2 * layer.macs / gops / 1e3 for layer in profile.layers if (gops := peaks.gops(layer.precision)) and layer.macs
    )
    memory = moved / peaks.bytes_per_s * 1e6 if peaks.bytes_per_s else None
    return {
        "gflops": round(2 * macs / time_us / 1e3, 3) if macs and time_us else None,
        "gbytes_per_s": round(moved / time_us / 1e3, 3) if moved and time_us else None,
        "of_compute_peak": round(min(1.0, at_peak / time_us), 4) if at_peak and time_us else None,
        "of_memory_peak": round(min(1.0, memory / time_us), 4) if memory and time_us else None,
        "bound": None if not (at_peak or memory) else "compute" if at_peak >= (memory or 0) else "memory",
    }
