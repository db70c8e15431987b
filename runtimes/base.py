"""What every runtime's session can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from deploykit.errors import DataError, DeviceError
from deploykit.extras import require
from deploykit.runtimes.device import Device
from deploykit.runtimes.placement import ExecutedNode, Placement
from deploykit.runtimes.requests import Bound, Request
from deploykit.specs import Array, Feeds, Signature, TensorSpec, fit_feeds


def dtypes_of(specs: Iterable[TensorSpec]) -> tuple[tuple[str, np.dtype[Any] | None], ...]:
    """Name and numpy's dtype of every tensor, to compare with; None for strings, which numpy has many of."""
    found: list[tuple[str, np.dtype[Any] | None]] = []
    for spec in specs:
        if spec.dtype == "bfloat16":
            found.append((spec.name, np.dtype(require("ml_dtypes").bfloat16)))
        else:
            found.append((spec.name, None if spec.dtype == "string" else np.dtype(spec.dtype)))
    return tuple(found)


def check_dtypes(expected: Iterable[tuple[str, np.dtype[Any] | None]], feeds: Feeds) -> None:
    """Refuse what a runtime would convert in silence, or read as it lies there, whatever the byte order says.

    Raises:
        TypeError: An array is of another dtype; `Session._diagnose` says it in our words.
        KeyError: One is missing.
    """
    for name, dtype in expected:
        if feeds[name].dtype != dtype and dtype is not None:
            raise TypeError(f"dtype of {name}")


class Session(ABC):
    """A model, loaded and ready. Use as a context manager.

    `run` is not for several threads at once, unless its device is `concurrent`: take one of the `requests` for each.

    Attributes:
        device: Where it runs.
        signature: Inputs and outputs as the runtime sees them.
        settings: What was set on the runtime, for reports.
    """

    device: Device
    signature: Signature
    settings: dict[str, Any]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once.

        Args:
            feeds: An array for every input, of its dtype and rank. Other names are an error.

        Returns:
            An array for every output.

        Raises:
            DataError: A name, dtype or shape does not fit.
            InferenceError: The runtime failed.
        """
        try:
            return self._run(feeds)
        except Exception as exc:
            raise self.reason(feeds, exc) from exc

    def requests(self, count: int) -> tuple[Request, ...]:
        """Independent requests over this one loaded model, each for a thread of its own.

        How many really run side by side is the runtime's matter: any number in ONNX Runtime, whose requests share the
        session's threads; `NUM_STREAMS` in OpenVINO (`settings` of `open_session`), where the others wait; in PyTorch
        they share the process's threads.

        Args:
            count: How many, 1 or more.

        Raises:
            DeviceError: Less than one.
            InferenceError: The runtime failed.
        """
        if count < 1:
            raise DeviceError(f"{count} requests", expected="1 or more")
        try:
            return tuple(Request(self, self._request()) for _ in range(count))
        except Exception as exc:
            raise self._translate(exc) from exc

    def reusing(self) -> Callable[[Feeds], dict[str, Array]] | None:
        """A way to run for any number of threads at once, whose outputs hold only until the same thread runs again.

        It is for who looks at many or large outputs at once, and keeps none of them.

        Returns:
            As `run`, with its errors; None where the device is not `concurrent`.
        """
        if not self.device.concurrent:
            return None
        call = self._reusing()

        def run(feeds: Feeds) -> dict[str, Array]:
            try:
                return call(feeds)
            except Exception as exc:
                raise self.reason(feeds, exc) from exc

        return run

    def bind(self, feeds: Feeds) -> Bound:
        """Put inputs on the device once, and run on them without copies: what the device alone takes.

        Nothing else may use the session while `Bound.run` runs; the arrays have to stay as they are.

        Args:
            feeds: As for `run`; the model runs once, to see that they fit.

        Raises:
            DataError: A name, dtype or shape does not fit.
            InferenceError: The runtime failed.
        """
        self.run(feeds)
        try:
            return self._bind(feeds)
        except Exception as exc:
            raise self.reason(feeds, exc) from exc

    def reason(self, feeds: Feeds, exc: Exception) -> Exception:
        """Our error for what a run failed with; only a failing call pays for the diagnosis.

        Raises:
            DataError: The feeds are to blame.
        """
        self._diagnose(feeds, exc)
        return self._translate(exc)

    def placement(self, feeds: Feeds, *, runs: int = 1) -> Placement:
        """Run with the runtime's profiler and say which nodes ran where, and in which precision.

        Args:
            feeds: As for `run`.
            runs: How many, after one to warm up; a node's time is the median over them.

        Raises:
            DataError: A name, dtype or shape does not fit.
            InferenceError: The runtime failed.
        """
        self.run(feeds)  # with feeds that do not fit, it says so
        try:
            return self._placement(feeds, runs)
        except Exception as exc:
            raise self._translate(exc) from exc

    def executed(self) -> tuple[ExecutedNode, ...]:
        """The graph that the runtime made of the file: fused, placed, each node with its precision.

        Raises:
            InferenceError: The runtime does not show it.
        """
        try:
            return self._executed()
        except Exception as exc:
            raise self._translate(exc) from exc

    def _diagnose(self, feeds: Feeds, cause: Exception) -> None:
        """Raise a DataError where the feeds are to blame."""
        extra = sorted(set(feeds) - {s.name for s in self.signature.inputs})
        if extra:
            wanted = ", ".join(str(s) for s in self.signature.inputs)
            raise DataError(f"the model has no input {extra[0]!r}", expected=wanted) from cause
        fitted = fit_feeds(self.signature, feeds)
        for spec in self.signature.inputs:
            given = feeds[spec.name]
            if not isinstance(given, np.ndarray):
                raise DataError(
                    f"{spec.name!r} is a {type(given).__name__}, not a numpy array", expected=str(spec)
                ) from cause
            if fitted[spec.name].dtype != given.dtype:
                raise DataError(f"{spec.name!r} is {given.dtype}", expected=str(spec)) from cause

    @abstractmethod
    def _run(self, feeds: Feeds) -> dict[str, Array]: ...

    @abstractmethod
    def _request(self) -> Callable[[Feeds], dict[str, Array]]:
        """What runs the model once, beside others of its kind."""

    def _reusing(self) -> Callable[[Feeds], dict[str, Array]]:
        """What runs for several threads; outputs need not outlive a thread's next run."""
        return self._run

    @abstractmethod
    def _bind(self, feeds: Feeds) -> Bound: ...

    @abstractmethod
    def _translate(self, exc: Exception) -> Exception:
        """Turn the runtime's exception into one of ours."""

    @abstractmethod
    def _placement(self, feeds: Feeds, runs: int) -> Placement: ...

    @abstractmethod
    def _executed(self) -> tuple[ExecutedNode, ...]: ...

    @abstractmethod
    def close(self) -> None:
        """Free the runtime's memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What may be set on any runtime.

    Attributes:
        threads: Threads inside one request; None for all cores allowed.
        optimize: Whether the runtime may rewrite the graph; for ONNX Runtime also a level: "basic", "extended", "all".
        precision: "fp32" forces single precision for floating-point models (no silent bf16 or TF32); "native" leaves
            the choice to the runtime.
        extra: The runtime's own settings, by their own names.
    """

    threads: int | None = None
    optimize: bool | str = True
    precision: str = "fp32"
    extra: Mapping[str, Any] | None = None
