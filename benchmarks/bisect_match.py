"""Which tensor of one model is which of another: by name first, else by value, whatever the layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from deploykit.benchmarks.bisect_probe import TensorSource, in_chunks
from deploykit.benchmarks.columns import find_wrong_column
from deploykit.benchmarks.differences import EQUAL, Difference, Tolerance, as_real, diff_arrays
from deploykit.specs import Array

# Values of fewer elements, or of fewer distinct ones, are the same by accident.
_MIN_ELEMENTS = 8
_MIN_DISTINCT = 4
# Sketches are compared this loosely; values decide afterwards.
_SKETCH = 0.02
_MAX_CANDIDATES = 6
_MAX_RANK = 5
# Elements that are looked at before a whole array is laid out in another order.
_SAMPLE = 64
_NEAR = 0.05
# Stands for no limit, and stays finite when it is multiplied.
_UNLIMITED = 1e30


class Status(StrEnum):
    """What is known about a tensor of the candidate."""

    AGREES = "agrees"
    DIFFERS = "differs"
    UNMATCHED = "unmatched"


@dataclass(frozen=True, slots=True)
class Match:
    """A tensor of the candidate and what it is in the reference.

    Attributes:
        status: Whether the values agree; "unmatched" where the reference has no such tensor.
        partner: The reference's name for it; empty where there is none.
        by: "name" or "value".
        diff: How they differ.
        telling: Whether equal values mean something.
    """

    status: Status
    partner: str = ""
    by: str = ""
    diff: Difference = EQUAL
    telling: bool = False


@dataclass(frozen=True, slots=True)
class Judge:
    """When two tensors count as the same.

    Attributes:
        max_error: Largest norm of the difference over the norm of the reference, for quantized candidates; None for
            the strict tolerance of the dtype.
        columns: Whether the strict tolerance holds for every column too, however few its values.
    """

    max_error: float | None = None
    columns: bool = False

    def compare(self, have: Array, want: Array, *, any_layout: bool = False) -> Difference:
        """The difference, with a reason where they are not the same; precisions may differ, and layouts where allowed.

        Args:
            have: The candidate's.
            want: The reference's.
            any_layout: Whether another shape, and another order of the axes, is accepted.
        """
        found = self._same_layout(have, want)
        if not any_layout or not found.reason or have.size != want.size or "O" in have.dtype.kind + want.dtype.kind:
            return found
        flat = have.reshape(-1)
        sample = np.linspace(0, flat.size - 1, min(flat.size, _SAMPLE)).astype(np.int64)
        few = _wide(flat[sample])
        scale = float(np.abs(few).mean()) if few.size else 0.0
        near = max(_NEAR, 3 * (self.max_error or 0.0))
        for other in _layouts(want):
            index = np.unravel_index(sample, other.shape)
            with np.errstate(invalid="ignore"):
                if float(np.abs(_wide(other[index]) - few).mean()) > near * scale:
                    continue
            trial = self._same_layout(flat, other.reshape(-1))
            if not trial.reason:
                return trial
        return found

    def _same_layout(self, have: Array, want: Array) -> Difference:
        if have.dtype != want.dtype and "O" not in have.dtype.kind + want.dtype.kind:
            narrow = min((have.dtype, want.dtype), key=lambda d: d.itemsize).name
            tolerance = Tolerance.for_dtype(narrow)
            have, want = _wide(have), _wide(want)
        else:
            tolerance = Tolerance.for_dtype(want.dtype.name)
        if self.max_error is None or want.dtype.kind in "biuOUS":
            found = diff_arrays(have, want, tolerance)
            wrong = find_wrong_column([have], [want], tolerance, least=1) if self.columns and not found.reason else None
            return found if wrong is None else replace(found, reason=wrong.reason, index=wrong.index)
        return diff_arrays(have, want, Tolerance(_UNLIMITED, _UNLIMITED, self.max_error))


def _wide(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _layouts(array: Array) -> list[Array]:
    """The array flat, and with its axes in any other order."""
    squeezed = array.reshape([n for n in array.shape if n != 1])
    if squeezed.ndim < 2 or squeezed.ndim > _MAX_RANK:
        return [array.reshape(-1)]
    return [squeezed.transpose(order) for order in itertools.permutations(range(squeezed.ndim))]


def sketch(array: Array) -> tuple[int, float, float, float]:
    """Number of elements, and sums that no layout changes: of squares (its root), of magnitudes, of values."""
    if array.dtype.kind in "OUS":
        return array.size, -1.0, -1.0, -1.0
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.nan_to_num(as_real(array), posinf=1e30, neginf=-1e30)
        return array.size, float(np.linalg.norm(values)), float(np.abs(values).sum()), float(values.sum())


def is_telling(array: Array) -> bool:
    """Whether a match by value means something: enough elements, of enough different values."""
    if array.size < _MIN_ELEMENTS or array.dtype.kind in "OUSb":
        return False
    head = array.reshape(-1)[:4096]
    return len(np.unique(head[head == head])) >= _MIN_DISTINCT


class Matcher:
    """Compares the tensors of two models, a bounded number of bytes at a time.

    Args:
        candidate: Whose tensors are judged.
        reference: What they are judged by.
        judge: When two are the same.
        budget_bytes: For each side.
    """

    def __init__(self, candidate: TensorSource, reference: TensorSource, judge: Judge, budget_bytes: int) -> None:
        self.found: dict[str, Match] = {}
        self._candidate = candidate
        self._reference = reference
        self._judge = judge
        self._budget = budget_bytes
        self._sketches: dict[str, tuple[int, float, float, float]] = {}
        self._theirs: dict[str, tuple[int, float, float, float]] = {}

    def by_name(
        self, names: Sequence[str], stop: Callable[[str], bool], *, trust_names: bool, alias: Mapping[str, str]
    ) -> bool:
        """Judge tensors by those of the same names; the others, and those that differ, are kept for `by_value`.

        Args:
            names: In the order in which they are made.
            trust_names: Whether what differs from the tensor of its name is wrong, and need not be looked for.
            stop: Asked after every tensor; true ends the search early.
            alias: What a tensor is called in the reference, where that is another name.

        Returns:
            Whether all were judged.
        """
        known = self._reference.sizes
        any_layout = not trust_names and self._judge.max_error is None
        partners = {name: partner for name in names if (partner := alias.get(name, name)) in known}
        sizes = {n: self._candidate.sizes[n] + (known[partners[n]] if n in partners else 0) for n in names}
        for chunk in in_chunks(sizes, names, self._budget):
            mine = self._candidate.fetch(chunk)
            theirs = self._reference.fetch(list({partners[name]: 0 for name in chunk if name in partners}))
            for name in chunk:
                have, want = mine[name], theirs.get(partners.get(name, ""))
                telling = is_telling(have)
                self.found[name] = Match(Status.UNMATCHED, telling=telling)
                if want is not None:
                    diff = self._judge.compare(have, want, any_layout=any_layout)
                    status = Status.DIFFERS if diff.reason else Status.AGREES
                    self.found[name] = Match(status, partners[name], "name", diff, telling)
                if stop(name):
                    return False
                wanted = self.found[name].status is Status.UNMATCHED or not trust_names
                if self.found[name].status is not Status.AGREES and telling and wanted:
                    self._sketches[name] = sketch(have)
        return True

    def by_value(self, movement: Mapping[str, bool]) -> None:
        """Look for tensors that did not agree by name among all of the reference, in the order of both.

        A tensor of the reference stands for one of the candidate; only an operator that merely moves values may have
        one again, for its input has the same values. Otherwise a node left out would look as if it were there.

        Args:
            movement: Whether the node that makes a tensor only moves values, by the tensor's name.
        """
        if not self._sketches:
            return
        self._sketch_reference()
        taken = {m.partner for m in self.found.values() if m.status is Status.AGREES}
        options = {name: self._candidates(name) for name in self._sketches}
        wanted = [name for name in self._sketches if options[name]]
        for chunk in in_chunks(self._candidate.sizes, wanted, self._budget):
            mine = self._candidate.fetch(chunk)
            partners = list(dict.fromkeys(p for name in chunk for p in options[name]))
            for piece in in_chunks(self._reference.sizes, partners, self._budget):
                theirs = self._reference.fetch(piece)
                for name in chunk:
                    if self.found[name].status is not Status.AGREES:
                        self._pair(
                            name, mine[name], {p: theirs[p] for p in options[name] if p in theirs}, taken, movement
                        )

    def _pair(
        self, name: str, have: Array, partners: Mapping[str, Array], taken: set[str], movement: Mapping[str, bool]
    ) -> None:
        for partner, want in partners.items():
            if partner in taken and not movement[name]:
                continue
            diff = self._judge.compare(have, want, any_layout=True)
            if not diff.reason:
                self.found[name] = Match(Status.AGREES, partner, "value", diff, True)
                taken.add(partner)
                return

    def _sketch_reference(self) -> None:
        sizes = {s[0] for s in self._sketches.values()}
        for chunk in in_chunks(self._reference.sizes, list(self._reference.sizes), self._budget):
            for name, array in self._reference.fetch(chunk).items():
                if array.size in sizes and is_telling(array):
                    self._theirs[name] = sketch(array)

    def _candidates(self, name: str) -> list[str]:
        """Tensors of the reference with nearly the same sketch, the nearest first."""
        count, norm, total, plain = self._sketches[name]
        loose = max(_SKETCH, self._judge.max_error or 0.0)
        near = [
            (abs(other[1] - norm) + abs(other[2] - total), partner)
            for partner, other in self._theirs.items()
            if other[0] == count
            and abs(other[1] - norm) <= loose * max(norm, other[1])
            and abs(other[2] - total) <= loose * max(total, other[2])
            and abs(other[3] - plain) <= loose * max(total, other[2])
        ]
        return [partner for _, partner in sorted(near)[:_MAX_CANDIDATES]]
