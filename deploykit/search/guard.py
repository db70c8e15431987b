"""Keeps a worker from leaving processes behind: python -m deploykit.search.guard.

It starts the worker and waits. When the worker ends, however it ends, or when whoever started the guard is gone, it
ends all that came from the worker, also what left its process group: as the "subreaper" it inherits what loses its
parent. Then it ends as the worker did. A worker whose guard is killed ends by itself when its input does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
from pathlib import Path

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
_TICK_MS = 500


def main() -> int:
    """Guard a worker until it ends; its exit code."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has it; elsewhere the process group has to do
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    worker = os.fork()
    if not worker:
        from deploykit.search.worker import main as work

        return work()
    os.dup2(2, 1)  # the end of the worker's output is the worker's alone
    code = _wait(worker)
    while left := descendants(os.getpid()):
        for pid in left:
            end_process(pid)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one is enough
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def _wait(worker: int) -> int:
    """Exit code of the worker, which is ended where the input ends; the negative signal where one ended it."""
    polled = select.poll()
    polled.register(0, 0)  # the worker reads it; that the other side is gone is told in any case
    tick = _TICK_MS
    if hasattr(os, "pidfd_open"):
        polled.register(os.pidfd_open(worker), select.POLLIN)
        tick = -1
    while True:
        gone = any(fd == 0 for fd, _ in polled.poll(tick))
        if gone:
            end_process(worker)
        pid, status = os.waitpid(worker, 0 if gone else os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)


def end_group(group: int) -> None:
    """Kill a process group, if there is one, and what its processes started, also what left the group.

    Those first: once their parents are dead, nothing tells whose they were.
    """
    for pid in _offspring(group):
        end_process(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def end_process(pid: int) -> None:
    """Kill a process, if there is one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """What a process started, and what that started; empty where there is no /proc."""
    return _below([pid], _processes())


def _offspring(group: int) -> list[int]:
    """What the processes of a group started and is not of it."""
    found = _processes()
    members = [pid for pid, (_, its) in found.items() if its == group]
    return [pid for pid in _below(members, found) if found[pid][1] != group]


def _below(roots: list[int], processes: dict[int, tuple[int, int]]) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    found, left = list[int](), list(roots)
    while left:
        more = children.get(left.pop(), [])
        found += more
        left += more
    return found


def _processes() -> dict[int, tuple[int, int]]:
    """Parent and group of every process; empty where there is no /proc."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # The name stands in brackets and may hold any character; after it come the state, the parent and the group.
        _, parent, group = text.rpartition(")")[2].split()[:3]
        found[int(stat.parent.name)] = int(parent), int(group)
    return found


if __name__ == "__main__":
    sys.exit(main())
