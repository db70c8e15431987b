"""A candidate in a process of its own, as its parent sees it. The parent blocks while the child works: a poll would
take time from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import deploykit
from deploykit.benchmarks.plan import Candidate, Settings

# The slowest thing that is waited for: loading a large model, and ten runs of it.
_GRACE_S = 1800.0
_TEARDOWN_S = 30.0


class ChildError(Exception):
    """The candidate's process failed; becomes a candidate's status, or a `BenchmarkError`."""


class Process:
    """A worker that has loaded a candidate. Use as a context manager.

    Args:
        candidate: What to load.
        settings: Threads and precision where the candidate says nothing.
        folder: For its job and its messages.
        concurrency: Requests in flight.
        feeds: Name of the file of inputs in ``folder``.
        wait: Whether to wait until it has loaded; else `ready` has to be called.

    Attributes:
        loaded: What it said when it was ready: milliseconds to load and of the first request, the runtime's settings.

    Raises:
        ChildError: It could not load or run the model.
    """

    loaded: dict[str, Any]

    def __init__(
        self,
        candidate: Candidate,
        settings: Settings,
        folder: Path,
        concurrency: int = 1,
        *,
        feeds: str = "feeds.npz",
        wait: bool = True,
    ) -> None:
        job = {
            "model": candidate.path,
            "device": candidate.device,
            "threads": candidate.threads or settings.threads,
            "sessions": candidate.sessions,
            "optimize": candidate.optimize,
            "settings": dict(candidate.settings) or None,
            "precision": candidate.precision or settings.precision,
            "concurrency": concurrency,
            "feeds": str(folder / feeds),
        }
        handle, name = tempfile.mkstemp(suffix=".json", dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(job, file)
        # The child has to find this very copy of DeployKit, also in a bare checkout and from another directory.
        home = str(Path(deploykit.__file__).resolve().parent.parent)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
        self._messages = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the process
        self._child = subprocess.Popen(
            [sys.executable, "-m", "deploykit.benchmarks.worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, env=env,
            text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        if wait:
            self.ready()

    def ready(self) -> None:
        """Wait until the model is loaded and has answered once.

        Raises:
            ChildError: It could not load or run the model.
        """
        try:
            self.loaded = self._answer(_GRACE_S)
        except BaseException:
            self.kill()
            raise

    def ask(self, do: str, *, within_s: float = 0.0, **told: Any) -> dict[str, Any]:
        """Have it do something, and wait for its answer.

        Args:
            do: One of the worker's deeds.
            within_s: Seconds that it is expected to take; half an hour more is allowed.
            told: For the deed.

        Raises:
            ChildError: It failed, died, or did not finish in time.
        """
        try:
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps({"do": do, **told}) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # why it died, the answer says
        return self._answer(_GRACE_S + within_s)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._child.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._child.kill()

        timer = threading.Timer(limit_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            line = self._child.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            raise ChildError("it did not finish in time" if late.is_set() else self._how_it_ended())
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ChildError(found["error"])
        return found

    def _how_it_ended(self) -> str:
        code = self._child.wait()
        self._messages.seek(0)
        lines = [s for line in self._messages.read().decode("utf-8", "replace").splitlines() if (s := line.strip())]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended with {how} ({lines[-1][:200] if lines else 'no message'})"

    def end(self) -> dict[str, Any]:
        """Let it finish; says how much memory it took."""
        found = self.ask("end")
        try:
            self._child.wait(_TEARDOWN_S)
        except subprocess.TimeoutExpired:
            self._child.kill()  # a runtime that hangs while it is unloaded; what it measured is here
        return found

    def kill(self) -> None:
        """End it now, if it has not ended."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self._messages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
