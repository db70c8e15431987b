"""How a small model answers beside the one that it was made from: by a metric, and by how often they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploykit.benchmarks.metrics import Scorer, decide, find_metric, reduce_outputs
from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError
from deploykit.specs import Array, Feeds, Signature, fit_feeds

_MASK = "attention_mask"
# Rows whose cosines with each other are compared: half a million pairs.
_COMPARED_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Answerer:
    """A model that can be asked.

    Attributes:
        run: Outputs by name for inputs by name.
        signature: What it takes.
        output: The judged output.
    """

    run: Callable[[Feeds], Mapping[str, Array]]
    signature: Signature
    output: str

    def answer(self, arrays: Mapping[str, Array]) -> Array:
        """The judged output for rows of a dataset, also where the model takes a fixed number of them."""
        rows = len(next(iter(arrays.values())))
        fixed = next((s.shape[0] for s in self.signature.inputs if s.shape and isinstance(s.shape[0], int)), rows)
        parts = []
        for start in range(0, rows, fixed):
            piece = {name: array[start : start + fixed] for name, array in arrays.items()}
            short = fixed - len(next(iter(piece.values())))
            if short:
                piece = {name: np.concatenate([a, np.repeat(a[-1:], short, 0)]) for name, a in piece.items()}
            parts.append(np.asarray(self.run(fit_feeds(self.signature, piece))[self.output]))
        return np.concatenate(parts)[:rows]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What was found; each None where it does not apply.

    Attributes:
        samples: Rows that were judged.
        metric: Which one.
        value: The metric of the small model.
        reference: The metric of the one that it was made from.
        agreement: Share of rows, or of real positions, with the same class.
        cosine: Mean cosine between embeddings of the same row, of equal widths.
        correlation: Pearson's, between the cosines of pairs of rows in the one model and in the other.
    """

    samples: int
    metric: str | None = None
    value: float | None = None
    reference: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    correlation: float | None = None

    def describe(self, of: str) -> str:
        """In words.

        Args:
            of: What the reference is called.
        """
        parts = []
        if self.value is not None and self.reference is not None:
            parts.append(f"{self.metric} {self.value:.4f} ({of} {self.reference:.4f})")
        for name in ("agreement", "cosine", "correlation"):
            found = getattr(self, name)
            if found is not None:
                parts.append(f"{name} {found:.4f}")
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """For a manifest."""
        named = {"metric": self.metric, "value": self.value, "parent": self.reference} if self.metric else {}
        rest = {n: getattr(self, n) for n in ("agreement", "cosine", "correlation")}
        rounded = {n: round(v, 6) if isinstance(v, float) else v for n, v in {**named, **rest}.items()}
        return {"samples": self.samples, **{n: v for n, v in rounded.items() if v is not None}}


@dataclass(slots=True)
class _Kept:
    """What is kept of the answers of one model."""

    classes: list[Array] = field(default_factory=list)
    outputs: list[Array] = field(default_factory=list)
    embeddings: list[Array] = field(default_factory=list)


def compare_answers(
    reference: Answerer, small: Answerer, data: Dataset, kind: str, metric: str | None, *, batch: int = 64
) -> Fidelity:
    """Ask both the same, and judge.

    Args:
        reference: Where the small one comes from.
        small: The small one.
        data: Real inputs, with `labels` for a metric.
        kind: "classification", "frames" or "embedding".
        metric: Its name; None for none.
        batch: Rows in a run.

    Raises:
        DataError: The data do not fit the models or the metric, or there are none.
    """
    scorer = find_metric(metric) if metric is not None else None
    kept = _Kept(), _Kept()
    labels: list[Array] = []
    masks: list[Array] = []
    samples = 0
    for arrays, truth in _batches(data, batch):
        samples += len(next(iter(arrays.values())))
        if truth is not None:
            labels.append(truth)
        mask = arrays.get(_MASK)
        for who, tally in zip((reference, small), kept, strict=True):
            _keep(tally, who.answer(arrays), mask, kind, scorer)
        if mask is not None and kind == "frames":
            masks.append(mask.astype(bool))
    if not samples:
        raise DataError(f"{data.source} holds no samples")
    if kind == "embedding":
        cosine, correlation = _alike(np.concatenate(kept[0].embeddings), np.concatenate(kept[1].embeddings))
        return Fidelity(samples, cosine=cosine, correlation=correlation)
    value = found = None
    if scorer is not None:
        if not labels:
            raise DataError(f"{data.source} has no {LABELS!r}, which {metric} needs", hint="leave --metric out")
        found, value = (_scored(scorer, np.concatenate(labels), tally) for tally in kept)
    agreement = _agreement(decide(kept[0].classes), decide(kept[1].classes), masks)
    return Fidelity(samples, metric, value, found, agreement)


def _batches(data: Dataset, size: int) -> Iterator[tuple[dict[str, Array], Array | None]]:
    for batch in data.batches(size):
        yield {name: array for name, array in batch.items() if name != LABELS}, batch.get(LABELS)


def _keep(tally: _Kept, output: Array, mask: Array | None, kind: str, scorer: Scorer | None) -> None:
    if kind == "embedding":
        tally.embeddings.append(_pooled(output, mask))
        return
    tally.classes.append(reduce_outputs({"": output}))
    if scorer is not None and scorer.takes_outputs:
        tally.outputs.append(output)


def _pooled(output: Array, mask: Array | None) -> Array:
    """The mean over real positions, in float64."""
    values = output.astype(np.float64)
    if values.ndim == 2:
        return values
    if mask is None or mask.shape != values.shape[:2]:
        return np.asarray(values.mean(1))
    return np.asarray((values * mask[..., None]).sum(1) / np.maximum(mask.sum(1), 1)[:, None])


def _scored(scorer: Scorer, labels: Array, tally: _Kept) -> float:
    return scorer.score(labels, np.concatenate(tally.outputs) if scorer.takes_outputs else decide(tally.classes))


def _agreement(want: Array, have: Array, masks: list[Array]) -> float:
    same = want == have
    real = np.concatenate(masks) if masks else None
    return float(np.mean(same if real is None or real.shape != same.shape else same[real]))


def _alike(want: Array, have: Array) -> tuple[float | None, float | None]:
    """Cosine between embeddings of a row, and how the cosines between rows correlate."""
    theirs, ours = (e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-12) for e in (want, have))
    cosine = float((theirs * ours).sum(1).mean()) if theirs.shape == ours.shape else None
    some = slice(_COMPARED_ROWS)
    upper = np.triu_indices(len(theirs[some]), 1)
    a, b = ((e[some] @ e[some].T)[upper] for e in (theirs, ours))
    if len(a) < 2 or not a.std() or not b.std():
        return cosine, None
    return cosine, float(np.corrcoef(a, b)[0, 1])
