"""What a person sees while a command works: on standard error, never on standard output."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


class Progress:
    """Reports steps and notes; writes to a private copy of standard error, so that `quiet` does not swallow it.

    The base class is silent and collects the notes: library callers pass nothing and read them from the result.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Something that the user must know: a fall-back, an option chosen for them."""
        self.notes.append(text)

    def say(self, text: str) -> None:
        """How something came out on the way, for who watches; it is not kept."""

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A piece of work that takes a while."""
        yield

    def advance(self, done: int, total: int | None, unit: str) -> None:
        """How far the current step is."""


class TerminalProgress(Progress):
    """For people: a live line in a terminal, one line a step in a pipe."""

    def __init__(self) -> None:
        super().__init__()
        self._live = sys.stderr.isatty()
        self._stream: IO[str] = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, encoding="utf-8")
        self._text = ""
        self._started = 0.0
        self._drawn = 0.0

    def note(self, text: str) -> None:
        """Print and keep."""
        super().note(text)
        self._clear()
        self._stream.write(f"note: {text}\n")

    def say(self, text: str) -> None:
        """Print."""
        self._clear()
        self._stream.write(f"{text}\n")

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show ``text`` while the block runs, its seconds afterwards."""
        outer = self._text, self._started
        # Its own, because jobs of several processes report here side by side.
        started = time.monotonic()
        self._text, self._started = text, started
        if self._live:
            self._draw("...")
        try:
            yield
        except BaseException:
            self._clear()
            raise
        else:
            self._clear()
            self._stream.write(f"{text}: {time.monotonic() - started:.1f} s\n")
        finally:
            self._text, self._started = outer

    def advance(self, done: int, total: int | None, unit: str) -> None:
        """Redraw the live line, at most ten times a second."""
        now = time.monotonic()
        if not self._live or now - self._drawn < 0.1:
            return
        self._drawn = now
        elapsed = now - self._started
        left = f", {elapsed / done * (total - done):.0f} s left" if total and done else ""
        self._draw(f"{done}/{total} {unit}{left}" if total else f"{done} {unit}")

    def _draw(self, tail: str) -> None:
        self._stream.write(f"\r\x1b[2K{self._text} {tail}")
        self._stream.flush()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[2K")


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send all that frameworks print, log and warn inside the block to the file ``log``.

    Works on file descriptors 1 and 2, so native libraries are included. Not for use in several threads at once.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    root = logging.getLogger()
    sink = log.open("a", encoding="utf-8")
    handler = logging.StreamHandler(sink)
    os.dup2(sink.fileno(), 1)
    os.dup2(sink.fileno(), 2)
    root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _warning_writer(sink)
            with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
                yield
    finally:
        root.removeHandler(handler)
        # First of all the way back to the terminal: without it not even the error below could be reported.
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(saved[0])
        os.close(saved[1])
        # A full disk loses the log; what the block was there for fails, or not, on its own.
        with contextlib.suppress(OSError):
            sink.close()


def _warning_writer(sink: IO[str]) -> Any:
    def write(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        sink.write(f"{filename}:{lineno}: {category.__name__}: {message}\n")

    return write
