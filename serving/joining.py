"""Whether requests may be joined: a row has to get the same numbers whoever else is in its batch.

Three things show that, each on the model itself:

1. Its operators. `DynamicQuantizeLinear` takes one scale from all that it is given, so that the rows of one request are
   rounded by what those of another hold (ONNX operators, `DynamicQuantizeLinear`; ONNX Runtime's contrib operators).
2. The same rows beside other ones, in batches of one shape. Kernels do the same sums in the same order then, whatever
   the values are: rows that see no others get the same bits, and one bit that differs came from the others.
3. The same rows alone. Kernels of other shapes sum in another order, so that this holds within the model's tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploykit.artifact import Artifact, Manifest
from deploykit.benchmarks.differences import Tolerance, diff_arrays
from deploykit.data import ValueRange, generate
from deploykit.errors import DataError, InferenceError
from deploykit.nodes import is_quantized_op
from deploykit.onnx_wire import read_wire
from deploykit.runtimes import Device
from deploykit.specs import Array, Signature

Run = Callable[[dict[str, Array]], dict[str, Array]]

WARM_RUNS = 3
_ALIGN = 64
# Operators that quantize what they are given by one scale for all of it.
_ONE_SCALE = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
# How far rows of a lossy model may be from the same rows alone, of their norm: where kernels of other shapes sum in
# another order, some values are rounded to the next step.
_LOSSY = 0.05


@dataclass(frozen=True, slots=True)
class Joining:
    """What was found out.

    Attributes:
        possible: Whether a joined batch runs, and gives a row for each of its rows.
        reason: Why requests should not be joined; empty where they may.
    """

    possible: bool
    reason: str = ""

    def allowed(self, *, force: bool) -> bool:
        """Whether requests are joined.

        Args:
            force: Also where a row's numbers depend on the other rows.
        """
        return self.possible and (force or not self.reason)

    def remark(self, *, force: bool) -> str:
        """What users have to know; empty where that is nothing."""
        if not self.reason:
            return ""
        if self.allowed(force=force):
            return f"requests are joined because that was asked for, though {self.reason}"
        return f"requests are not joined: {self.reason}"


def one_scale(model: Path) -> str:
    """Why rows of a model's file depend on each other, by its operators; empty where they do not show that.

    Raises:
        ModelError: It is no ONNX file.
    """
    found = sorted(read_wire(model).operators & _ONE_SCALE) if model.suffix == ".onnx" else []
    return f"{' and '.join(found)} takes one scale from all rows of a batch" if found else ""


def lossy_steps(manifest: Manifest) -> bool:
    """Whether a step of an artifact's lineage changed the numbers on purpose."""
    if any(s.step.startswith("quantize") or s.params.get("quantized") for s in manifest.lineage):
        return True
    # Of a plugin's steps the records say whether values were judged by their cosine.
    return any(r.get("outputs") and r.get("tolerance") is None for r in manifest.evidence.parity)


def is_lossy(model: Path | Artifact, device: Device) -> bool:
    """Whether a model's numbers are rounded by more than single precision, so that other sums may round otherwise.

    Args:
        model: An artifact, whose lineage says it, or a file.
        device: Where it runs; only ONNX Runtime's CPU provider is known to compute in the file's precision.
    """
    if device.runtime != "ort" or not device.on_cpu:
        return True
    if isinstance(model, Artifact):
        if lossy_steps(model.manifest):
            return True
        model = model.model_path
    return model.suffix == ".onnx" and any(is_quantized_op(op) for op in read_wire(model).operators)


