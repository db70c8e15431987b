"""Facts about this machine that decide speed: cores really allowed, CPU flags, memory. Standard library only."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# What an engineer has to know before believing an int8 or bf16 figure, and the names that Linux gives it.
_FLAGS = {
    "avx2": ("avx2",),
    "avx512": ("avx512f", "avx512bw"),
    "vnni": ("avx512_vnni",),
    "avx_vnni": ("avx_vnni",),
    "bf16": ("avx512_bf16",),
    "fp16": ("avx512_fp16",),
    "amx_int8": ("amx_int8",),
    "amx_bf16": ("amx_bf16",),
    "f16c": ("f16c",),
    "neon_dotprod": ("asimddp",),
    "neon_i8mm": ("i8mm",),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine as a benchmark has to record it.

    Attributes:
        cpu: Model name.
        flags: Which of the instruction sets that matter are there.
        cores_machine: Logical CPUs of the machine.
        cores_affinity: CPUs this process may be scheduled on.
        cores_quota: CPU time allowed by the cgroup, in cores; None where there is no limit.
        cores_allowed: What a thread pool should use: the smallest of the above, at least 1.
        threads_per_core: 2 with SMT; None where unknown.
        memory_bytes: RAM, or the cgroup's limit where that is lower.
    """

    cpu: str
    architecture: str
    flags: dict[str, bool]
    cores_machine: int
    cores_affinity: int
    cores_quota: float | None
    cores_allowed: int
    threads_per_core: int | None
    numa_nodes: int | None
    governor: str | None
    hypervisor: str | None
    memory_bytes: int | None
    kernel: str

    @property
    def int8_dot(self) -> bool:
        """Whether 8-bit products are summed without saturation at 16 bits (VNNI, AMX or Arm's dot product)."""
        return any(self.flags.get(f) for f in ("vnni", "avx_vnni", "amx_int8", "neon_dotprod"))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _cgroup_dirs() -> list[Path]:
    """This process's cgroup-v2 directory and its parents: a limit anywhere on the way counts."""
    text = _read("/proc/self/cgroup") or ""
    own = next((line.split("::", 1)[1] for line in text.splitlines() if line.startswith("0::")), "/")
    root = Path("/sys/fs/cgroup")
    here = root / own.lstrip("/")
    return [d for d in (here, *here.parents) if d == root or root in d.parents]


def parse_cpu_max(text: str) -> float | None:
    """Cores allowed by a cgroup-v2 ``cpu.max`` ("max 100000" or "150000 100000"); None without a limit."""
    quota, _, period = text.strip().partition(" ")
    if quota == "max" or not quota:
        return None
    return int(quota) / int(period or 100_000)


def _quota() -> float | None:
    limits = [parse_cpu_max(text) for d in _cgroup_dirs() if (text := _read(str(d / "cpu.max")))]
    v1_quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    if v1_quota and int(v1_quota) > 0:
        limits.append(int(v1_quota) / int(_read("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or 100_000))
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def _memory() -> int | None:
    found = [int(t) for d in _cgroup_dirs() if (t := _read(str(d / "memory.max"))) and t != "max"]
    v1 = _read("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    if v1:
        found.append(int(v1))
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            found.append(int(line.split()[1]) * 1024)
    return min(found) if found else None


def free_memory() -> int | None:
    """Bytes that a process may still take without swapping, or being killed by its cgroup; None where the kernel does
    not say.
    """
    groups = [(d, "memory.max", "memory.current") for d in _cgroup_dirs()]
    groups.append((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"))
    found = [room for group in groups if (room := _room(*group)) is not None]
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    return max(0, min(found)) if found else None


def _room(folder: Path, most: str, now: str) -> int | None:
    """Bytes below a cgroup's limit, files that are only cached counted as free; None without a limit."""
    limit, used = _read(str(folder / most)), _read(str(folder / now))
    if not limit or not used or limit == "max":
        return None
    lines = (line.split() for line in (_read(str(folder / "memory.stat")) or "").splitlines())
    told = {line[0]: line[1] for line in lines if len(line) == 2}
    return int(limit) - int(used) + int(told.get("total_inactive_file", told.get("inactive_file", 0)))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allowed_cores() -> int:
    """Cores that a thread pool should use: affinity and cgroup quota respected, at least 1."""
    quota = _quota()
    cores = _affinity()
    return max(1, cores if quota is None else min(cores, int(quota + 0.5)))


def inspect_machine() -> Machine:
    """Read the facts; takes about a millisecond."""
    info: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, sep, value = line.partition(":")
        if sep:
            info.setdefault(key.strip(), value.strip())
    words = set((info.get("flags") or info.get("Features") or "").split())
    siblings = _read("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    nodes = Path("/sys/devices/system/node")
    return Machine(
        cpu=info.get("model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        flags={name: all(w in words for w in wanted) for name, wanted in _FLAGS.items()},
        cores_machine=os.cpu_count() or 1,
        cores_affinity=_affinity(),
        cores_quota=_quota(),
        cores_allowed=allowed_cores(),
        threads_per_core=_count_cpu_list(siblings) if siblings else None,
        numa_nodes=len(list(nodes.glob("node[0-9]*"))) or None if nodes.is_dir() else None,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        hypervisor="yes" if "hypervisor" in words else None,
        memory_bytes=_memory(),
        kernel=platform.release(),
    )


def _count_cpu_list(text: str) -> int:
    """Number of CPUs in a Linux CPU list ("0,4" or "0-1,8")."""
    count = 0
    for part in text.split(","):
        low, _, high = part.partition("-")
        count += int(high or low) - int(low) + 1
    return count
