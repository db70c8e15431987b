"""What a model makes of each sample, as one row of numbers: the input of its last product or another tensor, pooled."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError, OptimizationError
from deploykit.modelfile import signature_of
from deploykit.optimizers.base import Opener
from deploykit.optimizers.sampling import real_positions, run_exposed
from deploykit.specs import Array, Signature, fit_feeds
from deploykit.weights import LightModel

if TYPE_CHECKING:
    import onnx

# Wider rows are folded to so many numbers.
WIDTH = 256
_CONVS = frozenset({"Conv", "ConvTranspose"})
_PRODUCTS = _CONVS | {"Gemm", "MatMul"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a graph.

    Attributes:
        name: In the graph.
        channel_axis: The axis that stays when it is pooled.
    """

    name: str
    channel_axis: int


def find_tensor(model: onnx.ModelProto, name: str | None = None) -> Tensor:
    """The tensor to choose by: what goes into the last product with weights before the first output, or the named one.

    Raises:
        OptimizationError: There is no tensor of that name.
    """
    import onnx

    graph = model.graph
    if name is not None:
        makers = {out: node for node in graph.node for out in node.output}
        if name not in makers and name not in {v.name for v in graph.input}:
            products = [out for node in graph.node if node.op_type in _PRODUCTS for out in node.output]
            near = get_close_matches(name, list(makers), 3) or products[-3:] or list(makers)[-3:]
            raise OptimizationError(
                f"the model has no tensor {name!r}", expected=f"one of its tensors, like {', '.join(near)}"
            )
        users = {node.op_type for node in graph.node if name in node.input}
        convolutional = users & _CONVS or (name in makers and makers[name].op_type in _CONVS)
        return Tensor(name, 1 if convolutional else -1)
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}
    last = next((v.name for v in graph.output if v.type.tensor_type.elem_type in floats), graph.output[0].name)
    before = {last}
    weights = {w.name for w in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    for node in reversed(graph.node):
        if before.isdisjoint(node.output):
            continue
        data = [given for given in node.input[:2] if given not in weights]
        if node.op_type in _PRODUCTS and len(data) == 1:
            return Tensor(data[0], 1 if node.op_type in _CONVS else -1)
        before.update(given for given in node.input if given)
    return Tensor(last, -1)


def model_features(
    light: LightModel, tensor: Tensor, data: Dataset, open_model: Opener, folder: Path, *, batch_size: int
) -> Iterator[tuple[Array, Array | None]]:
    """Run a model over a dataset.

    Args:
        light: The model.
        tensor: Which of its tensors.
        data: All samples count, those of an incomplete last batch too.
        open_model: Opens a model file for inference.
        folder: For a copy of the model.
        batch_size: Samples in one run, where the model does not fix them.

    Yields:
        Features `[n, width]` in float32, in the order of the data, and the labels of these samples where there are any.

    Raises:
        OptimizationError: The tensor has no row a sample.
        DataError: The data do not fit the model.
    """
    signature = signature_of(light.proto)
    waiting: deque[tuple[int, Array | None]] = deque()
    feeds = _feeds(signature, data, batch_size, waiting)
    for given, outputs in run_exposed(light, [tensor.name], feeds, open_model, folder):
        count, labels = waiting.popleft()
        values = outputs[tensor.name]
        rows = len(next(iter(given.values())))
        yield pool(values, rows, tensor, real_positions(given, values))[:count], labels


def check_inputs(light: LightModel, data: Dataset, batch_size: int) -> None:
    """Refuse data whose first samples a model does not take, before it is run over all of them.

    Raises:
        DataError: They do not fit.
    """
    next(_feeds(signature_of(light.proto), data, batch_size, deque()))


def _feeds(
    signature: Signature, data: Dataset, size: int, waiting: deque[tuple[int, Array | None]]
) -> Iterator[dict[str, Array]]:
    """Inputs of all samples; how many of a batch are real, and their labels, are put into ``waiting``."""
    fixed = next((s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], int)), None)
    for batch in data.fitted(signature.inputs).batches(fixed or size):
        count, labels = len(next(iter(batch.values()))), batch.get(LABELS)
        given = {name: array for name, array in batch.items() if name != LABELS}
        if fixed and count < fixed:
            given = {n: np.concatenate([a, np.repeat(a[-1:], fixed - count, 0)]) for n, a in given.items()}
        waiting.append((count, labels))
        yield fit_feeds(signature, given)


