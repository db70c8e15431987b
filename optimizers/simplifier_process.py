"""The parent's end of the process that simplifiers run in: a crash or a hang costs one result, and no more."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from deploykit.errors import OptimizationError

_WORKER = Path(__file__).with_name("simplify_worker.py")
_TAIL_BYTES = 4096
FOLD_LIMIT_BYTES = 2**20


class SimplifierProcess:
    """Runs simplifiers in a child process, which is started when it is needed, and again after a crash or a hang.

    Use as a context manager. One process serves any number of models: starting one costs seconds, a small model
    milliseconds.

    Args:
        worker: The script that the child runs; see `simplify_worker`.

    Attributes:
        starts: How often a child was started.
    """

    def __init__(self, worker: Path | None = None) -> None:
        self.starts = 0
        self._worker = worker or _WORKER
        self._child: subprocess.Popen[bytes] | None = None
        self._printed: IO[bytes] | None = None

    def run(
        self, tool: str, source: Path, target: Path, timeout_s: float, *, fold_limit_bytes: int = FOLD_LIMIT_BYTES
    ) -> str | None:
        """Simplify ``source`` into ``target``.

        Args:
            tool: What the worker offers, such as "onnxsim"; see `simplify_worker`.
            source: The model.
            target: Where the result goes.
            timeout_s: Seconds that it may take.
            fold_limit_bytes: Size up to which nodes with constant inputs become constants.

        Returns:
            Why there is no result; None where there is one.

        Raises:
            OptimizationError: No process can be started.
        """
        child = self._running()
        request = {
            "tool": tool, "source": str(source), "target": str(target), "fold_limit_bytes": fold_limit_bytes
        }  # fmt: skip
        answer = self._ask(child, (json.dumps(request) + "\n").encode(), timeout_s)
        if answer is None:
            self.close()
            return f"it took more than {timeout_s:g} s"
        if not answer:
            return self._death()
        failed = json.loads(answer)["failed"]
        if failed is None and not target.is_file():
            failed = "it wrote nothing"
        return None if failed is None else f"it failed ({failed})"

    def close(self) -> None:
        """End the child; it has nothing to save."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                assert stream is not None
                stream.close()
        if self._printed is not None:
            self._printed.close()
            self._printed = None

    def __enter__(self) -> SimplifierProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        # A file and no pipe: nobody reads while a simplifier prints megabytes.
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        # -P: the worker's own folder is no place to import from; it holds a module for each of our steps.
        command = [sys.executable, "-P", str(self._worker)]
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed, bufsize=0
            )
        except OSError as exc:
            raise OptimizationError(f"cannot start {sys.executable}: {exc}") from exc
        self.starts += 1
        return self._child

    def _ask(self, child: subprocess.Popen[bytes], request: bytes, timeout_s: float) -> bytes | None:
        """The answer's line; empty where the child died, None where the time was up."""
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(request)
        except BrokenPipeError:
            return b""
        end = time.monotonic() + timeout_s
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            part = os.read(child.stdout.fileno(), 65536)
            if not part:
                return b""
            answer += part
        return answer

    def _death(self) -> str:
        """How the child ended, in its own last words where it had any."""
        child, printed = self._child, self._printed
        assert child is not None and printed is not None
        code = child.wait()
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = [line.strip() for line in printed.read().decode(errors="replace").splitlines() if line.strip()]
        self.close()
        said = f" ({lines[-1][:200]})" if lines else ""
        return f"it crashed with signal {-code}{said}" if code < 0 else f"it ended with exit code {code}{said}"
