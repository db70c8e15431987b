"""Work that may take for ever, or crash the process: done in a forked child with a limit on its CPU time.

Symbolic shapes (sympy) and constant folding in C++ can take hours, and neither can be interrupted from a thread. A fork
shares the weights with its parent, where a new process would have to load them again. The limit counts CPU time, which
the kernel enforces (RLIMIT_CPU), so that a busy machine comes to the same result as an idle one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import pickle
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from deploykit.errors import DeploykitError, ExportError, TimeLimitError
from deploykit.extras import require

T = TypeVar("T")

# A child that sleeps for so long waits for a lock that another thread held during the fork.
_STALL_S = 120.0
_POLL_S = 2.0
_PR_SET_PDEATHSIG = 1


def run_bounded(work: Callable[[], T], cpu_s: float) -> T:
    """Do ``work`` in a child process; its result and its exception come back.

    Where there is no safe fork (not on Linux, or CUDA is in use), the work is done here and is not bounded.

    Args:
        work: What it returns is pickled; what it writes to files stays.
        cpu_s: Seconds of CPU time, over all of its threads (torch gets one).

    Raises:
        TimeLimitError: It took longer.
        ExportError: It crashed.
    """
    torch = require("torch", extra="torch")
    if sys.platform != "linux" or torch.cuda.is_initialized():
        return work()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reading, writing = os.pipe()
    parent = os.getpid()
    # The child must not collect what it inherits: a runtime's session would wait there for threads that only the parent
    # has. Frozen objects are not looked at.
    gc.freeze()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that do not exist in the child; torch's DataLoader relies on the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(work, writing, cpu_s, parent)
    gc.unfreeze()
    os.close(writing)
    try:
        data = _read_all(reading, pid)
    finally:
        os.close(reading)
        # Done, or not wanted any longer (Ctrl-C).
        with contextlib.suppress(ProcessLookupError):
            if _running(pid):
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if data is None:
        raise ExportError(
            f"torch hung, without work for {_STALL_S:.0f} s", hint="try again; if it hangs again, report it"
        )
    result: T = _result(data, status, cpu_s)
    return result


def _running(pid: int) -> bool:
    """Whether the child is still at work; it is not reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _read_all(descriptor: int, pid: int) -> bytes | None:
    """Everything up to the end of the pipe; None where the child does nothing any longer."""
    parts: list[bytes] = []
    busy_at, ticks = time.monotonic(), -1
    while True:
        ready, _, _ = select.select([descriptor], [], [], _POLL_S)
        if ready:
            part = os.read(descriptor, 1 << 16)
            if not part:
                # The end of the pipe is the end of the child, or a moment before it.
                time.sleep(0.01)
                return b"".join(parts)
            parts.append(part)
            continue
        state, now = _activity(pid)
        if state != "S" or now != ticks:
            busy_at, ticks = time.monotonic(), now
        elif time.monotonic() - busy_at > _STALL_S:
            return None


def _activity(pid: int) -> tuple[str, int]:
    """State of a process (S: asleep) and the CPU time that it used, in ticks; see proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[11]) + int(fields[12])


def _result(data: bytes, status: int, cpu_s: float) -> Any:
    if not data:
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGXCPU:
                raise TimeLimitError(f"it took more than {cpu_s:g} s")
            if number == signal.SIGKILL:
                raise ExportError("it was killed, most likely for lack of memory", hint="try a machine with more")
            raise ExportError(f"torch crashed with signal {number} ({signal.Signals(number).name})")
        raise ExportError(f"torch ended the process with exit code {os.WEXITSTATUS(status)}")
    kind, value = pickle.loads(data)
    if kind == "done":
        return value
    if kind == "raised":
        raise value
    raise RuntimeError(f"in the child process:\n{value}")  # a bug of ours, with its traceback


def _child(work: Callable[[], Any], writing: int, cpu_s: float, parent: int) -> NoReturn:
    """Never returns: neither the parent's clean-up nor its test framework may run a second time."""
    code = 1
    try:
        _set_limits(cpu_s, parent)
        try:
            answer: tuple[str, Any] = ("done", work())
        except (DeploykitError, OSError) as exc:
            answer = ("raised", exc)
        except BaseException:  # noqa: BLE001 - the parent shows it
            answer = ("bug", traceback.format_exc())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        left = memoryview(pickle.dumps(answer))
        while left:
            left = left[os.write(writing, left) :]
        code = 0
    finally:
        os._exit(code)


def _set_limits(cpu_s: float, parent: int) -> None:
    import resource

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        # Where the parent is killed, the child must not go on, nor hold the lock on the output.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    limit = max(1, math.ceil(cpu_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    # The parent's pool of OpenMP threads does not exist here; one thread needs no pool.
    require("torch", extra="torch").set_num_threads(1)
