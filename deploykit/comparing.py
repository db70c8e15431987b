"""What the verbs share: where to run, what comes out, and whether it is the same."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.benchmarks.bisect_graph import load_graph
from deploykit.benchmarks.conditioning import slack_of
from deploykit.benchmarks.parity import Parity, Tolerance, Verdict, compare, compare_lossy, without_padding
from deploykit.benchmarks.ties import Choices, GraphChoices, has_choices, relax
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


def not_same_bits(parent: Path, candidate: Path, feeds: Sequence[Feeds]) -> str | None:
    """Why two models do not give the same bits when ONNX Runtime fuses nothing; None where they do.

    Raises:
        DeviceError: ONNX Runtime is not installed.
        InferenceError: One of them does not run.
    """
    found: list[list[dict[str, Array]]] = []
    for model in (parent, candidate):  # one after the other: both may be large
        with open_session(model, "ort:cpu", optimize=False) as session:
            found.append([session.run(case) for case in feeds])
    for number, (expected, made) in enumerate(zip(*found, strict=True)):
        for name, array in expected.items():
            if array.dtype != made[name].dtype or array.tobytes() != made[name].tobytes():
                return f"output {name!r} of case {number} has other bits"
    return None


def integer_kernels(model: Path, device: Device, feeds: Feeds) -> dict[str, Any]:
    """How many convolutions and matrix products of a model ran on integers, by the runtime's own account of one run.

    Returns:
        "integer" and "all", and "ops": how often each operator ran, after fusion.
    """
    with open_session(model, device) as session:
        placement = session.placement(feeds)
    found = placement.precisions()
    return {"integer": found.get("int8", 0), "all": sum(found.values()), "ops": placement.summary()["ops"]}


def compare_outputs(
    expected: Sequence[Mapping[str, Array]],
    outputs: Sequence[Mapping[str, Array]],
    feeds: Sequence[Feeds],
    min_cosine: float | None,
    bounded: Collection[str] = (),
) -> Parity:
    """Strictly, or down to a cosine at the positions that are no padding."""
    if min_cosine is None:
        return compare(expected, outputs, bounded=bounded)
    return compare_lossy(without_padding(expected, feeds), without_padding(outputs, feeds), min_cosine)


def within_rounding(
    failed: Parity,
    feeds: Sequence[Feeds],
    expected: Sequence[Mapping[str, Array]],
    outputs: Sequence[Mapping[str, Array]],
    run: Callable[[Feeds], Mapping[str, Array] | None],
    tolerance: Tolerance | None,
    bounded: Collection[str],
) -> tuple[Parity, set[int]]:
    """Judge a failed comparison again, where a few values differ by no more than the source's own rounding moves them.

    Args:
        failed: The comparison; returned as it is unless it failed by a tolerance, and not in every case.
        feeds: Inputs, one mapping a case.
        expected: The source's outputs.
        outputs: The candidate's.
        run: Runs the source; None where it cannot be asked.
        tolerance: As for `compare`.
        bounded: As for `compare`.

    Returns:
        The verdict, and the numbers of the cases that are right in that sense only.
    """
    if failed.verdict is not Verdict.FAILED or not all(np.isfinite(o.max_abs) for o in failed.outputs):
        return failed, set()
    alone = [compare([want], [have], tolerance, bounded=bounded) for want, have in zip(expected, outputs, strict=True)]
    loose = {number for number, one in enumerate(alone) if one.verdict is Verdict.FAILED}
    slack = slack_of(feeds, expected, run) if len(loose) < len(alone) else None
    if slack is None:
        return failed, set()
    again = compare(expected, outputs, tolerance, bounded=bounded, slack=slack)
    if again.verdict is Verdict.FAILED:
        return failed, set()
    text = "the source moves these values as far when its inputs move by their rounding"
    return replace(again, relaxed=tuple(f"{o.name}: {o.reason}; {text}" for o in failed.outputs if not o.equal)), loose


def graph_choices(model: Path, device: Device) -> Callable[[Path], Choices]:
    """How an ONNX reference tells its choices; for `relax_ties`."""
    return lambda folder: GraphChoices(load_graph(model, folder), device)


def relax_ties(
    result: Parity,
    model: Path,
    device: Device,
    feeds: Sequence[Feeds],
    expected: Sequence[Mapping[str, Array]],
    outputs: Sequence[Mapping[str, Array]],
    reference: Callable[[Path], Choices],
) -> Parity:
    """Judge a failed strict comparison again, where the outputs hang on a choice between equal scores.

    Args:
        result: The comparison; returned as it is unless it failed and the model's graph chooses (TopK, ArgMax,
            NonMaxSuppression, NonZero of a comparison).
        model: The candidate's `.onnx` file.
        device: Where it ran.
        feeds: Inputs, one mapping a case.
        expected: The reference's outputs.
        outputs: The candidate's.
        reference: Given a folder for its files, it gives what tells the reference's choices.

    Raises:
        InferenceError: A runtime cannot run a graph with inner tensors exposed.
    """
    if result.verdict is not Verdict.FAILED or model.suffix != ".onnx" or not has_choices(model):
        return result
    judged, said, why = [dict(case) for case in outputs], [], ""
    with tempfile.TemporaryDirectory(prefix="deploykit-ties-") as name:
        mine, theirs = Path(name) / "candidate", Path(name) / "reference"
        mine.mkdir()
        theirs.mkdir()
        graph = GraphChoices(load_graph(model, mine), device)
        choices = reference(theirs)
        for number, case in enumerate(feeds):
            alone = compare([expected[number]], [outputs[number]])
            failing = [o.name for o in alone.outputs if not o.equal and o.name in outputs[number]]
            found = relax(graph, choices, case, outputs[number], failing) if failing else ""
            if isinstance(found, str):
                why = why or found
                continue
            judged[number] = found[0]
            said += [f"case {number}: {text}" for text in found[1]]
    if not said:
        return replace(result, reason=f"{result.reason} ({why})") if why else result
    return replace(compare(expected, judged), relaxed=tuple(said))