def pool(values: Array, rows: int, tensor: Tensor, real: Array | None = None) -> Array:
    """The mean over space or sequence, one row a sample.

    Args:
        values: `[rows, …]`, or flattened, `[rows * length, channels]`.
        rows: Samples.
        tensor: Says which axis stays.
        real: Which positions are no padding, `[rows, length]` or flattened; None for all.

    Returns:
        `[rows, channels]` in float32.

    Raises:
        OptimizationError: It has no row a sample, or holds no numbers.
    """
    if values.dtype.kind not in "fiub" or not values.ndim or len(values) % rows:
        raise OptimizationError(
            f"{tensor.name!r} is {values.dtype}{list(values.shape)} for {rows} samples",
            expected="numbers, with the samples along the first axis", hint="name another with --tensor",
        )  # fmt: skip
    found = np.asarray(values, np.float32)
    if len(found) != rows:
        found = found.reshape(rows, -1, found.shape[-1])
    if found.ndim < 3:
        return found.reshape(rows, -1)
    if found.ndim == values.ndim:
        found = np.moveaxis(found, tensor.channel_axis, -1)
    found = found.reshape(rows, -1, found.shape[-1])
    if real is None or real.size != found.shape[0] * found.shape[1]:
        return np.asarray(found.mean(axis=1))
    weight = real.reshape(found.shape[:2]).astype(np.float32)
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1)
    return np.asarray(np.einsum("rlc,rl->rc", found, weight))


def raw_features(data: Dataset, batch_size: int) -> Iterator[tuple[Array, Array | None]]:
    """The inputs themselves, flat; each divided by its root mean square over the first batch.

    Args:
        data: As for `model_features`, and so is what is given.
        batch_size: Samples at once.

    Raises:
        DataError: There are no numbers.
    """
    scales: dict[str, float] = {}
    for batch in data.batches(batch_size):
        inputs = {n: a for n, a in batch.items() if n != LABELS and a.dtype.kind in "fiub" and a.size}
        if not inputs:
            raise DataError(f"{data.source} holds no numbers to choose by", hint="choose by a model: -m MODEL")
        with np.errstate(over="ignore"):
            flat = {n: a.reshape(len(a), -1).astype(np.float32) for n, a in inputs.items()}
        if not scales:
            scales = {n: _size_of(a) for n, a in flat.items()}
        if flat.keys() != scales.keys():
            raise DataError(f"{data.source}: batches do not fit together", expected="the same names in every batch")
        yield np.concatenate([flat[n] / scales[n] for n in sorted(flat)], axis=1), batch.get(LABELS)


def _size_of(values: Array) -> float:
    """The root mean square of what is finite; 1 where nothing is, or all are 0."""
    finite = values[np.isfinite(values)]
    return math.sqrt(float(np.square(finite, dtype=np.float64).mean())) or 1.0 if finite.size else 1.0


class Sketch:
    """Folds wide rows to `WIDTH` numbers, which keeps distances in expectation; narrow ones stay as they are.

    Each number is added, with a random sign, to one of the sums: a count sketch (Charikar, Chen, Farach-Colton, 2002;
    Weinberger et al., Feature hashing for large scale multitask learning, 2009), which needs no matrix.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._width = 0
        self._order, self._signs, self._starts = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64)

    def __call__(self, rows: Array) -> Array:
        """Fold ``rows``, `[n, width]`; the width is the same every time.

        Raises:
            DataError: It is another.
        """
        if not self._width:
            self._prepare(rows.shape[1])
        if rows.shape[1] != self._width:
            raise DataError(
                f"a sample has {rows.shape[1]} numbers, the first {self._width}",
                expected="one shape, or a model to choose by: -m MODEL",
            )
        if self._width <= WIDTH:
            return rows
        return np.add.reduceat(rows[:, self._order] * self._signs, self._starts, axis=1)

    def _prepare(self, width: int) -> None:
        self._width = width
        if width <= WIDTH:
            return
        dice = np.random.default_rng(self._seed)
        # Sums of nearly equal numbers of terms, so that none is empty.
        places = dice.permutation(np.arange(width) % WIDTH)
        self._order = np.argsort(places, kind="stable")
        self._signs = dice.choice(np.array([-1, 1], np.float32), width)
        self._starts = np.searchsorted(places[self._order], np.arange(WIDTH))
