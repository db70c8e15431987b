"""What the verbs share: where to run, what comes out, and whether it is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.benchmarks.parity import (
    Parity,
    compare,
    compare_lossy,
    without_padding,
)
from deploykit.runtimes import Device, default_devices, open_session, require_device

if TYPE_CHECKING:
    from deploykit.specs import Array, Feeds

MIN_COSINE = 0.95


def find_targets(devices: Sequence[str | Device]) -> tuple[tuple[Device, ...], bool]:
    """Devices to check on, and whether all of them decide: those that the user named do."""
    if devices:
        return tuple(require_device(d) for d in devices), True
    return default_devices(), False


def outputs_of(model: Path, device: Device, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    """Run a model on every case."""
    with open_session(model, device) as session:
        return [session.run(case) for case in feeds]


def compare_outputs(
    expected: Sequence[Mapping[str, Array]],
    outputs: Sequence[Mapping[str, Array]],
    feeds: Sequence[Feeds],
    min_cosine: float | None,
) -> Parity:
    """Strictly, or down to a cosine at the positions that are no padding."""
    if min_cosine is None:
        return compare(expected, outputs)
    return compare_lossy(without_padding(expected, feeds), without_padding(outputs, feeds), min_cosine)