def other_request(
    signature: Signature,
    feeds: Mapping[str, Array],
    cases: Sequence[Mapping[str, Array]],
    ranges: Mapping[str, ValueRange],
    max_batch: int,
) -> dict[str, Array] | None:
    """Rows of other values, as many as a batch has room for beside a request; None where none can be had.

    Args:
        signature: The model's, with a symbol for the rows.
        feeds: The request.
        cases: Golden inputs, for what cannot be made up.
        ranges: Values that inputs may take.
        max_batch: Most rows of a batch.
    """
    rows = next(iter(feeds.values())).shape[0]
    count = rows * max(1, max_batch // max(rows, 1) - 1)
    sizes = {
        dim: size if axis else count
        for spec in signature.inputs
        for axis, (dim, size) in enumerate(zip(spec.shape or (), feeds[spec.name].shape, strict=True))
        if isinstance(dim, str)
    }
    try:
        made = [generate(signature.inputs, sizes, ranges=ranges, seed=1)]
    except DataError:  # strings
        made = []
    turned = {n: np.ascontiguousarray(a[:, ::-1] if a.ndim > 1 else a[::-1]) for n, a in feeds.items()}
    for other in (*made, *cases, turned):
        if all(n in other and len(other[n]) and other[n].shape[1:] == a.shape[1:] for n, a in feeds.items()):
            found = {n: other[n][np.arange(count) % len(other[n])] for n in feeds}
            if any(not np.array_equal(found[n][:rows], a) for n, a in feeds.items()):
                return found
    return None


def try_rows(
    run: Run, feeds: Mapping[str, Array], alone: Mapping[str, Array], other: Mapping[str, Array] | None, *, lossy: bool
) -> Joining:
    """Run a request beside other rows; this warms up the model too.

    Args:
        run: The model.
        feeds: The request, all of whose inputs have its rows first.
        alone: What it gives.
        other: Of `other_request`.
        lossy: Of `is_lossy`.
    """
    rows = next(iter(feeds.values())).shape[0]
    if other is None or not rows:
        return Joining(possible=False, reason="there are no two requests of other values to try it with")
    try:
        for _ in range(WARM_RUNS):
            mixed = run(beside(feeds, other))
        one = run({n: a[:1] for n, a in feeds.items()}) if rows > 1 else alone
        count = rows + len(next(iter(other.values())))
        for name, array in mixed.items():
            if array.ndim == 0 or array.shape[0] != count:
                return Joining(possible=False, reason=f"{name!r} does not have a row for each row of the inputs")
        moved = moved_output(run, feeds, other, mixed)
    except (DataError, InferenceError) as exc:
        return Joining(possible=False, reason=str(exc))
    if moved:
        return Joining(possible=True, reason=f"{moved!r} of a row is another beside other rows")
    for name, array in mixed.items():
        if not _close(array[:rows], alone[name], lossy=lossy):
            return Joining(possible=True, reason=f"{name!r} of a row is another beside other rows than alone")
        if not _close(one[name], alone[name][: len(one[name])], lossy=lossy):
            return Joining(possible=True, reason=f"{name!r} of a row is another without the other rows")
    return Joining(possible=True)


def moved_output(run: Run, first: Mapping[str, Array], second: Mapping[str, Array], mixed: Mapping[str, Array]) -> str:
    """The output of which a row has another bit where the rows beside it have other values; empty where none has.

    Where one batch gives other bits every time, that shows nothing, and no output is named.

    Args:
        run: The model.
        first: A request.
        second: Another one, of the same shapes but for the number of its rows.
        mixed: What both give in one batch, which has a row for each of theirs.
    """
    rows, more = (len(next(iter(feeds.values()))) for feeds in (first, second))
    own = run(beside(first, {n: a[np.arange(more) % rows] for n, a in first.items()}))
    others = run(beside({n: a[np.arange(rows) % more] for n, a in second.items()}, second))
    differ = [
        name
        for name, array in mixed.items()
        if not (same_bits(array[:rows], own[name][:rows]) and same_bits(array[rows:], others[name][rows:]))
    ]
    if not differ:
        return ""
    again = run(beside(first, second))
    return next((name for name in differ if same_bits(mixed[name], again[name])), "")


def beside(first: Mapping[str, Array], second: Mapping[str, Array]) -> dict[str, Array]:
    """Two requests in one batch."""
    return {n: stacked([a, second[n]]) for n, a in first.items()}


def stacked(parts: Sequence[Array]) -> Array:
    """Rows of several arrays, in memory that begins as an arena's does: some kernels sum as the address lies.

    Args:
        parts: Arrays of one dtype, and of one shape but for the first dimension.
    """
    first = parts[0]
    if first.dtype.kind in "OUS":
        return np.concatenate(parts)
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    room = np.empty(math.prod(shape) * first.itemsize + _ALIGN, np.uint8)
    begin = -room.ctypes.data % _ALIGN
    made = room[begin : begin + room.size - _ALIGN].view(first.dtype).reshape(shape)
    np.concatenate(parts, out=made)
    return made


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays are the same, bit for bit."""
    if a.dtype.kind in "OUS":
        return bool(np.array_equal(a, b))
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _close(found: Array, wanted: Array, *, lossy: bool) -> bool:
    """Whether outputs are the same, but for what rounding does to them."""
    if found.shape != wanted.shape:
        return False
    if wanted.dtype.kind not in "fc":
        # Indices may change with what they are taken of by rounding; a model of which many do is another matter.
        return bool(np.mean(found == wanted) >= 1 - _LOSSY) if wanted.size else True
    if not lossy:
        return not diff_arrays(found, wanted, Tolerance.for_dtype(wanted.dtype.name)).reason
    wide = np.complex128 if wanted.dtype.kind == "c" else np.float64
    a, b = found.astype(wide), wanted.astype(wide)
    finite = np.isfinite(a) & np.isfinite(b)
    away = np.linalg.norm(a[finite] - b[finite])
    return bool(np.array_equal(np.isfinite(a), np.isfinite(b)) and away <= _LOSSY * np.linalg.norm(b[finite]) + 1e-6)
