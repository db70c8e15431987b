"""Facts about the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploykit import machine
from deploykit.machine import Machine, allowed_cores, inspect_machine, parse_cpu_max


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", None),
        ("max 100000\n", None),
        ("max", None),
        ("", None),
        ("150000 100000\n", 1.5),
        ("50000 100000", 0.5),
        ("400000 200000", 2.0),
        ("200000", 2.0),
    ],
)
def test_cpu_max(text: str, cores: float | None) -> None:
    assert parse_cpu_max(text) == cores


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0,4", 2), ("0-1", 2), ("0-1,8", 3), ("0-3,8-11", 8)])
def test_cpu_list(text: str, count: int) -> None:
    assert machine._count_cpu_list(text) == count


@pytest.mark.parametrize(
    ("quota", "affinity", "allowed"),
    [(None, 8, 8), (1.5, 8, 2), (0.2, 8, 1), (16.0, 4, 4), (2.4, 8, 2), (1.0, 1, 1)],
)
def test_allowed_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, affinity: int, allowed: int) -> None:
    monkeypatch.setattr(machine, "_quota", lambda: quota)
    monkeypatch.setattr(machine, "_affinity", lambda: affinity)
    assert allowed_cores() == allowed


def pretend(monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str]) -> None:
    monkeypatch.setattr(machine, "_read", files.get)


def test_tightest_limit_on_the_way_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    root = "/sys/fs/cgroup"
    pretend(
        monkeypatch,
        {
            "/proc/self/cgroup": "12:cpu:/old\n0::/pod/box",
            f"{root}/pod/box/cpu.max": "max 100000",
            f"{root}/pod/cpu.max": "250000 100000",
            f"{root}/cpu.max": "800000 100000",
            f"{root}/pod/box/memory.max": "max",
            f"{root}/pod/memory.max": "1000",
            "/proc/meminfo": "MemFree: 1 kB\nMemTotal:       8 kB\n",
        },
    )
    assert machine._quota() == 2.5
    assert machine._memory() == 1000


def test_limits_of_cgroup_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = "/sys/fs/cgroup/cpu"
    pretend(monkeypatch, {f"{cpu}/cpu.cfs_quota_us": "300000", f"{cpu}/cpu.cfs_period_us": "200000"})
    assert machine._quota() == 1.5
    pretend(monkeypatch, {f"{cpu}/cpu.cfs_quota_us": "-1", f"{cpu}/cpu.cfs_period_us": "100000"})
    assert machine._quota() is None


def test_free_memory_is_what_the_cgroup_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    box, kernel = "/sys/fs/cgroup/pod/box", {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:       8 kB\n"}
    group = {"/proc/self/cgroup": "0::/pod/box", f"{box}/memory.max": "5000", f"{box}/memory.current": "3000"}
    pretend(monkeypatch, kernel)
    assert machine.free_memory() == 8192
    pretend(monkeypatch, {**kernel, **group})
    assert machine.free_memory() == 2000
    pretend(monkeypatch, {**kernel, **group, f"{box}/memory.stat": "anon 1\ninactive_file 500\nactive_file 7"})
    assert machine.free_memory() == 2500  # what is only cached can be had
    pretend(monkeypatch, {**kernel, **group, f"{box}/memory.max": "max"})
    assert machine.free_memory() == 8192
    old = "/sys/fs/cgroup/memory/memory."
    pretend(monkeypatch, {**kernel, f"{old}limit_in_bytes": "900", f"{old}usage_in_bytes": "1000"})
    assert machine.free_memory() == 0
    pretend(monkeypatch, {})
    assert machine.free_memory() is None


def test_nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    found = inspect_machine()
    assert found.cores_allowed >= 1
    assert not any(found.flags.values())
    assert (found.cores_quota, found.memory_bytes, found.threads_per_core) == (None, None, None)


@pytest.mark.parametrize(
    ("flags", "int8"),
    [
        ("flags : fpu avx2 avx512_vnni", True),
        ("flags : avx2 avx_vnni", True),
        ("Features : fp asimd asimddp", True),
        ("flags : avx2 avx512f avx512bw avx512_bf16", False),
        ("flags : notavx_vnni avx512_vnnix", False),
    ],
)
def test_eight_bit_products(monkeypatch: pytest.MonkeyPatch, flags: str, int8: bool) -> None:
    key = flags.partition(":")[0]
    pretend(monkeypatch, {"/proc/cpuinfo": f"processor : 0\n{flags}\n\nprocessor : 1\n{key}: none"})
    assert inspect_machine().int8_dot is int8


def test_this_machine() -> None:
    found = inspect_machine()
    assert 1 <= found.cores_allowed <= found.cores_affinity <= found.cores_machine == os.cpu_count()
    assert found.cpu
    if Path("/proc/meminfo").exists():
        assert found.memory_bytes
        assert found.memory_bytes > 2**20
    again = json.loads(json.dumps(found.as_dict()))
    assert Machine(**again) == found


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity_is_respected() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from deploykit.machine import allowed_cores, inspect_machine as i\n"
        "print(allowed_cores(), i().cores_affinity)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
