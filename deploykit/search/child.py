"""A process that does jobs, as whoever started it sees it.

It leads a session of its own: a Ctrl-C in the terminal is the parent's to decide about. What a job starts ends with it,
and when the parent dies, the child ends itself; see `guard`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deploykit
from deploykit.search.guard import descendants, end_group, end_process

_START_S = 300.0
_READ_S = 1.0


class Died(Exception):
    """The process ended before it answered; the text says how."""


class Late(Exception):
    """The job took longer than it may, and its process was ended; the text says how long."""


class Child:
    """A process that does one job after another.

    Args:
        drop: Names of environment variables that it does not get.
    """

    def __init__(self, drop: tuple[str, ...] = ()) -> None:
        # The child has to find this very copy of DeployKit, also in a bare checkout and from another directory.
        home = str(Path(deploykit.__file__).resolve().parent.parent)
        env = {k: v for k, v in os.environ.items() if k not in drop}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [home, env.get("PYTHONPATH")]))
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploykit.search.guard"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, env=env, start_new_session=True,
        )  # fmt: skip
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._how = ""
        self._reaping = threading.Lock()
        self._reaped = False
        self._machine: dict[str, Any] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._reader.start()
        self._waiter.start()

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def ask(self, told: Mapping[str, Any], timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Have a job done.

        Args:
            told: As `worker` reads it; with "stall_s" it is ended also where it says nothing more for so many
                seconds, once it has said something.
            timeout_s: Seconds that it may take, without the time until the process is ready.

        Yields:
            What it says meanwhile, and its answer, which holds "machine", at last.

        Raises:
            Died: The process ended.
            Late: It took too long.
        """
        if self._machine is None:
            self._machine = self._next(_START_S)["ready"]
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # how it ended, the answer says
        end = None if timeout_s is None else time.monotonic() + timeout_s
        stall_s: float | None = None
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            if stall_s is not None and (left is None or stall_s < left):
                found = self._next(stall_s, f"said nothing for {stall_s:.3g} s")
            else:
                found = self._next(left, "" if timeout_s is None else f"took longer than {timeout_s:.3g} s")
            if "said" not in found:
                yield {**found, "machine": self._machine}
                return
            stall_s = told.get("stall_s")
            yield found

    def _next(self, within_s: float | None, late: str = "did not start") -> dict[str, Any]:
        try:
            found = self._answers.get(timeout=within_s)
        except queue.Empty:
            self.kill()
            raise Late(late) from None
        if found is None:
            self._answers.put(None)  # for who asks again
            raise Died(self._how)
        return found

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # half a line: it is ending
            for line in self._process.stdout:
                self._answers.put(json.loads(line))

    def _wait(self) -> None:
        """See how it ends, and end what is left of its group.

        The number of the group is its own as long as it is not reaped. A process that it started may hold the other end
        of the pipe, so that the end of the output does not tell.
        """
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            end_group(self.pid)
        with self._reaping:
            code = self._process.wait()
            self._reaped = True
        self._reader.join(_READ_S)
        self._messages.seek(0)
        lines = [s for line in self._messages.read().decode("utf-8", "replace").splitlines() if (s := line.strip())]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._how = f"its process ended with {how} ({lines[-1][:200] if lines else 'no message'})"
        self._messages.close()
        self._answers.put(None)

    def kill(self) -> None:
        """End it and all that it started, if it has not ended."""
        with self._reaping:
            if not self._reaped:
                # Also those that left the group.
                for pid in (*descendants(self.pid), self.pid):
                    end_process(pid)
                end_group(self.pid)
        self._waiter.join()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
