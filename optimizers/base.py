"""What a step returns, and what it may be handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from deploykit.specs import Array, Feeds

# Says why a model file is not acceptable (does not load, or differs from the parent); None where it is.
Check = Callable[[Path], str | None]
# Opens a model file for plain fp32 inference.
Run = Callable[[Feeds], dict[str, Array]]
Opener = Callable[[Path], Run]


@runtime_checkable
class SharedOpener(Protocol):
    """An `Opener` that also opens a model for several threads to run it at once."""

    def __call__(self, path: Path) -> Run:
        """Open it for one thread, whose runs use all cores."""

    def shared(self, path: Path) -> Run | None:
        """Open it for any number of threads, each of whose runs uses one core; None where the runtime cannot.

        What a run gives need not outlive the same thread's next run.
        """


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        changed: Whether the result differs from the input.
        notes: What the user must know.
        params: The parameters that were really used, for the lineage.
        tools: Versions of the packages that took part.
        layered: The quantized file whose layers are those of `keep_float`, where the result's are not.
    """

    changed: bool
    notes: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    layered: Path | None = None
